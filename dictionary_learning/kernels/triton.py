"""The sparse products of a training step as Triton kernels, for CUDA (and for Triton's interpreter on the CPU).

In: the N active entries of a code matrix [B, F] (`Entries`), their values, and rows of weights or of a batch. Out: the
four products of `kernels.Kernels`. Nothing of size [N, D] is written, no kernel waits for the host, and grids follow
from shapes alone, so that a step can be captured in a CUDA graph.

Three of the four are the same sum over segments: of a row's entries in `bags`, of a latent's (which are found by
sorting the entries by latent) in `weight_gradient` and `latent_sums`. Most segments are short; a dense latent has
thousands of entries, and one program that sums them all would be what the rest waits for. So the entries are also cut
into windows of WINDOW at fixed places. A window that lies in one segment alone is summed by a program of its own; a
segment then adds its windows and the entries before and behind them, fewer than 2 * WINDOW.

Results are float32, or float64 where an input is, whatever the inputs' types: sums are kept in that type, and rounding
them is the caller's choice. Every sum has one order, given by the shapes and the constants below (no atomics, no
autotuning), so equal inputs give equal bits; other constants would change the rounding and nothing else. They are
meant for an H100 or H200 (16 values a thread, 16-byte loads, slices of W that fit the L2 cache) and are not measured.
Inputs that are not contiguous are copied first. Offsets are 64-bit: F * D may exceed 2^31. Indices are not checked.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dictionary_learning.kernels import Entries

WINDOW = 128  # entries of one segment that are summed by a program of their own
TILE = 2048  # values in a tile of entries x dimensions
WIDEST = 256  # dimensions in a tile
NUM_WARPS = 4


def bags(values_N: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
    """[B, D], for each row the sum over its entries of value * W[latent]; rows without entries give 0."""
    out_BD = _empty((entries.n_rows, W_FD.shape[1]), values_N, W_FD)
    return _segment_sums(values_N, entries.rows_N, entries.offsets_B, None, entries.latents_N, W_FD, out_BD)


def dots(rows_BD: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
    """[N], for each entry rows[row] . W[latent]."""
    rows_BD, W_FD = rows_BD.contiguous(), W_FD.contiguous()
    out_N = _empty((len(entries.latents_N),), rows_BD, W_FD)
    N, D = len(out_N), W_FD.shape[1]
    if N:
        BLOCK_N, BLOCK_D = _tile(D)
        with on_device_of(W_FD):
            _dots[triton.cdiv(N, BLOCK_N),](
                rows_BD, entries.rows_N.contiguous(), W_FD, entries.latents_N.contiguous(), out_N, N, D,
                tl_type(out_N), BLOCK_N, BLOCK_D, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out_N


def weight_gradient(values_N: Tensor, entries: Entries, rows_BD: Tensor) -> Tensor:
    """[F, D], for each latent the sum over its entries of value * rows[row]; latents without entries give 0."""
    out_FD = _empty((entries.n_latents, rows_BD.shape[1]), values_N, rows_BD)
    order_N, rows_N, firsts_F = entries.by_latent
    return _segment_sums(values_N, entries.latents_N, firsts_F, order_N, rows_N, rows_BD, out_FD)


def latent_sums(values_N: Tensor, entries: Entries) -> Tensor:
    """[F], for each latent the sum of its entries' values."""
    out_F1 = _empty((entries.n_latents, 1), values_N)
    order_N, _, firsts_F = entries.by_latent
    return _segment_sums(values_N, entries.latents_N, firsts_F, order_N, None, None, out_F1)[:, 0]


