"""What every format stores, in one form between the libraries: two matrices, two biases and an activation.

A reader makes a `Coder` from a file and `to_dictionary` a dictionary from it; a writer starts from `as_coder` of a
dictionary. What differs between the libraries (whether the decoder bias is subtracted before encoding, TopK or a
threshold, gates) is changed here, exactly, and in float64, because activations can be a hundred times their median.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal

import torch
from torch import Tensor

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK, Dictionary, JumpReluAutoEncoder
from dictionary_learning.errors import UserError


class CannotHold(UserError):
    """A dictionary that a format has no place for; the sentence says why."""


@dataclass(frozen=True)
class Coder:
    """f = activation((x - b_dec) W_enc + b_enc), or without the subtraction; x_hat = f W_dec + b_dec.

    Attributes:
        encoder_FD, encoder_bias_F, decoder_FD, decoder_bias_D: float32 on the CPU, a latent a row.
        activation: "relu"; "topk", ReLU and then the `k` largest; "jumprelu", zero where not above `threshold_F`.
        subtracts_bias: whether the decoder bias is subtracted from x before encoding.
        threshold_F: of JumpReLU; of TopK, what training measured, or None.
    """

    encoder_FD: Tensor
    encoder_bias_F: Tensor
    decoder_FD: Tensor
    decoder_bias_D: Tensor
    activation: Literal["relu", "topk", "jumprelu"]
    subtracts_bias: bool
    k: int | None = None
    threshold_F: Tensor | None = None

    @property
    def d_in(self) -> int:
        return self.encoder_FD.shape[1]

    @property
    def d_sae(self) -> int:
        return self.encoder_FD.shape[0]

    def subtracting(self, wanted: bool) -> Coder:
        """The same function with, or without, the decoder bias subtracted first: the encoder bias takes it over."""
        if wanted == self.subtracts_bias:
            return self
        shift_F = self.encoder_FD.double() @ self.decoder_bias_D.double()
        bias_F = self.encoder_bias_F.double() + (shift_F if wanted else -shift_F)
        return replace(self, encoder_bias_F=bias_F.float(), subtracts_bias=wanted)

    def as_jumprelu(self) -> Coder:
        """The same latents under thresholds: ReLU has them at 0, TopK where training measured them.

        Raises:
            CannotHold: a TopK dictionary whose threshold was never measured.
        """
        if self.activation == "jumprelu":
            return self
        threshold_F = torch.zeros_like(self.encoder_bias_F) if self.activation == "relu" else self.threshold_F
        if threshold_F is None:
            raise CannotHold(
                "A TopK dictionary becomes JumpReLU through its measured threshold, and this one has none: train it "
                "past threshold_start_step, or use a format with TopK (saelens, sparsify, dictionary_learning)."
            )
        return replace(self, activation="jumprelu", k=None, threshold_F=threshold_F)

    def scaled(self, factor_F: Tensor) -> Coder:
        """The same reconstructions with each latent's code times its factor (and its decoder row divided by it)."""
        return replace(
            self,
            encoder_FD=self.encoder_FD * factor_F[:, None],
            encoder_bias_F=self.encoder_bias_F * factor_F,
            decoder_FD=self.decoder_FD / factor_F[:, None],
            threshold_F=None if self.threshold_F is None else self.threshold_F * factor_F,
        )

    @property
    def has_unit_decoder(self) -> bool:
        norms_F = self.decoder_FD.norm(dim=1)
        return torch.allclose(norms_F, torch.ones_like(norms_F))


