"""trainSAE(): one stream of activations in, many trained dictionaries out.

The peer-compatible way to a `TrainingRun`: builds the trainers from configs, and takes up a run that was interrupted.
"""

from __future__ import annotations

import inspect
import itertools
import math
import shutil
import signal
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dictionary_learning import resume as resuming
from dictionary_learning import storage
from dictionary_learning.devices import resolve_device
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.tracking import ProgressSink, Sink, WandbSink
from dictionary_learning.trainers.trainer import SAETrainer
from dictionary_learning.training_run import Callback, TrainingRun

__all__ = ["Callback", "TrainingRun", "get_norm_factor", "trainSAE"]

ENCODER_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # autocast_dtype -> the trainers' encoder_dtype


def trainSAE(
    data: Iterable[Any],
    trainer_configs: Sequence[Mapping[str, Any]],
    steps: int,
    use_wandb: bool = False,
    wandb_entity: str = "",
    wandb_project: str = "",
    save_steps: Sequence[int] | None = None,
    save_dir: str | Path | None = None,
    log_steps: int | None = None,
    activations_split_by_head: bool = False,
    transcoder: bool = False,
    run_cfg: Mapping[str, Any] | None = None,
    normalize_activations: bool = False,
    verbose: bool = False,
    device: str | torch.device | None = None,
    autocast_dtype: torch.dtype = torch.float32,
    *,
    resume: bool = False,
    override: bool = False,
    state_every: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[Dictionary]:
    """Train a dictionary for each config on one stream of activations.

    Args:
        trainer_configs: dicts with a "trainer" class and its arguments; they are not modified. What a config leaves
            out of `steps`, `device`, `layer`, `lm_name`, and of a transcoder's `output_dim`, is filled in.
        run_cfg: further facts for the W&B config of each run; "group" names their group.
        verbose: print a progress bar and log lines.
        device: of the trainers, "auto" being the best there is; a config's own comes first.
        autocast_dtype: torch.bfloat16 trains with the encoder's products in bfloat16 and weights in float32
            (`encoder_dtype="bf16"` of every trainer whose config does not say it); torch.float32 is exact.
        resume: go on from the newest state in `save_dir`; the data must be set up as in the interrupted run. With
            more `steps` than that had, its trainers keep the learning rate and the warm-ups that they began with, and
            the decay is laid anew.
        override: with `resume`, allow other settings than the run began with.
        (others: see `TrainingRun`)

    Returns:
        the trained dictionaries, in the order of the configs; they take raw activations.

    Raises:
        UserError: a config that can't be, batches that don't fit, nothing to resume, or not the same run.
    """
    if isinstance(trainer_configs, Mapping):
        raise UserError("trainer_configs is a list of configs: write [config] in place of config.")
    if autocast_dtype not in ENCODER_DTYPES:
        raise UserError(f"autocast_dtype must be torch.float32 or torch.bfloat16, got {autocast_dtype!r}.")
    filled: dict[str, Any] = {"steps": steps} | ({} if device is None else {"device": resolve_device(device)})
    if autocast_dtype != torch.float32:
        filled["encoder_dtype"] = ENCODER_DTYPES[autocast_dtype]
    folder = None if save_dir is None else Path(save_dir)
    if resume and folder is None:
        raise UserError("resume needs the save_dir of the interrupted run.")
    state = storage.load_newest_state(folder / "state")[1] if resume and folder is not None else None
    began = (state or {}).get("settings", [])
    trainers = [
        _build_trainer(config, filled, data, transcoder, began_with)
        for config, began_with in itertools.zip_longest(trainer_configs, began[: len(trainer_configs)])
    ]
    sinks: list[Sink] = []
    if verbose:
        rows = getattr(data, "out_batch_size", None)
        sinks.append(
            ProgressSink(steps * rows if rows else None, [f"trainer_{index}" for index in range(min(3, len(trainers)))])
        )
    if use_wandb:
        group = str((run_cfg or {}).get("group") or (folder.name if folder else "trainSAE"))
        sinks.append(
            WandbSink(project=wandb_project, entity=wandb_entity, group=group, directory=folder, config=run_cfg)
        )
    run = TrainingRun(
        data,
        trainers,
        steps,
        save_dir=folder,
        save_steps=save_steps or (),
        log_steps=log_steps,
        sinks=sinks,
        state_every=state_every,
        normalize_activations=normalize_activations,
        transcoder=transcoder,
        activations_split_by_head=activations_split_by_head,
        callbacks=callbacks,
    )
    if folder is not None and not resume:  # states of an earlier run must not be taken for this one's
        shutil.rmtree(folder / "state", ignore_errors=True)
    if state is not None:
        for changed in run.load_state_dict(state, override):
            warnings.warn(f"The run goes on with another setting, {changed}.", stacklevel=2)
    dictionaries = run.run()
    run.tracker.close()
    if run.stopped == "SIGTERM":  # whoever sent it wants the process to end, not only the training
        signal.raise_signal(signal.SIGTERM)
    if run.stopped and not verbose:
        warnings.warn(f"Training stopped after {run.step:,} of {steps:,} steps: {run.stopped}.", stacklevel=2)
    return dictionaries


def _build_trainer(
    config: Mapping[str, Any],
    filled: Mapping[str, Any],
    data: Any,
    transcoder: bool,
    began: Mapping[str, Any] | None = None,
) -> SAETrainer:
    """A trainer from its config, with what `filled`, the data and the settings that a resumed run began with know where
    the config does not say it."""
    arguments = dict(config)
    cls = arguments.pop("trainer", None)
    if cls is None:
        raise UserError("A trainer config has no 'trainer': give its class, such as TopKTrainer.")
    if not isinstance(cls, type):
        raise UserError(f"A trainer config's 'trainer' must be a class, such as TopKTrainer, got {cls!r}.")
    lm = getattr(getattr(data, "source", None), "lm", None)
    if lm is not None:  # of which model and layer the activations are, for config.json
        points = {point.name: point.layer for point in data.source.hook_points}
        layer = points.get(arguments.get("submodule_name"), next(iter(points.values())) if len(points) == 1 else None)
        facts = {"lm_name": lm.name, "layer": layer}
    else:
        facts = {"lm_name": None, "layer": None}
    takes = cls.argument_names() if issubclass(cls, SAETrainer) else inspect.signature(cls).parameters
    known = {name: value for name, value in facts.items() if name in takes} | dict(filled)
    if transcoder and "activation_dim" in arguments:
        known["output_dim"] = arguments["activation_dim"]
    given = {name: value for name, value in arguments.items() if value is not None or name not in resuming.FROM_LENGTH}
    arguments = known | arguments | resuming.carried_settings(began, cls) | given
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"{cls.__name__} can't be made from its config: {error}.") from error


def get_norm_factor(data: Iterable[Any], steps: int) -> float:
    """Root mean squared norm of the activations [B, D] in the first `steps` batches of `data`, which are used up.

    `normalize_activations` measures it by itself, and trains on what it measured.

    Raises:
        UserError: no batches, or activations without a finite norm above 0.
    """
    rows, total = 0, torch.zeros((), dtype=torch.float64)
    for batch in itertools.islice(data, steps):
        rows += len(batch)
        total += batch.float().pow(2).sum(-1).sum(dtype=torch.float64).cpu()
    factor = (total / rows).sqrt().item() if rows else math.nan
    if not 0 < factor < math.inf:
        raise UserError(f"The activations have no norm factor: the root of their mean squared norm is {factor}.")
    return factor
