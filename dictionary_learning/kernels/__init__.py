"""The products of a training step, dense or through the active latents only. One place chooses: `kernels_for`.

A sparse step needs three of them, with x the input, W rows of weights and (values, indices) the k active latents:

    preactivations   x, W_enc, b_enc, b_dec -> (x - b_dec) W_enc^T + b_enc           the one dense product
    select           the pre-activations at chosen indices, differentiable
    decode           sum_k values[b, k] * W_dec[indices[b, k]], differentiable

`reference` computes them with plain dense autograd and is the truth the others are tested against. `cpu` forms the
same gradients through the active latents alone, at about a fifth of the arithmetic.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from dictionary_learning.errors import UserError, did_you_mean

ENVIRONMENT = "SAE_FACTORY_KERNELS"


class Kernels(Protocol):
    """What a set of kernels offers. F latents, D inputs, B rows, k active latents a row."""

    def preactivations(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor) -> Tensor:
        """[B, F] pre-activations (x - b_dec) W_enc^T + b_enc, for reading until the next call. Whether they carry a
        gradient is the kernels' affair: what is to be differentiated goes through `select`."""

    def select(
        self, pre_BF: Tensor, indices_Bk: Tensor, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor
    ) -> Tensor:
        """[B, k] pre-activations at `indices_Bk`, with gradients to x, W_enc, b_enc and b_dec."""

    def decode(self, values_Bk: Tensor, indices_Bk: Tensor, W_dec_FD: Tensor) -> Tensor:
        """[B, D] sum over k of values x decoder rows (no bias), with gradients to values and W_dec."""


def kernels_for(device: torch.device | str) -> Kernels:
    """The fastest exact kernels for a device, or those that the environment setting SAE_FACTORY_KERNELS names.

    Raises:
        UserError: the environment names kernels that do not exist.
    """
    from dictionary_learning.kernels import cpu, reference

    available: dict[str, Kernels] = {"reference": reference, "cpu": cpu}
    forced = os.environ.get(ENVIRONMENT)
    if forced:
        if forced not in available:
            raise UserError(
                f"{ENVIRONMENT}={forced} is unknown: use {' or '.join(available)}.{did_you_mean(forced, available)}"
            )
        return available[forced]
    return available["cpu" if torch.device(device).type == "cpu" else "reference"]
