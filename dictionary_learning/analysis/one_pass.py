"""One walk over texts that serves all dictionaries: one forward of the model, and statistics of each.

In: dictionaries, the model, corpora and what to measure. Out: `FeatureStatistics` of each dictionary. The walk can be
stopped at any batch and goes on exactly where it was: its state is that of the texts, of the source, and of each
dictionary's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dictionary_learning import storage
from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.analysis.mixed_texts import MOST_LABELS, MixedTexts, NamedCorpus
from dictionary_learning.analysis.plan import bytes_of_writing
from dictionary_learning.analysis.statistics import StatisticsPass, bytes_needed
from dictionary_learning.analysis.subjects import Subject, Subjects, make_source, unit_of
from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from dictionary_learning.analysis.types import FeatureStatistics

STATES_A_PASS = 5
BATCHES_BETWEEN_STATES = 200  # where nobody knows how many there will be
TEXTS_HELD = 100_000  # texts that are remembered before those that no example needs are dropped


@dataclass(frozen=True)
class Measures:
    """Everything besides dictionaries, model and corpora that decides what an analysis finds."""

    tokens: int | None = 200_000
    split: str = "all"
    top: int = 10
    samples: int = 20
    window: int = 64
    coactive: int = 256
    seed: int = 0
    effects: bool = True
    ablate: int = 32

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("top", 1), ("samples", 1), ("window", 1), ("coactive", 0), ("ablate", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}.")


class OnePass:
    """One walk over the texts that serves all dictionaries.

    Attributes:
        rows, batches: taken in so far. unit: what a row is. passes: {name of a dictionary: its statistics}.
    """

    def __init__(self, subjects: Subjects, lm: Any, corpora: Sequence[NamedCorpus], measures: Measures) -> None:
        self.subjects, self.measures = subjects.dictionaries, measures
        self.unit = unit_of(subjects.config)
        by_text = self.unit == "text"
        self.texts = MixedTexts(
            corpora,
            by_text=by_text,
            keep=by_text,
            split=measures.split,
            heldout_fraction=subjects.config.heldout_fraction,
            seed=measures.seed,
        )
        self.source: Any = make_source(subjects, lm, self.texts)
        self.passes = {
            subject.name: StatisticsPass(
                subject.dictionary,
                top=measures.top,
                samples=measures.samples,
                window=measures.window,
                coactive=measures.coactive,
                seed=measures.seed,
            )
            for subject in self.subjects
        }
        self.rows = self.batches = 0
        self._needed_texts = 0  # of the texts that are kept, those that examples needed when that was last looked up
        self.done = False  # the texts are used up, or enough rows were seen

    @property
    def corpora(self) -> list[str]:
        """Labels of the texts read so far, by the numbers that provenance has."""
        return list(getattr(self.source, "contexts", self.source).corpora)

    @property
    def bytes_needed(self) -> int:
        """Memory that the pass and the writing of its files take, whatever its length: the states of all dictionaries,
        and the work on one at a time."""
        writing = max(bytes_of_writing(s.dictionary.dict_size, self.unit, self.measures) for s in self.subjects)
        return self.state_bytes + max(writing, *(work for _, work in self._bytes()))

    @property
    def state_bytes(self) -> int:
        """Of that, what is kept between batches, and saved."""
        return sum(state for state, _ in self._bytes())

    def _bytes(self) -> list[tuple[int, int]]:
        """`bytes_needed` of each dictionary."""
        window = 0 if self.unit == "text" else self.measures.window
        return [
            bytes_needed(
                subject.dictionary.dict_size,
                top=self.measures.top,
                samples=self.measures.samples,
                window=window,
                corpora=max(MOST_LABELS, len(self.texts.corpora) + 1),
                coactive=self.measures.coactive,
                l0=_l0_at_most(subject),
                device=subject.dictionary.decoder_rows.device,
            )
            for subject in self.subjects
        ]

    def run(self, states: Path, state_every: int | None, stopped: Callable[[], bool]) -> bool:
        """Walk on to the end, saving states on the way and at the end: whether that was reached."""
        from tqdm import tqdm

        every = self._batches_between_states() if state_every is None else state_every
        with tqdm(
            total=self.measures.tokens,
            initial=self.rows,
            desc="analysing",
            unit=self.unit,
            unit_scale=True,
            disable=None,
        ) as bar:
            while not self.done and not stopped():
                batch = self._next()
                if batch is not None:
                    self._take(batch)
                    bar.update(self.rows - bar.n)
                if self.done or stopped() or (every and self.batches % every == 0):
                    self._forget_texts()
                    storage.save_state(states, self.batches, self.state_dict())
        return self.done

    def _batches_between_states(self) -> int:
        if self.measures.tokens is None:
            return BATCHES_BETWEEN_STATES
        return max(1, self.measures.tokens // self.source.max_rows // STATES_A_PASS)

    def _next(self) -> ActivationBatch | None:
        """The next batch, cut where there are enough rows; None where the texts are used up."""
        batch = next(self.source, None)
        self.done = batch is None
        if batch is None or self.measures.tokens is None:
            return batch
        room = self.measures.tokens - self.rows
        self.done = len(batch.provenance.document_N) >= room
        acts = {name: rows[:room] for name, rows in batch.acts.items()}
        return ActivationBatch(acts, Provenance(*(column_N[:room] for column_N in batch.provenance)))

    def _take(self, batch: ActivationBatch) -> None:
        assert batch.provenance is not None
        for subject in self.subjects:
            self.passes[subject.name].update(batch.acts[subject.reads], batch.provenance)
        self.rows += len(batch.provenance.document_N)
        self.batches += 1
        if len(self.texts.kept) > self._needed_texts + TEXTS_HELD:
            self._forget_texts()

    def finish(self, name: str) -> FeatureStatistics:
        """The statistics of a dictionary so far."""
        return self.passes[name].finish(self.corpora)

    def kept_texts(self) -> dict[int, tuple[str, str]]:
        """{document: (label, text)} of the texts in kept examples, where rows are texts."""
        self._forget_texts()
        return {number: self.texts.kept[number] for number in sorted(self._documents())} if self.texts.keep else {}

    def _forget_texts(self) -> None:
        """Drop the texts of no kept example, but for those that were read ahead."""
        if self.texts.keep and self.rows:
            documents = next(iter(self.passes.values())).documents
            self.texts.forget(documents, self._documents())
            self._needed_texts = len(self.texts.kept)

    def _documents(self) -> set[int]:
        """Of all kept examples and probes."""
        kept = [self.finish(name) for name in self.passes]
        probed = [s.probes.document_R for s in kept if s.probes is not None]
        found = np.unique(np.concatenate([e.document_FE.ravel() for s in kept for e in (s.top, s.samples)] + probed))
        return set(found[found >= 0].tolist())

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "batches": self.batches,
            "done": self.done,
            "kept": {number: list(text) for number, text in self.texts.kept.items()},
            "source": self.source.state_dict(),
            "passes": {name: one.state_dict() for name, one in self.passes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.batches, self.done = state["rows"], state["batches"], state["done"]
        self.texts.kept = {number: (label, text) for number, (label, text) in state["kept"].items()}
        self.source.load_state_dict(state["source"])
        for name, one in self.passes.items():
            one.load_state_dict(state["passes"][name])


def _l0_at_most(subject: Subject) -> float | None:
    """Latents active in a row, with room for texts on which more fire than on those that it was measured on."""
    l0 = (subject.results or {}).get("l0")
    return 4 * float(l0) if isinstance(l0, int | float) else None
