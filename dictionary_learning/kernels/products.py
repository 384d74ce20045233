"""The differentiable products of a step, dense or through entries: gradients are those of dense autograd.

Three things make them cheap: everything but the encoder's product touches active entries alone; the gradient of a
pre-bias is one matrix-vector product with the summed gradient of the pre-activations; and a penalty that is linear in
the codes joins the decoder's backward as the bias of its product.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictionary_learning.kernels import Entries, Kernels
from dictionary_learning.profiling import span

_memory = threading.local()


def scratch(name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, shared by all that ask by this name: touching 50 MB of fresh pages costs a CPU a quarter of
    the product that fills them. Autograd notices when something saved for a backward pass is written over.
    (On other devices PyTorch's caching allocator does the same.)"""
    if device.type != "cpu" or getattr(_memory, "own", False):
        return torch.empty(shape, dtype=dtype, device=device)
    pools: dict[tuple[str, torch.dtype], Tensor] = _memory.__dict__.setdefault("pools", {})
    pool = pools.get((name, dtype))
    if pool is None or len(pool) < math.prod(shape):
        pool = pools[name, dtype] = torch.empty(math.prod(shape), dtype=dtype)
    return pool[: math.prod(shape)].view(shape)


@contextlib.contextmanager
def own_memory() -> Iterator[None]:
    """Inside, what would be scratch is memory of its own, so that a graph outlives the next one."""
    before, _memory.own = getattr(_memory, "own", False), True
    try:
        yield
    finally:
        _memory.own = before


def is_scratch(tensor: Tensor) -> bool:
    """Whether a gradient lies in scratch memory, so that a backward pass may write over it."""
    start = tensor.untyped_storage().data_ptr()
    return any(start == pool.data_ptr() for pool in _memory.__dict__.get("pools", {}).values())


def _encoder_gradients(ctx: Any, d_bias_F: Tensor, W_FD: Tensor, pre_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """(bias, pre-bias): the latter enters each pre-activation through -W."""
    return (d_bias_F if ctx.has_bias else None), (-(d_bias_F @ W_FD) if pre_bias else None)


class Select(torch.autograd.Function):
    """[N] pre-activations at entries, their values being known already."""

    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        x_BD: Tensor,
        centered_BD: Tensor,
        W_FD: Tensor,
        bias_F: Tensor | None,
        pre_bias_D: Tensor | None,
        entries: Entries,
        kernels: Kernels,
    ) -> Tensor:
        ctx.save_for_backward(centered_BD, W_FD)
        ctx.entries, ctx.kernels, ctx.has_bias = entries, kernels, bias_F is not None
        return values_N.view_as(values_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        centered_BD, W_FD = ctx.saved_tensors
        grad_N = grad_N.contiguous()
        d_bias, d_pre_bias = _encoder_gradients(
            ctx, ctx.kernels.latent_sums(grad_N, ctx.entries), W_FD, ctx.needs_input_grad[5]
        )
        d_x = ctx.kernels.bags(grad_N, ctx.entries, W_FD) if ctx.needs_input_grad[1] else None
        with span("weight gradient"):
            d_W = ctx.kernels.weight_gradient(grad_N, ctx.entries, centered_BD) if ctx.needs_input_grad[3] else None
        return None, d_x, None, d_W, d_bias, d_pre_bias, None, None


class Bags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_N: Tensor, W_FD: Tensor, entries: Entries, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(values_N, W_FD)
        ctx.entries, ctx.kernels = entries, kernels
        with span("decode"):
            return kernels.bags(values_N, entries, W_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        values_N, W_FD = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        with span("code gradient"):
            d_values = ctx.kernels.dots(grad_BD, ctx.entries, W_FD) if ctx.needs_input_grad[0] else None
        with span("weight gradient"):
            d_W = ctx.kernels.weight_gradient(values_N, ctx.entries, grad_BD) if ctx.needs_input_grad[1] else None
        return d_values, d_W, None, None


class PerLatent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_F: Tensor, entries: Entries, kernels: Kernels) -> Tensor:
        ctx.entries, ctx.kernels = entries, kernels
        return v_F[entries.latents_N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.latent_sums(grad_N.contiguous(), ctx.entries), None, None


class DenseEncode(torch.autograd.Function):
    """[B, F] pre-activations, or with `relu` their positive part, formed in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        centered_BD: Tensor,
        W_FD: Tensor,
        bias_F: Tensor | None,
        pre_bias_D: Tensor | None,
        relu: bool,
    ) -> Tensor:
        pre_BF = linear(centered_BD, W_FD, bias_F, scratch("pre", (len(x_BD), len(W_FD)), x_BD.dtype, x_BD.device))
        ctx.has_bias, ctx.relu = bias_F is not None, relu
        if relu:
            pre_BF.relu_()
        ctx.save_for_backward(centered_BD, W_FD, *([pre_BF] if relu else []))
        return pre_BF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor | None, ...]:
        centered_BD, W_FD, *acts = ctx.saved_tensors
        if ctx.relu:
            grad_BF = where_positive(grad_BF, acts[0])
        d_bias, d_pre_bias = _encoder_gradients(ctx, grad_BF.sum(0), W_FD, ctx.needs_input_grad[4])
        d_x = grad_BF @ W_FD if ctx.needs_input_grad[0] else None
        d_W = grad_BF.t() @ centered_BD if ctx.needs_input_grad[2] else None
        return d_x, None, d_W, d_bias, d_pre_bias, None


def where_positive(grad: Tensor, acts: Tensor) -> Tensor:
    """The gradient where acts > 0, and 0 elsewhere; in place if the gradient is scratch."""
    if not is_scratch(grad):
        return torch.ops.aten.threshold_backward(grad, acts, 0)
    return torch.ops.aten.threshold_backward.grad_input(grad, acts, 0, grad_input=grad)


class DenseDecode(torch.autograd.Function):
    """(codes W, sum of the codes weighted by latent). The sum's gradient is the bias of the product in backward."""

    @staticmethod
    def forward(
        ctx: Any, acts_BF: Tensor, W_FD: Tensor, weights_F: Tensor | None, memory: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(acts_BF, W_FD, weights_F)
        ctx.memory = memory
        sums_F = acts_BF.sum(0)
        return acts_BF @ W_FD, (sums_F if weights_F is None else sums_F @ weights_F).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        acts_BF, W_FD, weights_F = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        d_acts = d_W = d_weights = None
        if ctx.needs_input_grad[0]:
            bias_F = grad_sum.expand(len(W_FD)) if weights_F is None else grad_sum * weights_F
            d_acts = linear(grad_BD, W_FD, bias_F, scratch(ctx.memory, acts_BF.shape, acts_BF.dtype, acts_BF.device))
        if ctx.needs_input_grad[1]:
            d_W = acts_BF.t() @ grad_BD
        if weights_F is not None and ctx.needs_input_grad[2]:
            d_weights = grad_sum * acts_BF.sum(0)
        return d_acts, d_W, d_weights, None


def linear(x_BD: Tensor, W_FD: Tensor, bias_F: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x_BD, W_FD.t(), out=out) if bias_F is None else torch.addmm(bias_F, x_BD, W_FD.t(), out=out)
