"""The tutorials' sparse autoencoder: one class with an option for each choice, made from the keys of a `config.yaml`.

What the options mean for files: tied weights have no `decoder.weight`; SiLU has `input_scale`; an input LayerNorm has
`normalizes_input`; `k` is 0 without TopK. So weights say which function they belong to. `beta_l1` is for the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor

from dictionary_learning.dictionaries.layouts import _LinearDictionary
from dictionary_learning.errors import UserError, did_you_mean

Activation = Literal["relu", "silu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
KEYS = (  # of a config.yaml
    "input_dims",
    "n_features",
    "activation",
    "input_norm",
    "k",
    "beta_l1",
    "tie_weights",
    "unit_norm_decoder",
)


class SparseAutoencoder(_LinearDictionary):
    """f = act(W_enc (x - b) + b_enc), and of these the k of largest magnitude; x_hat = W_dec f + b.

    Args:
        activation: "relu", or "silu" (z sigmoid(z): small negative codes too).
        input_norm: give every input mean 0 and variance 1 over its own D values first, and undo that on the
            reconstruction. Codes are then the same for x and for 2 x + 3.
        k: codes kept, or None for all.
        beta_l1: weight of the L1 penalty that it is trained with, where there is no k.
        tie_weights: the decoder's rows are the encoder's: one tensor.
        unit_norm_decoder: whether decoder rows stay of norm 1.

    Raises:
        UserError: a size or option that can't be; k together with beta_l1; a transcoder, which this is not.
    """

    decoder_bias_name = "bias"

    k: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        activation: Activation = "relu",
        input_norm: bool = True,
        k: int | None = None,
        beta_l1: float | None = None,
        tie_weights: bool = False,
        unit_norm_decoder: bool = True,
        *,
        output_dim: int | None = None,
        skip: bool = False,
    ) -> None:
        if output_dim is not None:
            raise UserError("A SparseAutoencoder reconstructs its own input: for a transcoder take an AutoEncoder.")
        super().__init__(activation_dim, dict_size, skip=skip)
        if activation not in ACTIVATIONS:
            raise UserError(
                f"activation must be relu or silu, got {activation!r}.{did_you_mean(str(activation), ACTIVATIONS)}"
            )
        flags = {"input_norm": input_norm, "tie_weights": tie_weights, "unit_norm_decoder": unit_norm_decoder}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise UserError(f"{name} must be true or false, got {flag!r}.")
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or not 0 < k <= dict_size):
            raise UserError(f"k must be a positive integer of at most the width {dict_size}, or null, got {k!r}.")
        if beta_l1 is not None and not (_is_number(beta_l1) and 0 <= beta_l1 < math.inf):
            raise UserError(f"beta_l1 must be a number that is not negative, or null, got {beta_l1!r}.")
        if k is not None and beta_l1 is not None:
            raise UserError("Give k (TopK) or beta_l1 (an L1 penalty), not both: the other is null.")
        self.activation_name, self.input_norm, self.tie_weights = activation, input_norm, tie_weights
        self.unit_norm_decoder, self.beta_l1 = unit_norm_decoder, beta_l1
        self._kept = k or 0  # `k` as a number of the host: to read the buffer would wait for the device in every step
        self.register_buffer("k", torch.tensor(k or 0, dtype=torch.int))
        self.register_buffer("normalizes_input", torch.tensor(True) if input_norm else None)
        # SiLU of a multiple is no multiple of SiLU, so other units of the data can't move into the biases.
        self.register_buffer("input_scale", torch.tensor(1.0) if activation == "silu" else None)
        if input_norm:
            self.scaled_with_data = ()
        else:
            self.scaled_with_data = ("input_scale",) if activation == "silu" else ("bias", "encoder.bias")
        if tie_weights:
            del self.decoder

    @property
    def decoder_rows(self) -> Tensor:
        return self.encoder.weight if self.tie_weights else self.decoder.weight.t()

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x with mean 0 and variance 1 over its last axis, the means and the standard deviations [..., 1]."""
        mean = x.mean(dim=-1, keepdim=True)
        centered = x - mean
        variance = centered.pow(2).mean(dim=-1, keepdim=True)
        deviation = variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt()  # no epsilon, which would have units
        return centered / deviation, mean, deviation

    def preactivations(self, x: Tensor) -> Tensor:
        """[..., F] values before the nonlinearity, of the normalised input where there is an `input_norm`."""
        if self.input_norm:
            x = self.normalize(x)[0]
        return super().preactivations(x if self.input_scale is None else x / self.input_scale)

    def activation(self, pre: Tensor) -> Tensor:
        """Pre-activations -> codes, elementwise; of these `encode` keeps k."""
        return functional.silu(pre) if self.activation_name == "silu" else torch.relu(pre)

    def encode(self, x: Tensor) -> Tensor:
        f = self.activation(self.preactivations(x))
        if not self._kept:
            return f
        kept = f.abs().topk(self._kept, dim=-1, sorted=False).indices
        return torch.zeros_like(f).scatter(-1, kept, f.gather(-1, kept))

    def decode(self, f: Tensor) -> Tensor:
        """Codes -> reconstructions; with an `input_norm`, of the normalised input (`reconstruct` undoes that)."""
        x_hat = super().decode(f)
        return x_hat if self.input_scale is None else x_hat * self.input_scale

    def reconstruct(self, f: Tensor, x: Tensor) -> Tensor:
        """What `forward` gives for the codes f of x: `decode(f)`, with the normalisation of x undone."""
        x_hat = self.decode(f)
        if not self.input_norm:
            return x_hat
        _, mean, deviation = self.normalize(x)
        return x_hat * deviation + mean

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A dictionary of the keys of a config.yaml: `input_dims` and `n_features`, and the options by their names.

        Raises:
            UserError: a key that there is none of, one missing, or a value that can't be.
        """
        for key in config:
            if key not in KEYS:
                raise UserError(
                    f"The autoencoder's key '{key}' is unknown: use {', '.join(KEYS)}.{did_you_mean(str(key), KEYS)}"
                )
        for key in KEYS[:2]:
            if config.get(key) is None:
                raise UserError(f"The autoencoder's config lacks '{key}'.")
        options = {key: config[key] for key in KEYS[2:] if key in config}
        if isinstance(beta := options.get("beta_l1"), str):  # YAML takes 1e-3, without a dot, for text
            try:
                options["beta_l1"] = float(beta)
            except ValueError:
                raise UserError(f"beta_l1 must be a number, got {beta!r}.") from None
        return cls(config["input_dims"], config["n_features"], **options)

    def to_config(self) -> dict[str, Any]:
        """The keys and values from which `from_config` makes such a dictionary."""
        values = (
            self.activation_dim,
            self.dict_size,
            self.activation_name,
            self.input_norm,
            int(self.k) or None,
            self.beta_l1,
            self.tie_weights,
            self.unit_norm_decoder,
        )
        return dict(zip(KEYS, values, strict=True))

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> tuple[int, int, int]:
        dict_size, activation_dim = state["encoder.weight"].shape
        return activation_dim, dict_size, activation_dim

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], k: int | None = None, **kwargs: Any) -> Self:
        stored = int(state["k"]) or None
        if k is not None and k != stored:
            raise UserError(f"This dictionary was trained with k = {stored}, and k = {k} was asked for.")
        said: dict[str, Any] = {
            "activation": "silu" if "input_scale" in state else "relu",
            "input_norm": "normalizes_input" in state,
            "tie_weights": "decoder.weight" not in state,
        }
        return super().from_state_dict(state, k=stored, **(said | kwargs))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
