"""Statistics of a dictionary's latents over a stream of activations, in one pass and in bounded memory.

In: batches of rows [N, D] in the order of the stream, and where they come from. Out: `FeatureStatistics`: how often
each latent fires, how strongly, in which documents and corpora, together with which others, and on what texts.

A batch is encoded in chunks, so that the dense code matrix is bounded; each chunk's active codes are found once
(`active.py`), and all statistics are counted from these: `quantiles.py` (histograms), `documents.py` (corpora and
documents), `coactivation.py` (pairs), `examples.py` and `probes.py` (texts). No loop is over rows, latents or
documents. Chunks end where a document or a context ends, so that windows of text are whole; a segment of more than
`SEGMENT_ROWS` rows, and one that goes on in the next batch (no source here makes such), is cut and counts as two.

On the CPU everything but the encoder's rounding is the same whatever the batches; on any device a pass that was saved
and resumed ends bit for bit as an unbroken one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.types import Provenance
from dictionary_learning.analysis.active import Active, Rows, add_at, segment_starts
from dictionary_learning.analysis.coactivation import CoactivePairs, bytes_of_pairs, working_bytes_of_pairs
from dictionary_learning.analysis.documents import CorpusSums, bytes_of_sums
from dictionary_learning.analysis.examples import (
    BestExamples,
    activation_scores,
    bytes_of_examples,
    random_scores,
    working_bytes_of_examples,
)
from dictionary_learning.analysis.probes import ProbePlaces, bytes_of_probes, working_bytes_of_probes
from dictionary_learning.analysis.quantiles import BINS, LogHistogram
from dictionary_learning.analysis.types import QUANTILES, FeatureStatistics
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.kernels.matmul import fast_matmul

CHUNK_CODES = {"cpu": 1 << 22, "cuda": 1 << 24}  # elements of a dense code matrix, unless a segment needs more
SEGMENT_ROWS = 512  # a longer stretch of a document in one context is cut
MOST_ROWS = 2**31 - 1  # of a pass: what the int32 counts of the histograms hold
MOST_WINDOW = 2**15 - 1


class StatisticsPass:
    """The statistics of one dictionary's F latents over a stream of rows, see `FeatureStatistics`.

    Args:
        dictionary: its device is where the state lives (on MPS, which has no float64: the CPU).
        top: examples of highest activation kept a latent, at most one of each stretch of a document in a context.
        samples: examples drawn uniformly from the rows in which a latent fires.
        window: tokens W of text around an example. Sources of whole texts (token -1 everywhere) have W = 0.
        coactive: latents of which all pairs are counted, the most active; 0 counts none.
        seed: of the samples.

    Attributes:
        rows, documents: seen so far.

    Raises:
        UserError: a number that can't be.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        *,
        top: int = 10,
        samples: int = 20,
        window: int = 64,
        coactive: int = 256,
        seed: int = 0,
    ) -> None:
        settings = {"top": top, "samples": samples, "window": window, "coactive": coactive, "seed": seed}
        for name, value in settings.items():
            least = 1 if name in ("top", "samples", "window") else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if window > MOST_WINDOW:
            raise UserError(f"window must be at most {MOST_WINDOW} tokens, got {window}.")
        self.dictionary, self.settings = dictionary, settings
        device = dictionary.decoder_rows.device
        self.device = torch.device("cpu") if device.type == "mps" else device
        F = dictionary.dict_size
        self.rows = 0
        self._unit: str | None = None  # what rows are, known from the first: "token", "text" or "row"
        self._sum_F = torch.zeros(F, dtype=torch.float64, device=self.device)
        self._square_F = torch.zeros_like(self._sum_F)
        self._max_F = torch.zeros(F, device=self.device)
        self._histogram = LogHistogram(F, self.device)
        self._corpora = CorpusSums(F, self.device)
        self._pairs = CoactivePairs(F, coactive, self.device)
        self._top: BestExamples | None = None
        self._samples: BestExamples | None = None
        self._probes: ProbePlaces | None = None

    @property
    def documents(self) -> int:
        return sum(self._corpora.documents_C)

    @torch.no_grad()
    def update(self, x_ND: Tensor, provenance: Provenance | None = None) -> None:
        """Take in a batch of rows, in the order of the stream (a document's rows follow each other, over any number of
        batches and contexts).

        Args:
            x_ND: on any device, of any dtype.
            provenance: without one there are no examples and documents, and one corpus.

        Raises:
            UserError: rows of another width; NaN or infinite codes; rows with a provenance after rows without, texts
                after tokens; more than `MOST_ROWS` rows.
        """
        if x_ND.ndim != 2 or x_ND.shape[1] != self.dictionary.activation_dim:
            width = self.dictionary.activation_dim
            raise UserError(f"The dictionary reads rows of width {width}, got shape {list(x_ND.shape)}.")
        if self.rows + len(x_ND) > MOST_ROWS:
            raise UserError(f"One pass counts at most {MOST_ROWS:,} rows: give a shorter stream.")
        if not len(x_ND):
            return
        self._begin(_unit_of(provenance))
        x_ND = x_ND.to(self.dictionary.decoder_rows.device, self.dictionary.decoder_rows.dtype)
        for chunk in self._chunks(len(x_ND), provenance):
            with fast_matmul():
                codes_NF = self.dictionary.encode(x_ND[chunk]).to(self.device)
            here = None if provenance is None else Provenance(*(column[chunk] for column in provenance))
            self._count(codes_NF, here)

    def _begin(self, unit: str) -> None:
        if self._unit is None:
            self._unit = unit
            F, window = self.dictionary.dict_size, self.settings["window"] if unit == "token" else 0
            self._top = BestExamples(F, self.settings["top"], window, self.device)
            self._samples = BestExamples(F, self.settings["samples"], window, self.device)
            self._probes = None if unit == "row" else ProbePlaces(F, unit == "text", self.device)
        elif unit != self._unit:
            raise UserError(f"The rows so far were of kind '{self._unit}', these are of kind '{unit}': use two passes.")

    def _chunks(self, rows: int, provenance: Provenance | None) -> Iterator[slice]:
        limit = chunk_rows(self.dictionary.dict_size, self.device)
        starts = np.arange(rows) if provenance is None else segment_starts(provenance)
        at = 0
        while at < rows:
            end = min(at + limit, rows)
            if end < rows:  # go back to where a segment begins, unless this one is longer than a chunk may be
                start = int(starts[np.searchsorted(starts, end, side="right") - 1])
                end = start if start > at else end
            yield slice(at, end)
            at = end

    def _count(self, codes_NF: Tensor, provenance: Provenance | None) -> None:
        """Add a chunk to all statistics."""
        rows = None if provenance is None else Rows.of(provenance, self.device)
        active = Active.of(codes_NF, self.rows, rows)
        self.rows += len(codes_NF)
        value_K = active.value_K.double()
        add_at(self._sum_F, active.latent_K, value_K)
        add_at(self._square_F, active.latent_K, value_K.square())
        self._max_F.scatter_reduce_(0, active.latent_K, active.value_K, "amax")
        self._histogram.add(active.latent_K, active.value_K)
        self._corpora.add(active, provenance)
        self._pairs.add(active)
        if rows is not None:
            assert self._top is not None and self._samples is not None and self._probes is not None
            self._top.offer(active, activation_scores(active.value_K), one_a_segment=True)
            self._samples.offer(active, random_scores(active, self.settings["seed"]))
            self._probes.offer(active, self.settings["seed"])

    @torch.no_grad()
    def finish(self, corpora: Sequence[str] = ()) -> FeatureStatistics:
        """The statistics so far; the pass can go on afterwards.

        Args:
            corpora: their names, by `corpus_N`; one beyond them is called by its number, a single one "".

        Raises:
            UserError: there were no rows.
        """
        if self._top is None or self._samples is None:
            raise UserError("There are no statistics: the source gave no rows.")
        sums = self._corpora.closed(len(corpora))
        active_CF, documents_CF, rate_sum_CF, rate_square_CF = (tensor.cpu().numpy() for tensor in sums)
        active_F = sums.active_CF.sum(0)
        n_F = active_F.clamp_min(1)
        mean_F = self._sum_F / n_F
        variance_F = (self._square_F / n_F - mean_F.square()).clamp_min(0)
        coactive_M, coactive_MM = self._pairs.result(active_F)
        unnamed = [f"corpus {number}" for number in range(len(corpora), len(active_CF))]
        return FeatureStatistics(
            rows=self.rows,
            documents=self.documents,
            active_F=active_F.cpu().numpy(),
            documents_F=documents_CF.sum(0),
            mean_F=mean_F.cpu().numpy(),
            std_F=variance_F.sqrt().cpu().numpy(),
            max_F=self._max_F.double().cpu().numpy(),
            quantiles_FQ=self._histogram.quantiles(QUANTILES, self._max_F),
            corpora=[""] if len(active_CF) == 1 and not corpora else [*corpora, *unnamed],
            rows_C=np.array(self._corpora.rows_C, dtype=np.int64),
            documents_C=np.array(self._corpora.documents_C, dtype=np.int64),
            active_CF=active_CF,
            documents_CF=documents_CF,
            rate_sum_CF=rate_sum_CF,
            rate_square_CF=rate_square_CF,
            coactive_M=coactive_M.int().cpu().numpy(),
            coactive_MM=coactive_MM.cpu().numpy(),
            top=self._top.result(),
            samples=self._samples.result(),
            probes=None if self._probes is None else self._probes.result(),
        )

    def state_dict(self) -> dict[str, Any]:
        """For `storage.save_state`. The tensors are those of the pass, not copies: save them before the next update."""
        return {
            "settings": {**self.settings, "dict_size": self.dictionary.dict_size},
            "rows": self.rows,
            "unit": self._unit,
            "sum": self._sum_F,
            "square": self._square_F,
            "max": self._max_F,
            "histogram": self._histogram.counts_FB,
            "corpora": self._corpora.state_dict(),
            "pairs": self._pairs.state_dict(),
            "top": None if self._top is None else self._top.state_dict(),
            "samples": None if self._samples is None else self._samples.state_dict(),
            "probes": None if self._probes is None else self._probes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved, exactly.

        Raises:
            UserError: the state is of a pass with other settings.
        """
        for name, value in {**self.settings, "dict_size": self.dictionary.dict_size}.items():
            if state["settings"][name] != value:
                raise UserError(f"The saved statistics were begun with {name} {state['settings'][name]}, not {value}.")
        for mine, saved in (
            (self._sum_F, state["sum"]),
            (self._square_F, state["square"]),
            (self._max_F, state["max"]),
            (self._histogram.counts_FB, state["histogram"]),
        ):
            mine.copy_(saved)
        self.rows, self._unit, self._top, self._samples = state["rows"], None, None, None
        self._probes = None
        self._corpora.load_state_dict(state["corpora"])
        self._pairs.load_state_dict(state["pairs"])
        if state["unit"] is not None:
            self._begin(state["unit"])
            assert self._top is not None and self._samples is not None
            self._top.load_state_dict(state["top"])
            self._samples.load_state_dict(state["samples"])
            if self._probes is not None:
                self._probes.load_state_dict(state["probes"])


def chunk_rows(dict_size: int, device: torch.device) -> int:
    """Rows that are encoded at once."""
    return max(CHUNK_CODES.get(device.type, CHUNK_CODES["cpu"]) // dict_size, SEGMENT_ROWS)


def bytes_needed(
    dict_size: int,
    *,
    top: int = 10,
    samples: int = 20,
    window: int = 64,
    corpora: int = 1,
    coactive: int = 256,
    l0: float | None = None,
    device: torch.device | str = "cpu",
) -> tuple[int, int]:
    """(bytes of one pass's state, bytes of working memory while a pass is updated), besides the dictionary.

    At the defaults the state is 20 KiB a latent, most of it windows of text. The working memory is needed once, however
    many passes take turns. `window`: 0 for sources of whole texts. `l0`: how many latents are active in a row; None:
    all of them, the worst case. `finish` takes one copy of the examples more.
    """
    state = (
        dict_size * (8 + 8 + 4 + 4 * BINS)
        + bytes_of_sums(dict_size, corpora)
        + bytes_of_pairs(dict_size, coactive)
        + bytes_of_examples(dict_size, top, window)
        + bytes_of_examples(dict_size, samples, window)
        + bytes_of_probes(dict_size)
    )
    rows = chunk_rows(dict_size, torch.device(device))
    active = rows * (dict_size if l0 is None else min(l0, dict_size))
    working = (
        rows * (16 * dict_size + 200)  # the codes, on their way through `encode`
        + int(120 * active)  # columns of active codes
        + working_bytes_of_pairs(dict_size, coactive, rows)
        + working_bytes_of_examples(window)
        + working_bytes_of_probes(dict_size)
    )
    return state, working


def _unit_of(provenance: Provenance | None) -> str:
    if provenance is None:
        return "row"
    return "text" if bool((provenance.token_N == -1).all()) else "token"
