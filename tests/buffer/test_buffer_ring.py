"""The ring: every row once, drawn uniformly, replaced in place, in little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from buffer_cases import WIDTH, NumberedRows, buffer_of, numbers_of
from hypothesis import given
from hypothesis import strategies as st

from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.activations.types import ActivationBatch
from dictionary_learning.buffer import ActivationBuffer


@given(
    rows=st.integers(1, 700),
    max_rows=st.integers(1, 60),
    batch=st.integers(1, 60),
    spare=st.integers(0, 100),
    seed=st.integers(0, 3),
)
def test_every_harvested_row_is_drawn_exactly_once(rows, max_rows, batch, spare, seed):
    source = NumberedRows(rows, max_rows)
    buffer = ActivationBuffer(None, source, n_ctxs=max_rows + batch + spare, ctx_len=1, out_batch_size=batch, seed=seed)
    batches = [numbers_of(b) for b in buffer]
    assert sorted(n for b in batches for n in b) == list(range(rows))
    assert all(len(b) == batch for b in batches[:-1])
    assert buffer.rows_drawn == rows


def test_every_row_of_a_full_buffer_is_as_likely_to_be_drawn():
    buffer = buffer_of(10_000)
    for _ in range(40):  # into the steady state
        next(buffer)
    buffer.refresh()
    state = buffer.state_dict()
    counts: dict[int, int] = {}
    draws = 800
    for seed in range(draws):
        buffer.load_state_dict({**state, "rng": np.random.default_rng(seed).bit_generator.state})
        for number in numbers_of(next(buffer)):
            counts[number] = counts.get(number, 0) + 1
    level = state["n_live"]
    assert len(counts) == level > 90
    # Each row's count is binomial with p = 16 / level; the sum of squares of its z-scores is chi-squared, near `level`.
    p = 16 / level
    chi = sum((count - draws * p) ** 2 for count in counts.values()) / (draws * p * (1 - p))
    assert level - 4 * (2 * level) ** 0.5 < chi < level + 4 * (2 * level) ** 0.5


def test_neighbours_in_the_stream_are_spread_over_many_batches():
    batches = [numbers_of(b) for b in buffer_of(8000, capacity=1024)]
    batch_of = {number: i for i, numbers in enumerate(batches) for number in numbers}
    waits = [batch_of[n] for n in range(4000, 4032)]  # one forward's worth in the middle
    assert len(set(waits)) > 20 and np.std(waits) > 20


def test_batches_depend_on_the_seed_alone():
    def drawn(seed):
        return [numbers_of(b) for b in buffer_of(300, seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)


def test_the_ring_stays_in_its_place_and_between_full_and_one_forward_short_of_full():
    buffer = buffer_of(2000, capacity=128, max_rows=32, batch=16)
    place = buffer.activations.data_ptr()
    levels = []
    for batch in buffer:
        assert buffer.activations.data_ptr() == place != batch.data_ptr()
        if buffer.source.given < 2000:
            levels.append(buffer.source.given - buffer.rows_drawn)
    assert len(levels) > 100
    assert 128 - 32 - 16 < min(levels) and max(levels) <= 128 - 16
    assert buffer.nbytes == 128 * WIDTH * 4


def test_exactly_the_freed_slots_are_filled_again():
    source = TensorStream(torch.arange(start, start + 16.0)[:, None] for start in range(0, 4800, 16))
    buffer = ActivationBuffer(None, source, n_ctxs=80, ctx_len=1, out_batch_size=16)
    buffer.refresh()
    for _ in range(50):
        before = buffer.activations.flatten().tolist()
        drawn = set(next(buffer).flatten().tolist())
        assert buffer.activations.flatten().tolist() == before
        buffer.refresh()
        after = buffer.activations.flatten().tolist()
        assert {old for old, new in zip(before, after, strict=True) if old != new} == drawn


def test_a_drawn_batch_is_not_overwritten_by_later_rows():
    buffer = buffer_of()
    first = next(buffer)
    kept = first.clone()
    for _ in range(40):
        next(buffer)
    assert torch.equal(first, kept)


def test_a_ring_of_128_mb_needs_less_than_a_tenth_more_at_its_peak():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads the peak of the resident memory from /proc")
    script = """
import torch
from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.buffer import ActivationBuffer

torch.set_num_threads(1)
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
def run(n_ctxs, draws):
    batches = (torch.full((256, 512), float(i)) for i in range(10**9))
    buffer = ActivationBuffer(None, TensorStream(batches), n_ctxs=n_ctxs, ctx_len=128, out_batch_size=256)
    for _ in range(draws):
        next(buffer)
    buffer.mean_squared_norm()
    return buffer.nbytes
run(4, 5)  # what torch and numpy load on first use
before = peak()
size = run(512, 100)
print(size, peak() - before)
"""
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    size, grown = map(int, out.stdout.split())
    assert size == 128 * 2**20
    assert 0.9 * size < grown < 1.1 * size


def test_a_finished_buffer_ends_for_loops_also_inside_generators():
    def through(buffer):
        for batch in buffer:  # PEP 479: a StopIteration that leaks into a generator becomes a RuntimeError
            yield len(batch)

    buffer = buffer_of(40)
    assert sum(through(buffer)) == 40
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(buffer)
    assert list(buffer) == []


def test_a_source_that_breaks_its_promise_is_caught_before_it_overwrites_rows():
    class TooMany(NumberedRows):
        def __next__(self):
            return ActivationBatch({"a": torch.ones(self.max_rows + 1, WIDTH)})

    with pytest.raises(ValueError, match="gave 33 rows at once, above its max_rows 32"):
        next(ActivationBuffer(None, TooMany(100, 32), n_ctxs=64, ctx_len=1, out_batch_size=8))
