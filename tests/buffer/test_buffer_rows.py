"""Rows of several hook points with their provenance, and the measures of what was drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from buffer_cases import WIDTH, NumberedRows, buffer_of

from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.activations.types import Provenance
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError


def test_hook_points_stay_aligned():
    buffer = buffer_of(500, points=("a", "b", "c"))
    assert buffer.hook_points == ["a", "b", "c"] and buffer.nbytes == 3 * 128 * WIDTH * 4
    for batch in buffer:
        assert list(batch) == ["a", "b", "c"]
        assert torch.equal(batch["b"], -batch["a"]) and torch.equal(batch["c"], 2 * batch["a"])


def test_provenance_stays_with_its_row():
    buffer = buffer_of(500, points=("a", "b"), provenance=True)
    seen = 0
    while True:
        try:
            acts, provenance = buffer.draw()
        except StopIteration:
            break
        n = acts["a"][:, 0].long()
        expected = Provenance(n // 16, n % 16, n * 7, n % 3, n // 8)
        assert all(map(torch.equal, provenance, expected))
        seen += len(n)
    assert seen == 500
    assert buffer_of().draw().provenance is None


def test_provenance_of_a_source_without_any_is_refused():
    source = TensorStream([torch.zeros(4, 2)])
    with pytest.raises(UserError, match="does not know it"):
        next(ActivationBuffer(None, source, n_ctxs=8, ctx_len=1, out_batch_size=2, provenance=True))


def test_input_and_output_are_stacked():
    for batch in buffer_of(100, points=("in", "out"), io="in_and_out"):
        assert batch.shape[1:] == (2, WIDTH)
        assert torch.equal(batch[:, 0], -batch[:, 1]) and (batch[:, 0] >= 0).all()
    with pytest.raises(UserError, match="one input and one output"):
        buffer_of(points=("a", "b", "c"), io="in_and_out")


def test_mixing_counts_the_rows_that_share_a_context():
    source = NumberedRows(12, 12, context=5)  # contexts of 5, 5 and 2 rows
    buffer = ActivationBuffer(None, source, n_ctxs=24, ctx_len=1, out_batch_size=12)
    assert buffer.mixing() == {}
    next(buffer)
    assert buffer.mixing() == {"rows_per_context": 4.0, "rows_alone": 0.0}

    source = NumberedRows(11, 11, context=5)  # contexts of 5, 5 and 1 rows
    buffer = ActivationBuffer(None, source, n_ctxs=24, ctx_len=1, out_batch_size=12)
    next(buffer)
    assert buffer.mixing() == {"rows_per_context": 11 / 3, "rows_alone": 1 / 11}

    buffer = buffer_of(points=("a", "b"), provenance=True)
    for _ in range(20):
        where = buffer.draw().provenance
        buffer.refresh()  # the slots of the batch are taken by other rows, and the measure is still of the batch
        assert buffer.mixing()["rows_per_context"] == 16 / len(where.context_N.unique())


def test_a_large_buffer_mixes_well_and_a_small_one_badly():
    def alone(capacity):
        buffer = buffer_of(40_000, capacity=capacity, max_rows=64, batch=64)
        shares = []
        for _ in range(100):
            next(buffer)
            shares.append(buffer.mixing()["rows_alone"])
        return np.mean(shares)

    assert alone(16_384) > 0.95  # the chance of meeting one of 7 siblings is 7 x 64 / 16,384 = 0.03
    assert alone(136) < 0.3


def test_mixing_says_nothing_where_contexts_are_unknown():
    buffer = ActivationBuffer(None, TensorStream([torch.ones(8, 2)]), n_ctxs=16, ctx_len=1, out_batch_size=4)
    next(buffer)
    assert buffer.mixing() == {}


def test_the_mean_squared_norm_is_of_the_rows_in_the_buffer():
    buffer = buffer_of(100, capacity=128, points=("a", "b", "c"))
    drawn = next(buffer)
    left = np.setdiff1d(np.arange(100), drawn["a"][:, 0].numpy())  # the source ends before the buffer is full
    assert buffer.mean_squared_norm() == pytest.approx(WIDTH * (left**2).mean())
    assert buffer.mean_squared_norm("c") == pytest.approx(4 * WIDTH * (left**2).mean())
    for _ in buffer:
        pass
    with pytest.raises(UserError, match="empty"):
        buffer.mean_squared_norm()


def test_measuring_does_not_change_what_is_drawn():
    plain, measured = buffer_of(500), buffer_of(500)
    for batch in plain:
        measured.mean_squared_norm()
        assert torch.equal(batch, next(measured))
        measured.mixing()
