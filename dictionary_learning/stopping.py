"""Signals that end a run: Ctrl-C and SIGTERM become a request that is looked at where the run can be put down.

That is between two steps, or where it waits for data that may be long in coming (`interruptible`), such as from a Hub
that does not answer. A second Ctrl-C is in a hurry: from then on nothing is waited for, neither a server that hangs nor
a thread in a read (`in_a_hurry`), and a process that is one command ends without the exit hooks of libraries
(`end_process`), of which wandb's waits a minute for a server that does not answer.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}  # 128 + the signal's number, as shells count
BROKEN_PIPE_EXIT = 141  # likewise of SIGPIPE, which Python turns into an error


class StopRequest:
    """`reason` is the name of the signal that asked the run to end, "" before."""

    reason = ""


class StoppedWaiting(Exception):
    """The run was asked to end while it waited for its data."""


class _Now:
    """What the main thread, which alone receives signals, is at."""

    request: StopRequest | None = None  # to which waits are to end
    waiting = False
    in_a_hurry = False


_now = _Now()


@contextlib.contextmanager
def stop_requests(end_waits: bool = False) -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM are a request that is looked at between steps; a Ctrl-C behind one leaves at once.

    Outside of the main thread, which alone receives signals, nothing changes.

    Args:
        end_waits: a request also ends what is `interruptible`; whoever sets this takes its StoppedWaiting.

    Raises:
        KeyboardInterrupt: at the second Ctrl-C.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: Any) -> None:
        if request.reason:
            if signum == signal.SIGINT:
                _now.in_a_hurry = True
                raise KeyboardInterrupt
            return
        request.reason = signal.Signals(signum).name
        with contextlib.suppress(OSError, RuntimeError):  # a signal may come in the middle of another write
            sys.stderr.write(f"\n{request.reason}: stopping behind this step. Ctrl-C leaves at once.\n")
            sys.stderr.flush()
        if _now.request is request and _now.waiting:
            raise StoppedWaiting

    _now.in_a_hurry = False
    outer, _now.request = _now.request, request if end_waits else None
    try:
        with _handled({signal.SIGINT: handle, signal.SIGTERM: handle}):
            yield request
    finally:
        _now.request = outer


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around a wait for data: in the main thread a request to stop, of a run that takes it, ends it.

    Raises:
        StoppedWaiting: it was asked to stop, now or before.
    """
    if _now.request is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _now.waiting = True  # before the look: a signal between the two would end neither
        if _now.request.reason:
            raise StoppedWaiting
        yield
    finally:
        _now.waiting = False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Around what reads data for itself and takes no StoppedWaiting, such as a callback that evaluates: its waits are
    not ended by a first request."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    request, _now.request = _now.request, None
    try:
        yield
    finally:
        _now.request = request


def waited_for(items: Iterable[T]) -> Iterator[T]:
    """The items, each waited for `interruptible`."""
    iterator = iter(items)
    while True:
        with interruptible():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[StopRequest]:
    """Inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does, where a job is at work that can be begun anew."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: Any) -> None:
        request.reason = signal.Signals(signum).name
        raise KeyboardInterrupt

    with _handled({signal.SIGINT: handle, signal.SIGTERM: handle}):
        yield request


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def in_a_hurry() -> bool:
    """Whether a second Ctrl-C asked to leave at once."""
    return _now.in_a_hurry


def end_process(command: Callable[[], int]) -> NoReturn:
    """Run a command, and end the process with its exit code; where a signal ended it, without waiting for anything.
    Where nobody reads its output any more (`... --help | head`) it ends as other programs do, without a traceback."""
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush fails again
        sys.exit(BROKEN_PIPE_EXIT)
    if code not in EXIT_CODES.values():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if not in_a_hurry():  # semaphores, of which tqdm's bars have one, would be told of as leaked behind the end
        with contextlib.suppress(Exception):
            getattr(multiprocessing.util, "_run_finalizers", int)(0)
    os._exit(code)
