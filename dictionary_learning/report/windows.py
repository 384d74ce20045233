"""The tokens of all examples, each place of the corpus kept once.

In: examples of any number of dictionaries. Out: one array of tokens, and where in it each example's window begins.

The best examples of different latents, and still more of different dictionaries, lie in the same documents, and their
windows overlap. Kept once, the texts of a sweep of twelve dictionaries take about a tenth of the room.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dictionary_learning.analysis.types import Examples

ROWS_AT_ONCE = 1 << 15  # windows whose tokens are copied together: bounds the memory of the index


def pooled_windows(parts: Sequence[Examples]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """(token_T, [(start_FE, first_FE, length_FE)]): int64; of part p the example [f, e] is
    token_T[start : start + length], and its first token is at [f, e, first] of the window. Length 0: no example."""
    bounds = [_inside(part) for part in parts]
    begins, ends, documents, rows = [], [], [], []
    for part, (first_FE, length_FE) in zip(parts, bounds, strict=True):
        begin_FE = part.position_FE.astype(np.int64) - part.peak_FE + first_FE
        there_FE = length_FE > 0
        begins.append(begin_FE[there_FE])
        ends.append((begin_FE + length_FE)[there_FE])
        documents.append(part.document_FE[there_FE])
        rows.append(part.token_FEW[there_FE])
    begin_N, end_N, document_N = np.concatenate(begins), np.concatenate(ends), np.concatenate(documents)
    start_N, size = _merged(begin_N, end_N, document_N)
    first_N = np.concatenate([first[length > 0] for first, length in bounds])
    token_T, clash_N = _filled(rows, start_N, first_N, end_N - begin_N, size)
    if len(clash_N):  # other tokens at the same place of the same document: each such window for itself
        start_N[clash_N] = size + np.concatenate([[0], np.cumsum((end_N - begin_N)[clash_N])[:-1]])
        size += int((end_N - begin_N)[clash_N].sum())
        token_T, _ = _filled(rows, start_N, first_N, end_N - begin_N, size)
    starts, taken = [], 0
    for first_FE, length_FE in bounds:
        start_FE = np.zeros(length_FE.shape, np.int64)
        count = int((length_FE > 0).sum())
        start_FE[length_FE > 0] = start_N[taken : taken + count]
        starts.append((start_FE, first_FE, length_FE))
        taken += count
    return token_T, starts


def _inside(part: Examples) -> tuple[np.ndarray, np.ndarray]:
    """(first_FE, length_FE): which part of each window lies in its document."""
    inside_FEW = part.token_FEW >= 0
    first_FE = inside_FEW.argmax(axis=-1).astype(np.int64)
    last_FE = inside_FEW.shape[-1] - inside_FEW[..., ::-1].argmax(axis=-1)
    there_FE = (part.document_FE >= 0) & inside_FEW.any(axis=-1)
    return first_FE, np.where(there_FE, last_FE - first_FE, 0).astype(np.int64)


def _merged(begin_N: np.ndarray, end_N: np.ndarray, document_N: np.ndarray) -> tuple[np.ndarray, int]:
    """(start_N, size): where each window lies when overlapping ones of a document are one stretch, all in a row."""
    if len(begin_N) == 0:
        return np.zeros(0, np.int64), 0
    _, rank_N = np.unique(document_N, return_inverse=True)
    span = int(end_N.max() - begin_N.min()) + 1
    low_N = rank_N * span + (begin_N - begin_N.min())
    high_N = low_N + (end_N - begin_N)
    order = np.argsort(low_N, kind="stable")
    reach = np.maximum.accumulate(high_N[order])
    fresh = np.r_[True, low_N[order][1:] > reach[:-1]]
    stretch = np.cumsum(fresh) - 1
    head = low_N[order][fresh]
    lengths = np.maximum.reduceat(high_N[order], np.flatnonzero(fresh)) - head
    base = np.concatenate([[0], np.cumsum(lengths)])
    start_N = np.empty_like(low_N)
    start_N[order] = base[stretch] + low_N[order] - head[stretch]
    return start_N, int(base[-1])


def _filled(
    rows: Sequence[np.ndarray], start_N: np.ndarray, first_N: np.ndarray, length_N: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(token_T, clash_N): the tokens at their places, and the windows that do not read back as they were."""
    token_T = np.zeros(size, np.int64)
    pieces: list[tuple[slice, np.ndarray]] = []
    at = 0
    for window_NW in rows:
        for low in range(0, len(window_NW), ROWS_AT_ONCE):
            piece = window_NW[low : low + ROWS_AT_ONCE]
            pieces.append((slice(at, at + len(piece)), piece))
            at += len(piece)

    def place(which: slice, width: int) -> tuple[np.ndarray, np.ndarray]:
        offset_NW = np.arange(width) - first_N[which, None]
        return start_N[which, None] + offset_NW, (offset_NW >= 0) & (offset_NW < length_N[which, None])

    for which, piece in pieces:
        index_NW, inside_NW = place(which, piece.shape[-1])
        token_T[index_NW[inside_NW]] = piece[inside_NW]
    clashes = []
    for which, piece in pieces:
        index_NW, inside_NW = place(which, piece.shape[-1])
        same_NW = token_T[np.where(inside_NW, index_NW, 0)] == piece if size else np.ones(piece.shape, bool)
        clashes.append(which.start + np.flatnonzero((~same_NW & inside_NW).any(axis=-1)))
    return token_T, np.concatenate(clashes) if clashes else np.zeros(0, np.int64)
