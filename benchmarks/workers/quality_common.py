"""What every trainer of the quality benchmark shares, in whatever environment: the rows in one order, and the file that
its dictionary is handed over in.

In: a folder with train.safetensors and eval.safetensors (`acts` [N, D]). Out: a file of plain arrays, with what the
trainer's own forward makes of the first held-out rows, so that whoever reads the arrays can check that they are read
as they were meant. The metrics are taken elsewhere, by one function for all.

The worker protocol (worker.py) is for steps; here a whole run is trained while a contestant is made, in a process of
its own, and what came out is its info.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from worker import Contestant, serve

CHECKED_ROWS = 256
LONGEST_WARMUP = 100  # steps, and a tenth of shorter runs


@dataclass
class Task:
    """One training run: where the rows are, where the dictionary goes, and what to train."""

    acts: str
    out: str
    architecture: str
    seed: int
    steps: int
    batch: int
    m: int
    k: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows_ND = load_file(Path(self.acts) / "train.safetensors")["acts"]

    @property
    def d(self) -> int:
        return self.rows_ND.shape[1]

    @property
    def warmup(self) -> int:
        return min(LONGEST_WARMUP, self.steps // 10)

    def batches(self) -> Iterator[torch.Tensor]:
        """[B, D] float32: passes over the rows, each in a new order, cut into batches that may reach over two."""
        draw, wanted, got = torch.Generator().manual_seed(self.seed), self.steps * self.batch, 0
        passes = []
        while got < wanted:
            passes.append(torch.randperm(len(self.rows_ND), generator=draw))
            got += len(self.rows_ND)
        for index_B in torch.cat(passes)[:wanted].split(self.batch):
            yield self.rows_ND[index_B].float()


@dataclass
class Trained:
    """A dictionary as arrays, a latent a row; `activation`: relu, topk, jumprelu, groupmax or gated; `forward` is the
    trainer's own; `unit_norm` whether it promises decoder rows of norm 1."""

    arrays: dict[str, torch.Tensor | None]
    activation: str
    subtracts_bias: bool
    unit_norm: bool
    forward: Callable[[torch.Tensor], torch.Tensor]
    settings: dict[str, Any]


def main(train: Callable[[Task], tuple[float, Trained]]) -> None:
    """Serve runs of `train`, which gives the seconds of its loop and what it trained."""

    def run(**given: Any) -> Contestant:
        task = Task(**given)
        torch.manual_seed(task.seed)
        seconds, trained = train(task)
        with torch.no_grad():
            x_BD = load_file(Path(task.acts) / "eval.safetensors")["acts"][:CHECKED_ROWS].float()
            arrays = {name: array for name, array in trained.arrays.items() if array is not None}
            arrays["own_x_hat_BD"] = trained.forward(x_BD)
        plain = {name: a.detach().to("cpu", torch.float32, copy=True).contiguous() for name, a in arrays.items()}
        save_file(plain, task.out)
        info = {
            "seconds": seconds,
            "activation": trained.activation,
            "subtracts_bias": trained.subtracts_bias,
            "unit_norm": trained.unit_norm,
            "settings": trained.settings,
        }
        return Contestant(lambda: None, lambda: info)

    serve({"train": run})


class Clock:
    """Seconds of what runs inside."""

    def __enter__(self) -> Clock:
        self.began = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self.began
