"""The k largest of every row, exactly, by a search over the bits of the k-th largest value.

In: pre-activations [B, F]. Out: values and indices [B, k]. A program holds a row in registers, as integers that order
as the floats do, and finds the k-th largest bit by bit: a bit stays where at least k values are no smaller. It stops
early when exactly k are. What is larger is taken, and of the values equal to the k-th those of lowest index. So ties
are resolved the same way everywhere, which `torch.topk` does not promise, and a row is read from memory once. The
result is in the order of the indices, as that of `torch.topk(sorted=False)` may be: nothing after it needs it sorted.

Rows wider than CHUNK are cut: the k largest of each chunk are found first, then the k largest among those. Values are
taken to be free of NaN; where there are some, the indices are k different ones of the row all the same. The search is
in integers, so nothing rounds. The chunk and the warps are meant for an H100 or H200 (32 values a thread) and are not
measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dictionary_learning.kernels.triton import on_device_of

CHUNK = 32768  # values that one program holds
WRITTEN = 4096  # values whose indices it writes at a time
LARGEST_CHUNK = 1 << 20  # more than this no Triton block holds
KEYS = {
    torch.float64: (tl.int64, 64),
    torch.float32: (tl.int32, 32),
    torch.float16: (tl.int16, 16),
    torch.bfloat16: (tl.int16, 16),
}


class TopK(NamedTuple):
    values: Tensor
    indices: Tensor


def top_k(pre_BF: Tensor, k: int) -> TopK:
    """The k largest values of each row and their indices (int64, ascending), both [B, k]; of equal values those of
    lowest index. Not differentiable: gather at the indices for that. k beyond a quarter of CHUNK is slow.

    Raises:
        ValueError: k is not in 0..F, or is over 2^18 in rows of more than 2^20.
    """
    F = pre_BF.shape[1]
    if not 0 <= k <= F:
        raise ValueError(f"k must be between 0 and the {F} values of a row, got {k}")
    if k > LARGEST_CHUNK // 4 and F > LARGEST_CHUNK:
        raise ValueError(f"k may be at most {LARGEST_CHUNK // 4} in rows of {F}, got {k}")
    pre_BF = pre_BF.detach().contiguous()
    indices_Bk = _chosen(pre_BF, k)
    return TopK(pre_BF.gather(1, indices_Bk), indices_Bk)


def _chosen(pre_BF: Tensor, k: int) -> Tensor:
    """[B, k] indices, by way of the candidates of each chunk where there are several."""
    B, F = pre_BF.shape
    chunk = max(CHUNK, triton.next_power_of_2(4 * k))  # so that a round leaves less than half
    chunks = max(1, triton.cdiv(F, chunk))
    width = triton.cdiv(F, chunks)  # over half a chunk, and the last one has more than k values too
    indices_Bck = torch.empty((B, chunks, k), dtype=torch.int64, device=pre_BF.device)
    if indices_Bck.numel():
        block = max(32, triton.next_power_of_2(width))
        with on_device_of(pre_BF):
            _largest[B, chunks](
                pre_BF,
                indices_Bck,
                F,
                width,
                k,
                *KEYS[pre_BF.dtype],
                block,
                min(block, WRITTEN),
                num_warps=min(32, max(1, block // 1024)),
            )
    candidates_BC = indices_Bck.view(B, chunks * k)
    if chunks == 1:
        return candidates_BC
    # Candidates are in the order of their indices, so the lowest place among equals is the lowest index too.
    return candidates_BC.gather(1, _chosen(pre_BF.gather(1, candidates_BC), k))


@triton.jit
def _keys(row, i_C, size, INT: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr):
    """Integers that order as the row's floats; the least one outside of it."""
    LEAST: tl.constexpr = -(2 ** (BITS - 1))
    x = tl.load(row + i_C, mask=i_C < size, other=0.0)
    bits = x.to(INT, bitcast=True).to(WIDE)
    bits = tl.where(bits == LEAST, 0, bits)  # -0, which is no less than 0
    # The bits of floats order as integers do, once those below the sign of the negative ones are turned over.
    return tl.where(i_C < size, bits ^ ((bits >> (BITS - 1)) & (-1 - LEAST)), LEAST)


@triton.jit(do_not_specialize=["k"])
def _largest(
    pre_BF, indices_Bck, F, width, k,
    INT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * width
    row = pre_BF + b * F + start
    size = tl.minimum(width, F - start)
    i_C = tl.arange(0, BLOCK)
    key = _keys(row, i_C, size, INT, BITS, WIDE)

    # Invariant: n >= k values are no smaller than the threshold.
    n = tl.sum((key >= 0).to(tl.int32), 0)
    threshold = tl.where(n >= k, 0, tl.full((), -(2 ** (BITS - 1)), WIDE))
    n = tl.where(n >= k, n, size)
    bit = BITS - 2
    while (bit >= 0) & (n != k):
        higher = threshold | (tl.full((), 1, WIDE) << bit)
        m = tl.sum((key >= higher).to(tl.int32), 0)
        threshold = tl.where(m >= k, higher, threshold)
        n = tl.where(m >= k, m, n)
        bit -= 1

    # Written by smaller blocks, read anew: scans over whole rows would not fit the registers beside the keys.
    equals = k - tl.sum((key > threshold).to(tl.int32), 0)  # how many of those equal to the threshold are wanted
    out = indices_Bck + (b * tl.num_programs(1) + tl.program_id(1)) * k
    for first in range(0, size, WRITTEN):
        j_W = first + tl.arange(0, WRITTEN)
        part = _keys(row, j_W, size, INT, BITS, WIDE)
        equal = ((j_W < size) & (part == threshold)).to(tl.int32)
        take = (part > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= equals))
        place = tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(out + place, (start + j_W).to(tl.int64), mask=take)
        equals -= tl.sum(equal, 0)
        out += tl.sum(take.to(tl.int32), 0)
