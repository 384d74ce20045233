"""Held-out loss during training: how good is every dictionary so far, on activations that it never trains on?

In: a finite set of activations, read once, and a run that calls this every step. Out: every `eval_steps` the loss and
the pooled L0 and explained variance of every dictionary, for the log; the loss also for the scheduler "plateau", and
with `save_best_only` the dictionaries of least loss as the run's results in place of the last ones.

Looking changes nothing: no gradient, no draw of a generator, no counter of a trainer. What the loss is must not change
during a run, or no two looks could be compared: the sparsity penalty is taken at its full weight also while it warms
up, and AuxK, which comes and goes with dead latents, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.callbacks import Best
from dictionary_learning.errors import UserError
from dictionary_learning.metrics import EvalResult, PooledMetrics

if TYPE_CHECKING:
    from dictionary_learning.trainers.trainer import SAETrainer
    from dictionary_learning.training import TrainingRun

ROWS_AT_ONCE = 4096


class HeldOut:
    """A callback that measures every dictionary of a run on held-out activations.

    Args:
        activations: a tensor or array [N, D], a mapping of hook point -> [N, D], or a finite iterable of batches as
            the run's data has them (of transcoders [N, 2, D], or pairs). Kept in memory, in the data's units.
        eval_steps: steps between two looks; the last step is looked at too.
        save_best_only: the run's results, in `trainer_<i>/` and returned, are the dictionaries of least held-out loss.
        batch_rows: rows measured at once, where tensors are given.

    Attributes:
        latest: {number of a trainer: (held-out loss, `EvalResult`)} of the last look.
        best: {number of a trainer: `Best`} with `save_best_only`, else empty.

    Raises:
        UserError: no activations, or values that are not finite; a bad number.
    """

    reports: ClassVar[bool] = True  # its metrics are logged with those of the step

    def __init__(
        self,
        activations: Any,
        eval_steps: int,
        *,
        save_best_only: bool = False,
        batch_rows: int = ROWS_AT_ONCE,
    ) -> None:
        for name, number in (("eval_steps", eval_steps), ("batch_rows", batch_rows)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise UserError(f"{name} must be a positive integer, got {number!r}.")
        self.eval_steps, self.save_best_only = eval_steps, save_best_only
        self._batches = list(_batches(activations, batch_rows))
        if not self._batches:
            raise UserError("There are no held-out activations to measure on.")
        self.latest: dict[int, tuple[float, EvalResult]] = {}
        self.best: dict[int, Best] = {}
        self._checked = False

    def _check(self, run: TrainingRun) -> None:
        self._checked = True
        for trainer in run.trainers:
            if trainer.moves_its_loss and (self.save_best_only or trainer.plateau is not None):
                what = "save_best_only" if self.save_best_only else "scheduler 'plateau'"
                raise UserError(
                    f"{what} compares losses, but that of {trainer.wandb_name} changes as its penalty moves (target_l0 "
                    "or annealing): leave one out."
                )

    def __call__(self, run: TrainingRun, step: int) -> dict[str, dict[str, float]] | None:
        """Measure, where it is time to; the metrics for the log."""
        if not self._checked:
            self._check(run)
        if step % self.eval_steps and step != run.steps:
            return None
        self.latest = self.measure(run)
        for index, (loss, _) in self.latest.items():
            plateau = run.trainers[index].plateau
            if plateau is not None:
                plateau.observe(loss)
            if self.save_best_only and loss < (self.best[index].loss if index in self.best else math.inf):
                self.best[index] = Best(step, loss, _copy(run.trainers[index].ae.state_dict()))
                if run.save_dir is not None:
                    run.save_dictionary(index)
        return {
            run.names[index]: {
                "heldout_loss": loss,
                "heldout_frac_variance_explained": result.frac_variance_explained,
                "heldout_l0": result.l0,
                "heldout_frac_alive": result.frac_alive,
            }
            for index, (loss, result) in self.latest.items()
        }

    @torch.no_grad()
    def measure(self, run: TrainingRun) -> dict[int, tuple[float, EvalResult]]:
        """(held-out loss in the trainer's units, pooled metrics in units of the norm factor) of every dictionary."""
        pooled = [PooledMetrics(trainer.ae) for trainer in run.trainers]
        sums = [0.0 for _ in run.trainers]
        for batch in self._batches:
            parts = {name: x.float() for name, x in run.inputs.parts(batch).items()}
            for index, trainer in enumerate(run.trainers):
                acts, target = run.inputs.of(trainer, index, parts)
                scale, output_scale = run.inputs.scales(trainer, index)
                acts = acts / scale
                target = None if target is None else target / (output_scale or scale)
                x_BD, y_BD = trainer._batch(acts, target)
                sums[index] += heldout_loss(trainer, x_BD, y_BD) * len(x_BD)
                pooled[index].update(acts, target)
        return {
            index: (total / metrics.tokens, metrics.result())
            for index, (total, metrics) in enumerate(zip(sums, pooled, strict=True))
        }

    def state_dict(self) -> dict[str, Any]:
        """The best dictionaries so far. (What the looks taught the scheduler is in the trainers' states.)"""
        return {"best": {str(index): best._asdict() for index, best in self.best.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = {int(index): Best(**best) for index, best in state["best"].items()}


def heldout_loss(trainer: SAETrainer, x_BD: Tensor, y_BD: Tensor) -> float:
    """The trainer's loss of a batch as it counts at the end of the run, without AuxK."""
    out = trainer.compute_loss(x_BD, y_BD, trainer.steps)
    auxk = out.terms.get("auxk_loss")
    if auxk is None:
        return out.loss.item()
    return (out.loss - trainer.auxk.alpha * y_BD.var(dim=0, correction=0).sum() * auxk).item()  # type: ignore[attr-defined]


def _batches(activations: Any, rows: int) -> Iterator[Any]:
    """Held-out activations as batches, each checked."""
    if isinstance(activations, np.ndarray):
        activations = torch.from_numpy(activations)
    if isinstance(activations, Tensor):
        activations = activations.split(rows) if len(activations) else ()
    elif isinstance(activations, Mapping):
        named = {name: torch.as_tensor(x) for name, x in activations.items()}
        if len({len(x) for x in named.values()}) != 1:
            raise UserError(f"Held-out activations need as many rows at every hook point, got {_shapes(named)}.")
        length = len(next(iter(named.values())))
        activations = ({name: x[at : at + rows] for name, x in named.items()} for at in range(0, length, rows))
    elif not isinstance(activations, Iterable):
        raise UserError(f"Held-out activations are a tensor, a mapping or batches, got {type(activations).__name__}.")
    at = 0
    for number, batch in enumerate(activations):
        sides = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
        tensors = [torch.as_tensor(x) for x in sides]
        for x in tensors:
            if x.ndim < 2:
                raise UserError(f"Batch {number} of the held-out activations must be rows, got shape {list(x.shape)}.")
            finite_N = torch.isfinite(x).flatten(1).all(1)
            if not finite_N.all():
                row = at + int((~finite_N).nonzero()[0])
                raise UserError(f"The held-out activations have a NaN or an infinity in row {row} (batch {number}).")
        at += len(tensors[0])
        yield batch


def _shapes(named: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}: {list(x.shape)}" for name, x in named.items())


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
