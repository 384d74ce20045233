"""What a run calls behind every step, and what it takes from there.

A callback is any `callback(run, step)`, called when the step has been logged. Three things it may do besides: with a
true attribute `reports` it is called before that, and returns metrics, {trainer: {name: number}}, that are logged with
those of the step; have `state_dict()` and `load_state_dict()`, which go into the run's state, so that a resume is
exact; and have `best`, {number of a trainer: `Best`}, the dictionaries that are the run's results in place of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.stopping import uninterrupted

if TYPE_CHECKING:
    from dictionary_learning.training import TrainingRun

Metrics: TypeAlias = Mapping[str, Mapping[str, float]]
Callback: TypeAlias = "Callable[[TrainingRun, int], Metrics | None]"


class Best(NamedTuple):
    """A dictionary to keep: behind which step it was, its held-out loss, its weights (`trainer.ae.state_dict()`)."""

    step: int
    loss: float
    weights: dict[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"best_step": self.step, "best_heldout_loss": self.loss}


def reports(callbacks: Sequence[Callback], run: TrainingRun, step: int) -> dict[str, dict[str, float]]:
    """Call those that report; their metrics, merged."""
    merged: dict[str, dict[str, float]] = {}
    for callback in callbacks:
        if getattr(callback, "reports", False):
            with uninterrupted():
                metrics = callback(run, step) or {}
            for name, values in metrics.items():
                merged.setdefault(name, {}).update(values)
    return merged


def call_others(callbacks: Sequence[Callback], run: TrainingRun, step: int) -> None:
    """Call those that don't report."""
    for callback in callbacks:
        if not getattr(callback, "reports", False):
            with uninterrupted():
                callback(run, step)


def best_of(callbacks: Sequence[Callback], index: int) -> Best | None:
    """What a callback keeps of trainer number `index`, or None."""
    found = (getattr(callback, "best", {}).get(index) for callback in callbacks)
    return next((best for best in found if best is not None), None)


def _with_state(callbacks: Sequence[Callback]) -> list[Any]:
    return [callback for callback in callbacks if hasattr(callback, "state_dict")]


def states(callbacks: Sequence[Callback]) -> list[dict[str, Any]]:
    """The states of those that have one, in their order."""
    return [
        {"callback": type(callback).__name__, "state": callback.state_dict()} for callback in _with_state(callbacks)
    ]


def load_states(callbacks: Sequence[Callback], saved: Sequence[Mapping[str, Any]]) -> None:
    """Give each its state back.

    Raises:
        UserError: the saved run had other callbacks, so that going on would not be the same run.
    """
    there = _with_state(callbacks)
    was, now = [entry["callback"] for entry in saved], [type(callback).__name__ for callback in there]
    if was != now:
        raise UserError(
            f"The saved run had the callbacks {', '.join(was) or 'none'}, this one has {', '.join(now) or 'none'}: "
            "resume with the same."
        )
    for callback, entry in zip(there, saved, strict=True):
        callback.load_state_dict(entry["state"])
