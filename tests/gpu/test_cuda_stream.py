"""Harvest beside training on a CUDA device: the same rows as in turn, and no host sync. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from data_prep.embedded import MODEL_DIR
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.corpus import TextStream, open_corpus
from dictionary_learning.streams import InTurn, OnHost, SideStream, to_device
from dictionary_learning.trainers import TRAINERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

POINTS = ["resid_post_layer_1", "resid_post_layer_2"]


def buffer_on_cuda(in_turn: bool = False, **settings: Any) -> ActivationBuffer:
    sizes = {"n_ctxs": 64, "ctx_len": 64, "refresh_batch_size": 8, "out_batch_size": 512, "remove_bos": True}
    stream = TextStream(open_corpus("embedded"), epochs=None, seed=0)
    lm = TracedLM.load(str(MODEL_DIR), device="cuda")
    buffer = ActivationBuffer(stream, lm, POINTS, device="cuda", provenance=True, **(sizes | settings))
    if in_turn:
        buffer._side = InTurn()
    return buffer


@pytest.fixture
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("multiple", [None, 1.5])
@pytest.mark.parametrize("batch", [256, 512, 1600])
def test_overlapped_draws_are_those_of_work_done_in_turn(multiple: float | None, batch: int) -> None:
    settings = {"max_activation_norm_multiple": multiple, "out_batch_size": batch}
    beside, in_turn = buffer_on_cuda(**settings), buffer_on_cuda(in_turn=True, read_ahead=0, **settings)
    work = torch.randn(2048, 2048, device="cuda")
    for _ in range(40):
        a, b = beside.draw(), in_turn.draw()
        for _ in range(3):  # training, so that the forward does run beside something
            work = torch.tanh(work @ work)
        assert all(torch.equal(a.acts[name], b.acts[name]) for name in POINTS)
        assert a.provenance is not None and b.provenance is not None
        assert all(map(torch.equal, a.provenance, b.provenance))
    beside.close()


@pytest.mark.parametrize("multiple", [None, 10.0])
def test_ten_steps_with_their_draws_wait_for_the_device_nowhere(multiple: float | None) -> None:
    buffer = buffer_on_cuda(max_activation_norm_multiple=multiple)
    width = buffer.source.widths[POINTS[1]]
    sizes = {"steps": 40, "activation_dim": width, "dict_size": 256, "layer": 0, "lm_name": "toy", "seed": 0}
    trainer = TRAINERS["top_k"](**sizes, k=8, device="cuda")

    def step(number: int) -> None:
        trainer.update(number, buffer.draw().acts[POINTS[1]])

    for number in range(5):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5, 15):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        buffer.close()


def test_side_work_comes_after_what_was_given_before_and_join_after_it() -> None:
    side = SideStream(torch.device("cuda"))
    for _ in range(20):
        x = torch.ones(4096, 4096, device="cuda")
        for _ in range(5):
            x = x + 1
        with side.beside():
            y = x * 2
            assert torch.cuda.current_stream() == side.stream
        side.join()
        assert int((y + 1).min()) == 13
        torch.cuda.synchronize()


def test_transfers_do_not_wait_and_may_be_changed_at_once(no_sync: None) -> None:
    device, rows = torch.device("cuda"), []
    for number in range(50):
        x = torch.full((100_000,), number)
        rows.append(to_device(x, device))
        x.fill_(-1)
    found = OnHost(torch.stack(rows).amin(1)).get()
    assert found.is_pinned() and found.tolist() == list(range(50))


def test_memory_does_not_grow_however_far_the_host_runs_ahead() -> None:
    buffer = buffer_on_cuda(out_batch_size=512)
    work = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        buffer.draw()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    for _ in range(60):
        buffer.draw()
        torch.mm(work, work, out=torch.empty_like(work))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() < before + 3 * work.nbytes + buffer.nbytes
    buffer.close()
