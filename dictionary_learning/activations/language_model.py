"""The stream of a language model's activations: token contexts in, rows of activations out.

One forward of `TracedLM` serves all hook points and stops after the last. Rows of padding and special tokens are
dropped before anything is copied, rows of extreme norm on request, and the rows of all hook points stay aligned, so
that one set of row numbers and one provenance serve them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dictionary_learning.activations.traced_lm import Place, TracedLM
from dictionary_learning.activations.types import ActivationBatch, Launched, Provenance
from dictionary_learning.errors import UserError
from dictionary_learning.streams import OnHost, to_device

if TYPE_CHECKING:
    from dictionary_learning.packing import ContextPacker, TokenBatch
    from dictionary_learning.read_ahead import ReadAhead

__all__ = ["LanguageModelActivations", "Place", "TracedLM"]


class LanguageModelActivations:
    """An `ActivationSource` over packed contexts.

    Args:
        contexts: iterator of `TokenBatch`es with `batch_contexts`, `ctx_len` and a state (a `ContextPacker`,
                `ReadAhead` or not).
        remove_special: drop rows of special tokens (`keep_CL` False). Rows of padding are always dropped.
        max_activation_norm_multiple: drop rows whose norm is above this multiple of the median norm of the batch's
            rows at any of the hook points, from all of them. The host waits for the forward before it knows how many
            are left; `launch()` lets it go on until it needs to know.
        provenance: say of each row where it comes from (on the CPU, where that is known without waiting).

    Attributes:
        widths: {name: d}. dtype, max_rows: as `ActivationSource` has them.
        rows_seen, rows_dropped_by_norm: rows before the norm filter, and those that it dropped.

    Raises:
        UserError: see `TracedLM.resolve`; a multiple below 1, which could drop everything.
    """

    def __init__(
        self,
        lm: TracedLM,
        contexts: ContextPacker | ReadAhead[TokenBatch],
        hook_points: Place | Iterable[Place],
        *,
        remove_special: bool = True,
        max_activation_norm_multiple: float | None = None,
        provenance: bool = False,
    ) -> None:
        if max_activation_norm_multiple is not None and max_activation_norm_multiple < 1:
            got = max_activation_norm_multiple
            raise UserError(f"max_activation_norm_multiple counts medians and must be at least 1, got {got}.")
        self.lm = lm
        self.contexts = contexts
        self.hook_points = lm.resolve(hook_points)
        self.remove_special = remove_special
        self.max_activation_norm_multiple = max_activation_norm_multiple
        self.provenance = provenance
        self.widths = {point.name: point.width for point in self.hook_points}
        self.dtype = lm.dtype
        self.max_rows = contexts.batch_contexts * contexts.ctx_len
        self.rows_seen = 0
        self.rows_dropped_by_norm = 0

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        while True:  # a batch of nothing but padding and special tokens has no rows to give
            launched = self.launch()
            kept_N = launched.kept()
            if kept_N is None:
                return launched.batch
            if kept_N.any():
                return _chosen(launched.batch, kept_N.nonzero().flatten())

    def launch(self) -> Launched:
        """The next batch, its forward only begun. `rows_dropped_by_norm` counts its rows when `kept()` is called.

        Raises:
            StopIteration: the contexts are at their end.
        """
        while True:
            tokens = next(self.contexts)
            wanted_CL = tokens.real_CL & tokens.keep_CL if self.remove_special else tokens.real_CL
            # The masks are on the CPU, so the rows are chosen there: a boolean index on the GPU would wait for it.
            rows_N = wanted_CL.flatten().nonzero().flatten()
            if len(rows_N):
                return self._launch(tokens, rows_N)

    def _launch(self, tokens: TokenBatch, rows_N: Tensor) -> Launched:
        acts = self.lm.capture(tokens.tokens_CL, self.hook_points)
        device = self.lm.device
        flat = {name: x.to(device, self.dtype).flatten(0, 1) for name, x in acts.items()}
        if len(rows_N) < tokens.tokens_CL.numel():
            index_N = to_device(rows_N, device)
            flat = {name: x.index_select(0, index_N) for name, x in flat.items()}
        self.rows_seen += len(rows_N)
        batch = ActivationBatch(flat, self._provenance(tokens, rows_N) if self.provenance else None)
        if self.max_activation_norm_multiple is None:
            return Launched(batch)
        usual_N = self._usual_rows(flat, self.max_activation_norm_multiple)
        coming = OnHost(usual_N)

        def kept() -> Tensor:
            on_host_N = coming.get()
            self.rows_dropped_by_norm += len(on_host_N) - int(on_host_N.sum())
            return on_host_N

        return Launched(batch, usual_N, kept)

    @staticmethod
    def _usual_rows(acts: dict[str, Tensor], multiple: float) -> Tensor:
        """[N] bool: rows whose norm is at most `multiple` medians everywhere.

        The median is over real, kept rows only; one NaN must not make it NaN (and drop them all).
        """
        usual_N: Tensor | None = None
        for x_Nd in acts.values():
            norm_N = torch.linalg.vector_norm(x_Nd, dim=-1, dtype=torch.float32)
            here_N = norm_N <= multiple * _nanmedian(norm_N)
            usual_N = here_N if usual_N is None else usual_N & here_N
        assert usual_N is not None
        return usual_N

    def _provenance(self, tokens: TokenBatch, rows_N: Tensor) -> Provenance:
        def pick(column_CL: Tensor) -> Tensor:
            return column_CL.flatten().to(torch.int64).index_select(0, rows_N)

        return Provenance(
            document_N=pick(tokens.document_CL),
            position_N=pick(tokens.position_CL),
            token_N=pick(tokens.tokens_CL),
            corpus_N=pick(tokens.corpus_CL),
            context_N=tokens.first_context + rows_N.div(tokens.tokens_CL.shape[1], rounding_mode="floor"),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "contexts": self.contexts.state_dict(),
            "rows_seen": self.rows_seen,
            "rows_dropped_by_norm": self.rows_dropped_by_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.contexts.load_state_dict(state["contexts"])
        self.rows_seen = state["rows_seen"]
        self.rows_dropped_by_norm = state["rows_dropped_by_norm"]


def _nanmedian(x_N: Tensor) -> Tensor:
    """[1] the (lower) median of the entries that are not NaN, as `x_N.nanmedian()`, which on CUDA waits for a count."""
    if not len(x_N):
        return x_N.new_full((1,), torch.nan)
    sorted_N = x_N.sort().values  # NaNs come last
    middle = (x_N.isnan().logical_not().sum() - 1).div(2, rounding_mode="floor").clamp_min(0)
    return sorted_N.index_select(0, middle.unsqueeze(0))


def _chosen(batch: ActivationBatch, rows_M: Tensor) -> ActivationBatch:
    """The rows of a batch with the given numbers (on the CPU)."""
    provenance = batch.provenance
    if len(rows_M) == len(next(iter(batch.acts.values()))):
        return batch
    if provenance is not None:
        provenance = Provenance(*(column_N.index_select(0, rows_M) for column_N in provenance))
    acts = {name: x.index_select(0, to_device(rows_M, x.device)) for name, x in batch.acts.items()}
    return ActivationBatch(acts, provenance)
