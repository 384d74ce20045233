"""States written behind the training: a copy in host memory, and a thread that hashes, writes and renames it.

In: the live state of a run, at a step. Out: `state/step_…/` as `storage.save_state` writes it, a little later. Training
stands still for the copy alone, into memory that is kept and used again: on Linux, touching fresh memory for the first
time can cost fifty times the copy. The price is that memory: as much as the state (buffer, weights, both moments).
From a GPU the copy goes into page-locked memory, in the order of the stream, so that the host does not wait for it.

One state is in flight at most. A write that fails is told and costs nothing but that state: what is on the disk stays,
and `saved_step` never names a state that is not there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dictionary_learning import storage

WORTH_KEEPING = 1 << 16  # bytes from which on host memory is used again


class FailedState(NamedTuple):
    """The state of a step that the disk refused."""

    step: int
    error: OSError


class StateWriter:
    """Writes the states of a run into a folder.

    Args:
        folder: `state/` of the run; it is made with the first state.

    Attributes:
        saved_step: the step of the newest state that is known to be on the disk; None before the first.
        failed: the last state that the disk refused, and why; None where there is none.
        blocked: seconds that training stood still for states. written: how many were written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved_step: int | None = None
        self.failed: FailedState | None = None
        self.blocked, self.written = 0.0, 0
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None  # of the thread, and no fault of the disk: it belongs to the run

    @property
    def busy(self) -> bool:
        """Whether a state is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def nbytes(self) -> int:
        """Bytes of the host memory that is kept for copies."""
        return sum(kept.numel() * kept.element_size() for kept in self._memory.values())

    def reserve(self, tree: Any) -> None:
        """Let the thread make the memory for states like `tree`, so that the first one need not wait for it."""
        shapes = {path: value for path, value in _tensors(tree) if _bytes(value) >= WORTH_KEEPING}
        wanted = {path: (value.shape, value.dtype, value.is_cuda) for path, value in shapes.items()}

        def make() -> None:
            for path, (shape, dtype, pinned) in wanted.items():
                self._memory[path] = _host_memory(shape, dtype, pinned).zero_()

        self._begin(make)

    def save(self, step: int, tree: Callable[[], Any], *, wait: bool = False) -> None:
        """Save the state of a step, unless that is on the disk already.

        Args:
            tree: gives the live state, see `storage.save_state`.
            wait: return when it is on the disk, or was refused (see `failed`); else as soon as it is copied.

        Raises:
            TypeError: what a state can't hold.
        """
        began = time.monotonic()
        self.finish()
        if self.saved_step == step:
            return
        copied, arrived = self._copy(tree())

        def write() -> None:
            for event in arrived:
                event.synchronize()
            try:
                storage.save_state(self.folder, step, copied)
            except OSError as error:
                self.failed = FailedState(step, error)
            else:
                self.saved_step, self.written = step, self.written + 1

        self._begin(write)
        if wait:
            self.finish()
        self.blocked += time.monotonic() - began

    def finish(self) -> None:
        """Wait for the state in flight. Raises what broke the thread, but for errors of the disk (see `failed`)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None  # not before: a wait that a Ctrl-C ended leaves the thread at work on the copy
        if self._broken is not None:
            broken, self._broken = self._broken, None
            raise broken

    def _begin(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised in the training's thread
                self._broken = error

        self.finish()
        # A daemon: a second Ctrl-C leaves at once, and a state half written is cleared by the next run.
        self._thread = threading.Thread(target=guarded, name="states", daemon=True)
        self._thread.start()

    def _copy(self, tree: Any) -> tuple[Any, list[Any]]:
        """The tree with every tensor in host memory, and an event behind the copies of each GPU that has some."""
        devices: set[torch.device] = set()

        def copied(value: Any, path: str) -> Any:
            if isinstance(value, Tensor):
                if value.is_cuda:
                    devices.add(value.device)
                kept = self._memory.get(path)
                if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                    kept = _host_memory(value.shape, value.dtype, value.is_cuda)
                    if _bytes(value) >= WORTH_KEEPING:
                        self._memory[path] = kept
                return kept.copy_(value.detach(), non_blocking=value.is_cuda)
            if isinstance(value, Mapping):
                return {key: copied(item, f"{path}/{key!r}") for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [copied(item, f"{path}/{index}") for index, item in enumerate(value)]
            return value

        result = copied(tree, "")
        return result, [torch.cuda.current_stream(device).record_event() for device in devices]


def _tensors(tree: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """(path, tensor) of every tensor of a tree, with the paths of `StateWriter._copy`."""
    if isinstance(tree, Tensor):
        return [(path, tree)]
    if isinstance(tree, Mapping):
        return [found for key, item in tree.items() for found in _tensors(item, f"{path}/{key!r}")]
    if isinstance(tree, list | tuple):
        return [found for index, item in enumerate(tree) for found in _tensors(item, f"{path}/{index}")]
    return []


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _host_memory(shape: torch.Size, dtype: torch.dtype, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system may limit page-locked memory
            pass
    return torch.empty(shape, dtype=dtype)
