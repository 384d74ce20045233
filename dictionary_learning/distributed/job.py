"""What the main job needs of the ranks: who trains what, and that all of them were started for the same run."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictionary_learning.config import RunConfig
from dictionary_learning.distributed.ranks import RESTARTS, Ranks
from dictionary_learning.distributed.sharded import _Sharded, sharded_trainer_class
from dictionary_learning.distributed.spread import spread, step_cost
from dictionary_learning.distributed.states import Shares, gathered, handed_out, owners_of
from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from dictionary_learning.dictionary import Dictionary
    from dictionary_learning.states import StateWriter
    from dictionary_learning.trainers.trainer import SAETrainer
    from dictionary_learning.training_run import TrainingRun

__all__ = ["Shares", "gathered", "handed_out", "owners_of"]  # besides what is defined here


def assignment(config: RunConfig, lm: Any, ranks: Ranks, shard: bool = False) -> list[list[int]]:
    """The numbers of the dictionaries that each rank trains.

    Args:
        lm: knows how wide the activations at each hook point are.
        shard: every dictionary on all ranks, its latents split; else each whole, on one rank.

    Raises:
        UserError: fewer dictionaries than ranks, an architecture that can't be split, nothing to split over.
    """
    everything = list(range(len(config.dictionaries)))
    if shard:
        if ranks.world == 1:
            raise UserError("--shard_latents splits dictionaries over ranks, of which there is one: start several.")
        for spec in config.dictionaries:
            sharded_trainer_class(spec.architecture)
        return [everything] * ranks.world
    if ranks.world == 1:
        return [everything]
    widths = {point.name: point.width for point in lm.resolve(config.hook_points)}
    costs = [step_cost(spec, widths[spec.hook_point]) for spec in config.dictionaries]
    return spread(costs, [spec.hook_point for spec in config.dictionaries], ranks.world)


def wanted(config: RunConfig, shares: Shares) -> list[list[str]]:
    """The hook points that each rank needs, of the dictionaries that it trains."""
    return [list({config.dictionaries[number].hook_point: None for number in own}) for own in shares]


def restarted(save_dir: Path) -> bool:
    """Whether torchrun started this rank again behind one that failed, so that the run that is there is to go on."""
    return os.environ.get(RESTARTS, "0") != "0" and (save_dir / "run.json").is_file()


def check_same_run(ranks: Ranks, config: RunConfig, save_dir: Path, options: Mapping[str, Any]) -> None:
    """See that every rank was started for the same run. Raises UserError: names what differs."""
    ranks.check_same(config.to_dict() | dict(options) | {"save_dir": str(save_dir.absolute())})


def check_same_files(ranks: Ranks, save_dir: Path, facts: Mapping[str, Any]) -> None:
    """See that every rank computes with the same model, corpus and versions, and writes where the first one does.

    Args:
        facts: what run.json says, as each rank finds it. The folder of the run is there by now.

    Raises:
        UserError: names what differs.
    """
    ranks.check_same(
        {
            "the model's weights": facts["model"]["weights"],
            "the corpus": facts["corpus_fingerprint"],
            **{f"the version of {name}": version for name, version in facts["versions"].items()},
        }
    )
    with ranks.together():
        if not save_dir.is_dir():
            raise UserError(f"there is no save_dir '{save_dir}': give a folder that all machines share.")


def whole_dictionary(trainer: SAETrainer) -> Dictionary:
    """A copy of a trainer's dictionary; where its latents are spread, a message to all ranks."""
    return trainer.whole_dictionary() if isinstance(trainer, _Sharded) else copy.deepcopy(trainer.ae)


def save_state(run: TrainingRun, states: StateWriter, wait: bool) -> None:
    """Have the state of a run's step written by the first rank; the others only tell theirs."""
    if run.ranks.world == 1:
        states.save(run.step, lambda: run.state_dict(live=True), wait=wait)
        return
    if run.ranks.first:
        states.finish()
    if run.ranks.of_first(states.saved_step) != run.step:
        tree = gathered(run.ranks, run.shares, run.state_dict(live=True))
        if run.ranks.first:
            states.save(run.step, lambda: tree, wait=wait)


def evaluation_share(run: TrainingRun) -> list[int]:
    """Which of a rank's trainers it evaluates: its own, or its part of those whose latents all ranks have."""
    world, rank = run.ranks.world, run.ranks.rank
    return [i for i, t in enumerate(run.trainers) if not isinstance(t, _Sharded) or i % world == rank]


def of_record(ranks: Ranks) -> dict[str, Any]:
    """What run.json says of the ranks, where there are several."""
    return {} if ranks.world == 1 else {"ranks": ranks.world}


def on_one_machine() -> bool:
    """Whether all ranks are on this machine."""
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")


def launcher() -> list[str]:
    """What a command line that goes on with this run begins with."""
    world, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world == "1":
        return ["python"]
    return ["torchrun", "--standalone", "--nproc_per_node", here] if on_one_machine() else ["torchrun", "..."]


def write_nothing(path: Path, data: Any) -> None:
    """In the place of `storage.write_json` where another rank writes."""
