"""Who trains what: dictionaries over ranks, balanced by what a step of each costs.

Every rank trains its dictionaries whole, so no gradient travels; what travels is every batch, to the ranks that need
it. A rank that trains dictionaries of few hook points needs few activations, so that those of one hook point are kept
together as far as the balance allows.
"""

from __future__ import annotations

from collections.abc import Sequence

from dictionary_learning.config import DictionarySpec
from dictionary_learning.errors import UserError

# Time of a whole run against TopK's (benchmarks/RESULTS.md): all but these are within a tenth of it.
RELATIVE_COST = {"batch_top_k": 1.15, "matryoshka_batch_top_k": 1.35}
SLACK = 1.02  # how much longer than need be the slowest rank may take for the sake of fewer hook points


def step_cost(spec: DictionarySpec, activation_dim: int) -> float:
    """What a step of a dictionary costs, in multiply-adds a row of the encoder's product: the rest grows with it."""
    return RELATIVE_COST.get(spec.architecture, 1.0) * spec.width * activation_dim


def spread(costs: Sequence[float], hook_points: Sequence[str], world: int) -> list[list[int]]:
    """The numbers of the dictionaries of each rank, ascending.

    The costliest first, each to the rank with the least to do (longest processing time first: the slowest rank is at
    most a third slower than the best possible); then again, preferring a rank that has the hook point already, which
    counts where the slowest rank stays within `SLACK`.

    Raises:
        UserError: fewer dictionaries than ranks.
    """
    if len(costs) < world:
        few = f"{len(costs)} {'dictionary' if len(costs) == 1 else 'dictionaries'}"
        raise UserError(
            f"{world} ranks have only {few} to train: start at most {len(costs)}, train more, or split the latents of "
            "each over all ranks (--shard_latents)."
        )
    balanced = _assigned(costs, hook_points, world, None)
    grouped = _assigned(costs, hook_points, world, SLACK * _slowest(balanced, costs))
    return grouped if _slowest(grouped, costs) <= SLACK * _slowest(balanced, costs) and all(grouped) else balanced


def _assigned(costs: Sequence[float], hook_points: Sequence[str], world: int, room: float | None) -> list[list[int]]:
    """`room`: what a rank may have to do so that it is given more of its hook points; None looks at costs alone."""
    numbers: list[list[int]] = [[] for _ in range(world)]
    load = [0.0] * world
    together = [] if room is None else [hook_points]
    order = sorted(range(len(costs)), key=lambda n: (*(names[n] for names in together), -costs[n], n))
    for n in order:
        at = [r for r in range(world) if any(hook_points[m] == hook_points[n] for m in numbers[r])]
        fitting = [r for r in at if room is not None and load[r] + costs[n] <= room]
        rank = max(fitting, key=lambda r: (load[r], -r)) if fitting else min(range(world), key=lambda r: (load[r], r))
        numbers[rank].append(n)
        load[rank] += costs[n]
    return [sorted(own) for own in numbers]


def _slowest(numbers: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    return max(sum(costs[n] for n in own) for own in numbers)
