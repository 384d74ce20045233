"""The state of a run on several ranks is that of a run on one: gathered when saved, handed out when loaded.

So a run goes on with another number of ranks, and nothing but the first rank touches the state's files. A trainer's
state travels as one message, so that no rank needs room for more than one besides what it keeps; the first rank needs
room for all of them, three times the dictionaries' weights, in the memory of its machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dictionary_learning.distributed.ranks import OfAllRanks, Ranks, said_of_lost

PER_TRAINER = ("trainers", "settings")  # of a run's state: lists with an entry a trainer


Shares = Sequence[Sequence[int]]  # of each rank, the numbers of its trainers, in its order


def gathered(ranks: Ranks, shares: Shares, tree: dict[str, Any]) -> dict[str, Any]:
    """The state of the whole run from `TrainingRun.state_dict()` of each rank; of use on the first rank alone."""
    if ranks.world == 1:
        return tree
    own = {number: index for index, number in enumerate(shares[ranks.rank])}
    owners = owners_of(shares)
    trainers = []
    for number, owner in owners.items():
        part = [tree[key][own[number]] for key in PER_TRAINER] if owner == ranks.rank else None
        trainers.append(_sent(ranks, owner, 0, part))
    inputs, data = dict(tree["inputs"]), dict(tree["inputs"]["data"])
    factors = {name: factor for part in ranks.everyone(inputs["norm_factors"]) for name, factor in part}
    rows: dict[str, Tensor] = {}
    for rank, names in enumerate(ranks.everyone(list(data["rows"]))):
        for name in names:
            if name not in rows:
                rows[name] = _sent(ranks, rank, 0, data["rows"].get(name))
    inputs |= {"norm_factors": [[name, factor] for name, factor in factors.items()], "data": data | {"rows": rows}}
    columns = zip(*trainers, strict=True) if ranks.first else ([] for _ in PER_TRAINER)
    return tree | dict(zip(PER_TRAINER, map(list, columns), strict=True)) | {"inputs": inputs}


def handed_out(
    ranks: Ranks, shares: Shares, wanted: Sequence[Sequence[str]], tree: dict[str, Any] | None
) -> dict[str, Any]:
    """The state that `TrainingRun.load_state_dict()` takes on each rank, from the whole one on the first rank.

    Args:
        wanted: of each rank, the hook points that its buffer keeps.

    Raises:
        UserError: the state is of another number of trainers, or of other hook points.
    """
    if ranks.world == 1:
        assert tree is not None
        return tree
    common: dict[str, Any] | None = None
    if tree is not None:
        data = {name: value for name, value in tree["inputs"]["data"].items() if name != "rows"}
        common = tree | {"trainers": len(tree["trainers"]), "inputs": tree["inputs"] | {"data": data}}
        common |= {"points": list(tree["inputs"]["data"]["rows"])}
    common = ranks.of_first(common)
    assert common is not None
    if common["trainers"] != (here := len(owners_of(shares))):
        raise OfAllRanks(f"The saved run has {common['trainers']} dictionaries, this one {here}.")
    if missing := {name for names in wanted for name in names} - set(common.pop("points")):
        raise OfAllRanks(f"The saved run has no activations of {', '.join(sorted(missing))}: resume with the same.")
    trainers, rows = [], {}
    for rank, (numbers, names) in enumerate(zip(shares, wanted, strict=True)):
        for number in numbers:
            state = _sent(ranks, 0, rank, None if tree is None else tree["trainers"][number])
            if rank == ranks.rank:
                trainers.append(state)
        for name in names:
            there = _sent(ranks, 0, rank, None if tree is None else tree["inputs"]["data"]["rows"][name])
            if rank == ranks.rank:
                rows[name] = there
    factors = [[name, factor] for name, factor in common["inputs"]["norm_factors"] if name in wanted[ranks.rank]]
    inputs = common["inputs"] | {"norm_factors": factors, "data": common["inputs"]["data"] | {"rows": rows}}
    settings = [common["settings"][number] for number in shares[ranks.rank]]
    return common | {"trainers": trainers, "settings": settings, "inputs": inputs}


def owners_of(shares: Shares) -> dict[int, int]:
    """Trainer -> the first rank that has it (all have it where its latents are spread), by number."""
    owners: dict[int, int] = {}
    for rank, numbers in enumerate(shares):
        for number in numbers:
            owners.setdefault(number, rank)
    return dict(sorted(owners.items()))


def _sent(ranks: Ranks, source: int, target: int, value: Any) -> Any:
    """A value of one rank on another one; None on all others."""
    if source == target:
        return value if ranks.rank == target else None
    message = [None]
    with said_of_lost():
        if ranks.rank == source:
            dist.send_object_list([on_cpu(value)], dst=target)
        elif ranks.rank == target:
            dist.recv_object_list(message, src=source)
    return message[0]


def on_cpu(value: Any) -> Any:
    """A tree with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [on_cpu(item) for item in value]
    return value
