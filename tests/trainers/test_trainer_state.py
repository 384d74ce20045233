"""Resuming: a trainer that is loaded goes on bit for bit as the unbroken one, whatever takes part in its steps."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import (
    ARCHITECTURES,
    BY_K,
    RESAMPLING,
    SWITCHING,
    TRANSCODERS,
    B,
    D,
    F,
    auxk_of,
    batches,
    make,
    same_bits,
    switch_of,
    targets,
    train,
    weights,
)

from dictionary_learning.trainers import SAETrainer
from dictionary_learning.trainers.sparse_switch import Densities

every = pytest.mark.parametrize("architecture", ARCHITECTURES)


def as_a_file_gives_it_back(state: Any) -> Any:
    """The state with every tensor a contiguous copy, as safetensors would return it."""
    if isinstance(state, Tensor):
        return state.contiguous().clone()
    if isinstance(state, dict):
        return {key: as_a_file_gives_it_back(value) for key, value in state.items()}
    return [as_a_file_gives_it_back(value) for value in state] if isinstance(state, list) else state


def through_torch_save(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def busy(architecture: str, **settings: Any) -> SAETrainer:
    """A trainer in which AuxK, resampling, annealing and both kinds of steps take part within 40 steps."""
    extra: dict[str, Any] = {"dict_size": D}
    if architecture in BY_K:
        extra = {"dead_after_tokens": 2 * B, "dict_size": 3 * F, "threshold_start_step": 3}
    elif architecture in RESAMPLING:
        extra = {"dict_size": 3 * F, "resample_steps": 12}
    elif architecture == "gated":
        extra = {"target_l0": 2.0}
    trainer = make(architecture, **extra | settings)
    if architecture in SWITCHING:  # dense up to the look at step 16, sparse from then on
        switch_of(trainer).densities = Densities(0.0, 0.0)
        look = switch_of(trainer).after_update

        def after_update(step: int, density: Tensor) -> None:
            if step == 16:
                switch_of(trainer).densities = Densities(2.0, 2.0)
            look(step, density)

        switch_of(trainer).after_update = after_update  # type: ignore[method-assign]
    return trainer


@every
@pytest.mark.parametrize("through", [as_a_file_gives_it_back, through_torch_save, copy.deepcopy])
@pytest.mark.parametrize("stop", [1, 21, 35])
def test_a_resumed_trainer_goes_on_bit_for_bit(architecture: str, through: Any, stop: int) -> None:
    data = batches(40)
    unbroken = train(busy(architecture), data)
    first = train(busy(architecture), data[:stop])
    resumed = busy(architecture, seed=1)
    resumed.load_state_dict(through(first.state_dict()))
    if architecture in SWITCHING and stop > 16:
        assert switch_of(resumed).sparse
        switch_of(resumed).densities = Densities(2.0, 2.0)
    train(resumed, data[stop:], start=stop)
    assert same_bits(weights(unbroken), weights(resumed))
    assert torch.equal(unbroken.tokens_since_fired_F, resumed.tokens_since_fired_F)
    assert unbroken.config | {"seed": 0} == resumed.config | {"seed": 0}
    if architecture in BY_K:
        assert auxk_of(unbroken).some_dead and unbroken.last is not None and "auxk_loss" in unbroken.last.terms
    else:
        assert switch_of(unbroken).sparse


@every
def test_a_resumed_transcoder_goes_on_bit_for_bit(architecture: str) -> None:
    data = batches(12)
    ys = targets(data)
    unbroken = train(make(architecture, **TRANSCODERS["skip"]), data, target=ys)
    first = train(make(architecture, **TRANSCODERS["skip"]), data[:7], target=ys)
    resumed = make(architecture, **TRANSCODERS["skip"], seed=1)
    resumed.load_state_dict(through_torch_save(first.state_dict()))
    assert same_bits(weights(unbroken), weights(train(resumed, data[7:], start=7, target=ys[7:])))


@every
def test_a_trainer_loaded_from_a_live_state_shares_nothing_with_it(architecture: str) -> None:
    data = batches(20)
    one, other = train(busy(architecture), data[:10]), busy(architecture)
    other.load_state_dict(one.state_dict())
    train(one, data[10:], start=10)
    train(other, data[10:], start=10)
    assert same_bits(weights(one), weights(other))


@every
def test_a_dictionary_moved_to_other_memory_is_still_the_one_that_is_trained(architecture: str) -> None:
    data = batches(10)
    stayed, moved = train(make(architecture), data[:5]), train(make(architecture), data[:5])
    moved.ae.to(torch.float64).to(torch.float32)  # as a move to another device and back would
    assert same_bits(weights(train(stayed, data[5:], start=5)), weights(train(moved, data[5:], start=5)))
