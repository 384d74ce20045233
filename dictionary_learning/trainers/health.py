"""Whether a dictionary can still learn: the first loss or gradient that is not finite ends it, with its weights good.

In: the loss and the gradients' squares of every step, on the device. Out: a number there that refuses the step, this
one and all that follow, so that the weights stay those of the last good step; and, when it is known on the host, what
ended the dictionary. On CUDA that is up to two intervals later, since nothing may wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dictionary_learning.trainers.dead_latents import COUNT_INTERVAL, Delayed


class Stopped(NamedTuple):
    """Why a dictionary no longer learns: of step `step` (the first is 1) its `what`, "loss" or "gradient", was not
    finite. Its weights are those of the step before."""

    step: int
    what: str

    def __str__(self) -> str:
        return f"its {self.what} was NaN or infinite at step {self.step:,}"


class Health:
    """Of one dictionary. `stopped` is set once it is known that it can't go on."""

    def __init__(self, device: torch.device) -> None:
        self.stopped: Stopped | None = None
        self._sums_2 = torch.zeros(2, device=device)  # of 0 * loss and 0 * square: NaN from the first that isn't finite
        self._refused = torch.zeros((), device=device)
        self._seen = Delayed()

    def refuses(self, loss: Tensor, square: Tensor) -> Tensor:
        """[] 1.0 where this loss, this sum of the gradients' squares or one before is not finite, else 0.0."""
        self._sums_2[0].add_(loss.to(self._sums_2), alpha=0)
        self._sums_2[1].add_(square.to(self._sums_2), alpha=0)
        return torch.ne(self._sums_2.sum(), 0, out=self._refused)

    @property
    def refusing(self) -> bool:
        """Whether the last step was refused. Waits for the device."""
        return bool(self._refused)

    def look(self, step: int, moved: bool | None, steps_taken: Callable[[], int]) -> bool:
        """Whether the dictionary is known to have ended.

        Args:
            moved: whether the step was taken; None where only the device knows, which is asked every so many steps,
                and its answer to the time before read.
            steps_taken: gives the number of steps that were taken; asked once, at the end.
        """
        if moved is None and step % COUNT_INTERVAL == 0:
            seen = self._seen.read()
            self._seen.send(self._sums_2.sum())
            moved = seen is None or seen == 0  # NaN is not
        if moved is False:
            self.stopped = Stopped(steps_taken() + 1, "loss" if bool(self._sums_2[0] != 0) else "gradient")
        return self.stopped is not None

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums_2, "stopped": None if self.stopped is None else list(self.stopped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums_2.copy_(state["sums"])
        self.stopped = None if state["stopped"] is None else Stopped(*state["stopped"])
