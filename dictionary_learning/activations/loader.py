"""Plain batches for training: an activation source in, tensors [B, D] of exactly B rows on a device out, in order.

What comes out is what `trainSAE` takes as data. Nothing is mixed: that is the buffer's work, or that of a source whose
files are mixed already. For a CUDA device the rows of a batch go to page-locked memory and are copied without waiting,
so that the next batch is read from the disk while the GPU still trains on this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dictionary_learning.activations.types import ActivationSource
from dictionary_learning.errors import UserError
from dictionary_learning.streams import to_device


class ActivationLoader:
    """Iterates over batches: a tensor [B, D] for one hook point, a dict of name -> [B, D] for several.

    Args:
        source: where the rows come from, in the order they are handed on.
        batch_size: rows B of a batch; the last one may be shorter.
        device: where the batches go. With a CUDA device they are pinned first and copied without blocking.
        drop_last: leave out a last batch of fewer rows.
    """

    def __init__(
        self,
        source: ActivationSource,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"A batch must have at least 1 row, got {batch_size}.")
        self.source, self.out_batch_size = source, batch_size
        self.device, self.drop_last = torch.device(device), drop_last
        self._begin(source.state_dict(), 0)

    def _begin(self, state: dict[str, Any], skip: int) -> None:
        self._rest: dict[str, Tensor] = {}  # rows read but not handed out; they all come from one batch of the source
        self._rest_state = state  # of the source in front of that batch
        self._used = 0  # rows of that batch that were handed out
        self._skip = skip  # rows of the batch to be read next that were handed out before a resume

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor]]:
        return self

    def __next__(self) -> Tensor | dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        wanted = self.out_batch_size
        while wanted:
            if not self._read():
                break
            taken = min(wanted, _rows(self._rest))
            parts.append({name: x[:taken] for name, x in self._rest.items()})
            self._rest = {name: x[taken:] for name, x in self._rest.items()}
            self._used += taken
            wanted -= taken
        if not parts or (wanted and self.drop_last):
            raise StopIteration
        batch = {name: self._moved([part[name] for part in parts]) for name in parts[0]}
        return next(iter(batch.values())) if len(batch) == 1 else batch

    def _read(self) -> bool:
        """See that there are rows to hand out; False at the source's end."""
        while not _rows(self._rest):
            state = self.source.state_dict()
            batch = next(self.source, None)
            if batch is None:
                return False
            self._rest_state, self._used, self._skip = state, self._skip, 0
            self._rest = {name: x[self._used :] for name, x in batch.acts.items()}
        return True

    def _moved(self, parts: list[Tensor]) -> Tensor:
        return to_device(parts[0] if len(parts) == 1 else torch.cat(parts), self.device)

    @property
    def config(self) -> dict[str, Any]:
        """Settings, as config.json keeps them under "buffer"."""
        widths = set(self.source.widths.values())
        return {
            "d_submodule": widths.pop() if len(widths) == 1 else None,
            "out_batch_size": self.out_batch_size,
            "device": str(self.device),
        }

    def state_dict(self) -> dict[str, Any]:
        """The source's position in front of the rows that are next, and how many of its next rows were handed out."""
        if _rows(self._rest):
            return {"source": self._rest_state, "skip": self._used}
        return {"source": self.source.state_dict(), "skip": self._skip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self._begin(state["source"], state["skip"])


def _rows(acts: dict[str, Tensor]) -> int:
    return len(next(iter(acts.values()))) if acts else 0
