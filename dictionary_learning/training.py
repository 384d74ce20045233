"""trainSAE(): one stream of activations in, many trained dictionaries out.

Every dictionary sees every batch, in the order of the list, and shares nothing else with the others: trained among
others it is bit for bit what it is alone. The run owns what is common to all (the stream, the step, the norm factors,
the log, the files) and can be put down after any step: `state_dict()` holds everything that the next step depends on.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dictionary_learning import storage
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.tracking import JsonlSink, ProgressSink, Sink, Tracker, WandbSink
from dictionary_learning.trainers.trainer import SAETrainer

NORM_BATCHES = 16  # batches that estimate the norm factor where the data is not a buffer
Callback = Callable[["TrainingRun", int], None]


class TrainingRun:
    """Dictionaries in training on one stream.

    Args:
        data: an `ActivationBuffer`, or any iterable of batches [B, D] (or dicts of hook point -> [B, D]).
        trainers: each trains on the hook point of its `submodule_name`, where there are several.
        steps: batches to train on.
        save_dir: where `trainer_<i>/`, `metrics.jsonl` and `state/` go; None writes nothing.
        save_steps: steps after which a checkpoint of every dictionary is kept.
        state_every: steps between two saved states; None saves one only when the run is stopped.
        log_steps: steps between two log entries; None logs nothing.
        normalize_activations: train on activations of unit mean squared norm; saved dictionaries take raw ones.
        callbacks: called as `callback(run, step)` behind every step.

    Attributes:
        step: steps done. tokens: activations trained on. stopped: why it ended before its last step, or "".
    """

    def __init__(
        self,
        data: Iterable[Any],
        trainers: Sequence[SAETrainer],
        steps: int,
        *,
        save_dir: Path | None = None,
        save_steps: Sequence[int] = (),
        state_every: int | None = None,
        log_steps: int | None = None,
        normalize_activations: bool = False,
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not trainers:
            raise UserError("There is nothing to train: the list of trainers is empty.")
        if log_steps is not None and log_steps < 1:
            raise UserError(f"log_steps must be at least 1, got {log_steps}.")
        if state_every is not None and state_every < 1:
            raise UserError(f"state_every must be at least 1, got {state_every}.")
        self.data, self.trainers, self.steps = data, list(trainers), steps
        self.save_dir, self.save_steps, self.state_every = save_dir, set(save_steps), state_every
        self.log_steps, self.normalize_activations = log_steps, normalize_activations
        self.callbacks = list(callbacks)
        self.tracker = Tracker(JsonlSink(save_dir / "metrics.jsonl") if save_dir else None, sinks)
        self.norm_factors: dict[str | None, float] = {}
        self.step = 0
        self.tokens = 0
        self.stopped = ""
        self._batches: Iterator[Any] | None = None

    @property
    def names(self) -> list[str]:
        return [f"trainer_{index}" for index in range(len(self.trainers))]

    def run(self) -> list[Dictionary]:
        """Train to the last step, or to the end of the stream, or until asked to stop; the finished dictionaries.

        SIGINT or SIGTERM ends the run behind the step it is in, with a saved state; a second SIGINT ends it at once.
        """
        if self._batches is None:
            self._prepare_stream()
        self.tracker.start(self.step, dict(zip(self.names, map(self.config, range(len(self.trainers))), strict=True)))
        failed = True
        try:
            with _stop_requests() as stop:
                while self.step < self.steps and not self.stopped:
                    self._one_step()
                    self.stopped = self.stopped or stop.reason
            if self.stopped and self.save_dir is not None:
                self.save_state()
            if self.save_dir is not None:
                for index in range(len(self.trainers)):
                    self.save_dictionary(index)
            failed = False
        finally:
            self.tracker.finish(failed)
        return self.dictionaries()

    def _one_step(self) -> None:
        try:
            batch = next(self._batches, None)  # type: ignore[arg-type]
        except UserError:  # such as a damaged line in the corpus; no trainer has seen anything of this step yet
            if self.save_dir is not None and self.step > 0:
                self.save_state()
            raise
        if batch is None:
            self.stopped = "end of stream"
            self.tracker.message(
                f"The activations ended after {self.step:,} of {self.steps:,} steps ({self.tokens:,} tokens)."
            )
            return
        inputs = self._normalized(batch)
        for trainer in self.trainers:
            trainer.update(self.step, self._input_of(trainer, inputs))
        self.step += 1
        self.tokens += len(next(iter(inputs.values())))
        self.tracker.advance(self.step, self.tokens)
        if self.log_steps and (self.step % self.log_steps == 0 or self.step == self.steps):
            mixing = self.data.mixing() if isinstance(self.data, ActivationBuffer) else {}
            metrics = [trainer.metrics(self._input_of(trainer, inputs)) | mixing for trainer in self.trainers]
            self.tracker.metrics(self.step, self.tokens, dict(zip(self.names, metrics, strict=True)))
            for name, values in zip(self.names, metrics, strict=True):
                if not math.isfinite(values["loss"]):
                    self.tracker.message(f"Warning: the loss of {name} is {values['loss']} at step {self.step:,}.")
        if self.save_dir is not None:
            if self.step in self.save_steps:
                for index in range(len(self.trainers)):
                    self.save_dictionary(index, checkpoint=True)
            if self.state_every and self.step % self.state_every == 0 and self.step < self.steps:
                self.save_state()
        for callback in self.callbacks:
            callback(self, self.step)

    # ------------------------------------------------------------------------------------------- the stream

    def _prepare_stream(self) -> None:
        """Measure the norm factors on the first activations, which are trained on all the same."""
        self._batches = iter(self.data)
        if self.norm_factors or not self.normalize_activations:
            return
        if isinstance(self.data, ActivationBuffer):
            squares: dict[str | None, float] = {
                name: self.data.mean_squared_norm(name) for name in self.data.hook_points
            }
        else:
            first = list(itertools.islice(self._batches, NORM_BATCHES))
            if not first:
                raise UserError("The activations are empty: there is no batch to train on.")
            self._batches = itertools.chain(first, self._batches)
            rows: dict[str | None, list[Tensor]] = {}
            for batch in first:
                for name, acts in self._by_name(batch).items():
                    rows.setdefault(name, []).append(acts.float().pow(2).sum(-1))
            squares = {name: torch.cat(parts).mean().item() for name, parts in rows.items()}
        for name, square in squares.items():
            if not 0 < square < float("inf"):
                raise UserError(
                    f"The activations of '{name}' can't be normalised: their mean squared norm is {square}."
                )
        self.norm_factors = {name: square**0.5 for name, square in squares.items()}

    def _by_name(self, batch: Any) -> dict[str | None, Tensor]:
        acts = batch if isinstance(batch, dict) else {None: batch}
        if isinstance(self.data, ActivationBuffer) and None in acts:
            acts = {self.data.hook_points[0]: acts[None]}
        for name, tensor in acts.items():
            if not isinstance(tensor, Tensor) or tensor.ndim != 2:
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UserError(
                    f"A batch of activations{f' of {name}' if name else ''} must be [rows, width], got {shape}."
                )
        return acts

    def _normalized(self, batch: Any) -> dict[str | None, Tensor]:
        """Each hook point's batch in float32, divided by its norm factor: once for all trainers."""
        inputs = {}
        for name, acts in self._by_name(batch).items():
            acts = acts.float()
            inputs[name] = acts / self.norm_factors[name] if self.norm_factors else acts
        return inputs

    def _input_of(self, trainer: SAETrainer, inputs: Mapping[str | None, Tensor]) -> Tensor:
        acts = next(iter(inputs.values())) if len(inputs) == 1 else inputs.get(trainer.submodule_name)
        if acts is None:
            raise UserError(
                f"The data has several hook points ({', '.join(map(str, inputs))}): set submodule_name of "
                f"{trainer.wandb_name} to one of them, not {trainer.submodule_name!r}."
            )
        width = trainer.ae.activation_dim
        if acts.shape[1] != width:
            raise UserError(f"{trainer.wandb_name} expects activations of width {width}, the data has {acts.shape[1]}.")
        return acts

    # ------------------------------------------------------------------------------------------- results

    def norm_factor(self, index: int) -> float:
        """What the activations of a trainer are divided by (1.0 without normalisation)."""
        if not self.norm_factors:
            return 1.0
        if len(self.norm_factors) == 1:
            return next(iter(self.norm_factors.values()))
        return self.norm_factors[self.trainers[index].submodule_name]

    def dictionary(self, index: int) -> Dictionary:
        """A copy of a trainer's dictionary that takes raw activations: the norm factor folded into its biases."""
        dictionary = copy.deepcopy(self.trainers[index].ae)
        dictionary.scale_biases(self.norm_factor(index))
        return dictionary.requires_grad_(False)

    def dictionaries(self) -> list[Dictionary]:
        """`dictionary(i)` of every trainer."""
        return [self.dictionary(index) for index in range(len(self.trainers))]

    def config(self, index: int) -> dict[str, Any]:
        """A trainer's settings and the norm factor that was folded into its saved weights."""
        return self.trainers[index].config | {"norm_factor": self.norm_factor(index)}

    def save_dictionary(self, index: int, checkpoint: bool = False) -> None:
        """Write `trainer_<i>/ae.safetensors` and `config.json`, or a checkpoint of this step beside them."""
        assert self.save_dir is not None
        folder = self.save_dir / f"trainer_{index}"
        weights = self.dictionary(index).state_dict()
        if checkpoint:
            storage.write_tensors(folder / "checkpoints" / f"ae_{self.step}.safetensors", weights)
            return
        config = {"trainer": self.config(index), "buffer": getattr(self.data, "config", {})}
        storage.write_json(folder / "config.json", storage.finite(config))
        storage.write_tensors(folder / "ae.safetensors", weights)

    # ------------------------------------------------------------------------------------------- state

    def save_state(self) -> Path | None:
        """Write the state of this step under `state/`; None (with a warning) where the data can't be resumed."""
        assert self.save_dir is not None
        if not hasattr(self.data, "state_dict"):
            warnings.warn("No state was saved: the activations have no state_dict() to resume from.", stacklevel=2)
            return None
        return storage.save_state(self.save_dir / "state", self.step, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "norm_factors": [[name, factor] for name, factor in self.norm_factors.items()],
            "trainers": [trainer.state_dict() for trainer in self.trainers],
            "data": self.data.state_dict(),  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["trainers"]) != len(self.trainers):
            raise UserError(f"The saved run has {len(state['trainers'])} dictionaries, this one {len(self.trainers)}.")
        self.step, self.tokens = state["step"], state["tokens"]
        self.norm_factors = {name: factor for name, factor in state["norm_factors"]}
        for trainer, saved in zip(self.trainers, state["trainers"], strict=True):
            trainer.load_state_dict(saved)
        self.data.load_state_dict(state["data"])  # type: ignore[attr-defined]


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
    run_cfg: Mapping[str, Any] | None = None,
    normalize_activations: bool = False,
    verbose: bool = False,
    device: str | torch.device | None = None,
    *,
    resume: bool = False,
    state_every: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[Dictionary]:
    """Train a dictionary for each config on one stream of activations.

    Args:
        trainer_configs: dicts with a "trainer" class and its arguments; they are not modified. `steps` and `device`
            are filled in where a config leaves them out.
        run_cfg: further facts for the W&B config of each run; "group" names their group.
        verbose: print a progress bar and log lines.
        resume: go on from the newest state in `save_dir`; the data must be set up as in the interrupted run.
        (others: see `TrainingRun`)

    Returns:
        the trained dictionaries, in the order of the configs; they take raw activations.

    Raises:
        UserError: a config that can't be, batches that don't fit, nothing to resume.
    """
    if isinstance(trainer_configs, Mapping):
        raise UserError("trainer_configs is a list of configs: write [config] in place of config.")
    trainers = [_build_trainer(config, steps, device) for config in trainer_configs]
    folder = None if save_dir is None else Path(save_dir)
    if resume and folder is None:
        raise UserError("resume needs the save_dir of the interrupted run.")
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
        callbacks=callbacks,
    )
    if folder is not None and not resume:  # states of an earlier run must not be taken for this one's
        shutil.rmtree(folder / "state", ignore_errors=True)
    if resume and folder is not None:
        run.load_state_dict(storage.load_newest_state(folder / "state")[1])
    dictionaries = run.run()
    run.tracker.close()
    if run.stopped == "SIGTERM":  # whoever sent it wants the process to end, not only the training
        signal.raise_signal(signal.SIGTERM)
    if run.stopped and not verbose:
        warnings.warn(f"Training stopped after {run.step:,} of {steps:,} steps: {run.stopped}.", stacklevel=2)
    return dictionaries


def _build_trainer(config: Mapping[str, Any], steps: int, device: str | torch.device | None) -> SAETrainer:
    arguments = dict(config)
    cls = arguments.pop("trainer", None)
    if cls is None:
        raise UserError("A trainer config has no 'trainer': give its class, such as TopKTrainer.")
    if not isinstance(cls, type):
        raise UserError(f"A trainer config's 'trainer' must be a class, such as TopKTrainer, got {cls!r}.")
    arguments.setdefault("steps", steps)
    if device is not None:
        arguments.setdefault("device", device)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"{cls.__name__} can't be made from its config: {error}.") from error


class _StopRequest:
    reason = ""
    signum: int | None = None


@contextlib.contextmanager
def _stop_requests() -> Iterator[_StopRequest]:
    """Turn SIGINT and SIGTERM into a request that is looked at between steps; a second SIGINT interrupts at once."""
    request = _StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: Any) -> None:
        if request.reason and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.reason, request.signum = signal.Signals(signum).name, signum

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
