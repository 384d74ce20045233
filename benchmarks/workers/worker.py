"""A worker: one process in one environment that makes contestants and times their steps when it is told to.

In: a JSON object a line on stdin. Out: a JSON object a line on the file descriptor BENCHMARK_REPLIES. The requests:

    {"do": "make", "name": ..., "kind": ..., **options}  -> {"info": {...}}     untimed; "error" where it can't be made
    {"do": "turn", "name": ..., "steps": n}              -> {"seconds": [...], "units": [...]}, one entry a step
    {"do": "info", "name": ...}                          -> {"info": {...}}     what can be measured outside a step
    {"do": "drop", "name": ...}                          -> {}                  its memory is free again

This file and its siblings run inside each peer's own environment: they import torch, the peer and each other, and
nothing of this project (our package has the same import name as one of the peers).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Contestant:
    """What is timed: `step()` does one step and gives the units it handled (activations), None for 1."""

    step: Callable[[], int | None]
    info: Callable[[], dict[str, Any]] = field(default=dict)
    close: Callable[[], None] = field(default=lambda: None)


Maker = Callable[..., Contestant]


def serve(makers: dict[str, Maker]) -> None:
    """Answer requests until stdin closes."""
    replies = os.fdopen(int(os.environ["BENCHMARK_REPLIES"]), "w")
    if threads := os.environ.get("BENCHMARK_THREADS"):
        torch.set_num_threads(int(threads))
    contestants: dict[str, Contestant] = {}
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), makers, contestants)
        except Exception as error:  # a peer that fails is a result too: it is written down, and the others go on
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def answer(request: dict[str, Any], makers: dict[str, Maker], contestants: dict[str, Contestant]) -> dict[str, Any]:
    """The reply to one request."""
    match request.pop("do"):
        case "make":
            name, kind = request.pop("name"), request.pop("kind")
            contestants[name] = makers[kind](**request)
            return {"info": contestants[name].info() | {"threads": torch.get_num_threads(), "torch": torch.__version__}}
        case "turn":
            return timed(contestants[request["name"]].step, request["steps"])
        case "info":
            return {"info": contestants[request["name"]].info()}
        case "drop":
            if request["name"] in contestants:
                contestants.pop(request["name"]).close()
            gc.collect()
            return {}
        case other:
            raise ValueError(f"unknown request {other!r}")


def timed(step: Callable[[], int | None], steps: int) -> dict[str, Any]:
    seconds, units = [], []
    synchronize()
    for _ in range(steps):
        began = time.perf_counter()
        units.append(step() or 1)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "units": units}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class GateClosed(BaseException):
    """Ends a library's loop from within; no library catches it by accident."""


class Gate:
    """Steps through a library's own training loop, which runs in a thread and waits at `tick` between its steps.

    `run` is called with the gate and starts the loop; something that the loop calls once at the start of each
    iteration (its data iterator) calls `tick`. A step then reaches from one `tick` to the next.
    """

    def __init__(self, run: Callable[[Gate], None]) -> None:
        self._go, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()
        self._wait()

    def _run(self, run: Callable[[Gate], None]) -> None:
        try:
            run(self)
            self._failure = "the training loop ended"
        except GateClosed:
            return
        except BaseException as error:
            traceback.print_exc()
            self._failure = f"the training loop failed: {type(error).__name__}: {error}"
        self._arrived.release()

    def tick(self) -> None:
        """Called by the loop: the step before is done; wait until the next one is wanted."""
        self._arrived.release()
        self._go.acquire()
        if self._closed:
            raise GateClosed

    def close(self) -> None:
        """End the loop where it waits, and give back what it held."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def step(self) -> None:
        """Let the loop run until its next tick."""
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._arrived.acquire()
        if self._failure:
            raise RuntimeError(self._failure)

    def gated(self, batches: Callable[[], Any]) -> Iterator[Any]:
        """An endless data iterator that ticks before each batch."""
        while True:
            self.tick()
            yield batches()


class Batches:
    """An endless cycle of a few fixed batches [B, D] that look like activations: sparse sums of many directions with
    a decaying spectrum, a common mean and some noise, at unit mean squared norm. The same in every environment."""

    def __init__(self, d: int, batch: int, device: str = "cpu", count: int = 4) -> None:
        draw = torch.Generator().manual_seed(0)
        directions = torch.randn(4 * d, d, generator=draw) * torch.arange(1, 4 * d + 1)[:, None].pow(-0.5)
        mean, self.all = torch.randn(d, generator=draw), []
        for _ in range(count):
            picked = torch.randint(len(directions), (batch, 24), generator=draw)
            amounts = torch.rand(batch, 24, generator=draw)
            x = torch.nn.functional.embedding_bag(picked, directions, per_sample_weights=amounts, mode="sum")
            x += 0.1 * mean + 0.02 * torch.randn(batch, d, generator=draw)
            self.all.append((x / x.pow(2).sum(-1).mean().sqrt()).to(device))
        self.drawn = 0

    def __call__(self) -> torch.Tensor:
        self.drawn += 1
        return self.all[self.drawn % len(self.all)]


SPARSE_L0 = 48
"""Active latents an input in the state "sparse", in which every ReLU-like contestant is measured alike."""


@torch.no_grad()
def cut_for_l0(pre_BF: torch.Tensor, l0: float = SPARSE_L0) -> torch.Tensor:
    """[F] per latent the value that its pre-activations exceed on a fraction l0 / F of the rows: taken off a ReLU's
    bias, or set as a JumpReLU's threshold, it leaves `l0` active latents an input, spread evenly."""
    return pre_BF.float().quantile(1 - min(l0 / pre_BF.shape[1], 0.5), dim=0)


@contextlib.contextmanager
def fp32_product(precision: str) -> Iterator[None]:
    """Run fp32 products under an oneDNN setting; some machines without the narrow format's hardware then compute the
    exact product in a faster kernel. Whether it is exact is measured (see `bounds.py`), never assumed."""
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        yield
    finally:
        products.fp32_precision = before
