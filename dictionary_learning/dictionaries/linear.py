"""ReLU dictionaries: the standard SAE, and the one of Anthropic's April 2024 update."""

from __future__ import annotations

import os
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor

from dictionary_learning.dictionaries.layouts import _LinearDictionary


class _ReLU(_LinearDictionary):
    """f = ReLU(pre-activations)."""

    def activation(self, pre: Tensor) -> Tensor:
        """Pre-activations -> codes, elementwise."""
        return torch.relu(pre)

    def encode(self, x: Tensor) -> Tensor:
        return self.activation(self.preactivations(x))


class AutoEncoder(_ReLU):
    """The standard SAE: f = ReLU(W_enc (x - b) + b_enc), x_hat = W_dec f + b.

    Source: Bricken et al. 2023, "Towards Monosemanticity", section "Sparse autoencoder setup".
    """

    decoder_bias_name = "bias"
    scaled_with_data = ("bias", "encoder.bias")

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give decoder rows unit norm and their norms to the encoder: the same function, comparable codes."""
        norms_F = self.decoder_rows.norm(dim=1)
        if torch.allclose(norms_F, torch.ones_like(norms_F)):
            return
        norms_F.clamp_min_(torch.finfo(norms_F.dtype).tiny)
        self.decoder.weight.div_(norms_F)
        self.encoder.weight.mul_(norms_F[:, None])
        self.encoder.bias.mul_(norms_F)

    @overload
    def forward(self, x: Tensor, output_features: Literal[False] = False, ghost_mask: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, output_features: Literal[True], ghost_mask: None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, x: Tensor, output_features: bool = False, *, ghost_mask: Tensor) -> tuple[Tensor, ...]: ...
    def forward(
        self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The reconstruction, and with `output_features` the codes too.

        With a `ghost_mask` [F], 1 for dead latents, between the two comes what those would add, exp(pre-activations)
        through their decoder rows, for ghost gradients (Jermyn and Templeton 2024, "Ghost grads", Transformer Circuits
        Thread, January 2024).
        """
        pre = self.preactivations(x)
        f = self.activation(pre)
        out = [self.reconstruct(f, x)]
        if ghost_mask is not None:
            out.append((pre.exp() * ghost_mask.to(pre)) @ self.decoder_rows)
        if output_features:
            out.append(f)
        return out[0] if len(out) == 1 else tuple(out)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], normalize_decoder: bool = True, **kwargs: Any) -> Self:
        dictionary = super().from_state_dict(state, **kwargs)
        if normalize_decoder:
            dictionary.normalize_decoder()
        return dictionary

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        normalize_decoder: bool = True,
        **kwargs: Any,
    ) -> Self:
        """See `Dictionary.from_pretrained`; by default decoder rows get unit norm, and codes the norms they had."""
        return super().from_pretrained(path, dtype, device, normalize_decoder=normalize_decoder, **kwargs)


class AutoEncoderNew(_ReLU):
    """The SAE of the April update: f = ReLU(W_enc x + b_enc), x_hat = W_dec f + b_dec, decoder rows of any norm.

    A latent's penalty, and what its code means, is f times the norm of its decoder row; `forward(...,
    output_features=True)` hands out that product. Rows begin at a norm of 0.1.

    Source: Conerly et al. 2024, "Update on how we train SAEs", Transformer Circuits Thread, April 2024.
    """

    decoder_bias_name = "decoder.bias"
    scaled_with_data = ("decoder.bias", "encoder.bias")
    subtracts_decoder_bias = False
    unit_norm_decoder = False

    INITIAL_NORM = 0.1

    def _initial_rows(self) -> tuple[Tensor, Tensor]:
        encoder_FD, decoder_FO = super()._initial_rows()
        return self.INITIAL_NORM * encoder_FD, self.INITIAL_NORM * decoder_FO

    @overload
    def forward(self, x: Tensor, output_features: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, output_features: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction, and with `output_features` the codes times the norms of their decoder rows."""
        f = self.encode(x)
        x_hat = self.reconstruct(f, x)
        return (x_hat, f * self.decoder_rows.norm(dim=1)) if output_features else x_hat

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
