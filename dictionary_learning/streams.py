"""Device work beside other device work, and transfers that nobody waits for.

On CUDA a `SideStream` runs the harvest beside the training: what it is given starts once the work given to the current
stream before it is done, and the current stream waits for it only when told to. No memory changes hands between the
streams but the buffer's ring, which is never freed, so nothing is held back from reuse and the memory stays bounded
however far the host runs ahead. Elsewhere work is done in turn (`InTurn`), which gives the same values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class InTurn:
    """Side work that is done at once, where a device has no streams."""

    overlaps = False

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside is side work."""
        yield

    def join(self) -> None:
        """Let later work of the current stream see what the side work wrote. Never waits on the host."""


class SideStream(InTurn):
    """Side work on a CUDA stream of its own."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self._done = self.stream.record_event()

    def join(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)


def side_stream(device: torch.device) -> InTurn:
    """The means of doing work beside other work on a device."""
    return SideStream(device) if device.type == "cuda" else InTurn()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device. The host does not wait for a copy to CUDA: it goes by way of page-locked memory, which torch
    gives to nobody else before the copy has ended, so `x` itself may be changed at once."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")  # to the host it must wait: the values are read there


class OnHost:
    """A tensor on its way to the host: started when made, waited for by `get()`."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._arrived = x, None
        if x.is_cuda:
            self._x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._x.copy_(x, non_blocking=True)
            self._arrived = torch.cuda.current_stream(x.device).record_event()

    def get(self) -> Tensor:
        """The tensor on the host; waits for this copy alone, not for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._x
