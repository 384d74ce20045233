"""Learning-rate and sparsity schedules, and the settings that are filled in when they are left out."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_cases import ARCHITECTURES, SETTINGS, TRANSCODERS, D, F, batches, make, train

from dictionary_learning.errors import UserError
from dictionary_learning.trainers import TRAINERS, StandardTrainer, trainer_class
from dictionary_learning.trainers.schedules import (
    Scheduler,
    automatic_learning_rate,
    get_lr_schedule,
    get_scheduler,
    get_sparsity_warmup_fn,
)
from dictionary_learning.trainers.trainer import Shared

every = pytest.mark.parametrize("architecture", ARCHITECTURES)


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    scale = get_lr_schedule(total_steps=20, warmup_steps=4, decay_start=15)
    assert [scale(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [scale(step) for step in range(4, 16)] == [1.0] * 12
    assert [scale(step) for step in range(15, 20)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    constant = get_lr_schedule(total_steps=20, warmup_steps=0)
    assert [constant(step) for step in range(20)] == [1.0] * 20


@given(st.data())
def test_every_step_of_a_schedule_learns_at_most_at_the_peak_rate(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 50))
    warmup = data.draw(st.integers(0, total - 1))
    decay = data.draw(st.none() | st.integers(warmup, total))
    scales = [get_lr_schedule(total, warmup, decay)(step) for step in range(total)]
    assert all(0 < scale <= 1 for scale in scales)
    assert all(scales[i] <= scales[i + 1] for i in range(min(warmup, total - 1)))


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_every_scheduler_begins_with_the_warmup_and_ends_where_it_says(scheduler: Scheduler) -> None:
    scale = get_scheduler(scheduler, 100, 10, 50 if scheduler == "wsd" else None)
    assert [scale(step) for step in range(11)] == pytest.approx([min((step + 1) / 11, 1.0) for step in range(11)])
    middle, end = {
        "wsd": (0.8, 0.02), "linear": (40 / 90, 1 / 90), "cosine": (0.5 + 0.5 * math.cos(math.pi * 50 / 90), 3e-4),
        "constant": (1.0, 1.0), "plateau": (1.0, 1.0),
    }[scheduler]  # fmt: skip
    assert scale(60) == pytest.approx(middle) and scale(99) == pytest.approx(end, abs=1e-4)


def test_a_decay_start_is_refused_by_schedulers_without_one() -> None:
    with pytest.raises(UserError, match="decay_start belongs to the scheduler 'wsd'"):
        get_scheduler("cosine", 100, 10, 50)


def test_on_a_plateau_the_rate_halves_when_the_held_out_loss_has_stopped_falling() -> None:
    trainer = make("top_k", scheduler="plateau", warmup_steps=0, lr=1e-3)
    plateau, rates = trainer.plateau, []
    assert plateau is not None
    for step, loss in enumerate([5.0, 4.0, 4.0, 4.5, 4.0, 4.0, 3.0, 3.0]):
        trainer.update(step, batches(1)[0])
        rates.append(trainer.metrics(batches(1)[0])["lr"])
        plateau.observe(loss)
    assert rates == pytest.approx([1e-3] * 6 + [5e-4] * 2)
    again = make("top_k", scheduler="plateau", warmup_steps=0, lr=1e-3)
    again.load_state_dict(trainer.state_dict())
    assert again.plateau is not None and again.plateau.state_dict() == plateau.state_dict()


def test_the_sparsity_penalty_rises_linearly_from_zero() -> None:
    scale = get_sparsity_warmup_fn(20, 4)
    assert [scale(step) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert get_sparsity_warmup_fn(20, None)(0) == get_sparsity_warmup_fn(20, 0)(0) == 1


@pytest.mark.parametrize("warmup", [-1, 20, 25])
def test_a_warmup_outside_the_run_is_refused(warmup: int) -> None:
    with pytest.raises(UserError, match=f"warmup_steps must be .* below the 20 steps of the run, got {warmup}"):
        get_lr_schedule(20, warmup)
    with pytest.raises(UserError, match=f"sparsity_warmup_steps must be .* below the 20 steps .* got {warmup}"):
        get_sparsity_warmup_fn(20, warmup)


@pytest.mark.parametrize("decay", [-1, 3, 21])
def test_a_decay_outside_the_run_or_in_the_warmup_is_refused(decay: int) -> None:
    with pytest.raises(UserError, match=f"decay_start must lie between warmup_steps 4 and steps 20, got {decay}"):
        get_lr_schedule(20, 4, decay)


def test_the_automatic_rate_falls_with_width_and_length_and_has_a_ceiling() -> None:
    assert automatic_learning_rate(3072, 384, 1500) == pytest.approx(3e-3)
    assert automatic_learning_rate(4 * 3072, 384, 1500) == pytest.approx(1.5e-3)
    assert automatic_learning_rate(3072, 4 * 384, 1500) == pytest.approx(1.5e-3)
    assert automatic_learning_rate(3072, 384, 8 * 1500) == pytest.approx(1.5e-3)
    assert automatic_learning_rate(8, 8, 1) == 1e-2


@every
def test_an_update_uses_the_rate_of_its_step_and_the_log_says_so(architecture: str) -> None:
    trainer = make(architecture, steps=20, lr=2e-3, warmup_steps=4, decay_start=15)
    scale = get_lr_schedule(20, 4, 15)
    for step, x in enumerate(batches(20)):
        trainer.update(step, x)
        assert trainer.metrics(x)["lr"] == pytest.approx(2e-3 * scale(step))


@every
@pytest.mark.parametrize("steps", [1, 2, 3, 19, 1500, 100_000])
def test_settings_left_out_fit_a_run_of_any_length(architecture: str, steps: int) -> None:
    trainer = make(architecture, steps=steps, **({"anneal_start": None} if "anneal" in architecture else {}))
    config = trainer.config
    assert config["lr"] == automatic_learning_rate(F, D, steps)
    assert config["warmup_steps"] == min(1000, steps // 20)
    assert config["decay_start"] == pytest.approx(steps * 2 / 3, abs=1)


@every
def test_the_config_is_json_and_makes_the_same_trainer_again(architecture: str) -> None:
    trainer = train(make(architecture, submodule_name="resid_post_layer_1", wandb_name="run"), batches(2))
    config = json.loads(json.dumps(trainer.config))
    cls = trainer_class(config["architecture"])
    names = {name for parent in cls.__mro__[:-1] for name in inspect.signature(parent.__init__).parameters}
    not_settings = {"self", "dict_class", "dict_kwargs", "shared", "settings", "args", "kwargs"}
    arguments = (names | set(Shared.__annotations__)) - not_settings
    arguments -= {"output_dim", "skip"}  # of transcoders, see below
    assert arguments <= set(config)
    again = cls(**{name: config[name] for name in arguments})
    again.update(0, batches(1)[0])
    assert again.config == trainer.config
    assert config["trainer_class"] == cls.__name__ and config["dict_class"] == type(trainer.ae).__name__


@every
@pytest.mark.parametrize("way", TRANSCODERS)
def test_the_config_of_a_transcoder_says_so(architecture: str, way: str) -> None:
    config = make(architecture, **TRANSCODERS[way]).config
    assert {name: config[name] for name in ("output_dim", "skip") if name in config} == (
        {} if way == "sae" else {"output_dim": 5, "skip": way == "skip"}
    )


# ------------------------------------------------------------------------------------------------- bad settings


@every
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "learning rate must be positive, got 0.0"),
        ({"lr": -1e-3}, "learning rate must be positive"),
        ({"lr": float("nan")}, "learning rate must be positive"),
        ({"lr": float("inf")}, "learning rate must be positive"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": -5}, "steps must be a positive integer"),
        ({"steps": 10.0}, "steps must be a positive integer"),
        ({"dict_size": 0}, "dict_size .width. must be a positive integer, got 0"),
        ({"dict_size": -8}, "dict_size .width. must be a positive integer"),
        ({"activation_dim": 0}, "activation_dim must be a positive integer"),
        ({"warmup_steps": 40}, "warmup_steps must be .* below the 40 steps"),
        ({"warmup_steps": 10, "decay_start": 5}, "decay_start must lie between"),
        ({"decay_start": 41}, "decay_start must lie between"),
        ({"encoder_dtype": "fp16"}, "encoder_dtype must be one of fp32, tf32, bf16, got 'fp16'"),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm must be positive, or None for no clipping, got 0.0"),
        ({"grad_clip_norm": float("nan")}, "grad_clip_norm must be positive"),
        ({"output_dim": 0}, "output_dim must be a positive integer, got 0"),
        ({"scheduler": "cosin"}, "scheduler must be one of .*Did you mean 'cosine'"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(architecture, **settings)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("top_k", {"k": 0}, "k must be a positive integer of at most the width 24, got 0"),
        ("top_k", {"k": 25}, "at most the width 24, got 25"),
        ("top_k", {"k": 2.5}, "k must be a positive integer"),
        ("top_k", {"auxk_alpha": -0.1}, "auxk_alpha must not be negative"),
        ("top_k", {"auxk_alpha": float("nan")}, "auxk_alpha must not be negative"),
        ("top_k", {"threshold_beta": 1.0}, "threshold_beta must be at least 0 and below 1"),
        ("top_k", {"dead_after_tokens": 0}, "dead_after_tokens must be positive"),
        ("gated", {"l1_penalty": -0.1}, "l1_penalty must not be negative"),
        ("batch_top_k", {"k": 25}, "at most the width 24, got 25"),
        ("standard_april_update", {"l1_penalty": float("nan")}, "l1_penalty must not be negative"),
        ("standard", {"l1_penalty": -0.1}, "l1_penalty must not be negative"),
        ("standard", {"sparsity_warmup_steps": 40}, "sparsity_warmup_steps must be .* below the 40 steps"),
        ("jump_relu", {"sparsity_penalty": -1.0}, "sparsity_penalty must not be negative"),
        ("jump_relu", {"sparsity_warmup_steps": -1}, "sparsity_warmup_steps must be"),
        ("jump_relu", {"bandwidth": 0.0}, "bandwidth must be positive"),
        ("jump_relu", {"target_l0": 0.0}, "target_l0 must be positive and at most the width 24"),
        ("jump_relu", {"target_l0": 25.0}, "target_l0 must be positive and at most the width 24, got 25.0"),
    ],
)
def test_impossible_settings_of_an_architecture_are_refused(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(architecture, **settings)


# ------------------------------------------------------------------------------------------------- the registry


@every
def test_every_architecture_is_found_by_its_name(architecture: str) -> None:
    cls = trainer_class(architecture)
    assert cls is TRAINERS[architecture] and cls.architecture == architecture
    assert architecture in SETTINGS  # trainer_cases has to know how to make one


def test_an_unknown_architecture_brings_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match="Unknown architecture 'topk': use one of .*Did you mean 'top_k'"):
        trainer_class("topk")


def test_a_second_trainer_of_one_name_is_refused() -> None:
    with pytest.raises(TypeError, match="two trainers are named 'standard': StandardTrainer and Again"):
        type("Again", (StandardTrainer,), {}, architecture="standard")
    assert TRAINERS["standard"] is StandardTrainer


def test_a_subclass_without_a_name_keeps_its_parents() -> None:
    class Variant(StandardTrainer):
        pass

    assert Variant.architecture == "standard" and TRAINERS["standard"] is StandardTrainer


def test_a_dictionary_whose_decoder_rows_are_copies_cannot_be_trained() -> None:
    from dictionary_learning.dictionary import AutoEncoder

    class _Copying(AutoEncoder):
        @property
        def decoder_rows(self) -> torch.Tensor:
            return self.decoder.weight.t().clone()

    with pytest.raises(TypeError, match="decoder_rows is not a contiguous view of a parameter"):
        make("standard", dict_class=_Copying)
