"""The products of a step by plain dense autograd: slow, obvious, and what every other kernel must agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def preactivations(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor) -> Tensor:
    return torch.nn.functional.linear(x_BD - b_dec_D, W_enc_FD, b_enc_F)


def select(
    pre_BF: Tensor, indices_Bk: Tensor, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor
) -> Tensor:
    return pre_BF.gather(-1, indices_Bk)


def decode(values_Bk: Tensor, indices_Bk: Tensor, W_dec_FD: Tensor) -> Tensor:
    acts_BF = values_Bk.new_zeros(len(values_Bk), len(W_dec_FD)).scatter_add(-1, indices_Bk, values_Bk)
    return acts_BF @ W_dec_FD
