"""The two ways in which the field names and shapes a dictionary's weights on disk.

`_LinearDictionary`: two linear maps, `encoder.weight` [F, D] and `decoder.weight` [D_out, F]. `_MatrixDictionary`: two
matrices, `W_enc` [D, F] and `W_dec` [F, D_out]. Memory is the same in both: a latent's weights lie side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dictionary_learning.dictionaries.base import Dictionary


class _LinearDictionary(Dictionary):
    """Weights as `encoder` and `decoder` linear maps; a decoder bias of another name than `decoder.bias` is apart."""

    encoder_bias_name = "encoder.bias"

    def __init__(
        self, activation_dim: int, dict_size: int, *, output_dim: int | None = None, skip: bool = False
    ) -> None:
        super().__init__(activation_dim, dict_size, output_dim=output_dim, skip=skip)
        encoder_FD, decoder_FO = self._initial_rows()
        own_bias = self.decoder_bias_name == "decoder.bias"
        self.encoder = nn.utils.skip_init(
            nn.Linear, activation_dim, dict_size, bias=self.encoder_bias_name == "encoder.bias"
        )
        self.decoder = nn.utils.skip_init(nn.Linear, dict_size, self.output_dim, bias=own_bias)
        self.encoder.weight = nn.Parameter(encoder_FD)
        self.decoder.weight = nn.Parameter(decoder_FO.t())  # [D_out, F] with contiguous rows of [F, D_out] underneath
        if self.encoder.bias is not None:
            self.encoder.bias = nn.Parameter(torch.zeros(dict_size))
        zeros_O = nn.Parameter(torch.zeros(self.output_dim))
        if own_bias:
            self.decoder.bias = zeros_O
        else:
            self._parameters[self.decoder_bias_name] = zeros_O  # `decoder_bias` is a property too, so not by setattr

    @property
    def encoder_rows(self) -> Tensor:
        return self.encoder.weight

    @property
    def decoder_rows(self) -> Tensor:
        return self.decoder.weight.t()

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> tuple[int, int, int]:
        dict_size, activation_dim = state["encoder.weight"].shape
        output_dim, _ = state["decoder.weight"].shape
        return activation_dim, dict_size, output_dim


class _MatrixDictionary(Dictionary):
    """Weights as matrices `W_enc` and `W_dec` with biases `b_enc` and `b_dec`."""

    encoder_bias_name = "b_enc"
    decoder_bias_name = "b_dec"

    def __init__(
        self, activation_dim: int, dict_size: int, *, output_dim: int | None = None, skip: bool = False
    ) -> None:
        super().__init__(activation_dim, dict_size, output_dim=output_dim, skip=skip)
        encoder_FD, decoder_FO = self._initial_rows()
        self.W_enc = nn.Parameter(encoder_FD.t())  # [D, F] with contiguous rows of [F, D] underneath
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(decoder_FO)
        self.b_dec = nn.Parameter(torch.zeros(self.output_dim))

    @property
    def encoder_rows(self) -> Tensor:
        return self.W_enc.t()

    @property
    def decoder_rows(self) -> Tensor:
        return self.W_dec

    @classmethod
    def _sizes(cls, state: dict[str, Tensor]) -> tuple[int, int, int]:
        activation_dim, dict_size = state["W_enc"].shape
        _, output_dim = state["W_dec"].shape
        return activation_dim, dict_size, output_dim
