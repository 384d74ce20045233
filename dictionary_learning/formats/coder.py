"""What every format stores, in one form between the libraries: two matrices, two biases and an activation.

A reader makes a `Coder` from a file and `to_dictionary` a dictionary from it; a writer starts from `as_coder` of a
dictionary. What differs between the libraries (whether the decoder bias is subtracted before encoding, TopK or a
threshold, gates) is changed here, exactly, and in float64, because activations can be a hundred times their median.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor

from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderGroupMax,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    Dictionary,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
    SparseAutoencoder,
)
from dictionary_learning.errors import UserError


class CannotHold(UserError):
    """A dictionary that a format has no place for; the sentence says why."""


Activation = Literal["relu", "topk", "groupmax", "jumprelu", "gated"]


@dataclass(frozen=True)
class Coder:
    """f = activation((x - b_dec) W_enc + b_enc), or without the subtraction; x_hat = f W_dec + b_dec (+ x W_skip^T).

    Attributes:
        encoder_FD, encoder_bias_F, decoder_FO, decoder_bias_O: float32 on the CPU, a latent a row; O is D but for
            transcoders.
        activation: "relu"; "topk", ReLU and then the `k` largest; "groupmax", ReLU and then the largest of each of `k`
            groups of neighbours; "jumprelu", zero where not above `threshold_F`; "gated", ReLU of exp(`r_mag_F`) times
            what the bias was added to, plus `mag_bias_F`, zero where the pre-activation is not positive.
        subtracts_bias: whether the decoder bias is subtracted from x before encoding; never of a transcoder.
        threshold_F: of JumpReLU; of TopK, what training measured, or None.
        transcodes: whether x_hat is of another site than x.
        skip_OD: W_skip of a skip transcoder, or None.
    """

    encoder_FD: Tensor
    encoder_bias_F: Tensor
    decoder_FO: Tensor
    decoder_bias_O: Tensor
    activation: Activation
    subtracts_bias: bool
    k: int | None = None
    threshold_F: Tensor | None = None
    r_mag_F: Tensor | None = None
    mag_bias_F: Tensor | None = None
    transcodes: bool = False
    skip_OD: Tensor | None = None

    @property
    def d_in(self) -> int:
        return self.encoder_FD.shape[1]

    @property
    def d_out(self) -> int:
        return self.decoder_FO.shape[1]

    @property
    def d_sae(self) -> int:
        return self.encoder_FD.shape[0]

    def subtracting(self, wanted: bool) -> Coder:
        """The same function with, or without, the decoder bias subtracted first: the encoder bias takes it over."""
        if wanted == self.subtracts_bias:
            return self
        assert not self.transcodes, "the decoder bias of a transcoder lives in the output's space"
        shift_F = self.encoder_FD.double() @ self.decoder_bias_O.double() * (1 if wanted else -1)
        changed: dict[str, Any] = {"encoder_bias_F": (self.encoder_bias_F.double() + shift_F).float()}
        if self.mag_bias_F is not None and self.r_mag_F is not None:
            changed["mag_bias_F"] = (self.mag_bias_F.double() + shift_F * self.r_mag_F.double().exp()).float()
        return replace(self, subtracts_bias=wanted, **changed)

    def as_jumprelu(self) -> Coder:
        """The same latents under thresholds: ReLU has them at 0, TopK where training measured them, a gate where the
        magnitude is when it opens.

        With u = W (x - b_dec), magnitude m = exp(r) u + b_mag and gate u + b_gate > 0, the gate opens where
        m > b_mag - exp(r) b_gate. Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse
        autoencoders" (arXiv:2404.16014), section 3.2 on tied weights.

        Raises:
            CannotHold: a TopK dictionary whose threshold was never measured, or groups.
        """
        if self.activation == "jumprelu":
            return self
        if self.activation == "groupmax":
            raise CannotHold("Group-max has no thresholds, because a latent fires by its neighbours: use sparsify.")
        if self.activation == "gated":
            assert self.r_mag_F is not None and self.mag_bias_F is not None
            gain_F = self.r_mag_F.double().exp()
            threshold_F = self.mag_bias_F.double() - gain_F * self.encoder_bias_F.double()
            return replace(
                self,
                activation="jumprelu",
                encoder_FD=(self.encoder_FD * gain_F[:, None]).float(),
                encoder_bias_F=self.mag_bias_F,
                threshold_F=threshold_F.float(),
                r_mag_F=None,
                mag_bias_F=None,
            )
        thresholds_F = torch.zeros_like(self.encoder_bias_F) if self.activation == "relu" else self.threshold_F
        if thresholds_F is None:
            raise CannotHold(
                "A TopK dictionary becomes JumpReLU through its measured threshold, and this one has none: train it "
                "past threshold_start_step, or use a format with TopK (saelens, sparsify, dictionary_learning)."
            )
        return replace(self, activation="jumprelu", k=None, threshold_F=thresholds_F)

    def scaled(self, factor_F: Tensor) -> Coder:
        """The same reconstructions with each latent's code times its factor (and its decoder row divided by it)."""
        return replace(
            self,
            encoder_FD=self.encoder_FD * factor_F[:, None],
            encoder_bias_F=self.encoder_bias_F * factor_F,
            decoder_FO=self.decoder_FO / factor_F[:, None],
            threshold_F=None if self.threshold_F is None else self.threshold_F * factor_F,
            mag_bias_F=None if self.mag_bias_F is None else self.mag_bias_F * factor_F,
        )

    @property
    def has_unit_decoder(self) -> bool:
        norms_F = self.decoder_FO.norm(dim=1)
        return torch.allclose(norms_F, torch.ones_like(norms_F))


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


