"""What a run tells the world: one stream of events, many sinks (JSONL, log lines, a progress bar, Weights & Biases).

`Tracker` passes each event on. The JSONL file is the record of the run and must be written; every other sink is a
convenience, and one that fails is switched off with a warning instead of stopping training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dictionary_learning import weights_and_biases
from dictionary_learning.errors import UserError
from dictionary_learning.stopping import in_a_hurry
from dictionary_learning.storage import atomic_file, disk_faults_said, finite

log = logging.getLogger("dictionary_learning")

QUEUE_LIMIT = 4096  # log steps that Weights & Biases may be behind
LOG_LINE = ("loss", "l0", "frac_variance_explained", "nz_frac", "lr", "heldout_loss", "heldout_frac_variance_explained")


class Sink(Protocol):
    """Receives the events of a run. `metrics` maps trainer names to their numbers at one step."""

    def start(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None: ...

    def advance(self, step: int, tokens: int) -> None: ...

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, Mapping[str, float]]) -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self, failed: bool) -> None:
        """Training is over."""

    def close(self) -> None:
        """The job is over: evaluation and report, where there are any, are on disk."""


class SilentSink:
    """Ignores every event; the base of sinks that want only some."""

    def start(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        pass

    def advance(self, step: int, tokens: int) -> None:
        pass

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def finish(self, failed: bool) -> None:
        pass

    def close(self) -> None:
        pass


class Tracker(SilentSink):
    """Passes events to `record`, whose errors count, and to `sinks`, which are switched off when they fail."""

    def __init__(self, record: Sink | None, sinks: Sequence[Sink] = ()) -> None:
        self.record, self.sinks = record, list(sinks)

    def start(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self._send("start", step, configs)

    def advance(self, step: int, tokens: int) -> None:
        self._send("advance", step, tokens)

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        self._send("metrics", step, tokens, metrics)

    def message(self, text: str) -> None:
        self._send("message", text)

    def finish(self, failed: bool = False) -> None:
        self._send("finish", failed)

    def close(self) -> None:
        self._send("close")

    def _send(self, event: str, *arguments: Any) -> None:
        if self.record is not None:
            getattr(self.record, event)(*arguments)
        for sink in list(self.sinks):
            try:
                getattr(sink, event)(*arguments)
            except Exception as error:  # a logger that breaks must not take the training with it
                self.sinks.remove(sink)
                log.warning("%s is switched off: %s", type(sink).__name__, error)


class JsonlSink(SilentSink):
    """`metrics.jsonl`: one line a dictionary and log step. A resumed run first drops the lines of steps it repeats.
    What a full disk does not take is written when it does, at the latest at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []  # lines that the disk refused

    def start(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        kept = []
        if step > 0 and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a line cut short by a crash
        with atomic_file(self.path) as handle:
            handle.writelines(line + "\n" for line in kept)

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        waited = bool(self._waiting)
        for trainer, values in metrics.items():
            row = {"step": step, "tokens": tokens, "trainer": trainer, **finite(values)}
            self._waiting.append(json.dumps(row, allow_nan=False) + "\n")
        try:
            self._write()
        except OSError as error:
            if not waited:
                why = error.strerror or error
                log.warning("%s can't be written (%s): its lines wait until there is room.", self.path, why)

    def finish(self, failed: bool) -> None:
        """Raises UserError where lines are left that the disk does not take."""
        try:
            with disk_faults_said(self.path.parent):
                self._write()
        except UserError:
            if not failed:
                raise

    def _write(self) -> None:
        """Append the lines that wait: all of them, or on a full disk none."""
        if not self._waiting:
            return
        left = memoryview("".join(self._waiting).encode())
        with self.path.open("ab", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            try:
                while left:
                    left = left[handle.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    handle.truncate(size)  # no half line
                raise
        self._waiting.clear()


class ProgressSink(SilentSink):
    """A progress bar with tokens a second, the time left, and L0 / explained variance of the `shown` dictionaries;
    and a log line for each of them at every log step. `total_tokens` None: the length of the run is not known."""

    def __init__(
        self, total_tokens: int | None, shown: Sequence[str], *, bar: bool | None = None, lines: bool = True
    ) -> None:
        self.total_tokens, self.shown, self.lines = total_tokens, list(shown), lines
        self.show_bar = sys.stderr.isatty() if bar is None else bar
        self.bar: Any = None
        self._tokens_at_start: int | None = None
        self._began = 0.0

    def start(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total_tokens, unit="tok", unit_scale=True, disable=not self.show_bar, dynamic_ncols=True
        )

    def advance(self, step: int, tokens: int) -> None:
        if self._tokens_at_start is None:
            self._tokens_at_start, self._began = tokens, time.monotonic()
            self.bar.initial = tokens
        self.bar.update(tokens - self.bar.n)

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        from tqdm import tqdm

        few = {name: metrics[name] for name in self.shown if name in metrics}
        trained = {name: values for name, values in few.items() if "l0" in values}  # others are a callback's alone
        if trained:
            self.bar.set_postfix_str(
                ", ".join(f"{n}: L0 {m['l0']:.0f} FVE {m['frac_variance_explained']:.3f}" for n, m in trained.items())
            )
        if not self.lines:
            return
        elapsed = time.monotonic() - self._began
        done = tokens - (self._tokens_at_start or 0)
        rate = f"{done / elapsed:,.0f} tok/s" if elapsed > 1 and done else "starting"
        left = ""
        if elapsed > 1 and done and self.total_tokens is not None:
            left = f", {(self.total_tokens - tokens) * elapsed / done:,.0f} s left"
        for name, values in few.items():
            numbers = ", ".join(f"{key} {values[key]:.4g}" for key in LOG_LINE if key in values)
            if not numbers:
                continue
            tqdm.write(f"{name}: step {step}, {numbers}  ({rate}{left})", file=sys.stdout)
        sys.stdout.flush()

    def message(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def finish(self, failed: bool) -> None:
        if self.bar is not None:
            self.bar.close()


class WandbSink(SilentSink):
    """Weights & Biases: one run a dictionary, all in one group (see `weights_and_biases.WandbRuns`).

    Everything that talks to wandb happens in a thread of its own, behind a queue: a server that hangs, refuses or
    vanishes costs training nothing, and closing waits only as long as answers keep coming. Where an event does not fit
    into the queue or wandb fails, no later one is sent, so that what arrived is a beginning of metrics.jsonl, and
    `sae-factory sync` sends the rest. WANDB_MODE=offline keeps the runs on disk.

    Args:
        directory: the folder of the training run, or None (then artifacts are not sent).
        config: what every run's config holds besides the dictionary's own.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        group: str,
        directory: Path | None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.runs = weights_and_biases.WandbRuns(
            weights_and_biases.wandb_module(),
            project=project,
            entity=entity,
            group=group,
            folder=directory,
            config=config,
        )
        self._events: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_up = self._full = False

    def start(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self._events.put(("start", step, {name: dict(config) for name, config in configs.items()}))
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        if self._given_up or self._full:
            return
        if self._events.qsize() >= QUEUE_LIMIT:
            self._full = True
            self._warn(f"it is {QUEUE_LIMIT:,} log entries behind")
            return
        self._events.put(("metrics", step, tokens, {name: dict(values) for name, values in metrics.items()}))

    def finish(self, failed: bool) -> None:
        if failed:
            self._close(failed)

    def close(self) -> None:
        self._close(failed=False)

    def _close(self, failed: bool) -> None:
        thread, self._thread = self._thread, None
        if thread is None or in_a_hurry():
            return
        if not self._given_up:
            self._events.put(("close", failed))
        self._events.put(None)
        soonest = time.monotonic() + weights_and_biases.PATIENCE
        while thread.is_alive() and not self._given_up:
            if time.monotonic() > max(soonest, self.runs.patience_ends):
                self._give_up("it does not answer")
            thread.join(0.05)

    def _work(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                if not self._given_up:
                    getattr(self.runs, event[0])(*event[1:])
        except BaseException as error:  # also SystemExit, which wandb has been known to raise
            self._give_up(weights_and_biases.said(error))

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            self._warn(why)

    def _warn(self, why: str) -> None:
        folder = self.runs.folder
        later = f"metrics.jsonl is complete, send it later: sae-factory sync {shlex.quote(str(folder))}"
        log.warning("Weights & Biases is switched off (%s); %s", why, later if folder else "training goes on.")
