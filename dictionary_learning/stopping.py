"""Signals that end a run: Ctrl-C and SIGTERM become a request that is looked at where the run can be put down."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}  # 128 + the signal's number, as shells count


class StopRequest:
    """`reason` is the name of the signal that asked the run to end, "" before."""

    reason = ""


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM are a request that is looked at between steps; a Ctrl-C behind one leaves at once.

    Outside of the main thread, which alone receives signals, nothing changes.

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
                raise KeyboardInterrupt
            return
        request.reason = signal.Signals(signum).name
        with contextlib.suppress(OSError, RuntimeError):  # a signal may come in the middle of another write
            sys.stderr.write(f"\n{request.reason}: stopping behind this step. Ctrl-C leaves at once.\n")
            sys.stderr.flush()

    with _handled({signal.SIGINT: handle, signal.SIGTERM: handle}):
        yield request


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
