"""Whose turn it is: workers as processes, contestants that step in turns, and what their seconds say.

A round gives each contestant one turn, in an order that changes from round to round; so a change of the machine's load
falls on all alike, and a ratio is taken within a round and then its median over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import HERE, PEERS, ROOT, clean_environment


class WorkerError(RuntimeError):
    """A worker said that something can't be made or run, or it ended."""


class Worker:
    """A worker process (see workers/worker.py for what is said to it)."""

    def __init__(self, python: str, script: Path, environment: dict[str, str], threads: int | None) -> None:
        self.log = tempfile.TemporaryFile("w+")
        if threads:
            environment = environment | {"BENCHMARK_THREADS": str(threads)}
        read, write = os.pipe()  # for replies only: some libraries print to stdout while they are imported
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            text=True,
            env=environment | {"BENCHMARK_REPLIES": str(write)},
            pass_fds=(write,),
            cwd=HERE / "workers",
        )
        os.close(write)
        self.replies = os.fdopen(read)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.replies.readline()
        reply = json.loads(line) if line else {"error": f"the worker ended: {self._last_words()}"}
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {self.process.returncode}"

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()  # the loops of some peers wait in threads and would keep it from ending
        self.process.wait()
        self.replies.close()
        self.log.close()


def start(who: str, threads: int | None = None) -> Worker:
    """The worker of "ours" (with the bounds) or of a peer."""
    if who == "ours":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return Worker(sys.executable, HERE / "workers" / "ours.py", environment, threads)
    return Worker(str(PEERS[who].python), PEERS[who].script, clean_environment(), threads)


@dataclass
class Entry:
    """A contestant: its name in the tables, its environment, what its maker is given; and what was measured.

    `rounds` holds a list of seconds a step for each round, `units` the activations of these steps.
    """

    name: str
    who: str
    kind: str
    options: dict[str, Any]
    steps: int = 1
    rounds: list[list[float]] = field(default_factory=list)
    units: list[list[int]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    def raw(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value not in ([], {}, "")}


class Workers:
    """The workers of a section, started when they are first wanted; a context manager that ends them."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self.started: dict[str, Worker] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.started.values():
            worker.close()

    def __getitem__(self, who: str) -> Worker:
        if who != "ours" and not PEERS[who].present:
            raise WorkerError("its environment is missing (python -m benchmarks setup-peers)")
        if who not in self.started:
            self.started[who] = start(who, self.threads)
        return self.started[who]


def take_turns(
    workers: Workers, entries: list[Entry], rounds: int, *, first: int = 0, warm: int = 1
) -> list[dict[str, Any]]:
    """Make the entries, let each take `rounds` turns of `entry.steps` steps; what was measured, for the JSON.

    `first` untimed steps come before all rounds, `warm` ones before each turn. An entry that can't run carries the
    reason in `skipped`.
    """
    order = random.Random(0)
    with contextlib.ExitStack() as stack:
        for entry in entries:
            with _skipping(entry):
                stack.callback(_drop, workers[entry.who], entry.name)
                reply = workers[entry.who].ask(do="make", name=entry.name, kind=entry.kind, **entry.options)
                entry.info = reply["info"]
                if first:
                    workers[entry.who].ask(do="turn", name=entry.name, steps=first)
        for _ in range(rounds):
            running = [entry for entry in entries if not entry.skipped]
            for entry in order.sample(running, len(running)):
                with _skipping(entry):
                    if warm:
                        workers[entry.who].ask(do="turn", name=entry.name, steps=warm)
                    reply = workers[entry.who].ask(do="turn", name=entry.name, steps=entry.steps)
                    entry.rounds.append(reply["seconds"])
                    entry.units.append(reply["units"])
        for entry in entries:
            if not entry.skipped:
                with _skipping(entry):
                    entry.info |= workers[entry.who].ask(do="info", name=entry.name)["info"]
    return [entry.raw() for entry in entries]


def _drop(worker: Worker, name: str) -> None:
    with contextlib.suppress(WorkerError):  # one that ended has nothing to give back
        worker.ask(do="drop", name=name)


@contextlib.contextmanager
def _skipping(entry: Entry) -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        entry.skipped = str(error)


def milliseconds(entry: dict[str, Any]) -> float:
    """Median over the rounds of the median step, in ms."""
    return 1e3 * statistics.median(statistics.median(seconds) for seconds in entry["rounds"])


def times_faster(entry: dict[str, Any], than: dict[str, Any]) -> float:
    """How many times as long `than` takes for a step: median over the rounds of the ratio within a round."""
    pairs = zip(than["rounds"], entry["rounds"], strict=False)
    return statistics.median(statistics.median(theirs) / statistics.median(ours) for theirs, ours in pairs)


def rate(entry: dict[str, Any]) -> float:
    """Activations a second over all rounds."""
    return sum(map(sum, entry["units"])) / sum(map(sum, entry["rounds"]))


def rate_ratio(entry: dict[str, Any], of: dict[str, Any]) -> float:
    """Activations a second relative to another entry's: median over the rounds."""

    def rates(one: dict[str, Any]) -> list[float]:
        return [sum(units) / sum(seconds) for units, seconds in zip(one["units"], one["rounds"], strict=True)]

    return statistics.median(mine / other for mine, other in zip(rates(entry), rates(of), strict=False))
