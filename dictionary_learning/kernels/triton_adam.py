"""Adam on the rows of a weight, with the unit norm of decoder rows and the projection of their gradient folded in.

In: a weight [F, D], or [n, F, D] for n stacked dictionaries, its gradient and Adam's moments. Out: the same tensors,
changed in place, as if by four steps of plain torch: drop the part of the gradient along the row, scale it (clipping),
`torch.optim.Adam`, scale the row to unit norm. Those read and write the weight's memory four times over; here a program
holds one row in registers, and each of the four tensors is read once and each of the three that change written once.
The norm for the clipping comes first, by `gradient_squares`, which reads the gradient as it will be and writes nothing.

Arithmetic is in float32 (float64 for float64 weights), and the bias corrections in float64: 1 - beta^step loses all
digits in float32. A row's sum has one fixed order. Rows of up to 8,192 fit the registers of an H100's program; wider
ones (to 2^20) are exact and slower. The choice of warps is not measured.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dictionary_learning.kernels.triton import accumulated, on_device_of, tl_type


def gradient_squares(W_FD: Tensor, grad_FD: Tensor, project: bool) -> Tensor:
    """[] sum of the squares of the gradient ([n] for stacked weights [n, F, D]), with `project` of what remains of it
    when the part along each row of W (of unit norm) is dropped."""
    W_FD, grad_FD = W_FD.contiguous(), grad_FD.contiguous()
    D = W_FD.shape[-1]
    squares_F = torch.zeros(W_FD.shape[:-1], dtype=accumulated(W_FD, grad_FD), device=W_FD.device)
    if W_FD.numel():
        BLOCK_D, warps = _row(D)
        with on_device_of(W_FD):
            _squares[squares_F.numel(),](
                W_FD, grad_FD, squares_F, D, project, tl_type(squares_F), BLOCK_D, num_warps=warps
            )
    return squares_F.sum(-1)


def adam_step(
    W_FD: Tensor,
    grad_FD: Tensor,
    exp_avg_FD: Tensor,
    exp_avg_sq_FD: Tensor,
    *,
    step: Tensor,
    lr: float | Tensor,
    scale: Tensor,
    project: bool,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of Adam (Kingma & Ba 2015, algorithm 1) as `torch.optim.Adam` takes it, in place.

    Args:
        W_FD: the weight [F, D], or [n, F, D]: n dictionaries.
        grad_FD: its gradient, in any floating type; left as it is.
        exp_avg_FD, exp_avg_sq_FD: Adam's moments.
        step: the number of this step, 1 for the first: on the device, [] or [n].
        lr: learning rate; as a tensor [] or [n] on the device.
        scale: what the gradient is multiplied with (after the projection): on the device, [] or [n].
        project: before, drop the part of the gradient along each row; after, scale each row to unit norm.

    Raises:
        ValueError: a tensor that would be changed is not contiguous, shapes differ, or a beta is not in [0, 1).
    """
    for tensor in (W_FD, exp_avg_FD, exp_avg_sq_FD):
        if not tensor.is_contiguous() or tensor.shape != grad_FD.shape:
            raise ValueError(
                f"weight, gradient and moments must be contiguous and of one shape, got {tuple(tensor.shape)} with "
                f"strides {tensor.stride()} beside a gradient of {tuple(grad_FD.shape)}"
            )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    if not W_FD.numel():
        return
    *stacked, F, D = W_FD.shape
    n = math.prod(stacked)
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float64, device=W_FD.device)  # a launch, no copy from the host
    step_n, lr_n, scale_n = (scalar.expand(n) for scalar in (step, lr, scale))
    log_betas = (math.log(beta) if beta else -math.inf for beta in betas)
    acc = torch.empty(0, dtype=accumulated(W_FD, grad_FD))
    BLOCK_D, warps = _row(D)
    with on_device_of(W_FD):
        _adam[n * F,](
            W_FD, grad_FD.contiguous(), exp_avg_FD, exp_avg_sq_FD,
            step_n, step_n.stride(0), lr_n, lr_n.stride(0), scale_n, scale_n.stride(0), F, D,
            *betas, *log_betas, eps, torch.finfo(acc.dtype).tiny, project, tl_type(acc), BLOCK_D, num_warps=warps,
        )  # fmt: skip


def _row(D: int) -> tuple[int, int]:
    """The block that holds a row, and warps for it: 16 values a thread up to 8,192."""
    BLOCK_D = triton.next_power_of_2(D)
    return BLOCK_D, min(16, max(1, BLOCK_D // 512))


@triton.jit
def _squares(W_FD, grad_FD, squares_F, D, PROJECT: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    f = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    g = tl.load(grad_FD + f * D + d_D, mask=d_D < D, other=0.0).to(ACC)
    if PROJECT:
        w = tl.load(W_FD + f * D + d_D, mask=d_D < D, other=0.0).to(ACC)
        g -= tl.sum(w * g, 0) * w
    tl.store(squares_F + f, tl.sum(g * g, 0))


@triton.jit
def _adam(
    W_FD, grad_FD, exp_avg_FD, exp_avg_sq_FD,
    step_n, step_stride, lr_n, lr_stride, scale_n, scale_stride, F, D,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr, TINY: tl.constexpr, PROJECT: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    dictionary = f // F
    step = tl.load(step_n + dictionary * step_stride).to(tl.float64)
    lr = tl.load(lr_n + dictionary * lr_stride).to(tl.float64)
    scale = tl.load(scale_n + dictionary * scale_stride).to(ACC)
    step_size = (lr / (1.0 - tl.exp(step * LOG_BETA1))).to(ACC)
    root = tl.sqrt(1.0 - tl.exp(step * LOG_BETA2)).to(ACC)

    d_D = tl.arange(0, BLOCK_D)
    inside, at = d_D < D, f * D + d_D
    w = tl.load(W_FD + at, mask=inside, other=0.0).to(ACC)
    g = tl.load(grad_FD + at, mask=inside, other=0.0).to(ACC)
    m = tl.load(exp_avg_FD + at, mask=inside, other=0.0).to(ACC)
    v = tl.load(exp_avg_sq_FD + at, mask=inside, other=0.0).to(ACC)
    if PROJECT:
        g -= tl.sum(w * g, 0) * w
    g *= scale
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    w -= step_size * (m / (tl.sqrt(v) / root + EPS))
    if PROJECT:
        w /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), 0)), TINY)
    tl.store(W_FD + at, w, mask=inside)
    tl.store(exp_avg_FD + at, m, mask=inside)
    tl.store(exp_avg_sq_FD + at, v, mask=inside)
