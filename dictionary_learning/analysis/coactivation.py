"""Which latents fire together? Exact counts of all pairs of the most active latents.

In: the active codes of chunks, in order. Out: the latents M and counts [M, M]. All F x F pairs would be 2 GB at 16,384
latents, and most of them 0. So twice as many candidates as wanted are chosen after `CHOICE_ROWS` rows; what fired until
then is held, and counted from row 0 on. Of the candidates the most active in the end are reported: whoever is among
the M most active of the whole stream, but not among the 2 M of its beginning, is missed.

A chunk costs one product of 0/1 matrices, dense or, on the CPU where few are on, sparse; exact in float32 as long as a
chunk has less than 2^24 rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from dictionary_learning.analysis.active import Active

CHOICE_ROWS = 20_480
HELD = 1 << 20  # active codes held at most before the choice, and one chunk's more: 8 MiB
_BLOCK_ROWS = 4096
_SPARSE = 1 / 8  # share of ones below which the sparse product is faster


class CoactivePairs:
    """Counts of pairs among `number` latents, of F."""

    def __init__(self, dict_size: int, number: int, device: torch.device | str = "cpu") -> None:
        self.dict_size, self.number, self.device = dict_size, min(number, dict_size), torch.device(device)
        self.candidates_M: Tensor | None = None  # int64, sorted; None before the choice
        self.pairs_MM = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._held: list[Tensor] = []  # int32 [2, K] row, latent
        self._rows = 0  # while holding

    @torch.no_grad()
    def add(self, active: Active) -> None:
        if not self.number:
            return
        if self.candidates_M is not None:
            self.pairs_MM += _pairs(active.codes_NF.index_select(1, self.candidates_M).ne_(0))
            return
        self._held.append(torch.stack([active.row_K + self._rows, active.latent_K]).int())
        self._rows += len(active.codes_NF)
        if self._rows >= CHOICE_ROWS or sum(held.shape[1] for held in self._held) >= HELD:
            self.candidates_M, self.pairs_MM = self._choose()
            self._held, self._rows = [], 0

    def _choose(self) -> tuple[Tensor, Tensor]:
        """The candidates, and the pairs among them in the rows held."""
        if not self._held:
            return torch.zeros(0, dtype=torch.int64, device=self.device), self.pairs_MM
        row_K, latent_K = torch.cat(self._held, dim=1)
        active_F = torch.bincount(latent_K[row_K < CHOICE_ROWS], minlength=self.dict_size)
        candidates_M = _most(active_F, _candidates(self.dict_size, self.number)).sort().values
        slot_F = torch.full((self.dict_size,), -1, device=self.device)
        slot_F[candidates_M] = torch.arange(len(candidates_M), device=self.device)
        slot_K = slot_F[latent_K.long()]
        row_K, slot_K = row_K[slot_K >= 0].long(), slot_K[slot_K >= 0]
        pairs_MM = torch.zeros(len(candidates_M), len(candidates_M), dtype=torch.int64, device=self.device)
        for first in range(0, self._rows, _BLOCK_ROWS):
            here_K = (row_K >= first) & (row_K < first + _BLOCK_ROWS)
            on_NM = torch.zeros(_BLOCK_ROWS, len(candidates_M), device=self.device)
            on_NM[row_K[here_K] - first, slot_K[here_K]] = 1
            pairs_MM += _pairs(on_NM)
        return candidates_M, pairs_MM

    def result(self, active_F: Tensor) -> tuple[Tensor, Tensor]:
        """(latents [M] int64, counts [M, M] int64 of rows in which both fired), the most active first; latents that
        never fired are left out. active_F: int64, rows in which each latent fired."""
        candidates_M, pairs_MM = self._choose() if self.candidates_M is None else (self.candidates_M, self.pairs_MM)
        order = _most(active_F[candidates_M], self.number)
        return candidates_M[order], pairs_MM[order][:, order]

    def state_dict(self) -> dict[str, Any]:
        return {
            "candidates": self.candidates_M,
            "pairs": self.pairs_MM,
            "held": torch.cat(self._held, dim=1) if self._held else None,
            "rows": self._rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, copy=True)

        self.candidates_M, pairs_MM, held = own(state["candidates"]), own(state["pairs"]), own(state["held"])
        assert pairs_MM is not None
        self.pairs_MM, self._held, self._rows = pairs_MM, [] if held is None else [held], state["rows"]


def _most(counts: Tensor, number: int) -> Tensor:
    """Places of the `number` largest counts that are not 0, the largest first and the earlier of equal ones first."""
    ordered = counts.sort(descending=True, stable=True)
    return ordered.indices[:number][ordered.values[:number] > 0]


def _pairs(on_NM: Tensor) -> Tensor:
    """[M, M] int64, rows in which both are 1 and not 0."""
    n, M = on_NM.shape
    if on_NM.device.type != "cpu" or on_NM.count_nonzero() > _SPARSE * on_NM.numel():
        return (on_NM.t() @ on_NM).long()
    place_K = on_NM.t().contiguous().view(-1).nonzero().flatten()
    begin_M = torch.searchsorted(place_K, n * torch.arange(M))
    return functional.embedding_bag(place_K % n, on_NM, begin_M, mode="sum").long()  # sums of the rows where one is on


def bytes_of_pairs(dict_size: int, number: int) -> int:
    """Bytes that `CoactivePairs` keeps at most, besides one chunk's active codes."""
    candidates = _candidates(dict_size, number)
    return 8 * candidates * (candidates + 1) + (8 * HELD if number else 0)


def working_bytes_of_pairs(dict_size: int, number: int, rows: int) -> int:
    """Bytes that `CoactivePairs` takes for a moment, with chunks of so many rows."""
    candidates = _candidates(dict_size, number)
    choice = 64 * HELD + 4 * _BLOCK_ROWS * candidates if number else 0
    return choice + 4 * rows * candidates + 24 * candidates**2


def _candidates(dict_size: int, number: int) -> int:
    return min(2 * min(number, dict_size), dict_size)
