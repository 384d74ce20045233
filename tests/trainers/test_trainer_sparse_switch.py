"""When steps go through active entries only, and that nothing but their cost depends on it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from trainer_cases import SWITCHING, batches, explained, forced, in_float64, make, switch_of, synthetic, train, weights

from dictionary_learning.kernels.codes import DenseCodes, SparseCodes
from dictionary_learning.trainers.dead_latents import COUNT_INTERVAL, Delayed
from dictionary_learning.trainers.sparse_switch import CAPACITY, DENSITIES, SparseSwitch

every = pytest.mark.parametrize("architecture", SWITCHING)
ENTER, LEAVE = DENSITIES["cpu"]


def look(switch: SparseSwitch, density: float, number: int = 0) -> bool:
    switch.after_update(number * COUNT_INTERVAL, torch.tensor(density))
    return switch.sparse


def test_sparse_steps_begin_below_one_density_and_end_above_another() -> None:
    switch, between = SparseSwitch("cpu"), (ENTER + LEAVE) / 2
    assert ENTER < between < LEAVE and not switch.sparse
    assert [look(switch, density) for density in (0.9, between, 0.9 * ENTER)] == [False, False, True]
    assert [look(switch, density) for density in (between, between, 1.1 * LEAVE)] == [True, True, False]
    assert not look(switch, between)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_density_is_looked_at_every_few_steps(device: str) -> None:
    """On CUDA the number is read at the next look, when it has long arrived."""
    switch, seen = SparseSwitch(device), []
    for step in range(3 * COUNT_INTERVAL):
        switch.after_update(step, torch.tensor(0.0))
        seen.append(switch.sparse)
    assert seen.index(True) == (0 if device == "cpu" else COUNT_INTERVAL) and all(seen[seen.index(True) :])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_restored_switch_decides_as_the_first_would(device: str) -> None:
    densities = [0.9, 0.9 * DENSITIES[device].enter, 0.9 * DENSITIES[device].enter, 0.9, 0.9, 0.0, 0.0]
    for stop in range(len(densities)):
        unbroken, first, restored = SparseSwitch(device), SparseSwitch(device), SparseSwitch(device)
        for n, density in enumerate(densities[:stop]):
            look(unbroken, density, n)
            look(first, density, n)
        restored.load_state_dict(first.state_dict())
        for n, density in enumerate(densities[stop:], start=stop):
            assert look(unbroken, density, n) == look(restored, density, n)


def test_a_delayed_number_is_the_one_sent_last() -> None:
    delayed = Delayed()
    assert delayed.read() is None
    for number in (3.0, 0.25):
        delayed.send(torch.tensor(number))
        assert delayed.read() == delayed.read() == number
    other = Delayed()
    other.restore(delayed.read())
    assert other.read() == 0.25
    other.restore(None)
    assert other.read() is None


@every
def test_codes_are_dense_or_sparse_as_the_switch_says(architecture: str) -> None:
    trainer = make(architecture)
    x, switch = batches(1)[0], switch_of(trainer)
    assert isinstance(switch.codes(trainer.preactivations(x), 0.0), DenseCodes)
    switch.sparse = True
    assert isinstance(switch.codes(trainer.preactivations(x), 0.0), SparseCodes)


@every
def test_a_trainer_switches_by_the_density_of_its_own_codes(architecture: str) -> None:
    trainer = make(architecture, steps=200)
    data = batches(2 * COUNT_INTERVAL)
    for step, x in enumerate(data):
        before = switch_of(trainer).sparse
        trainer.update(step, x)
        assert trainer.last is not None
        l0 = trainer.last.terms["gate_l0"] if "gated" in architecture else trainer.last.l0
        density = l0.item() / trainer.ae.dict_size
        if step % COUNT_INTERVAL:
            assert switch_of(trainer).sparse == before
        else:
            switch = switch_of(trainer)
            assert switch.sparse == (density < (LEAVE if before else ENTER))
            switch.densities = type(switch.densities)(LEAVE, LEAVE)


@every
def test_training_is_the_same_with_and_without_sparse_steps(architecture: str) -> None:
    extra: dict[str, Any] = {"resample_steps": 15} if architecture in ("standard", "p_anneal", "gated_anneal") else {}
    dense = train(in_float64(forced(make(architecture, **extra), False)), batches())
    sparse = train(in_float64(forced(make(architecture, **extra), True)), batches())
    for name, tensor in weights(dense).items():
        torch.testing.assert_close(weights(sparse)[name], tensor, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("architecture", ["standard", "jump_relu"])
def test_a_dictionary_becomes_sparse_by_itself_and_learns_as_the_dense_one(architecture: str) -> None:
    data, _ = synthetic(300)
    settings: dict[str, Any] = {"activation_dim": 24, "dict_size": 240, "steps": 300}
    settings |= {"l1_penalty": 0.4} if architecture == "standard" else {"target_l0": 5.0, "bandwidth": 0.01}
    trainer = make(architecture, **settings)
    train(trainer, data[:1])
    assert not switch_of(trainer).sparse
    train(trainer, data[1:], start=1)
    assert switch_of(trainer).sparse
    dense = train(forced(make(architecture, **settings), False), data)
    x = torch.cat(data[-8:])
    assert explained(trainer, x) == pytest.approx(explained(dense, x), abs=0.005) and explained(dense, x) > 0.5


# ------------------------------------------------------------------------------------------------- a fixed number


@every
def test_with_more_entries_than_room_sparse_steps_end_with_a_warning(architecture: str) -> None:
    """As on CUDA, where a step provides for a fixed number of entries."""
    trainer = make(architecture)
    switch = switch_of(trainer)
    switch.may_wait, switch.sparse, switch.densities = False, True, DENSITIES["cuda"]
    with pytest.warns(UserWarning, match="Before step 16 more latents fired than a sparse step had room for"):
        train(trainer, batches(17))
    assert not switch.sparse
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_with_room_enough_nothing_is_said() -> None:
    trainer = make("standard")
    switch = switch_of(trainer)
    switch.may_wait, switch.sparse, switch.densities = False, True, type(switch.densities)(2.0, 1.5 / CAPACITY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trainer, batches(40))
