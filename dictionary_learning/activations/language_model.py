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
from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from dictionary_learning.packing import ContextPacker, TokenBatch

__all__ = ["LanguageModelActivations", "Place", "TracedLM"]


class LanguageModelActivations:
    """An `ActivationSource` over packed contexts.

    Args:
        contexts: iterator of `TokenBatch`es with `batch_contexts`, `ctx_len` and a state (a `ContextPacker`).
        remove_special: drop rows of special tokens (`keep_CL` False). Rows of padding are always dropped.
        max_activation_norm_multiple: drop rows whose norm is above this multiple of the median norm of the batch's
            rows at any of the hook points, from all of them. Costs one host sync a batch.
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
        contexts: ContextPacker,
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
            batch = self._harvest(next(self.contexts))
            if batch is not None:
                return batch

    def _harvest(self, tokens: TokenBatch) -> ActivationBatch | None:
        wanted_CL = tokens.real_CL & tokens.keep_CL if self.remove_special else tokens.real_CL
        # The masks are on the CPU, so the rows are chosen there: a boolean index on the GPU would wait for it.
        rows_N = wanted_CL.flatten().nonzero().flatten()
        if not len(rows_N):
            return None
        acts = self.lm.capture(tokens.tokens_CL, self.hook_points)
        device, everything = self.lm.device, len(rows_N) == wanted_CL.numel()
        index_N = rows_N.to(device, non_blocking=True)
        flat = {name: x.to(device, self.dtype).flatten(0, 1) for name, x in acts.items()}
        if not everything:
            flat = {name: x.index_select(0, index_N) for name, x in flat.items()}
        self.rows_seen += len(rows_N)
        if self.max_activation_norm_multiple is not None:
            usual_M = self._usual_rows(flat, self.max_activation_norm_multiple)
            self.rows_dropped_by_norm += len(rows_N) - len(usual_M)
            if len(usual_M) < len(rows_N):
                rows_N = rows_N.index_select(0, usual_M.cpu())
                flat = {name: x.index_select(0, usual_M) for name, x in flat.items()}
            if not len(rows_N):
                return None
        return ActivationBatch(flat, self._provenance(tokens, rows_N) if self.provenance else None)

    @staticmethod
    def _usual_rows(acts: dict[str, Tensor], multiple: float) -> Tensor:
        """Numbers of the rows whose norm is at most `multiple` medians everywhere.

        The median is over real, kept rows only; one NaN must not make it NaN (and drop them all).
        """
        usual_N: Tensor | None = None
        for x_Nd in acts.values():
            norm_N = torch.linalg.vector_norm(x_Nd, dim=-1, dtype=torch.float32)
            here_N = norm_N <= multiple * norm_N.nanmedian()
            usual_N = here_N if usual_N is None else usual_N & here_N
        assert usual_N is not None
        return usual_N.nonzero().flatten()

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
