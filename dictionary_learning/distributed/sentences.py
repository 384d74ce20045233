"""The harvest of a sentence encoder by several ranks: each text is read once, and encoded by one of them.

The first rank reads a window of texts and tells all ranks. They are cut into batches by length, as on one rank, and the
batches are dealt out; each rank is then sent the rows of the hook points that its dictionaries learn. Embeddings that
are kept for later epochs are kept by every rank: each trains on all of them, so that sending them again would cost what
the encoder saves.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dictionary_learning.activations.sentence_encoder import WINDOW_BATCHES, SentenceActivations
from dictionary_learning.activations.sentence_model import SENTENCE, TOKENS, SentenceEncoder, TextStates
from dictionary_learning.activations.types import ActivationBatch
from dictionary_learning.corpus import Text, TextStream
from dictionary_learning.distributed.harvest import exchanged
from dictionary_learning.distributed.ranks import Ranks
from dictionary_learning.distributed.reading import ReadByFirst


class RankedSentences:
    """An `ActivationSource` whose texts are encoded by all ranks; its rows are those of `source` alone, to rounding.

    Args:
        source: of every rank alike; only the first rank's texts are read.
        wanted: of each rank, the hook points whose activations it needs.

    Attributes:
        encoded: texts that this rank's model has seen. (others: see `SentenceActivations`)
    """

    def __init__(self, source: SentenceActivations, ranks: Ranks, wanted: Sequence[Sequence[str]]) -> None:
        self.widths = {name: width for name, width in source.widths.items() if name in wanted[ranks.rank]}
        self.dtype, self.max_rows = source.dtype, source.max_rows
        self._source = source = copy.copy(source)
        source.encoder = self._encoder = _RankedEncoder(source.encoder, ranks, source.widths, wanted)
        source.texts = cast(TextStream, _RankedTexts(source.texts, ranks, WINDOW_BATCHES * source.batch_texts))
        source.widths = self.widths
        self._put_off: dict[str, Any] | None = None  # a state that is yet to be loaded

    @property
    def encoded(self) -> int:
        return self._encoder.encoded

    def __getattr__(self, name: str) -> Any:
        if name == "_source":  # before __init__, as when a copy is made
            raise AttributeError(name)
        return getattr(self._source, name)

    def __iter__(self) -> RankedSentences:
        return self

    def __next__(self) -> ActivationBatch:
        if self._put_off is not None:
            state, self._put_off = self._put_off, None
            self._source.load_state_dict(state)
        return next(self._source)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict() if self._put_off is None else self._put_off

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes no message: the window in which the state was saved is encoded again when a row of it is wanted."""
        self._source.load_state_dict(state | {"taken": 0})
        self._put_off = state


class _RankedTexts:
    """Iterates over the texts that the first rank reads, on all ranks."""

    def __init__(self, texts: TextStream, ranks: Ranks, at_once: int) -> None:
        self._reader, self._at_once = ReadByFirst(ranks, texts), at_once
        self._coming: deque[tuple[Text, Any]] = deque()
        self._behind: Any = None  # the state of the texts behind the last one handed out, on the first rank

    def __iter__(self) -> _RankedTexts:
        return self

    def __next__(self) -> Text:
        if not self._coming:
            self._coming.extend(self._reader.items(self._at_once))
        text, self._behind = self._coming.popleft()
        return text

    @property
    def epoch(self) -> int:
        """Passes over the corpus that are done, as the first rank knows."""
        return (self.state_dict() or {"epoch": 0})["epoch"]

    def state_dict(self) -> Any:
        return self._reader.state_dict() if self._behind is None else self._behind

    def load_state_dict(self, state: Any) -> None:
        self._coming.clear()
        self._behind = None
        self._reader.load_state_dict(state)


class _RankedEncoder(SentenceEncoder):
    """A `SentenceEncoder` that encodes some of the texts, and has the rows of the others from the other ranks.

    Args:
        widths: of all hook points, in the order in which rows are sent.
        wanted: as `RankedSentences` has it; what this rank wants is what its callers are given.
    """

    def __init__(
        self, encoder: SentenceEncoder, ranks: Ranks, widths: dict[str, int], wanted: Sequence[Sequence[str]]
    ) -> None:
        super().__init__(encoder.model, encoder.name, encoder.revision)
        self.ranks, self._widths, self._wanted, self.encoded = ranks, widths, wanted, 0

    def embed(self, texts: Sequence[str], *, batch_texts: int = 64, **options: Any) -> Tensor:
        shares, size = self._shares(texts, batch_texts)
        own = [texts[number] for number in shares[self.ranks.rank]]
        acts = {SENTENCE: super().embed(own, batch_texts=size, **options)} if own else None
        rows = self._exchanged(acts, [len(share) for share in shares])
        out_Nd = torch.empty(len(texts), self._widths[SENTENCE], dtype=self.dtype, device=self.device)
        out_Nd[torch.tensor(sum(shares, []), device=self.device)] = torch.cat([part[SENTENCE] for part in rows])
        return out_Nd

    def token_states(
        self, texts: Sequence[str], names: Sequence[str] = (TOKENS,), *, batch_texts: int = 64, **options: Any
    ) -> list[TextStates]:
        shares, size = self._shares(texts, batch_texts)
        own = [texts[number] for number in shares[self.ranks.rank]]
        states = super().token_states(own, list(self._widths), batch_texts=size, **options)
        places = self.ranks.everyone(
            (
                [len(s.token_T) for s in states],
                _joined(s.token_T for s in states),
                _joined(s.position_T for s in states),
            )
        )
        acts = {name: torch.cat([s.acts[name] for s in states]) for name in self._widths} if states else None
        rows = self._exchanged(acts, [sum(counts) for counts, _, _ in places])
        found: dict[int, TextStates] = {}
        for share, here, (counts, token_N, position_N) in zip(shares, rows, places, strict=True):
            parts = {name: here[name].split(counts) for name in names}
            tokens, positions = token_N.split(counts), position_N.split(counts)
            for index, number in enumerate(share):
                acts_of_text = {name: part[index] for name, part in parts.items()}
                found[number] = TextStates(acts_of_text, tokens[index], positions[index])
        return [found[number] for number in range(len(texts))]

    def _shares(self, texts: Sequence[str], batch_texts: int) -> tuple[list[list[int]], int]:
        """The numbers of the texts of each rank, and how many make a batch: those of one rank, dealt out; smaller ones
        where there would be fewer than ranks."""
        world = self.ranks.world
        size = min(batch_texts, -(-len(texts) // world))
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        shares: list[list[int]] = [sum(batches[rank::world], []) for rank in range(world)]
        self.encoded += len(shares[self.ranks.rank])
        return shares, size

    def _exchanged(self, acts: dict[str, Tensor] | None, counts: Sequence[int]) -> list[dict[str, Tensor]]:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return exchanged(self.ranks, acts, counts, self._widths, self._wanted, like)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.long), *parts])
