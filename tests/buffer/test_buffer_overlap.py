"""Forwards beside training: the same batches as in turn, whenever the other stream's writes become visible.

`LateStream` stands in for a CUDA stream. What is written beside shows up in the ring only with `join()`; until then its
slots hold NaN, so a batch, a state or a measure that did not wait would carry them.
"""

from __future__ import annotations

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch
from buffer_cases import NumberedRows, iter_draw, saved_and_loaded
from hypothesis import given
from hypothesis import strategies as st

from dictionary_learning.activations.types import Launched
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError
from dictionary_learning.streams import InTurn, OnHost, to_device


class LateStream(InTurn):
    overlaps = True

    def __init__(self, buffer: ActivationBuffer) -> None:
        self.rings = list(buffer._rows.values())
        self.late: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @contextlib.contextmanager
    def beside(self):
        before = [ring.clone() for ring in self.rings]
        yield
        for ring, old in zip(self.rings, before, strict=True):
            where = ~((ring == old) | (ring.isnan() & old.isnan())).all(1)
            self.late.append((ring, where, ring[where]))
            ring[where] = torch.nan

    def join(self) -> None:
        for ring, where, rows in self.late:
            ring[where] = rows
        self.late.clear()


class PickedRows(NumberedRows):
    """Numbered rows of which the source, on the device, drops every fifth, and of which it counts the others."""

    counted = 0

    def launch(self) -> Launched:
        batch = super().__next__()
        keep_N = batch.acts["a"][:, 0].long() % 5 != 0

        def kept():
            self.counted += int(keep_N.sum())
            return keep_N

        return Launched(batch, keep_N, kept)

    def __next__(self):
        raise AssertionError("launch() goes before next()")


def make(kind=NumberedRows, late=False, *, rows=600, max_rows=20, batch=16, capacity=128, points=("a", "b"), seed=3):
    source = kind(rows, max_rows, points)
    buffer = ActivationBuffer(
        None, source, n_ctxs=capacity, ctx_len=1, out_batch_size=batch, provenance=True, seed=seed
    )
    if late:
        buffer._side = LateStream(buffer)
    return buffer


def draws(buffer):
    return iter(lambda: next(iter_draw(buffer), None), None)


def assert_same(found, expected):
    assert all(torch.equal(found.acts[name], acts) for name, acts in expected.acts.items())
    assert all(map(torch.equal, found.provenance, expected.provenance))


@given(
    kind=st.sampled_from([NumberedRows, PickedRows]),
    max_rows=st.integers(1, 60),
    batch=st.integers(1, 60),
    spare=st.integers(0, 100),
    rows=st.integers(1, 500),
)
def test_the_batches_are_those_of_the_same_work_done_in_turn(kind, max_rows, batch, spare, rows):
    sizes = {"max_rows": max_rows, "batch": batch, "capacity": max_rows + batch + spare, "rows": rows}
    in_turn, late = make(kind, **sizes), make(kind, late=True, **sizes)
    seen = []
    for expected in draws(in_turn):
        assert_same(late.draw(), expected)
        assert late.mixing() == in_turn.mixing()
        seen += expected.acts["a"][:, 0].long().tolist()
    assert next(late, None) is None
    assert sorted(seen) == [n for n in range(rows) if kind is NumberedRows or n % 5]


def test_the_rows_that_a_source_drops_on_the_device_free_their_slots():
    buffer = make(PickedRows)
    for drawn in draws(buffer):
        n = drawn.acts["a"][:, 0].long()
        assert (n % 5 != 0).all() and torch.equal(drawn.acts["b"][:, 0].long(), -n)
        assert torch.equal(drawn.provenance.token_N, n * 7)
        if buffer.source.given < 600:  # dropped rows take no room: the buffer is as full as can be
            assert buffer._slots.n_live > 128 - 20 - 16
    assert buffer.source.counted == buffer.rows_drawn == 480


