"""The products of a step through the active latents only, on PyTorch's embedding-bag primitives.

The encoder's dense product runs without a graph; everything after it touches k of F latents a row. A bag is a row of
the batch when decoding, and a latent when forming a weight gradient: there the active entries are sorted by latent, so
that each latent sums the batch rows it fired on. Entries are summed in a fixed order, so results are deterministic.
The gradient with respect to b_dec is one matrix-vector product with the summed gradient of the pre-activations.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_scratch = threading.local()


@torch.no_grad()
def preactivations(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor) -> Tensor:
    # Into memory that every step of every dictionary shares: touching fresh pages costs a quarter of the product.
    shape = len(x_BD), len(W_enc_FD)
    memory: Tensor | None = getattr(_scratch, "memory", None)
    if memory is None or memory.dtype != x_BD.dtype or memory.device != x_BD.device or len(memory) < math.prod(shape):
        memory = _scratch.memory = x_BD.new_empty(math.prod(shape))
    return torch.addmm(b_enc_F, x_BD - b_dec_D, W_enc_FD.t(), out=memory[: math.prod(shape)].view(shape))


def select(
    pre_BF: Tensor, indices_Bk: Tensor, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor
) -> Tensor:
    return _Select.apply(pre_BF, indices_Bk, x_BD, W_enc_FD, b_enc_F, b_dec_D)


def decode(values_Bk: Tensor, indices_Bk: Tensor, W_dec_FD: Tensor) -> Tensor:
    return _Decode.apply(values_Bk, indices_Bk, W_dec_FD)


def _bags(values_Bk: Tensor, indices_Bk: Tensor, W_FD: Tensor) -> Tensor:
    """[B, D] sum over k of values[b, k] * W[indices[b, k]]."""
    return embedding_bag(indices_Bk, W_FD, per_sample_weights=values_Bk, mode="sum")


def _dots(rows_BD: Tensor, indices_Bk: Tensor, W_FD: Tensor) -> Tensor:
    """[B, k] dot products rows[b] . W[indices[b, k]], without gathering W into a [B, k, D] tensor."""
    bags, k = indices_Bk.shape
    offsets = torch.arange(0, bags * k, k, device=rows_BD.device)
    bag_of_entry = torch.arange(bags, device=rows_BD.device).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_BD.contiguous(), W_FD, indices_Bk.reshape(-1), offsets, bag_of_entry, 0
    ).view(bags, k)


def weight_gradient(values_Bk: Tensor, indices_Bk: Tensor, rows_BD: Tensor, n_latents: int) -> Tensor:
    """[F, D] sum over the entries of each latent of value * batch row: a dense gradient from sparse entries."""
    k = indices_Bk.shape[1]
    latents, order = indices_Bk.reshape(-1).sort(stable=True)
    firsts = torch.searchsorted(latents, torch.arange(n_latents, device=latents.device))
    return embedding_bag(order // k, rows_BD, firsts, per_sample_weights=values_Bk.reshape(-1)[order], mode="sum")


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_Bk: Tensor, indices_Bk: Tensor, W_dec_FD: Tensor) -> Tensor:
        ctx.save_for_backward(values_Bk, indices_Bk, W_dec_FD)
        return _bags(values_Bk, indices_Bk, W_dec_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        values_Bk, indices_Bk, W_dec_FD = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        d_values = _dots(grad_BD, indices_Bk, W_dec_FD) if ctx.needs_input_grad[0] else None
        d_W = weight_gradient(values_Bk, indices_Bk, grad_BD, len(W_dec_FD)) if ctx.needs_input_grad[2] else None
        return d_values, None, d_W


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre_BF: Tensor, indices_Bk: Tensor, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor
    ) -> Tensor:
        ctx.save_for_backward(indices_Bk, x_BD, W_enc_FD, b_dec_D)
        return pre_BF.gather(-1, indices_Bk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Bk: Tensor) -> tuple[Tensor | None, ...]:
        indices_Bk, x_BD, W_enc_FD, b_dec_D = ctx.saved_tensors
        grad_Bk = grad_Bk.contiguous()
        d_b_enc = grad_Bk.new_zeros(len(W_enc_FD)).index_add_(0, indices_Bk.reshape(-1), grad_Bk.reshape(-1))
        d_x = _bags(grad_Bk, indices_Bk, W_enc_FD) if ctx.needs_input_grad[2] else None
        d_W = weight_gradient(grad_Bk, indices_Bk, x_BD - b_dec_D, len(W_enc_FD)) if ctx.needs_input_grad[3] else None
        d_b_dec = -(d_b_enc @ W_enc_FD) if ctx.needs_input_grad[5] else None
        return None, None, d_x, d_W, d_b_enc, d_b_dec
