"""The identity as a dictionary."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from dictionary_learning.dictionaries.base import Dictionary


class IdentityDict(Dictionary):
    """The identity: codes are the activations. A baseline for evaluation and intervention code."""

    encoder_bias_name = decoder_bias_name = ""
    scaled_with_data = ()
    subtracts_decoder_bias = False

    def __init__(self, activation_dim: int | None = None) -> None:
        nn.Module.__init__(self)
        self.activation_dim = self.dict_size = self.output_dim = activation_dim  # type: ignore[assignment]
        self.is_transcoder = False
        self.register_parameter("W_skip", None)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return f

    @property
    def encoder_rows(self) -> Tensor:
        return torch.eye(self.activation_dim or 0)  # [0, 0] where the width was not given

    decoder_rows = encoder_rows

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> tuple[int, int, int]:
        raise KeyError("the identity has no weights")

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], **kwargs: Any) -> Self:
        return cls(**kwargs)