def test_the_next_forward_begins_before_the_batch_is_handed_out():
    in_turn, late = make(max_rows=16), make(late=True, max_rows=16)
    ahead = 0
    for _ in range(20):
        in_turn.draw(), late.draw()
        ahead += late.source.given > in_turn.source.given
        assert late._side.late or late.source.given == in_turn.source.given  # and nothing has waited for it
    assert ahead > 10


@pytest.mark.parametrize("kind", [NumberedRows, PickedRows])
@pytest.mark.parametrize("stop", [0, 1, 9, 20])
def test_a_state_taken_while_a_forward_runs_goes_on_bit_for_bit(kind, stop):
    unbroken, broken = make(kind), make(kind, late=True)
    for _ in range(stop):
        unbroken.draw(), broken.draw()
    state = saved_and_loaded(broken.state_dict())
    assert not state["rows"]["a"].isnan().any()
    resumed = [make(kind), make(kind, late=True), broken]
    for other in resumed[1:]:
        other.draw()  # a forward is under way when the state comes
    for other in resumed:
        other.load_state_dict(state)
    for expected in draws(unbroken):
        for other in resumed:
            assert_same(other.draw(), expected)


def test_measures_wait_for_the_forward():
    in_turn, late = make(), make(late=True)
    for _ in range(10):
        in_turn.draw(), late.draw()
    assert late.mean_squared_norm("b") == pytest.approx(in_turn.mean_squared_norm("b"))
    late.draw()
    assert not late.activations["a"].isnan().any()


class Failing(NumberedRows):
    bad = True

    def __next__(self):
        if self.given > 300 and self.bad:
            self.bad = False
            raise UserError("Line 7 is damaged.")
        return super().__next__()


def test_an_error_of_a_forward_begun_ahead_comes_with_the_next_draw_and_loses_nothing():
    in_turn, late = make(Failing), make(Failing, late=True)
    batches = []
    with pytest.raises(UserError, match="Line 7"):
        while True:
            batches.append(in_turn.draw())
    for expected in batches:
        assert_same(late.draw(), expected)
    with pytest.raises(UserError, match="Line 7"):
        late.draw()
    resumed = make(late=True)
    resumed.load_state_dict(saved_and_loaded(late.state_dict()))
    for expected in draws(in_turn):
        assert_same(late.draw(), expected)
        assert_same(resumed.draw(), expected)


def test_loading_a_state_forgets_an_error_that_was_not_raised_yet():
    buffer = make(Failing, late=True)
    state = buffer.state_dict()
    while buffer._error is None:
        buffer.draw()
    buffer.load_state_dict(state)
    assert sorted(n for d in draws(buffer) for n in d.acts["a"][:, 0].long().tolist()) == list(range(600))


def test_activations_of_a_forward_are_let_go_once_they_are_in_the_ring():
    alive = []

    class Watched(NumberedRows):
        def __next__(self):
            batch = super().__next__()
            alive.append(weakref.ref(batch.acts["a"]))
            return batch

    buffer = make(Watched, late=True)
    for _ in range(10):
        buffer.draw()
    gc.collect()
    assert len(alive) > 8 and not any(ref() is not None for ref in alive)


def test_transfers_on_the_cpu_are_the_tensor_itself():
    x = torch.arange(3)
    assert to_device(x, torch.device("cpu")) is x
    assert torch.equal(OnHost(x).get(), x)


def test_slots_of_rows_that_stay_come_first_in_the_order_of_the_rows():
    from dictionary_learning.slots import Slots

    slots = Slots(10, 0)
    filled = slots.fill([(4, torch.tensor([True, False, True, True])), (3, None), (2, torch.tensor([False, False]))])
    assert [list(part) for part in filled] == [[0, 1, 2], [4, 5, 6], []]
    assert slots.n_live == 6 and list(slots.live) == [0, 1, 2, 4, 5, 6]
    assert sorted(slots.next_free(0, 4)) == [3, 7, 8, 9]
    assert np.array_equal(np.sort(slots.take(6)), [0, 1, 2, 4, 5, 6])
