"""Reading ahead: a resumable iterator runs in a thread and hands its items over through a bounded queue.

Used for tokenisation and packing, whose work is done outside of Python's lock (by the tokenizer), beside the forwards
and the training. Items come in the iterator's own order, one thread making all of them, so what is given out does not
depend on how far ahead was read, and the state is that of the last item handed out, not of the last one made.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

from dictionary_learning.errors import UserError
from dictionary_learning.stopping import in_a_hurry, interruptible

Item = TypeVar("Item", covariant=True)
JOIN_S = 5.0  # a read that hangs (a dead network) must not hold up the end of the program for ever


class Resumable(Protocol[Item]):
    """An iterator that can be put down and taken up again."""

    def __next__(self) -> Item: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Queue:
    """What the consumer and the thread share: what was made, and whether more will come."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.changed = threading.Condition()
        self.made: deque[tuple[Any, dict[str, Any]]] = deque()  # (item, state of the source behind it)
        self.error: BaseException | None = None  # what the source raised behind the items made
        self.ended = False  # nothing comes behind the items made
        self.stopping = False


class ReadAhead(Generic[Item]):
    """Iterates over `source` with up to `depth` items made ahead by a thread, which waits while the queue is full.

    An error of the source is raised where its item would have been handed out; `StoppedWaiting` where a run that waits
    for an item is to end. Whatever else the source offers
    (`ctx_len`, `corpora`, ...) is asked of it directly. The thread starts with the first item and ends with the source,
    with `close()`, or when this object is no longer used.

    Raises:
        UserError: a depth below 1.
    """

    def __init__(self, source: Resumable[Item], depth: int = 2) -> None:
        if depth < 1:
            raise UserError(f"Reading ahead needs room for at least 1 item, got {depth}.")
        self.source, self.depth = source, depth
        self._state: dict[str, Any] | None = None  # behind the last item handed out; None: the source itself knows
        self._queue = _Queue(depth)
        self._thread: Any = None
        self._stop: Any = None

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # before __init__, as when a copy is made
            raise AttributeError(name)
        return getattr(self.source, name)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        queue = self._queue
        if self._stop is None and not queue.ended:
            self._start()
        with queue.changed:
            with interruptible():
                while not queue.changed.wait_for(lambda: queue.made or queue.ended, timeout=1):
                    pass  # of a process that was stopped and goes on, a signal may wake another thread
            if queue.made:
                item, self._state = queue.made.popleft()
                queue.changed.notify_all()
                return item
        if queue.error is not None:  # whoever asks again asks the source again
            self._halt()
            self._queue = _Queue(self.depth)
            raise queue.error
        raise StopIteration

    def _start(self) -> None:
        self._state = self.source.state_dict()
        thread = threading.Thread(target=_work, args=(self.source, self._queue), name="read-ahead", daemon=True)
        self._thread, self._stop = thread, weakref.finalize(self, _end, self._queue, thread)
        thread.start()

    def _halt(self) -> None:
        if self._stop is not None:
            self._stop()
            self._thread.join()  # however long its read takes: nobody else may use the source meanwhile
            self._stop = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the thread stands still, as many items ahead as there is room for: the source can be used."""
        queue = self._queue
        with queue.changed:
            if self._stop is not None:
                queue.changed.wait_for(lambda: len(queue.made) >= queue.depth or queue.ended)
            yield

    def close(self) -> None:
        """End the thread and the iteration. Items that were not handed out are forgotten; `load_state_dict` of this
        object's state goes on with them."""
        self._halt()
        self._queue = _Queue(self.depth)
        self._queue.ended = True

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict() if self._state is None else dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._halt()
        self._queue = _Queue(self.depth)
        self.source.load_state_dict(state)
        self._state = None


def _work(source: Resumable[Any], queue: _Queue) -> None:
    while True:
        with queue.changed:
            queue.changed.wait_for(lambda: len(queue.made) < queue.depth or queue.stopping)
            if queue.stopping:
                return
        made, error = None, None
        try:
            made = next(source), source.state_dict()
        except StopIteration:
            pass
        except BaseException as raised:  # noqa: BLE001 - whatever it is, it belongs to whoever waits for the item
            error = raised
        with queue.changed:
            if made is not None:
                queue.made.append(made)
            queue.error, queue.ended = error, made is None
            queue.changed.notify_all()
            if queue.ended:
                return


def _end(queue: _Queue, thread: threading.Thread) -> None:
    with queue.changed:
        queue.stopping = True
        queue.changed.notify_all()
    if thread is not threading.current_thread() and not in_a_hurry():  # it may be the thread that drops the last of it
        thread.join(JOIN_S)