def _coder(dictionary: Dictionary, activation: Activation, **more: Any) -> Coder:
    """What all have in common."""
    return Coder(
        _plain(dictionary.encoder_rows),
        _plain(dictionary.encoder_bias),
        _plain(dictionary.decoder_rows),
        _plain(dictionary.decoder_bias),
        activation,
        subtracts_bias=dictionary.pre_bias is not None,
        transcodes=dictionary.is_transcoder,
        skip_OD=None if dictionary.W_skip is None else _plain(dictionary.W_skip),
        **more,
    )


@as_coder.register(AutoEncoder)
@as_coder.register(AutoEncoderNew)
def _(dictionary: AutoEncoder | AutoEncoderNew) -> Coder:
    return _coder(dictionary, "relu")


@as_coder.register
def _(dictionary: AutoEncoderTopK) -> Coder:
    measured = float(dictionary.threshold)
    threshold_F = torch.full((dictionary.dict_size,), measured) if measured >= 0 else None
    return _coder(dictionary, "topk", k=int(dictionary.k), threshold_F=threshold_F)


@as_coder.register
def _(dictionary: AutoEncoderGroupMax) -> Coder:
    return _coder(dictionary, "groupmax", k=int(dictionary.k))


@as_coder.register(BatchTopKSAE)
@as_coder.register(MatryoshkaBatchTopKSAE)
def _(dictionary: BatchTopKSAE | MatryoshkaBatchTopKSAE) -> Coder:
    """As it encodes after training, by its threshold. Not yet measured, it is negative and lets all positive ones by;
    so does 0. Of Matryoshka groups that take no part are left out: a prefix is a dictionary of its own."""
    threshold = max(float(dictionary.threshold), 0.0)
    coder = _coder(dictionary, "jumprelu", threshold_F=torch.full((dictionary.dict_size,), threshold))
    end = dictionary.group_indices[dictionary.active_groups] if isinstance(dictionary, MatryoshkaBatchTopKSAE) else None
    parts = ("encoder_FD", "encoder_bias_F", "decoder_FO", "threshold_F")
    return replace(coder, **{name: getattr(coder, name)[:end].clone() for name in parts})


@as_coder.register
def _(dictionary: JumpReluAutoEncoder) -> Coder:
    return _coder(dictionary, "jumprelu", threshold_F=_plain(dictionary.threshold))


@as_coder.register
def _(dictionary: GatedAutoEncoder) -> Coder:
    return _coder(dictionary, "gated", r_mag_F=_plain(dictionary.r_mag), mag_bias_F=_plain(dictionary.mag_bias))


@as_coder.register
def _(dictionary: SparseAutoencoder) -> Coder:
    if dictionary.input_norm or dictionary.activation_name != "relu":
        option = "an input_norm" if dictionary.input_norm else f"the activation {dictionary.activation_name}"
        raise CannotHold(f"A SparseAutoencoder with {option} can't be exported: no other library computes it.")
    k = int(dictionary.k)
    return _coder(dictionary, "topk", k=k) if k else _coder(dictionary, "relu")


def to_dictionary(coder: Coder) -> Dictionary:
    """The dictionary of a coder, such that `load_dictionary` gives the same codes once it is saved.

    JumpReLU folds a subtracted decoder bias into the encoder's, because files have no place for that flag. An
    `AutoEncoder` is given unit decoder rows when it is loaded, which would rescale the codes of ReLU with other ones:
    that, and ReLU without the subtraction, is an `AutoEncoderNew`.
    """
    if not coder.transcodes:
        new = coder.activation == "relu" and not (coder.has_unit_decoder and coder.subtracts_bias)
        coder = coder.subtracting(not new and coder.activation != "jumprelu")
    cls: type[Dictionary]
    state: dict[str, Tensor]
    if coder.activation == "jumprelu":
        assert coder.threshold_F is not None
        cls = JumpReluAutoEncoder
        state = {
            "W_enc": coder.encoder_FD.t(),
            "b_enc": coder.encoder_bias_F,
            "W_dec": coder.decoder_FO,
            "threshold": coder.threshold_F,
        }
    else:
        relu = AutoEncoder if coder.subtracts_bias else AutoEncoderNew
        classes = {"relu": relu, "topk": AutoEncoderTopK, "groupmax": AutoEncoderGroupMax, "gated": GatedAutoEncoder}
        cls = classes[coder.activation]
        state = {
            "encoder.weight": coder.encoder_FD,
            cls.encoder_bias_name: coder.encoder_bias_F,
            "decoder.weight": coder.decoder_FO.t(),
        }
    state[cls.decoder_bias_name] = coder.decoder_bias_O
    if coder.transcodes:
        state["transcodes_to"] = torch.tensor(coder.d_out)
    if coder.skip_OD is not None:
        state["W_skip"] = coder.skip_OD
    if coder.activation == "topk" and coder.threshold_F is not None:
        state["threshold"] = coder.threshold_F[0]
    if coder.activation == "groupmax":
        assert coder.k is not None
        state["group_size"] = torch.tensor(coder.d_sae // coder.k, dtype=torch.int)
    if coder.activation == "gated":
        assert coder.r_mag_F is not None and coder.mag_bias_F is not None
        state |= {"r_mag": coder.r_mag_F, "mag_bias": coder.mag_bias_F}
    options: dict[str, Any] = {} if coder.k is None else {"k": coder.k}
    if cls is AutoEncoder:
        options["normalize_decoder"] = False
    return cls.from_state_dict(state, **options)