def _segment_sums(
    values_N: Tensor,
    segments_N: Tensor,
    firsts_S: Tensor,
    order_N: Tensor | None,
    picks_N: Tensor | None,
    rows_RD: Tensor | None,
    out_SD: Tensor,
) -> Tensor:
    """Fill `out_SD`, for each segment, with the sum of value * rows[pick] over its entries (of the values alone where
    there are no rows). Segment s has the places firsts[s] to firsts[s + 1]; the entry at a place is `order_N`'s, or
    that of the same number. Picks are by place, values and `segments_N` (the segment of each) by entry."""
    S, D = out_SD.shape
    if not out_SD.numel():
        return out_SD
    N, (BLOCK_N, BLOCK_D) = len(values_N), _tile(D)
    windows_WD = out_SD.new_empty(N // WINDOW, D)
    # A kernel does not look at what stands in for the order, the picks and the rows where there are none.
    read = [firsts_S if one is None else one.contiguous() for one in (values_N, order_N, picks_N, rows_RD)]
    constants = WINDOW, order_N is not None, rows_RD is not None, tl_type(out_SD), BLOCK_N, BLOCK_D
    with on_device_of(out_SD):
        if len(windows_WD):
            _window_sums[len(windows_WD), triton.cdiv(D, BLOCK_D)](
                *read, segments_N.contiguous(), windows_WD, D, *constants, num_warps=NUM_WARPS
            )
        _add_up[S, triton.cdiv(D, BLOCK_D)](
            *read, firsts_S.contiguous(), windows_WD, out_SD, N, S, D, *constants, num_warps=NUM_WARPS
        )
    return out_SD


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current CUDA device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def accumulated(*tensors: Tensor) -> torch.dtype:
    """The type that sums over these tensors are kept in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def tl_type(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _empty(shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
    return torch.empty(shape, dtype=accumulated(*inputs), device=inputs[0].device)


def _tile(D: int) -> tuple[int, int]:
    """Entries and dimensions of a tile: narrow rows leave room for more entries."""
    BLOCK_D = min(WIDEST, triton.next_power_of_2(D))
    return min(WINDOW, TILE // BLOCK_D), BLOCK_D


# In a tile, entry n is added to lane n mod BLOCK_N, and the lanes are added up at the end: so BLOCK_N independent loads
# are in flight, and the order of summation is fixed.


@triton.jit(do_not_specialize=["N"])
def _dots(
    rows_BD, rows_N, W_FD, latents_N, out_N, N, D,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # A program per BLOCK_N entries, whatever rows they are of: equal work. Neighbours share a row, which L1 keeps.
    n_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N = tl.load(rows_N + n_N, mask=n_N < N, other=0)
    latent_N = tl.load(latents_N + n_N, mask=n_N < N, other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for d in range(0, D, BLOCK_D):
        d_D = d + tl.arange(0, BLOCK_D)
        inside = (n_N < N)[:, None] & (d_D < D)[None, :]
        x = tl.load(rows_BD + row_N[:, None] * D + d_D[None, :], mask=inside, other=0.0)
        w = tl.load(W_FD + latent_N[:, None] * D + d_D[None, :], mask=inside, other=0.0)
        acc += x.to(ACC) * w.to(ACC)
    tl.store(out_N + n_N, tl.sum(acc, 1), mask=n_N < N)


@triton.jit
def _add_entries(
    acc, first, last, values_N, order_N, picks_N, rows_RD, d_D, D,
    ORDERED: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc plus value * rows[pick] of the places from first to before last."""
    for n in range(first, last, BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        entry_N = n_N
        if ORDERED:
            entry_N = tl.load(order_N + n_N, mask=n_N < last, other=0)
        value_N = tl.load(values_N + entry_N, mask=n_N < last, other=0.0).to(ACC)
        if ROWS:
            pick_N = tl.load(picks_N + n_N, mask=n_N < last, other=0)
            inside = (n_N < last)[:, None] & (d_D < D)[None, :]
            x = tl.load(rows_RD + pick_N[:, None] * D + d_D[None, :], mask=inside, other=0.0)
            acc += value_N[:, None] * x.to(ACC)
        else:
            acc += value_N[:, None]
    return acc


@triton.jit
def _window_sums(
    values_N, order_N, picks_N, rows_RD, segments_N, windows_WD, D,
    WINDOW: tl.constexpr, ORDERED: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    first = window * WINDOW
    one, other = first, first + WINDOW - 1
    if ORDERED:
        one = tl.load(order_N + one)
        other = tl.load(order_N + other)
    # Entries are sorted by segment: equal ends mean one segment throughout. Nobody reads the sums of other windows.
    if tl.load(segments_N + one) == tl.load(segments_N + other):
        d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        acc = _add_entries(
            acc, first, first + WINDOW, values_N, order_N, picks_N, rows_RD, d_D, D, ORDERED, ROWS, ACC, BLOCK_N
        )  # fmt: skip
        tl.store(windows_WD + window * D + d_D, tl.sum(acc, 0), mask=d_D < D)


@triton.jit(do_not_specialize=["N", "S"])
def _add_up(
    values_N, order_N, picks_N, rows_RD, firsts_S, windows_WD, out_SD, N, S, D,
    WINDOW: tl.constexpr, ORDERED: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(firsts_S + s)
    last = tl.load(firsts_S + s + 1, mask=s + 1 < S, other=N)
    # The windows that lie in this segment alone, and the entries before and behind them. Often there are no windows.
    window_first = (first + WINDOW - 1) // WINDOW
    window_last = last // WINDOW
    some = window_first < window_last
    head = tl.where(some, window_first * WINDOW, last)
    tail = tl.where(some, window_last * WINDOW, last)
    acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    acc = _add_entries(acc, first, head, values_N, order_N, picks_N, rows_RD, d_D, D, ORDERED, ROWS, ACC, BLOCK_N)
    acc = _add_entries(acc, tail, last, values_N, order_N, picks_N, rows_RD, d_D, D, ORDERED, ROWS, ACC, BLOCK_N)
    for window in range(window_first, window_last, BLOCK_N):
        window_N = window + tl.arange(0, BLOCK_N)
        inside = (window_N < window_last)[:, None] & (d_D < D)[None, :]
        acc += tl.load(windows_WD + window_N[:, None] * D + d_D[None, :], mask=inside, other=0.0)
    tl.store(out_SD + s * D + d_D, tl.sum(acc, 0), mask=d_D < D)
