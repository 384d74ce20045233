"""A language model whose forward is made to fit: where memory runs out, the contexts go through it in halves.

In: token contexts [C, L], as `TracedLM.capture` takes them. Out: the same activations in the same order, from as many
smaller forwards as it takes. How many contexts fit is remembered, so that running out costs one failed forward and not
one a batch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from dictionary_learning.activations.traced_lm import Place, TracedLM
from dictionary_learning.errors import UserError

log = logging.getLogger("dictionary_learning")


class FittingLM(TracedLM):
    """`TracedLM`, with forwards of at most `most_contexts` contexts; None until memory has run out."""

    most_contexts: int | None = None

    def capture(
        self, tokens_CL: Tensor, hook_points: Place | Iterable[Place], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `TracedLM.capture`.

        Raises:
            UserError: also where a single context does not fit.
        """
        points = self.resolve(hook_points)
        while True:
            size = min(self.most_contexts or len(tokens_CL), len(tokens_CL)) or 1
            masks = None if attention_mask is None else attention_mask.split(size)
            parts: list[dict[str, Tensor]] = []
            try:
                for index, tokens in enumerate(tokens_CL.split(size)):
                    parts.append(super().capture(tokens, points, None if masks is None else masks[index]))
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                if size == 1:
                    raise UserError(_too_long(self.device, tokens_CL.shape[1])) from error
            else:
                if len(parts) == 1:
                    return parts[0]
                return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            # Behind the except block, whose error holds on to the tensors of the failed forward.
            parts.clear()
            gc.collect()  # nnsight's traces are cycles that hold on to activations
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.most_contexts = size // 2
            log.warning(
                "The memory of %s does not suffice for a forward of %d contexts: going on with %d at once (set "
                "harvest_contexts to %d).",
                *(self.device, size, self.most_contexts, self.most_contexts),
            )


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device's memory does not suffice."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said


def _too_long(device: torch.device, length: int) -> str:
    return (
        f"The memory of {device} does not suffice for one context of {length} tokens: set ctx_len to "
        f"{max(2, length // 2)}, or make the buffer (buffer_contexts) or the dictionaries (widths) half as large."
    )
