"""What the tests of faults share: a toy run on a buffer that resumes, a disk that fails on cue, sentences."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers import TRAINERS
from dictionary_learning.training_run import TrainingRun

D, F, B, STEPS = 16, 64, 64, 24


def activations(rows: int = B * STEPS + 256, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 32, generator=g) * (torch.rand(rows, 32, generator=g) < 0.1)
    return 3 * (codes @ torch.randn(32, D, generator=g) + 0.5)


def stream(rows: int = B * STEPS + 256, seed: int = 0) -> ActivationBuffer:
    chunks = [{"a": chunk} for chunk in activations(rows, seed).split(100)]
    return ActivationBuffer(None, TensorStream(chunks), n_ctxs=40, ctx_len=10, out_batch_size=B, seed=seed)


def config(architecture: str = "top_k", **changes: Any) -> dict[str, Any]:
    sparsity = {"standard": {"l1_penalty": 0.05}, "jump_relu": {"target_l0": 4.0}}.get(architecture, {"k": 4})
    sizes = {"activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "toy", "device": "cpu", "seed": 0}
    return {"trainer": TRAINERS[architecture], **sizes, **sparsity, **changes}


def trainer(architecture: str = "top_k", steps: int = STEPS, **changes: Any) -> Any:
    settings = config(architecture, **changes)
    return settings.pop("trainer")(steps=steps, **settings)


def weights(run: TrainingRun, index: int = 0) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.trainers[index].ae.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(step: int, action: Callable[[TrainingRun], Any]) -> Any:
    """A callback that acts once, behind a step."""

    def callback(run: TrainingRun, done: int) -> None:
        if done == step:
            action(run)

    return callback


def settled(run: TrainingRun, step: int) -> None:
    """A callback that waits for the state in flight, so that on a busy machine too each is begun at its step."""
    assert run.states is not None
    run.states.finish()


class FailingDisk:
    """os.fsync refuses files whose path holds one of `parts` with an error number, so nothing of them is renamed into
    place. `refused` lists what it refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: tuple[str, ...] = ()
        self.number = errno.ENOSPC
        self.refused: list[str] = []
        true_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if any(part in path for part in self.parts):
                self.refused.append(path)
                raise OSError(self.number, os.strerror(self.number), path)
            true_fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    @contextlib.contextmanager
    def refusing(self, *parts: str, number: int = errno.ENOSPC) -> Iterator[None]:
        self.parts, self.number = parts, number
        try:
            yield
        finally:
            self.parts = ()


class Messages:
    """A sink that keeps what the run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def start(self, step: int, configs: Any) -> None: ...

    def advance(self, step: int, tokens: int) -> None: ...

    def metrics(self, step: int, tokens: int, metrics: Any) -> None:
        self.rows.append((step, {name: dict(values) for name, values in metrics.items()}))

    def message(self, text: str) -> None:
        self.texts.append(text)

    def finish(self, failed: bool) -> None: ...

    def close(self) -> None: ...


def states(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "state").glob("step_*"))
