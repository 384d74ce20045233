"""The harvest of one corpus by several ranks: each record is read once, each context forwarded once.

The first rank reads, tokenises and packs; token contexts are small (34 bytes a token, against thousands of its
activations), so it tells all ranks those of the next `world` forwards. Rank r runs forward r of them, and each rank is
sent the activations of the hook points that its dictionaries learn, of all forwards. They are handed out in the order
of the text: a rank's buffer, the slots it draws and its batches are those of a run on one rank, on any number of ranks.

Why the buffer is kept whole by every rank: every row that is drawn is trained on by all, so it has to reach every rank
once, whether it is sent when it is harvested or when it is drawn. Sent when harvested, a message is as large as `world`
forwards and not as one batch, drawing needs no message, and a run's state does not depend on how many ranks it had. The
price is memory: each rank holds the rows of its own hook points, as a run on one GPU does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dictionary_learning.activations.language_model import LanguageModelActivations
from dictionary_learning.activations.sentence_encoder import SentenceActivations
from dictionary_learning.activations.types import ActivationBatch, Launched
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.distributed.ranks import Ranks
from dictionary_learning.distributed.reading import ReadByFirst
from dictionary_learning.packing import TokenBatch
from dictionary_learning.streams import OnHost

KEEP = "rows that stay"  # sent as a hook point of width 1


def exchanged(
    ranks: Ranks,
    acts: Mapping[str, Tensor] | None,
    counts: Sequence[int],
    widths: Mapping[str, int],
    wanted: Sequence[Sequence[str]],
    like: Tensor,
) -> list[dict[str, Tensor]]:
    """The activations {name: [N, d]} that every rank has for this one, at the hook points that it wants: one message
    from each rank to each.

    Args:
        acts: this rank's, at all hook points; None where it has no rows.
        counts: the rows of each rank. widths: d of every hook point. wanted: of each rank, its hook points.
        like: of the dtype and on the device of the activations.
    """
    names_of = [[name for name in widths if name in names] for names in wanted]  # in one order everywhere
    here = {name: widths[name] for name in names_of[ranks.rank]}
    parts = [acts[name].flatten() for names in names_of for name in names] if acts is not None else [like]
    mine, width = counts[ranks.rank], sum(here.values())
    flat = ranks.exchanged(
        torch.cat(parts), [mine * sum(widths[n] for n in names) for names in names_of], [n * width for n in counts]
    )
    found = []
    for count, part in zip(counts, flat.split([n * width for n in counts]), strict=True):
        columns = part.split([count * d for d in here.values()])
        found.append({name: x.view(count, d) for (name, d), x in zip(here.items(), columns, strict=True)})
    return found


class RankedSource:
    """An `ActivationSource` whose forwards are run by all ranks in turn; its rows are those of `source` alone.

    Args:
        source: of every rank alike; only the first rank's is asked for contexts.
        wanted: of each rank, the hook points whose activations it needs.

    Attributes:
        forwarded: contexts that this rank's model has seen. (others: see `LanguageModelActivations`)
    """

    def __init__(self, source: LanguageModelActivations, ranks: Ranks, wanted: Sequence[Sequence[str]]) -> None:
        self.ranks, self.contexts, self.lm, self.hook_points = ranks, source.contexts, source.lm, source.hook_points
        self.widths = {name: width for name, width in source.widths.items() if name in wanted[ranks.rank]}
        self.dtype, self.max_rows = source.dtype, source.max_rows
        self.rows_seen = self.rows_dropped_by_norm = self.forwarded = 0
        self._source, self._wanted = source, wanted
        # Contexts without a row to keep are passed over, as on one rank.
        self._reader = ReadByFirst(ranks, source.contexts, lambda tokens: len(self._rows_of(tokens)) > 0)
        self._coming: deque[tuple[Launched, Any]] = deque()  # batches, and the state of the contexts behind each
        self._behind: Any = None  # the state of the contexts behind the last batch handed out, on the first rank

    def __iter__(self) -> RankedSource:
        return self

    def __next__(self) -> ActivationBatch:
        while True:
            launched = self.launch()
            kept_N = launched.kept()
            if kept_N is None:
                return launched.batch
            if kept_N.any():
                rows_M = kept_N.nonzero().flatten()
                acts = {name: x.index_select(0, rows_M.to(x.device)) for name, x in launched.batch.acts.items()}
                provenance = launched.batch.provenance
                return ActivationBatch(acts, provenance and type(provenance)(*(c[rows_M] for c in provenance)))

    def launch(self) -> Launched:
        """As `LanguageModelActivations.launch`.

        Raises:
            StopIteration: the text is at its end.
            UserError: the first rank can't read it.
        """
        if not self._coming:
            self._round()
        launched, self._behind = self._coming.popleft()
        self.rows_seen += len(next(iter(launched.batch.acts.values())))
        return launched

    def _round(self) -> None:
        """The next forwards, one a rank."""
        read = self._reader.items(self.ranks.world)
        batches = [tokens for tokens, _ in read]
        rows = [self._rows_of(tokens) for tokens in batches]
        own = self.ranks.rank if self.ranks.rank < len(batches) else None
        launched = None if own is None else self._source._launch(batches[own], rows[own])
        if own is not None:
            self.forwarded += len(batches[own].tokens_CL)
        found = self._exchanged(launched, [len(rows_N) for rows_N in rows])[: len(read)]
        for (acts, keep_N), (tokens, behind), rows_N in zip(found, read, rows, strict=True):
            batch = ActivationBatch(acts, self._source._provenance(tokens, rows_N))
            self._coming.append((self._launched(batch, keep_N), behind))

    def _rows_of(self, tokens: TokenBatch) -> Tensor:
        wanted_CL = tokens.real_CL & tokens.keep_CL if self._source.remove_special else tokens.real_CL
        return wanted_CL.flatten().nonzero().flatten()

    def _exchanged(self, launched: Launched | None, counts: list[int]) -> list[tuple[dict[str, Tensor], Tensor | None]]:
        """(activations by name, which rows stay) of every rank's forward."""
        acts, widths, wanted = launched and launched.batch.acts, self._source.widths, self._wanted
        if self._source.max_activation_norm_multiple is not None:  # then one more number a row says if it stays
            widths, wanted = widths | {KEEP: 1}, [[*names, KEEP] for names in wanted]
        if launched is not None and launched.keep_N is not None:
            acts = launched.batch.acts | {KEEP: launched.keep_N.to(self.dtype)}
        like = torch.empty(0, dtype=self.dtype, device=self.lm.device)
        counts = counts + [0] * (self.ranks.world - len(counts))
        found: list[tuple[dict[str, Tensor], Tensor | None]] = []
        for here in exchanged(self.ranks, acts, counts, widths, wanted, like):
            keep_N1 = here.pop(KEEP, None)
            found.append((here, None if keep_N1 is None else keep_N1.flatten() > 0))
        return found

    def _launched(self, batch: ActivationBatch, keep_N: Tensor | None) -> Launched:
        if keep_N is None:
            return Launched(batch)
        coming = OnHost(keep_N)

        def kept() -> Tensor:
            on_host_N = coming.get()
            self.rows_dropped_by_norm += len(on_host_N) - int(on_host_N.sum())
            return on_host_N

        return Launched(batch, keep_N, kept)

    def state_dict(self) -> dict[str, Any]:
        """That of `source` on one rank; where the text stands is known to the first rank alone."""
        return {
            "contexts": self._reader.state_dict() if self._behind is None else self._behind,
            "rows_seen": self.rows_seen,
            "rows_dropped_by_norm": self.rows_dropped_by_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coming.clear()
        self._behind = state["contexts"]
        self._reader.load_state_dict(state["contexts"])
        self.rows_seen, self.rows_dropped_by_norm = state["rows_seen"], state["rows_dropped_by_norm"]


class RankedBuffer(ActivationBuffer):
    """An `ActivationBuffer` over a language model, or over the activations of a sentence encoder, of which this rank
    keeps those of some hook points.

    Args:
        wanted: of each rank, those hook points. (others: see `ActivationBuffer`)
    """

    def __init__(
        self, data: Any, model: Any, submodule: Any, *, ranks: Ranks, wanted: Sequence[Sequence[str]], **options: Any
    ) -> None:
        from dictionary_learning.distributed.sentences import RankedSentences

        self.ranks, self._wanted = ranks, wanted
        if isinstance(model, SentenceActivations) and ranks.world > 1:
            model = RankedSentences(model, ranks, wanted)
        super().__init__(data, model, submodule, **options)

    def _language_model_source(self) -> Any:
        source = super()._language_model_source()
        assert isinstance(source, LanguageModelActivations)
        return source if self.ranks.world == 1 else RankedSource(source, self.ranks, self._wanted)
