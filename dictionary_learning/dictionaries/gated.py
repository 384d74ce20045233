"""The gated SAE: one path decides which latents fire, another how strongly, with one matrix for both."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, Self, overload

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from dictionary_learning.dictionaries.layouts import _LinearDictionary


class GatedAutoEncoder(_LinearDictionary):
    """With u = W_gate (x - b_dec): f = 1[u + b_gate > 0] * ReLU(exp(r_mag) u + b_mag), x_hat = W_dec f + b_dec.

    `encoder_bias` is the gate's, `gate_bias`, and pre-activations are the gate's, u + b_gate.

    Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"
    (arXiv:2404.16014), equations 6 and 7; W_mag is W_gate with every row times exp(r_mag).

    Args:
        initialization: "default", or a function that is given the dictionary and sets its weights.
    """

    encoder_bias_name = "gate_bias"
    decoder_bias_name = "decoder_bias"
    scaled_with_data = ("decoder_bias", "gate_bias", "mag_bias")

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        initialization: Literal["default"] | Callable[[GatedAutoEncoder], Any] = "default",
        device: torch.device | str | None = None,
        *,
        output_dim: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__(activation_dim, dict_size, output_dim=output_dim, skip=skip)
        self.r_mag = nn.Parameter(torch.zeros(dict_size))
        self.gate_bias = nn.Parameter(torch.zeros(dict_size))
        self.mag_bias = nn.Parameter(torch.zeros(dict_size))
        if device is not None:
            self.to(device)
        if initialization != "default":
            initialization(self)

    def activation(self, pre: Tensor) -> Tensor:
        """Pre-activations of the gate -> codes, elementwise."""
        magnitude = self.r_mag.exp() * (pre - self.gate_bias) + self.mag_bias
        return (pre > 0) * torch.relu(magnitude)

    @overload
    def encode(self, x: Tensor, return_gate: Literal[False] = False, normalize_decoder: bool = False) -> Tensor: ...
    @overload
    def encode(
        self, x: Tensor, return_gate: Literal[True], normalize_decoder: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def encode(
        self, x: Tensor, return_gate: bool = False, normalize_decoder: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Codes [..., F]; with `return_gate` also the ReLU of the gate's pre-activations, which the paper's sparsity
        and auxiliary losses take. `normalize_decoder` gives codes as if decoder rows had norm 1."""
        u = functional.linear(x if self.pre_bias is None else x - self.pre_bias, self.encoder_rows)
        gate = u + self.gate_bias
        f = (gate > 0) * torch.relu(self.r_mag.exp() * u + self.mag_bias)
        if normalize_decoder:
            f = f * self.decoder_rows.norm(dim=1)
        return (f, torch.relu(gate)) if return_gate else f

    def decode(self, f: Tensor, normalize_decoder: bool = False) -> Tensor:
        """Codes -> reconstructions; `normalize_decoder` takes codes as if decoder rows had norm 1."""
        return super().decode(f / self.decoder_rows.norm(dim=1) if normalize_decoder else f)

    @overload
    def forward(
        self, x: Tensor, output_features: Literal[False] = False, normalize_decoder: bool = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, output_features: Literal[True], normalize_decoder: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, output_features: bool = False, normalize_decoder: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction, and with `output_features` the codes; see `encode` for `normalize_decoder`."""
        f = self.encode(x)
        x_hat = self.reconstruct(f, x)
        if not output_features:
            return x_hat
        return x_hat, f * self.decoder_rows.norm(dim=1) if normalize_decoder else f

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the package's order: the device comes second
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> Self:
        """See `Dictionary.from_pretrained`."""
        return super().from_pretrained(path, dtype, device, **kwargs)
