"""The JumpReLU SAE: every latent has a threshold of its own, learnt, below which it does not fire."""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dictionary_learning.dictionaries.layouts import _MatrixDictionary
from dictionary_learning.errors import UserError


class JumpReluAutoEncoder(_MatrixDictionary):
    """The JumpReLU SAE: z = x W_enc + b_enc, f = z where z > threshold and 0 elsewhere, x_hat = f W_dec + b_dec.

    Source: Rajamanoharan et al. 2024, "Jumping ahead" (arXiv:2407.14435), equations 3 to 5; its appendix I sets the
    first threshold to 0.001. `apply_b_dec_to_input` (off by default) subtracts b_dec before encoding.
    """

    scaled_with_data = ("b_dec", "b_enc", "threshold")

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        device: torch.device | str | None = None,
        *,
        output_dim: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__(activation_dim, dict_size, output_dim=output_dim, skip=skip)
        self.threshold = nn.Parameter(torch.full((dict_size,), 0.001))
        self.apply_b_dec_to_input = False
        if device is not None:
            self.to(device)

    @property
    def pre_bias(self) -> nn.Parameter | None:
        return self.b_dec if self.apply_b_dec_to_input and not self.is_transcoder else None

    def activation(self, pre: Tensor) -> Tensor:
        """Pre-activations -> codes, elementwise."""
        return torch.relu(pre * (pre > self.threshold))

    @overload
    def encode(self, x: Tensor, output_pre_jump: Literal[False] = False) -> Tensor: ...
    @overload
    def encode(self, x: Tensor, output_pre_jump: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Codes [..., F]; with `output_pre_jump` also the pre-activations."""
        pre = self.preactivations(x)
        f = self.activation(pre)
        return (f, pre) if output_pre_jump else f

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the package's order
        cls,
        path: str | os.PathLike[str] | None = None,
        load_from_sae_lens: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> JumpReluAutoEncoder:
        """See `Dictionary.from_pretrained`. With `load_from_sae_lens`, an SAE that the library `sae_lens` finds by
        `release` and `sae_id`; one of another architecture becomes the JumpReLU that it equals.

        Raises:
            UserError: neither a path nor `load_from_sae_lens`, or both; `sae_lens` is not installed.
        """
        if load_from_sae_lens == (path is not None):
            raise UserError("Give the path of a dictionary, or load_from_sae_lens=True with release and sae_id.")
        if load_from_sae_lens:
            from dictionary_learning.formats.saelens import jumprelu_from_library

            return jumprelu_from_library(**kwargs).to(dtype=dtype, device=device)
        assert path is not None
        return super().from_pretrained(path, dtype, device, **kwargs)
