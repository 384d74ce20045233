"""What each trainer is given of every batch that the data delivers.

In: the data of a run, an iterable of batches. Out: per batch a dict of name -> activations [B, D] in float32, each in
units of its norm factor, computed once for all trainers; and for a trainer its input, and its target if it has one.

There are three ways to read a batch: as activations of one or several hook points (each trainer has its own by
`submodule_name`); as (input, output) of a module, which transcoders learn; and as the heads of an attention layer, of
which trainer i learns head i.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError
from dictionary_learning.trainers.trainer import SAETrainer

NORM_BATCHES = 16  # batches that estimate the norm factors where the data is not a buffer
INPUT, OUTPUT = "input", "output"  # names of the two sides of a transcoder's batch

Parts: TypeAlias = dict[str | None, Tensor]


class TrainingInputs:
    """Reads the batches of a run.

    Args:
        data: an `ActivationBuffer`, or any iterable of batches: [B, D], dicts of hook point -> [B, D]; with
            `transcoder` [B, 2, D] or pairs of [B, D] and [B, D_out]; with `split_by_head` [..., heads, D].
        normalize: divide by norm factors, measured on the first activations (which are delivered all the same).

    Attributes:
        norm_factors: name -> what its activations are divided by; empty without normalisation.
    """

    def __init__(
        self, data: Iterable[Any], *, normalize: bool = False, transcoder: bool = False, split_by_head: bool = False
    ) -> None:
        if transcoder and split_by_head:
            raise UserError("transcoder and activations_split_by_head read a batch in two ways: choose one.")
        self.data, self.normalize, self.transcoder, self.split_by_head = data, normalize, transcoder, split_by_head
        self.norm_factors: dict[str | None, float] = {}
        self._batches: Iterator[Any] | None = None
        self._given = 0  # batches
        self._measured: list[Any] = []  # batches that the norm factors were measured on and that are still to be given

    def __iter__(self) -> Iterator[Parts]:
        return self

    def __next__(self) -> Parts:
        self.start()
        assert self._batches is not None
        batch = self._measured.pop(0) if self._measured else next(self._batches)
        parts = {name: acts.float() for name, acts in self.parts(batch).items()}
        for name, acts in parts.items():
            if not len(acts):
                raise UserError(f"Batch {self._given} of the activations{f' of {name!r}' if name else ''} is empty.")
            if acts.device.type == "cpu" and not acts.sum().isfinite():  # on a GPU looking would wait for it
                self._refuse_non_finite(name, acts)
        self._given += 1
        if not self.norm_factors:
            return parts
        return {name: acts / self.norm_factors[name] for name, acts in parts.items()}

    def _refuse_non_finite(self, name: str | None, acts: Tensor) -> None:
        """Raises UserError at a NaN or an infinity (a sum may overflow without one)."""
        finite_B = torch.isfinite(acts).all(dim=1)
        if not finite_B.all():
            of = f" of '{name}'" if name else ""
            row = int((~finite_B).nonzero()[0])
            raise UserError(f"The activations{of} have a NaN or an infinity in batch {self._given}, row {row}.")

    def start(self) -> None:
        """Open the stream and measure the norm factors, where that has not been done.

        Raises:
            UserError: no activations, or such as can't be normalised.
        """
        if self._batches is not None:
            return
        self._batches = iter(self.data)
        if self.norm_factors or not self.normalize:
            return
        whole = isinstance(self.data, ActivationBuffer) and not self.split_by_head
        squares = self._squares_of_buffer() if whole else self._squares_of_first()
        for name, square in squares.items():
            if not 0 < square < float("inf"):
                of = f" of '{name}'" if name else ""
                raise UserError(f"The activations{of} can't be normalised: their mean squared norm is {square}.")
        self.norm_factors = {name: square**0.5 for name, square in squares.items()}

    def _squares_of_buffer(self) -> dict[str | None, float]:
        assert isinstance(self.data, ActivationBuffer)
        points = self.data.hook_points
        names = (INPUT, OUTPUT) if self.transcoder else points
        return {name: self.data.mean_squared_norm(point) for name, point in zip(names, points, strict=True)}

    def _squares_of_first(self) -> dict[str | None, float]:
        assert self._batches is not None
        self._measured = list(itertools.islice(self._batches, NORM_BATCHES))
        if not self._measured:
            raise UserError("The activations are empty: there is no batch to train on.")
        rows: dict[str | None, list[Tensor]] = {}
        for batch in self._measured:
            for name, acts in self.parts(batch).items():
                rows.setdefault(name, []).append(acts.float().pow(2).sum(-1))
        return {name: torch.cat(parts).mean().item() for name, parts in rows.items()}

    def parts(self, batch: Any) -> Parts:
        """A batch as activations [B, D] by name, in the data's units.

        Raises:
            UserError: a batch of another form.
        """
        if self.split_by_head:
            return self._heads(batch)
        if self.transcoder:
            acts: Mapping[str | None, Any] = dict(zip((INPUT, OUTPUT), self._pair(batch), strict=True))
        elif isinstance(batch, Mapping):
            acts = batch
        else:
            named = isinstance(self.data, ActivationBuffer)
            acts = {self.data.hook_points[0] if named else None: batch}  # type: ignore[attr-defined]
        for name, tensor in acts.items():
            if not isinstance(tensor, Tensor) or tensor.ndim != 2:
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                of = f" of {name}" if name else ""
                raise UserError(f"A batch of activations{of} must be [rows, width], got {shape}.")
        return dict(acts)

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        sides = list(batch.values()) if isinstance(batch, Mapping) else batch
        if isinstance(sides, Tensor):
            sides = sides.unbind(1) if sides.ndim == 3 else [sides]
        if not isinstance(sides, list | tuple) or len(sides) != 2:
            got = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise UserError(
                "A batch for transcoders must be [rows, 2, width] or a pair of input and output, as a buffer with "
                f"io='in_and_out' delivers it, got {got}."
            )
        return sides[0], sides[1]

    def _heads(self, batch: Any) -> Parts:
        if not isinstance(batch, Tensor) or batch.ndim < 3:
            got = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise UserError(f"A batch split by head must be [rows, heads, width], got {got}.")
        return {f"head_{head}": acts.reshape(-1, acts.shape[-1]) for head, acts in enumerate(batch.unbind(-2))}

    def name_of(self, trainer: SAETrainer, index: int) -> str | None:
        """The name under which the input of trainer number `index` is found, where there are several."""
        if self.split_by_head:
            return f"head_{index}"
        return INPUT if self.transcoder else trainer.submodule_name

    def of(self, trainer: SAETrainer, index: int, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Input [B, D] and target [B, D_out] (None but for transcoders) of trainer number `index`.

        Raises:
            UserError: nothing of the trainer's name, or another width than it expects.
        """
        name = self.name_of(trainer, index)
        acts = next(iter(parts.values())) if len(parts) == 1 else parts.get(name)
        if acts is None and self.split_by_head:
            raise UserError(f"Trainer {index} is to learn head {index}, but the data has {len(parts)} heads.")
        if acts is None:
            raise UserError(
                f"The data has several hook points ({', '.join(map(str, parts))}): set submodule_name of "
                f"{trainer.wandb_name} to one of them, not {trainer.submodule_name!r}."
            )
        width = trainer.ae.activation_dim
        if acts.shape[1] != width:
            raise UserError(f"{trainer.wandb_name} expects activations of width {width}, the data has {acts.shape[1]}.")
        if not self.transcoder:
            return acts, None
        target, width = parts[OUTPUT], trainer.ae.output_dim
        if target.shape[1] != width:
            raise UserError(
                f"{trainer.wandb_name} predicts activations of width {width}, the data has {target.shape[1]}: set "
                f"output_dim to {target.shape[1]}."
            )
        return acts, target

    def scales(self, trainer: SAETrainer, index: int) -> tuple[float, float | None]:
        """What the input of a trainer is divided by, and for transcoders what its target is (1.0 unnormalised)."""
        if not self.norm_factors:
            return 1.0, (1.0 if self.transcoder else None)
        if len(self.norm_factors) == 1:
            return next(iter(self.norm_factors.values())), None
        scale = self.norm_factors[self.name_of(trainer, index)]
        return scale, (self.norm_factors[OUTPUT] if self.transcoder else None)

    def state_dict(self, live: bool = False) -> dict[str, Any]:
        """The norm factors, the batches read to measure them and not yet given, and the data's position; with `live`,
        a buffer's own rows in place of copies."""
        is_buffer = isinstance(self.data, ActivationBuffer)
        return {
            "norm_factors": [[name, factor] for name, factor in self.norm_factors.items()],
            "measured": list(self._measured),
            "data": self.data.state_dict(**({"live": live} if is_buffer else {})),  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norm_factors = {name: factor for name, factor in state["norm_factors"]}
        self._measured = list(state["measured"])
        self.data.load_state_dict(state["data"])  # type: ignore[attr-defined]
