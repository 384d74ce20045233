"""When a step of an architecture that fires by a threshold (ReLU, JumpReLU, Gated) goes through active entries only.

At the start half of the latents fire and dense products are cheaper; once few do, entries are. The switch looks at the
density every few steps and has two thresholds, so that a density in between changes nothing.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dictionary_learning.kernels.codes import Codes, Preactivations
from dictionary_learning.trainers.dead_latents import COUNT_INTERVAL, Delayed
from dictionary_learning.trainers.trainer import LossOutput, SAETrainer


class Densities(NamedTuple):
    """Sparse steps begin below `enter` and end above `leave` (fractions of the B x F codes)."""

    enter: float
    leave: float


# CPU: an entry costs as much as 14 elements of the four dense products it replaces (d = 768, 2 threads, see
# benchmarks/RESULTS.md), so the break-even is near 7 %. CUDA's products are faster beside its memory: not measured yet.
DENSITIES = {"cpu": Densities(0.05, 0.07), "cuda": Densities(0.006, 0.01)}
CAPACITY = 2.0  # entries that a step on CUDA provides for, in units of `leave`


class SparseSwitch:
    def __init__(self, device_type: str) -> None:
        self.densities = DENSITIES.get(device_type, DENSITIES["cuda"])
        self.may_wait = device_type != "cuda"  # for a number on the device
        self.sparse = False
        self._density = Delayed()
        self._full: Tensor | None = None  # whether the step that is being taken filled all the room there is

    def codes(self, pre: Preactivations, cutoff_F: Tensor | float) -> Codes:
        """All codes in a dense step, those above the cutoff in a sparse one."""
        if not self.sparse:
            self._full = None
            return pre.dense()
        size = len(pre.x_BD) * len(pre.encoder.W_FD)
        # On CUDA their number is fixed beforehand: asking for it would wait for the device. Overflow would need the
        # density to double between two looks.
        capacity = None if self.may_wait else max(1, int(size * self.densities.leave * CAPACITY))
        codes = pre.above(cutoff_F, capacity)
        self._full = codes.full
        return codes

    def after_update(self, step: int, density: Tensor) -> None:
        """`density` is the fraction of codes above the cutoff in this step, on the device."""
        if step % COUNT_INTERVAL:
            return
        if self._full is not None:
            density = torch.where(self._full, 1.0, density)
        if self.may_wait:
            self._density.send(density)  # this step's own
        measured = self._density.read()
        if not self.may_wait:
            self._density.send(density)
        if measured is not None:
            if self.sparse and not self.may_wait and measured == 1:
                warnings.warn(f"Before step {step:,} more latents fired than a sparse step had room for.", stacklevel=2)
            self.sparse = measured < (self.densities.leave if self.sparse else self.densities.enter)

    def state_dict(self) -> dict[str, Any]:
        return {"sparse": self.sparse, "density": self._density.read()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sparse = state["sparse"]
        self._density.restore(state["density"])


class FiresByThreshold(SAETrainer):
    """The trainers with a switch: they make it behind `SAETrainer`'s constructor, and get it tended and saved."""

    switch: SparseSwitch

    def active_entries(self, out: LossOutput) -> Tensor:
        """Entries an input above the cutoff."""
        return out.l0

    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: LossOutput) -> None:
        self.switch.after_update(step, self.active_entries(out) / self.ae.dict_size)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"switch": self.switch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.switch.load_state_dict(state["switch"])