def gated(
    encoder_FD: Tensor, r_mag_F: Tensor, gate_bias_F: Tensor, mag_bias_F: Tensor, decoder_FD: Tensor, b_dec_D: Tensor
) -> Coder:
    """A gated SAE as the JumpReLU that it equals (decoder bias subtracted first).

    With u = W (x - b_dec), magnitude m = exp(r) u + b_mag and gate u + b_gate > 0, the gate opens where
    m > b_mag - exp(r) b_gate. Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse
    autoencoders" (arXiv:2404.16014), section 3.2 on tied weights.
    """
    gain_F = r_mag_F.exp()
    return Coder(
        encoder_FD=encoder_FD * gain_F[:, None],
        encoder_bias_F=mag_bias_F,
        decoder_FD=decoder_FD,
        decoder_bias_D=b_dec_D,
        activation="jumprelu",
        subtracts_bias=True,
        threshold_F=mag_bias_F - gain_F * gate_bias_F,
    )


@singledispatch
def as_coder(dictionary: Dictionary) -> Coder:
    """A dictionary in the common form; a class is added with `@as_coder.register`.

    Raises:
        CannotHold: a class that no form is registered for.
    """
    raise CannotHold(
        f"A {type(dictionary).__name__} can't be exported: it is not an encoder with ReLU, TopK or JumpReLU and a "
        "linear decoder."
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


@as_coder.register
def _(dictionary: AutoEncoder) -> Coder:
    return Coder(
        _plain(dictionary.encoder_rows),
        _plain(dictionary.encoder.bias),
        _plain(dictionary.decoder_rows),
        _plain(dictionary.decoder_bias),
        activation="relu",
        subtracts_bias=True,
    )


@as_coder.register
def _(dictionary: AutoEncoderTopK) -> Coder:
    measured = float(dictionary.threshold)
    return Coder(
        _plain(dictionary.encoder_rows),
        _plain(dictionary.encoder.bias),
        _plain(dictionary.decoder_rows),
        _plain(dictionary.decoder_bias),
        activation="topk",
        subtracts_bias=True,
        k=int(dictionary.k),
        threshold_F=torch.full((dictionary.dict_size,), measured) if measured >= 0 else None,
    )


@as_coder.register
def _(dictionary: JumpReluAutoEncoder) -> Coder:
    return Coder(
        _plain(dictionary.encoder_rows),
        _plain(dictionary.b_enc),
        _plain(dictionary.decoder_rows),
        _plain(dictionary.b_dec),
        activation="jumprelu",
        subtracts_bias=dictionary.apply_b_dec_to_input,
        threshold_F=_plain(dictionary.threshold),
    )


def to_dictionary(coder: Coder) -> Dictionary:
    """The dictionary of a coder, such that `load_dictionary` gives the same codes once it is saved.

    JumpReLU folds a subtracted decoder bias into the encoder's, because files have no place for that flag. ReLU with a
    decoder that is not of unit rows becomes JumpReLU with thresholds of 0, because an `AutoEncoder` is normalised when
    it is loaded, which would rescale its codes.
    """
    if coder.activation == "relu" and not coder.has_unit_decoder:
        coder = coder.as_jumprelu()
    bias_name = {"relu": "bias", "topk": "b_dec", "jumprelu": "b_dec"}[coder.activation]
    coder = coder.subtracting(coder.activation != "jumprelu")
    if coder.activation == "jumprelu":
        assert coder.threshold_F is not None
        return JumpReluAutoEncoder.from_state_dict(
            {
                "W_enc": coder.encoder_FD.t(),
                "b_enc": coder.encoder_bias_F,
                "W_dec": coder.decoder_FD,
                "b_dec": coder.decoder_bias_D,
                "threshold": coder.threshold_F,
            }
        )
    state = {
        "encoder.weight": coder.encoder_FD,
        "encoder.bias": coder.encoder_bias_F,
        "decoder.weight": coder.decoder_FD.t(),
        bias_name: coder.decoder_bias_D,
    }
    if coder.activation == "relu":
        return AutoEncoder.from_state_dict(state, normalize_decoder=False)
    if coder.threshold_F is not None:
        state["threshold"] = coder.threshold_F[0]
    return AutoEncoderTopK.from_state_dict(state, k=coder.k)
