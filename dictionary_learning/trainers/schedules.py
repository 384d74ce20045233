"""Learning-rate and sparsity schedules: pure functions of the step, so that a resume has nothing to restore."""

from __future__ import annotations

from collections.abc import Callable

from dictionary_learning.errors import UserError

DECAY_FRACTION = 1 / 3  # of the run; a decay to zero is worth 0.007 explained variance (TopK, 1,500 steps)
WARMUP_FRACTION = 1 / 20


def automatic_learning_rate(dict_size: int, activation_dim: int, steps: int) -> float:
    """Adam's peak learning rate for `dict_size` latents on activations of width `activation_dim`, trained for `steps`.

    Falls with the square root of the number of latents (Gao et al. 2024, arXiv:2406.04093, appendix A.3) and of the
    width, and with the cube root of the length. Fitted to the best rates of TopK measured at (3,072 latents, width 384,
    1,500 steps) and at (1,536, 192) with 292 and 585 steps.
    """
    return min(
        2e-3 * (3072 / dict_size) ** 0.5 * (384 / activation_dim) ** 0.5 * (1500 / max(steps, 1)) ** (1 / 3), 1e-2
    )


def get_lr_schedule(total_steps: int, warmup_steps: int, decay_start: int | None = None) -> Callable[[int], float]:
    """Scale factor of the learning rate at a step: linear from 0 to 1 over the warm-up, 1, then linearly to 0.

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

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)  # the first step already learns
        if decay_start is not None and step >= decay_start and total_steps > decay_start:
            return (total_steps - step) / (total_steps - decay_start)
        return 1.0

    return scale


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
