"""What a reader of a hostile file may do, and whether it did.

In: a target (fuzz_targets.py) and bytes, written to its file beside valid companions. A reader may succeed, or refuse
in one sentence (`UserError`). Anything else is a finding: another exception, more than `SECONDS` of its own time,
memory far beyond the file, a file made outside of the folder, a file removed, or code that ran.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dictionary_learning.errors import UserError

SECONDS = 5.0  # of the thread's own time: other tests leave threads behind, and other programs share the machine
ROOM, TIMES = 64 << 20, 20  # bytes of memory that any file may cost, and so many times its size
SENTENCE = 4000  # characters of a message, at most


@dataclass
class Target:
    """A reader, the `file` that is hostile, its `kind` (see fuzz_mutations.py), and what lies beside it."""

    name: str
    file: str
    kind: str
    prepare: Callable[[Path], None]
    read: Callable[[Path], None]
    handmade: Callable[[], list[bytes]] = list  # makes hostile files

    def seeds(self, folder: Path) -> list[bytes]:
        """The valid file, and what was made by hand; `folder` is one that was prepared."""
        return [(folder / self.file).read_bytes(), *self.handmade()]


# ---------------------------------------------------------------------------------------------- what is allowed


class Finding(AssertionError):
    """A reader did what none may."""


class Hang(BaseException):
    """Raised from a signal, where no reader catches it."""


class Box:
    """A target's folder, made once; `run(data)` writes the hostile file, reads, and looks at what happened."""

    def __init__(self, spec: Target, folder: Path) -> None:
        self.target, self.folder, self.outer = spec, folder, folder / "outer"
        self.inner = self.outer / "inner"
        self.inner.mkdir(parents=True)
        spec.prepare(self.inner)
        self.files = self._listing()

    def _listing(self) -> set[str]:
        return {os.path.join(at, name) for at, _, names in os.walk(self.folder) for name in names}

    def run(self, data: bytes) -> str | None:
        """The refusal, or None where the file was read. Raises Finding."""
        (self.inner / self.target.file).write_bytes(data)
        _forget_peak()
        before, began = _peak(), time.thread_time()
        with _limited():
            refusal = self._read()
        took, memory = time.thread_time() - began, _peak() - before
        if took > SECONDS:
            raise Finding(f"hang: {took:.1f} s for {len(data):,} bytes")
        if memory > ROOM + TIMES * len(data):
            raise Finding(f"memory: {memory >> 20} MB for {len(data):,} bytes")
        shutil.rmtree(self.inner / "out", ignore_errors=True)
        if (now := self._listing()) != self.files:
            changed = sorted(now ^ self.files)
            for path in now - self.files:
                os.unlink(path)
            raise Finding(f"files made or removed: {changed}")
        return refusal

    def _read(self) -> str | None:
        here = os.getcwd()
        os.chdir(self.outer)  # what runs code, or writes to a relative path, does it here
        try:
            self.target.read(self.inner)
        except UserError as error:
            said = str(error)
            if "\n" in said or len(said) > SENTENCE or not said.strip():
                raise Finding(f"message: {len(said):,} characters, {said.count(chr(10))} line breaks") from error
            return said
        except Hang:
            raise Finding(f"hang: over {4 * SECONDS} s") from None
        except Finding:
            raise
        except BaseException as error:
            raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
        finally:
            os.chdir(here)
        return None


class Forked:
    """The decoder of parquet files as a fork of this process, which begins a hundred times sooner than a program; its
    memory and time are looked at when it ends. In place of `parquet_files._started`, whose answer it resembles."""

    def __init__(self, arguments: list[str]) -> None:
        from dictionary_learning.parquet_files import ROW, main

        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        self.bytes, self.began = os.path.getsize(arguments[0]), _peak()
        self.room = ROOM + TIMES * self.bytes + (ROW if arguments[1] == "rows" else 0)
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            status = 99
            try:
                os.dup2(to_out, 1), os.dup2(to_err, 2)
                os.closerange(3, 256)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                status = main(*arguments)
                sys.stderr.flush()
            finally:
                os._exit(status)
        os.close(to_out), os.close(to_err)
        self.stdout, self.stderr = os.fdopen(out, "rb"), os.fdopen(err, "rb")

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            _, status, used = os.wait4(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
            if used.ru_utime > SECONDS:
                raise Finding(f"hang: {used.ru_utime:.1f} s in the decoder, for {self.bytes:,} bytes")
            if (memory := used.ru_maxrss * 1024 - self.began) > self.room:
                raise Finding(f"memory: {memory >> 20} MB in the decoder, for {self.bytes:,} bytes")
        return self.returncode


def _stop(*_: Any) -> None:
    raise Hang


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    old = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS)  # which counts all threads: only what never ends gets here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def _forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")


def _peak() -> int:
    """The most memory since `_forget_peak`, in bytes; where /proc has no such thing, since the process began."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
