"""Places drawn from the whole stream with the latents that fire around them: texts in which a latent is known silent.

In: the active codes of chunks, in order. Out: `Probes`. Whoever judges a description needs texts that do not hold the
feature. That a text is none of a latent's kept examples does not say so; here every latent's codes are looked at while
they are there, for `PLACES` windows that all latents share, which costs a byte a latent and place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.analysis.active import Active
from dictionary_learning.analysis.examples import EMPTY, random_keys
from dictionary_learning.analysis.types import Probes

PLACES = 256
BEFORE, BEHIND = 16, 8  # tokens of text around a place
WIDTH = BEFORE + 1 + BEHIND


class ProbePlaces:
    """`PLACES` rows drawn uniformly from the stream, each with the text around it and the latents that fire there.

    Args:
        whole: rows are whole texts: what fires is what fires in the row, and no window is kept.
    """

    def __init__(self, dict_size: int, whole: bool, device: torch.device | str = "cpu") -> None:
        self.whole, self.device = whole, torch.device(device)

        def full(*shape: int, value: int = -1, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((PLACES, *shape), value, dtype=dtype, device=device)

        self._kept = {
            "score_R": full(value=EMPTY),
            "row_R": full(),
            "document_R": full(),
            "corpus_R": full(dtype=torch.int16),
            "token_RW": full(0 if whole else WIDTH, dtype=torch.int32),
            "fired_RF": full(dict_size, value=0, dtype=torch.bool),
        }

    def offer(self, active: Active, seed: int) -> None:
        """Draw from the stream's next chunk, too: reservoir sampling by keys, as of examples."""
        rows, kept = active.rows, self._kept
        assert rows is not None
        row_N = torch.arange(len(active.codes_NF), device=self.device)
        score_N = random_keys(row_N + active.first_row + 1, seed)
        best_R = torch.cat([kept["score_R"], score_N]).argsort(descending=True, stable=True)[:PLACES]
        free_R = torch.ones(PLACES, dtype=torch.bool, device=self.device)
        free_R[best_R[best_R < PLACES]] = False
        place_P, row_P = free_R.nonzero().flatten(), best_R[best_R >= PLACES] - PLACES
        if not len(row_P):
            return
        width = 1 if self.whole else WIDTH
        start_P, end_P = rows.start_N[row_P], rows.end_N[row_P]
        begin_P = row_P if self.whole else torch.maximum(torch.minimum(row_P - BEFORE, end_P - width), start_P)
        row_PW = begin_P[:, None] + torch.arange(width, device=self.device)
        inside_PW = row_PW < end_P[:, None]
        row_PW = torch.where(inside_PW, row_PW, row_P[:, None])
        fired_PF = active.codes_NF[row_P] != 0
        for row_of_P in row_PW.unbind(1):  # a column at a time: all of them at once would be W dense codes a place
            fired_PF |= active.codes_NF[row_of_P] != 0
        new = {
            "score_R": score_N[row_P],
            "row_R": row_P + active.first_row,
            "document_R": rows.document_N[row_P],
            "corpus_R": rows.corpus_N[row_P],
            "token_RW": torch.where(inside_PW, rows.token_N[row_PW], -1)[:, : kept["token_RW"].shape[1]],
            "fired_RF": fired_PF,
        }
        for name, tensor in new.items():
            kept[name][place_P] = tensor.to(kept[name].dtype)

    def result(self) -> Probes:
        """The places so far, in the order of the stream."""
        there = int((self._kept["row_R"] >= 0).sum())
        order_R = self._kept["row_R"].argsort()[PLACES - there :]  # those that are not taken come first

        def ordered(name: str) -> np.ndarray:
            return self._kept[name][order_R].cpu().numpy()

        return Probes(**{name: ordered(name) for name in Probes._fields})

    def state_dict(self) -> dict[str, Any]:
        return dict(self._kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, kept in self._kept.items():
            kept.copy_(state[name])


def bytes_of_probes(dict_size: int) -> int:
    """Bytes that `ProbePlaces` keeps."""
    return PLACES * (dict_size + 4 * WIDTH + 26)


def working_bytes_of_probes(dict_size: int) -> int:
    """Bytes that drawing takes for a moment."""
    return 6 * PLACES * dict_size
