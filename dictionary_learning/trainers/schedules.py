"""Learning-rate and sparsity schedules: pure functions of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from dictionary_learning.errors import UserError, did_you_mean

Scheduler = Literal["wsd", "linear", "cosine", "constant", "plateau"]

DECAY_FRACTION = 1 / 3  # of the run; a decay to zero is worth 0.007 explained variance (TopK, 1,500 steps)
WARMUP_FRACTION = 1 / 20


def automatic_learning_rate(dict_size: int, activation_dim: int, steps: int) -> float:
    """Adam's peak learning rate for `dict_size` latents on activations of width `activation_dim`, trained for `steps`.

    Falls with the square root of the number of latents (Gao et al. 2024, arXiv:2406.04093, appendix A.3) and of the
    width, and with the cube root of the length. Fitted to rates of TopK measured at (3,072 latents, width 384, 1,500
    steps), where 3e-3 explains 0.002 more than 2e-3 and more latents die above, and at (1,536, 192) with 292 and 585.
    """
    return min(
        3e-3 * (3072 / dict_size) ** 0.5 * (384 / activation_dim) ** 0.5 * (1500 / max(steps, 1)) ** (1 / 3), 1e-2
    )


def get_lr_schedule(
    total_steps: int,
    warmup_steps: int,
    decay_start: int | None = None,
    resample_steps: int | None = None,
    sparsity_warmup_steps: int | None = None,
) -> Callable[[int], float]:
    """Scale factor of the learning rate at a step: linear from 0 to 1 over the warm-up, 1, then linearly to 0.

    Args:
        resample_steps: the warm-up is repeated every so many steps.
        sparsity_warmup_steps: a decay must not begin before the sparsity penalty is whole.

    Raises:
        UserError: the warm-up or the start of the decay lies outside the run, or they overlap.
    """
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"warmup_steps must be at least 0 and below the {total_steps} steps of the run, got {warmup_steps}."
        )
    if decay_start is not None and not warmup_steps <= decay_start <= total_steps:
        raise UserError(
            f"decay_start must lie between warmup_steps {warmup_steps} and steps {total_steps}, got {decay_start}."
        )

    if decay_start is not None and sparsity_warmup_steps is not None and decay_start < sparsity_warmup_steps:
        raise UserError(
            f"decay_start {decay_start} lies before the end of the sparsity warm-up {sparsity_warmup_steps}."
        )

    def scale(step: int) -> float:
        since = step if resample_steps is None else step % resample_steps
        warm = min((since + 1) / (warmup_steps + 1), 1.0)  # the first step already learns
        if decay_start is not None and step >= decay_start and total_steps > decay_start:
            return warm * (total_steps - step) / (total_steps - decay_start)
        return warm

    return scale


def get_scheduler(
    scheduler: Scheduler,
    total_steps: int,
    warmup_steps: int,
    decay_start: int | None = None,
    resample_steps: int | None = None,
) -> Callable[[int], float]:
    """Scale factor of the learning rate at a step by one of the schedulers, all of which begin with the warm-up.

    "wsd" is `get_lr_schedule`; "linear" and "cosine" fall to 0 from the end of the warm-up on, "constant" and "plateau"
    (see `Plateau`) don't fall.

    Raises:
        UserError: an unknown scheduler, a decay_start for one that has none, see `get_lr_schedule`.
    """
    if scheduler not in get_args(Scheduler):
        raise UserError(
            f"scheduler must be one of {', '.join(get_args(Scheduler))}, got {scheduler!r}."
            f"{did_you_mean(str(scheduler), get_args(Scheduler))}"
        )
    if scheduler == "wsd":
        return get_lr_schedule(total_steps, warmup_steps, decay_start, resample_steps)
    if decay_start is not None:
        raise UserError(f"decay_start belongs to the scheduler 'wsd', and '{scheduler}' was asked for.")
    if scheduler == "linear":
        return get_lr_schedule(total_steps, warmup_steps, warmup_steps, resample_steps)
    warm = get_lr_schedule(total_steps, warmup_steps, None, resample_steps)
    if scheduler != "cosine":
        return warm

    def cosine(step: int) -> float:
        done = max(0, step - warmup_steps) / (total_steps - warmup_steps)
        return warm(step) * 0.5 * (1 + math.cos(math.pi * done))

    return cosine


class Plateau:
    """A factor on the learning rate that falls whenever the held-out loss has stopped falling."""

    def __init__(self, factor: float = 0.5, patience: int = 3, threshold: float = 1e-4) -> None:
        """Args:
        factor: by which the rate is multiplied.
        patience: looks without a loss lower by `threshold` (relative) before that.
        """
        self._by, self._patience, self._threshold = factor, patience, threshold
        self.factor, self._best, self._bad = 1.0, math.inf, 0

    def observe(self, heldout_loss: float) -> None:
        if heldout_loss < self._best * (1 - self._threshold):
            self._best, self._bad = heldout_loss, 0
            return
        self._bad += 1
        if self._bad > self._patience:
            self.factor, self._bad = self.factor * self._by, 0

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "best": None if self._best == math.inf else self._best, "bad": self._bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self._bad = state["factor"], state["bad"]
        self._best = math.inf if state["best"] is None else state["best"]


def get_sparsity_warmup_fn(total_steps: int, sparsity_warmup_steps: int | None = None) -> Callable[[int], float]:
    """Scale factor of the sparsity penalty at a step: linear from 0 to 1, or 1 throughout without a warm-up.

    Raises:
        UserError: the warm-up is not shorter than the run.
    """
    if sparsity_warmup_steps is not None and not 0 <= sparsity_warmup_steps < total_steps:
        raise UserError(
            f"sparsity_warmup_steps must be at least 0 and below the {total_steps} steps of the run, "
            f"got {sparsity_warmup_steps}."
        )
    if not sparsity_warmup_steps:
        return lambda step: 1.0
    return lambda step: min(step / sparsity_warmup_steps, 1.0)
