"""How often latents fire in each corpus, in rows and in documents: exact counts, and sums of rates within documents.

In: the active codes of chunks, in order. Out: sums a corpus and latent. A document may go on over any number of chunks;
what fired in the one that is still open is kept apart ([F] counts) until the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.types import Provenance
from dictionary_learning.analysis.active import Active, add_at


class _Sums(NamedTuple):
    """What is counted a corpus and latent, [C, F]; see `FeatureStatistics`. Rates in float64."""

    active_CF: Tensor
    documents_CF: Tensor
    rate_sum_CF: Tensor
    rate_square_CF: Tensor


class _Open(NamedTuple):
    """The document that may go on in the next chunk."""

    document: int
    corpus: int
    rows: int


class CorpusSums:
    """Sums over rows and documents, by corpus.

    Attributes:
        rows_C, documents_C: rows, and documents that began, of each corpus so far.
        sums: of the documents that are closed (and of all rows).
    """

    def __init__(self, dict_size: int, device: torch.device | str = "cpu") -> None:
        self.dict_size, self.device = dict_size, torch.device(device)
        self.rows_C: list[int] = []
        self.documents_C: list[int] = []
        self.sums = _Sums(*(torch.zeros(0, dict_size, dtype=dtype, device=device) for dtype in _DTYPES))
        self._open: _Open | None = None
        self._open_F = torch.zeros(dict_size, dtype=torch.int64, device=device)

    def add(self, active: Active, provenance: Provenance | None) -> None:
        """Take in a chunk and its provenance (on the CPU; None: one corpus, no documents)."""
        n = len(active.codes_NF)
        if provenance is None:
            self._make_room(1)
            self.rows_C[0] += n
            self.sums.active_CF[0] += torch.bincount(active.latent_K, minlength=self.dict_size)
            return
        assert active.rows is not None
        corpus_N = provenance.corpus_N.numpy()
        self._make_room(int(corpus_N.max()) + 1)
        self.rows_C = [sum(pair) for pair in zip(self.rows_C, _counts(corpus_N, len(self.rows_C)), strict=True)]
        place_K = active.rows.corpus_N[active.row_K] * self.dict_size + active.latent_K
        self.sums.active_CF.view(-1).index_add_(0, place_K, torch.ones_like(place_K))
        self._add_documents(active, provenance.document_N.numpy(), corpus_N)

    def _add_documents(self, active: Active, document_N: np.ndarray, corpus_N: np.ndarray) -> None:
        """The first document of a chunk may be the open one, the last stays open, those between begin and end here."""
        starts_D = np.concatenate([[0], np.flatnonzero(np.diff(document_N)) + 1])
        rows_D = np.diff(starts_D, append=len(document_N))
        ids_D, corpora_D = document_N[starts_D].tolist(), corpus_N[starts_D].tolist()
        continues = self._open is not None and self._open.document == ids_D[0]
        for corpus, began in enumerate(_counts(corpus_N[starts_D[continues:]], len(self.documents_C))):
            self.documents_C[corpus] += began
        last = len(starts_D) - 1
        document_K = self._sent(np.repeat(np.arange(last + 1), rows_D))[active.row_K]
        for d in dict.fromkeys((0, last)):  # a chunk may lie in one document
            if d == 0 and continues:
                assert self._open is not None
                self._open = self._open._replace(rows=self._open.rows + int(rows_D[0]))
            else:
                self._close(self.sums)
                if d == last and last > 1:
                    self._add_between(active, document_K, rows_D, corpora_D)
                self._open = _Open(ids_D[d], corpora_D[d], int(rows_D[d]))
            self._open_F.index_add_(0, active.latent_K, (document_K == d).long())

    def _add_between(self, active: Active, document_K: Tensor, rows_D: np.ndarray, corpora_D: Sequence[int]) -> None:
        """Documents 1 to D - 2 of a chunk."""
        documents, F = len(rows_D), self.dict_size
        place_K = document_K * F + active.latent_K
        if documents == len(active.codes_NF):  # one row each: every active code is a document's
            inside_K = (document_K > 0) & (document_K < documents - 1)
            place_P, count_P = place_K[inside_K], torch.ones_like(place_K[inside_K])
        else:
            count_DF = torch.bincount(place_K, minlength=documents * F)
            count_DF[:F] = 0
            count_DF[(documents - 1) * F :] = 0
            place_P = count_DF.nonzero().flatten()
            count_P = count_DF[place_P]
        document_P = place_P // F
        target_P = self._sent(np.array(corpora_D))[document_P] * F + place_P % F
        rate_P = count_P.double() / self._sent(rows_D)[document_P]
        self.sums.documents_CF.view(-1).index_add_(0, target_P, torch.ones_like(target_P))
        add_at(self.sums.rate_sum_CF.view(-1), target_P, rate_P)
        add_at(self.sums.rate_square_CF.view(-1), target_P, rate_P.square())

    def _close(self, sums: _Sums) -> None:
        """Add the open document to `sums`."""
        if self._open is None:
            return
        rate_F = self._open_F.double() / self._open.rows
        sums.documents_CF[self._open.corpus] += self._open_F > 0
        sums.rate_sum_CF[self._open.corpus] += rate_F
        sums.rate_square_CF[self._open.corpus] += rate_F.square()
        if sums is self.sums:
            self._open = None
            self._open_F.zero_()

    def closed(self, corpora: int) -> _Sums:
        """The sums with the open document in them, for at least so many corpora. The pass can go on afterwards."""
        self._make_room(corpora)
        sums = _Sums(*(tensor.clone() for tensor in self.sums))
        self._close(sums)
        return sums

    def _make_room(self, corpora: int) -> None:
        more = corpora - len(self.rows_C)
        if more > 0:
            self.rows_C, self.documents_C = [*self.rows_C, *[0] * more], [*self.documents_C, *[0] * more]
            self.sums = _Sums(*(torch.cat([old, old.new_zeros(more, self.dict_size)]) for old in self.sums))

    def _sent(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows_C,
            "documents": self.documents_C,
            "sums": self.sums._asdict(),
            "open": None if self._open is None else list(self._open),
            "open_counts": self._open_F,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows_C, self.documents_C = list(state["rows"]), list(state["documents"])
        self.sums = _Sums(**{name: tensor.to(self.device, copy=True) for name, tensor in state["sums"].items()})
        self._open = None if state["open"] is None else _Open(*state["open"])
        self._open_F = state["open_counts"].to(self.device, copy=True)


_DTYPES = (torch.int64, torch.int64, torch.float64, torch.float64)


def _counts(numbers: np.ndarray, length: int) -> list[int]:
    return np.bincount(numbers, minlength=length).tolist()


def bytes_of_sums(dict_size: int, corpora: int) -> int:
    """Bytes that `CorpusSums` keeps."""
    return 8 * dict_size * (4 * corpora + 1)
