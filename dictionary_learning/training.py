"""trainSAE(): one stream of activations in, many trained dictionaries out.

Every dictionary sees every batch, in the order of the list, and shares nothing else with the others: trained among
others it is bit for bit what it is alone. The run owns what is common to all (the stream, the step, the norm factors,
the log, the files) and can be put down after any step: `state_dict()` holds everything that the next step depends on.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import shutil
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dictionary_learning import callbacks as called
from dictionary_learning import storage
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.devices import resolve_device
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.tracking import JsonlSink, ProgressSink, Sink, Tracker, WandbSink
from dictionary_learning.trainers.trainer import SAETrainer
from dictionary_learning.training_inputs import Parts, TrainingInputs

Callback = called.Callback
ENCODER_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # autocast_dtype -> the trainers' encoder_dtype


class TrainingRun:
    """Dictionaries in training on one stream.

    Args:
        data: an `ActivationBuffer`, or any iterable of batches, as `TrainingInputs` reads them.
        trainers: each trains on the hook point of its `submodule_name`, where there are several.
        steps: batches to train on.
        save_dir: where `trainer_<i>/`, `metrics.jsonl` and `state/` go; None writes nothing.
        save_steps: steps after which a checkpoint of every dictionary is kept.
        state_every: steps between two saved states; None saves one only when the run is stopped.
        log_steps: steps between two log entries; None logs nothing.
        normalize_activations: train on activations of unit mean squared norm; saved dictionaries take raw ones.
        transcoder: batches are (input, output) of a module, [B, 2, D]; trainers learn to predict the output.
        activations_split_by_head: batches are [..., heads, D]; trainer i learns head i.
        callbacks: called as `callback(run, step)` behind every step, see `callbacks`.

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
        transcoder: bool = False,
        activations_split_by_head: bool = False,
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not trainers:
            raise UserError("There is nothing to train: the list of trainers is empty.")
        if log_steps is not None and log_steps < 1:
            raise UserError(f"log_steps must be at least 1, got {log_steps}.")
        if state_every is not None and state_every < 1:
            raise UserError(f"state_every must be at least 1, got {state_every}.")
        for trainer in trainers:
            if trainer.plateau is not None and not any(getattr(c, "reports", False) for c in callbacks):
                raise UserError(
                    f"{trainer.wandb_name} has the scheduler 'plateau', which waits for a held-out loss that nobody "
                    "measures: add HeldOut(...) to the callbacks, or choose another scheduler."
                )
        self.data, self.trainers, self.steps = data, list(trainers), steps
        self.save_dir, self.save_steps, self.state_every = save_dir, set(save_steps), state_every
        self.log_steps, self.callbacks = log_steps, list(callbacks)
        self.inputs = TrainingInputs(
            data, normalize=normalize_activations, transcoder=transcoder, split_by_head=activations_split_by_head
        )
        self.tracker = Tracker(JsonlSink(save_dir / "metrics.jsonl") if save_dir else None, sinks)
        self.step = 0
        self.tokens = 0
        self.stopped = ""
        self._request = _StopRequest()

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked the run to end behind the step it is in."""
        return bool(self._request.reason)

    @property
    def names(self) -> list[str]:
        return [f"trainer_{index}" for index in range(len(self.trainers))]

    def run(self) -> list[Dictionary]:
        """Train to the last step, or to the end of the stream, or until asked to stop; the finished dictionaries.

        SIGINT or SIGTERM ends the run behind the step it is in, with a saved state; a second SIGINT ends it at once.
        """
        self.inputs.start()
        self.tracker.start(self.step, dict(zip(self.names, map(self.config, range(len(self.trainers))), strict=True)))
        failed = True
        try:
            with _stop_requests() as self._request:
                while self.step < self.steps and not self.stopped:
                    self._one_step()
                    self.stopped = self.stopped or self._request.reason
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
            parts = next(self.inputs, None)
        except UserError:  # such as a damaged line in the corpus; no trainer has seen anything of this step yet
            if self.save_dir is not None and self.step > 0:
                self.save_state()
            raise
        if parts is None:
            self.stopped = "end of stream"
            self.tracker.message(
                f"The activations ended after {self.step:,} of {self.steps:,} steps ({self.tokens:,} tokens)."
            )
            return
        for trainer, batch in zip(self.trainers, self._batches_of(parts), strict=True):
            trainer.update(self.step, **batch)
        self.step += 1
        self.tokens += len(next(iter(parts.values())))
        self.tracker.advance(self.step, self.tokens)
        metrics = called.reports(self.callbacks, self, self.step)
        if self.log_steps and (self.step % self.log_steps == 0 or self.step == self.steps):
            mixing = self.data.mixing() if isinstance(self.data, ActivationBuffer) else {}
            batches = zip(self.trainers, self._batches_of(parts), strict=True)
            for name, (trainer, batch) in zip(self.names, batches, strict=True):
                values = trainer.metrics(*batch.values()) | mixing
                metrics[name] = values | metrics.get(name, {})
                if not math.isfinite(values["loss"]):
                    self.tracker.message(f"Warning: the loss of {name} is {values['loss']} at step {self.step:,}.")
        if metrics:
            self.tracker.metrics(self.step, self.tokens, metrics)
        called.call_others(self.callbacks, self, self.step)
        if self.save_dir is not None:
            if self.step in self.save_steps:
                for index in range(len(self.trainers)):
                    self.save_dictionary(index, checkpoint=True)
            if self.state_every and self.step % self.state_every == 0 and self.step < self.steps:
                self.save_state()

    def _batches_of(self, parts: Parts) -> Iterator[dict[str, Any]]:
        """The arguments of each trainer's `update`: its activations, and its target if it is a transcoder's."""
        for index, trainer in enumerate(self.trainers):
            acts, target = self.inputs.of(trainer, index, parts)
            yield {"activations": acts} if target is None else {"activations": acts, "target": target}

    # ------------------------------------------------------------------------------------------- results

    def norm_factor(self, index: int) -> float:
        """What the activations of a trainer are divided by (1.0 without normalisation)."""
        return self.inputs.scales(self.trainers[index], index)[0]

    def dictionary(self, index: int, best: bool = True) -> Dictionary:
        """A copy of a trainer's dictionary that takes raw activations: the norm factors folded into its weights.

        Where a callback keeps the best dictionary it is that one, with `best` False always the present one."""
        dictionary = copy.deepcopy(self.trainers[index].ae)
        kept = called.best_of(self.callbacks, index) if best else None
        if kept is not None:
            dictionary.load_state_dict(kept.weights)
        scale, output_scale = self.inputs.scales(self.trainers[index], index)
        dictionary.scale_biases(scale, *([] if output_scale is None else [output_scale]))
        return dictionary.requires_grad_(False)

    def dictionaries(self) -> list[Dictionary]:
        """`dictionary(i)` of every trainer."""
        return [self.dictionary(index) for index in range(len(self.trainers))]

    def config(self, index: int) -> dict[str, Any]:
        """A trainer's settings, the norm factors that were folded into its saved weights, and if these are the best
        of several steps, of which."""
        scale, output_scale = self.inputs.scales(self.trainers[index], index)
        target = {} if output_scale is None else {"output_norm_factor": output_scale}
        kept = called.best_of(self.callbacks, index)
        return self.trainers[index].config | {"norm_factor": scale} | target | (kept.facts if kept else {})

    def save_dictionary(self, index: int, checkpoint: bool = False) -> None:
        """Write `trainer_<i>/ae.safetensors` and `config.json`, or a checkpoint of this step beside them."""
        assert self.save_dir is not None
        folder = self.save_dir / f"trainer_{index}"
        weights = self.dictionary(index, best=not checkpoint).state_dict()
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
            "trainers": [trainer.state_dict() for trainer in self.trainers],
            "inputs": self.inputs.state_dict(),
            "callbacks": called.states(self.callbacks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["trainers"]) != len(self.trainers):
            raise UserError(f"The saved run has {len(state['trainers'])} dictionaries, this one {len(self.trainers)}.")
        self.step, self.tokens = state["step"], state["tokens"]
        for trainer, saved in zip(self.trainers, state["trainers"], strict=True):
            trainer.load_state_dict(saved)
        self.inputs.load_state_dict(state["inputs"])
        called.load_states(self.callbacks, state.get("callbacks", []))


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
        resume: go on from the newest state in `save_dir`; the data must be set up as in the interrupted run.
        (others: see `TrainingRun`)

    Returns:
        the trained dictionaries, in the order of the configs; they take raw activations.

    Raises:
        UserError: a config that can't be, batches that don't fit, nothing to resume.
    """
    if isinstance(trainer_configs, Mapping):
        raise UserError("trainer_configs is a list of configs: write [config] in place of config.")
    if autocast_dtype not in ENCODER_DTYPES:
        raise UserError(f"autocast_dtype must be torch.float32 or torch.bfloat16, got {autocast_dtype!r}.")
    filled: dict[str, Any] = {"steps": steps} | ({} if device is None else {"device": resolve_device(device)})
    if autocast_dtype != torch.float32:
        filled["encoder_dtype"] = ENCODER_DTYPES[autocast_dtype]
    trainers = [_build_trainer(config, filled, data, transcoder) for config in trainer_configs]
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
        transcoder=transcoder,
        activations_split_by_head=activations_split_by_head,
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


def _build_trainer(config: Mapping[str, Any], filled: Mapping[str, Any], data: Any, transcoder: bool) -> SAETrainer:
    """A trainer from its config, with what `filled` and the data know where the config does not say it."""
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
    takes = inspect.signature(cls).parameters
    known = {name: value for name, value in facts.items() if name in takes} | dict(filled)
    if transcoder and "activation_dim" in arguments:
        known["output_dim"] = arguments["activation_dim"]
    arguments = known | arguments
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
