"""A run that is asked to end while a forward beside its training waits for text: the buffer serves the next run."""

from __future__ import annotations

import signal

import pytest
import torch
from buffer_cases import NumberedRows
from test_buffer_overlap import LateStream, make

from dictionary_learning.stopping import StoppedWaiting, interruptible, stop_requests


class SignalledRows(NumberedRows):
    """Numbered rows, each batch waited for as the Hub's are; the signal comes while the 10th is waited for."""

    asked = 0

    def __next__(self):
        self.asked += 1
        with interruptible():
            if self.asked == 10:
                signal.raise_signal(signal.SIGTERM)
        return super().__next__()


@pytest.mark.parametrize("late", [False, True])
def test_the_draws_behind_a_run_that_was_stopped_while_it_waited(late: bool) -> None:
    unbroken, buffer = make(), make(SignalledRows)
    if late:
        buffer._side = LateStream(buffer)
    expected = [batch["a"] for batch in unbroken]
    found = []
    with stop_requests(end_waits=True) as request, pytest.raises(StoppedWaiting):
        while True:
            found.append(next(buffer)["a"])
            assert len(found) < len(expected), "nothing was waited for"
    assert request.reason == "SIGTERM"
    with stop_requests(end_waits=True):  # the next run
        found += [batch["a"] for batch in buffer]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_a_wait_that_was_ended_behind_the_last_draw_is_not_raised_at_the_next() -> None:
    unbroken, buffer = make(), make(SignalledRows)
    buffer._side = LateStream(buffer)
    expected, found = [batch["a"] for batch in unbroken], []
    with stop_requests(end_waits=True) as request:
        while not request.reason:  # as a run does, which looks behind each step
            found.append(next(buffer)["a"])
    found += [batch["a"] for batch in buffer]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
