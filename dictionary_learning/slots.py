"""Which slots of the buffer's ring are filled: drawing frees slots, forwards fill them again.

All of it happens on the CPU with a generator of its own, in time that grows with the rows drawn or filled and not with
the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.errors import UserError


def check_capacity(n_ctxs: int, ctx_len: int, max_rows: int, out_batch_size: int) -> None:
    """See that a buffer of `n_ctxs` contexts can hold one forward of `max_rows` rows beside one batch.

    Raises:
        UserError: it can't; says how large it must be.
    """
    smallest = max_rows + out_batch_size
    if n_ctxs * ctx_len < smallest:
        raise UserError(
            f"The buffer is too small: n_ctxs {n_ctxs:,} x ctx_len {ctx_len} = {n_ctxs * ctx_len:,} rows must hold one "
            f"forward ({max_rows:,} rows) and one batch ({out_batch_size:,}); set n_ctxs to at least "
            f"{-(-smallest // ctx_len):,} or make the batches smaller."
        )


class Slots:
    """The slots 0 .. capacity - 1, of which `n_live` are filled.

    Args:
        seed: of the generator that draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.n_live = 0
        self._slots = np.arange(capacity, dtype=np.int64)  # the first n_live are filled, the others free
        self._rng = np.random.default_rng(seed)

    @property
    def live(self) -> np.ndarray:
        """The filled ones (a view)."""
        return self._slots[: self.n_live]

    def take(self, count: int) -> np.ndarray:
        """Draw `count` filled slots uniformly without replacement and free them.

        They trade places with the last `count` filled ones, so they are the first free ones that are filled again.
        """
        places = self._rng.choice(self.n_live, size=count, replace=False)
        drawn = self._slots[places]
        self.n_live -= count
        tail = self._slots[self.n_live : self.n_live + count]
        stays = np.ones(count, dtype=bool)  # the slots of the tail that were not drawn fill the holes before it
        stays[places[places >= self.n_live] - self.n_live] = False
        self._slots[places[places < self.n_live]] = tail[stays]
        tail[:] = drawn
        return drawn

    def next_free(self, skip: int, count: int) -> np.ndarray:
        """The `count` slots that are filled after the next `skip` (a view)."""
        return self._slots[self.n_live + skip : self.n_live + skip + count]

    def fill(self, batches: Sequence[tuple[int, Tensor | None]]) -> list[np.ndarray]:
        """Count the next free slots as filled, batch after batch.

        Args:
            batches: (rows, which of them stay: bool [rows] or None for all) of each; its rows that stay are in the
                first of its slots, and the others are free again.

        Returns:
            the slots of each batch's rows that stay.
        """
        filled: list[np.ndarray] = []
        freed: list[np.ndarray] = []
        start = 0
        for count, kept_N in batches:
            slots, start = self.next_free(start, count).copy(), start + count
            stay = count if kept_N is None else int(kept_N.sum())
            filled.append(slots[:stay])
            freed.append(slots[stay:])
        if any(map(len, freed)):
            self.next_free(0, start)[:] = np.concatenate(filled + freed)
        self.n_live += sum(map(len, filled))
        return filled

    def state_dict(self) -> dict[str, Any]:
        return {
            "slots": torch.from_numpy(self._slots.copy()),
            "n_live": self.n_live,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._slots[:], self.n_live = state["slots"].numpy(), state["n_live"]
        self._rng.bit_generator.state = state["rng"]
