"""One run: dictionaries in training on one stream, from the first step to the files.

Every dictionary sees every batch, in the order of the list, and shares nothing else with the others: trained among
others it is bit for bit what it is alone, also when one of them ends early because its loss is no longer finite. The
run owns what is common to all (the stream, the step, the norm factors, the log, the files) and can be put down after
any step: `state_dict()` holds everything that the next step depends on. States are written behind the training
(`states.StateWriter`); a disk that fails costs a state or a checkpoint, and a warning, but not the run.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dictionary_learning import callbacks as called
from dictionary_learning import resume, storage
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.distributed import job
from dictionary_learning.distributed.ranks import OfAllRanks, Ranks
from dictionary_learning.errors import UserError
from dictionary_learning.states import StateWriter
from dictionary_learning.stopping import StoppedWaiting, StopRequest, stop_requests
from dictionary_learning.tracking import JsonlSink, Sink, Tracker
from dictionary_learning.trainers.trainer import SAETrainer
from dictionary_learning.training_inputs import Parts, TrainingInputs

Callback = called.Callback
NONE_LEFT = "no dictionary can go on"


class TrainingRun:
    """Dictionaries in training on one stream.

    Args:
        data: an `ActivationBuffer`, or any iterable of batches, as `TrainingInputs` reads them.
        trainers: each trains on the hook point of its `submodule_name`, where there are several.
        steps: batches to train on.
        save_dir: where `trainer_<i>/`, `metrics.jsonl` and `state/` go; None writes nothing.
        save_steps: steps after which a checkpoint of every dictionary is kept.
        state_every: steps between two saved states, the last step's among them; None saves one only when the run is
            stopped.
        final_state: save the last step's state in any case.
        log_steps: steps between two log entries; None logs nothing.
        normalize_activations: train on activations of unit mean squared norm; saved dictionaries take raw ones.
        transcoder: batches are (input, output) of a module, [B, 2, D]; trainers learn to predict the output.
        activations_split_by_head: batches are [..., heads, D]; trainer i learns head i.
        callbacks: called as `callback(run, step)` behind every step, see `callbacks`.
        ranks, shares: those that train together, and which dictionaries of the run the `trainers` of each are.

    Attributes:
        step: steps done. tokens: activations trained on. stopped: why it ended before its last step, or "".
        states: what writes the states, None without a folder; its `saved_step` is the newest on the disk.
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
        final_state: bool = False,
        log_steps: int | None = None,
        normalize_activations: bool = False,
        transcoder: bool = False,
        activations_split_by_head: bool = False,
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
        ranks: Ranks | None = None,
        shares: job.Shares | None = None,
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
        self.final_state, self.log_steps, self.callbacks = final_state, log_steps, list(callbacks)
        self.inputs = TrainingInputs(
            data, normalize=normalize_activations, transcoder=transcoder, split_by_head=activations_split_by_head
        )
        self.ranks = Ranks() if ranks is None else ranks
        self.shares = [range(len(trainers))] if shares is None else shares
        self.numbers, self._owners = self.shares[self.ranks.rank], job.owners_of(self.shares)
        first = self.ranks.first
        record = JsonlSink(save_dir / "metrics.jsonl") if save_dir and first else None
        self.tracker = Tracker(record, sinks if first else ())
        self.states = None if save_dir is None else StateWriter(save_dir / "state")
        self.step = 0
        self.tokens = 0
        self.stopped = ""
        self._request = StopRequest()
        self._began_with = [storage.finite(trainer.config) for trainer in self.trainers]
        self._state_due = self._training = False
        self._told: set[Any] = set()  # names of stopped dictionaries and steps of failed states
        self._unlogged: dict[str, dict[str, float]] = {}  # metrics that wait for the next log step of all ranks

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked the run to end behind the step it is in."""
        return bool(self._request.reason)

    @property
    def names(self) -> list[str]:
        return [f"trainer_{number}" for number in self.numbers]

    @property
    def stopped_dictionaries(self) -> dict[str, str]:
        """Name -> why, of the dictionaries whose loss or gradient was no longer finite."""
        return {name: str(t.stopped) for name, t in zip(self.names, self.trainers, strict=True) if t.stopped}

    def run(self) -> list[Dictionary]:
        """Train to the last step, or to the end of the stream, or until asked to stop; the finished dictionaries.

        SIGINT or SIGTERM ends the run behind the step it is in, with a saved state; a second SIGINT ends it at once.

        Raises:
            UserError: what the data refuses; memory or a disk that does not suffice.
        """
        self.inputs.start()
        configs = dict(zip(self.names, map(self.config, range(len(self.trainers))), strict=True))
        self.tracker.start(self.step, self.ranks.merged(configs))
        self._told |= set(self.stopped_dictionaries)
        first, failed, at_once = self.step, True, False
        try:
            with stop_requests(end_waits=self.ranks.first) as self._request:
                while self.step < self.steps and not self.stopped:
                    self._training = True
                    self._one_step()
                    self.stopped = self.stopped or self.ranks.agreed(self._request.reason, self._idle)
                    if self.step == first + 1 and self.states is not None and self.state_every:
                        self._reserve()
                self._training = False
                self._put_down()
                # A signal that came meanwhile ends the run too: whoever sent it does not wait for an evaluation.
                self.stopped = self.ranks.agreed(self._request.reason) or self.stopped
            failed = False
        except KeyboardInterrupt:
            at_once = True
            raise
        finally:
            if failed and not at_once and self.states is not None:
                with contextlib.suppress(Exception):  # what is in flight may still arrive
                    self.states.finish()
            self.tracker.finish(failed)
        return self.dictionaries()

    def _one_step(self) -> None:
        try:
            parts = next(self.inputs, None)
        except StoppedWaiting:
            return
        except Exception as error:  # such as a damaged line in the corpus; no trainer has seen anything of this step
            if self.ranks.world == 1 or isinstance(error, OfAllRanks):
                self._save_before_failing()
            raise
        if parts is None:
            self.stopped = "end of stream"
            self.tracker.message(
                f"The activations ended after {self.step:,} of {self.steps:,} steps ({self.tokens:,} tokens)."
            )
            return
        for trainer, batch in zip(self.trainers, self._batches_of(parts), strict=True):
            if trainer.stopped is None:
                self._update(trainer, batch)
        self.step += 1
        self.tokens += len(next(iter(parts.values())))
        self.tracker.advance(self.step, self.tokens)
        metrics = called.reports(self.callbacks, self, self.step)
        self._note_stopped(metrics)
        logged = bool(self.log_steps) and (self.step % (self.log_steps or 1) == 0 or self.step == self.steps)
        if logged:
            mixing = self.data.mixing() if isinstance(self.data, ActivationBuffer) else {}
            batches = zip(self.trainers, self._batches_of(parts), strict=True)
            for name, (trainer, batch) in zip(self.names, batches, strict=True):
                if trainer.stopped is None:
                    metrics[name] = trainer.metrics(*batch.values()) | mixing | metrics.get(name, {})
        if self.ranks.world > 1:
            metrics = self._of_all_ranks(metrics, logged)
        if metrics:
            self.tracker.metrics(self.step, self.tokens, metrics)
        called.call_others(self.callbacks, self, self.step)
        if self.save_dir is not None:
            if self.step in self.save_steps:
                for index in range(len(self.trainers)):
                    self.save_dictionary(index, checkpoint=True)
            self._save_when_due()

    def _update(self, trainer: SAETrainer, batch: dict[str, Any]) -> None:
        try:
            trainer.update(self.step, **batch)
        except torch.OutOfMemoryError as error:
            rows = len(batch["activations"])
            raise UserError(
                f"The memory of {trainer.device} does not suffice for a step of {trainer.wandb_name} on {rows:,} rows: "
                f"set the batch size to {max(1, rows // 2):,}, make the buffer half as large, or train fewer "
                "dictionaries at once."
            ) from error

    def _note_stopped(self, metrics: dict[str, dict[str, float]]) -> None:
        """Tell once of every dictionary that can't go on."""
        for name, trainer in zip(self.names, self.trainers, strict=True):
            if trainer.stopped is not None and name not in self._told:
                self._told.add(name)
                metrics.setdefault(name, {})["stopped_at_step"] = trainer.stopped.step
                self.tracker.message(
                    f"Warning: {name} is stopped, {trainer.stopped}. Its weights are those of the step before."
                )

    @property
    def _idle(self) -> str:
        return NONE_LEFT if all(trainer.stopped is not None for trainer in self.trainers) else ""

    def _of_all_ranks(self, metrics: dict[str, dict[str, float]], logged: bool) -> dict[str, dict[str, float]]:
        """At a log step the metrics of every rank since the last; before it none, they wait."""
        for name, values in metrics.items():
            self._unlogged.setdefault(name, {}).update(values)
        if not logged:
            return {}
        merged, self._unlogged = self.ranks.merged(self._unlogged), {}
        for name, values in merged.items():
            if "stopped_at_step" in values and name not in self._told:
                self._told.add(name)
                self.tracker.message(f"Warning: {name} is stopped since step {values['stopped_at_step']:,.0f}.")
        return merged

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
        dictionary = job.whole_dictionary(self.trainers[index])
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
        """A trainer's settings, the norm factors that were folded into its saved weights, if these are the best of
        several steps, of which, and if it could not go on, why."""
        scale, output_scale = self.inputs.scales(self.trainers[index], index)
        target = {} if output_scale is None else {"output_norm_factor": output_scale}
        kept, stopped = called.best_of(self.callbacks, index), self.trainers[index].stopped
        why = {} if stopped is None else {"stopped_at_step": stopped.step, "stopped": str(stopped)}
        return self.trainers[index].config | {"norm_factor": scale} | target | (kept.facts if kept else {}) | why

    def save_dictionary(self, index: int, checkpoint: bool = False) -> None:
        """Write `trainer_<i>/ae.safetensors` and `config.json`, or a checkpoint of this step beside them.

        Raises:
            UserError: the disk refuses it; while training goes on that is only told, since a state holds it all.
        """
        assert self.save_dir is not None
        name = self.names[index]
        folder, weights = self.save_dir / name, self.dictionary(index, best=not checkpoint).state_dict()
        if self._owners[self.numbers[index]] != self.ranks.rank:
            return
        try:
            with storage.disk_faults_said(self.save_dir):
                if checkpoint:
                    storage.write_tensors(folder / "checkpoints" / f"ae_{self.step}.safetensors", weights)
                    return
                config = {"trainer": self.config(index), "buffer": getattr(self.data, "config", {})}
                storage.write_json(folder / "config.json", storage.finite(config))
                storage.write_tensors(folder / "ae.safetensors", weights)
        except UserError as error:
            if not self._training:
                raise
            self.tracker.message(f"Warning: {name} was not written at step {self.step:,}: {error}")

    # ------------------------------------------------------------------------------------------- state

    def save_state(self, wait: bool = True) -> Path | None:
        """Write the state of this step under `state/`, with `wait` False behind the training.

        Returns:
            its folder; None, with a warning, where the data can't be resumed or the disk refuses it.
        """
        assert self.save_dir is not None and self.states is not None
        if not hasattr(self.data, "state_dict"):
            warnings.warn("No state was saved: the activations have no state_dict() to resume from.", stacklevel=2)
            return None
        job.save_state(self, self.states, wait)
        self._tell_of_states()
        return storage.state_folder(self.states.folder, self.step) if self.states.saved_step == self.step else None

    def _reserve(self) -> None:
        if self.states is not None and hasattr(self.data, "state_dict") and self.ranks.world == 1:
            self.states.reserve(self.state_dict(live=True))

    def _save_when_due(self) -> None:
        """Begin a state where it is time to, or as soon as the one before is written."""
        assert self.states is not None
        self._tell_of_states()
        self._state_due |= bool(self.state_every) and self.step % (self.state_every or 1) == 0
        if self._state_due and self.step < self.steps and not self.ranks.of_first(self.states.busy):
            self._state_due = False
            self.save_state(wait=False)

    def _put_down(self) -> None:
        if self.save_dir is not None and self.states is not None:
            states, alone = self.states, self.ranks.world == 1
            storage.patiently(self._save_all, lambda: alone and states.saved_step != self.step)

    def _save_all(self) -> None:
        """The state first: whatever happens to the dictionaries' files, it brings them back."""
        if self.stopped or self.state_every or self.final_state:
            self.save_state()
        for index in range(len(self.trainers)):
            self.save_dictionary(index)

    def _save_before_failing(self) -> None:
        with contextlib.suppress(Exception):  # what failed first is what is told
            if self.save_dir is not None and self.step > 0 and self.save_state() is not None:
                self.tracker.message(f"The state of step {self.step:,} is saved; a resume goes on from there.")

    def _tell_of_states(self) -> None:
        failed = None if self.states is None else self.states.failed
        if self.states is not None and failed is not None and failed.step not in self._told:
            self._told.add(failed.step)
            kept = self.states.saved_step
            newest = "there is none yet" if kept is None else f"the newest is that of step {kept:,}"
            why = failed.error.strerror or failed.error
            self.tracker.message(f"Warning: the state of step {failed.step:,} was not written ({why}); {newest}.")

    def state_dict(self, live: bool = False) -> dict[str, Any]:
        """Everything that the next step depends on; with `live`, of the buffer too the tensors themselves, which are
        to be copied before it."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "settings": self._began_with,
            "trainers": [trainer.state_dict() for trainer in self.trainers],
            "inputs": self.inputs.state_dict(live=live),
            "callbacks": called.states(self.callbacks),
        }

    def load_state_dict(self, state: Mapping[str, Any], override: bool = False) -> list[str]:
        """Go on from a state; what differs from the run that saved it, where `override` allows that.

        Raises:
            UserError: other dictionaries; other settings of one (without `override`), each named; what does not fit.
        """
        try:
            return self._load(state, override)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"The saved state does not fit this run ({why}): resume with the same settings.") from error

    def _load(self, state: Mapping[str, Any], override: bool) -> list[str]:
        if (count := len(state["trainers"])) != len(self.trainers):
            raise UserError(f"The saved run has {count} dictionaries, this one {len(self.trainers)}.")
        if state["step"] > self.steps:
            raise UserError(f"The saved run has done {state['step']:,} steps: it can't end at step {self.steps:,}.")
        settings = zip(state.get("settings", self._began_with), self._began_with, self.names, strict=True)
        differences = [d for each in settings for d in resume.trainer_differences(*each)]
        changed = resume.refuse("The saved run", differences, override)
        for trainer, saved in zip(self.trainers, state["trainers"], strict=True):
            trainer.load_state_dict(saved)
        self.inputs.load_state_dict(state["inputs"])
        called.load_states(self.callbacks, state.get("callbacks", []))
        self.step, self.tokens = state["step"], state["tokens"]
        if self.states is not None and not changed:
            self.states.saved_step = self.step
        return changed
