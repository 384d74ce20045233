"""One update, against Adam written by hand; what an update may depend on, and what may not change it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import ARCHITECTURES, B, D, F, batches, formula, make, same_bits, train, weights

from dictionary_learning.trainers import SAETrainer, TopKTrainer
from dictionary_learning.trainers.trainer import geometric_median

every = pytest.mark.parametrize("architecture", ARCHITECTURES)
IN_DATA_UNITS = ("bias", "b_dec", "b_enc", "encoder.bias", "threshold")


def train_by_hand(trainer: SAETrainer, data: list[Tensor], lr: float, warmup: int, decay: int) -> dict[str, Tensor]:
    """What `trainer`'s parameters should be after `data`: Adam, its schedules and projections, step by step."""
    architecture, steps = trainer.architecture, trainer.steps
    p = {name: tensor.clone().requires_grad_() for name, tensor in weights(trainer).items() if name != "k"}
    threshold_average = p.pop("threshold").detach() if architecture == "top_k" else None
    m = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    v = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    decoder = "W_dec" if architecture == "jump_relu" else "decoder.weight"
    rows_dim = 1 if architecture == "jump_relu" else 0  # along a decoder direction
    scale = data[0].pow(2).sum(1).mean().sqrt()
    with torch.no_grad():
        p["bias" if architecture == "standard" else "b_dec"].copy_(geometric_median(data[0]))
        if architecture == "jump_relu":
            p["threshold"].mul_(scale)
            p["b_enc"].copy_(-p["b_dec"] @ p["W_enc"])
    for step, x in enumerate(data):
        warm = min(1.0, step / (steps // 10))  # of the sparsity term
        settings: dict[str, Any] = {
            "standard": {"weight": 0.05 * warm},
            "top_k": {"k": 4},
            "jump_relu": {"weight": scale**2 * warm, "target_l0": 4.0, "bandwidth": 0.2 * scale},
        }[architecture]
        loss = formula(architecture, p, x, **settings)
        grads = dict(zip(p, torch.autograd.grad(loss / scale**2, list(p.values())), strict=True))
        for name in p:
            if name in IN_DATA_UNITS:
                grads[name] = grads[name] * scale
        along = (grads[decoder] * p[decoder].detach()).sum(rows_dim, keepdim=True)
        grads[decoder] = grads[decoder] - along * p[decoder].detach()
        norm = sum(grad.pow(2).sum() for grad in grads.values()) ** 0.5
        if step < warmup:
            rate = lr * (step + 1) / (warmup + 1)
        else:
            rate = lr * min(1.0, (steps - step) / (steps - decay))
        with torch.no_grad():
            for name in p:
                grad = grads[name] / max(1.0, norm)
                m[name] = 0.9 * m[name] + 0.1 * grad
                v[name] = 0.999 * v[name] + 0.001 * grad**2
                by = m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                p[name] -= rate * by * (scale if name in IN_DATA_UNITS else 1.0)
            p[decoder] /= p[decoder].norm(dim=rows_dim, keepdim=True)
            if architecture == "jump_relu":
                p["threshold"].clamp_(min=1e-6 * scale)
    assert norm > 0
    return {name: tensor.detach() for name, tensor in p.items()} | (
        {} if threshold_average is None else {"threshold": threshold_average, "k": torch.tensor(4, dtype=torch.int)}
    )


@every
@pytest.mark.parametrize("dict_size", [F, D, 5])  # D: a square decoder, whose transpose has the same shape
@pytest.mark.parametrize("scale", [0.05, 30.0])
def test_updates_are_hand_written_adam(architecture: str, dict_size: int, scale: float) -> None:
    data = batches(12, scale=scale)
    settings: dict[str, Any] = {"steps": 20, "dict_size": dict_size, "lr": 3e-3, "warmup_steps": 4, "decay_start": 8}
    if architecture == "top_k":
        settings["threshold_start_step"] = 19
    trainer = make(architecture, **settings)
    expected = train_by_hand(trainer, data, lr=3e-3, warmup=4, decay=8)
    train(trainer, data)
    for name, tensor in weights(trainer).items():
        unit = trainer.input_scale if name in IN_DATA_UNITS else 1.0
        torch.testing.assert_close(
            tensor / unit, expected[name] / unit, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: n + m
        )


def test_gradients_are_clipped_to_norm_one() -> None:
    trainer = make("standard", l1_penalty=1000.0, sparsity_warmup_steps=0)
    train(trainer, batches(1))
    norm = sum(leaf.grad.pow(2).sum() for group in trainer.optimizer.param_groups for leaf in group["params"]) ** 0.5
    assert norm.item() == pytest.approx(1.0, rel=1e-4)


@every
def test_decoder_rows_stay_of_unit_norm_and_their_gradient_has_no_part_along_them(architecture: str) -> None:
    trainer = make(architecture, dict_size=D)
    for step, x in enumerate(batches(10)):
        before = trainer.ae.decoder_rows.detach().clone()
        trainer.update(step, x)
        grad_FD = trainer._decoder_leaf_FD.grad
        assert grad_FD is not None and grad_FD.abs().max() > 0
        torch.testing.assert_close((grad_FD * before).sum(1), torch.zeros(D), atol=1e-6, rtol=0)
        torch.testing.assert_close(trainer.ae.decoder_rows.norm(dim=1), torch.ones(D))


@every
def test_the_loss_of_an_update_is_that_of_compute_loss_and_the_batch_is_left_alone(architecture: str) -> None:
    trainer = train(make(architecture), batches(3))
    x = batches(4)[3]
    kept, expected = x.clone(), trainer.compute_loss(x, 3).loss.detach()
    assert torch.equal(trainer.update(3, x), expected)
    assert torch.equal(x, kept) and trainer.last is not None and not trainer.last.loss.requires_grad


# ------------------------------------------------------------------------------------------------- no side effects


@every
def test_losses_metrics_and_logs_between_updates_change_nothing(architecture: str) -> None:
    extra = {"dead_after_tokens": 2 * B} if architecture == "top_k" else {}  # AuxK takes part
    quiet, watched = make(architecture, **extra), make(architecture, **extra)
    for step, x in enumerate(batches()):
        quiet.update(step, x)
        watched.update(step, x)
        watched.loss(x, step=step, logging=True)
        watched.loss(batches(1, seed=5)[0])
        watched.compute_loss(x, step)
        watched.metrics(x)
        watched.get_logging_parameters()
        _ = watched.config
        watched.state_dict()
    assert same_bits(weights(quiet), weights(watched))
    assert torch.equal(quiet.tokens_since_fired_F, watched.tokens_since_fired_F)


def test_trained_among_others_or_alone_a_dictionary_is_the_same_bits() -> None:
    def together() -> list[SAETrainer]:
        sizes = [F, 2 * F, 7]
        return [make(name, dict_size=size, seed=i) for name in ARCHITECTURES for i, size in enumerate(sizes)]

    data = batches(25)
    many = together()
    for step, x in enumerate(data):
        for trainer in many:
            trainer.update(step, x)
    for trainer, alone in zip(many, together(), strict=True):
        assert same_bits(weights(trainer), weights(train(alone, data)))


@every
def test_training_draws_nothing_from_the_global_generator(architecture: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(make(architecture, seed=3), batches(5))
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_the_seed_fixes_the_initial_weights(architecture: str) -> None:
    torch.manual_seed(1)
    one = weights(make(architecture, seed=3))
    torch.manual_seed(2)
    assert same_bits(one, weights(make(architecture, seed=3)))
    rows = [make(architecture, seed=seed).ae.decoder_rows for seed in (3, 4, None, None)]
    assert all(not torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))


# ------------------------------------------------------------------------------------------------- state


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


@every
@pytest.mark.parametrize("through", [as_a_file_gives_it_back, through_torch_save, copy.deepcopy])
@pytest.mark.parametrize("stop", [1, 21, 35])
def test_a_resumed_trainer_goes_on_bit_for_bit(architecture: str, through: Any, stop: int) -> None:
    extra = {"dead_after_tokens": 2 * B, "dict_size": 3 * F} if architecture == "top_k" else {"dict_size": D}
    data = batches(40)
    unbroken = train(make(architecture, **extra), data)
    first = train(make(architecture, **extra), data[:stop])
    resumed = make(architecture, **extra, **{"seed": 1})
    resumed.load_state_dict(through(first.state_dict()))
    train(resumed, data[stop:], start=stop)
    assert same_bits(weights(unbroken), weights(resumed))
    assert torch.equal(unbroken.tokens_since_fired_F, resumed.tokens_since_fired_F)
    if isinstance(unbroken, TopKTrainer):
        assert unbroken.some_dead and unbroken.last is not None and "auxk_loss" in unbroken.last.terms


@every
def test_a_trainer_loaded_from_a_live_state_shares_nothing_with_it(architecture: str) -> None:
    data = batches(20)
    one, other = train(make(architecture), data[:10]), make(architecture)
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


# ------------------------------------------------------------------------------------------------- units of the data


@pytest.mark.parametrize("architecture", ["top_k", "jump_relu"])
@pytest.mark.parametrize("power", [-6, 5, 9])
def test_training_on_scaled_activations_gives_the_scaled_dictionary(architecture: str, power: int) -> None:
    # Powers of two scale floating-point numbers exactly, so nothing but the units may differ: to the last bit.
    extra = {"dead_after_tokens": 2 * B, "threshold_start_step": 3} if architecture == "top_k" else {}
    data, factor = batches(), 2.0**power
    one = train(make(architecture, **extra), data)
    scaled = train(make(architecture, **extra), [x * factor for x in data])
    assert scaled.input_scale == one.input_scale * factor
    one.ae.scale_biases(factor)
    assert same_bits(weights(one), weights(scaled))


@pytest.mark.parametrize("architecture", ["top_k", "jump_relu"])
def test_training_in_odd_units_gives_nearly_the_same(architecture: str) -> None:
    data = batches(10)
    one = train(make(architecture), data)
    scaled = train(make(architecture), [x * 37.3 for x in data])
    one.ae.scale_biases(37.3)
    x = data[0] * 37.3
    torch.testing.assert_close(scaled.ae(x) / 37.3, one.ae(x) / 37.3, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.ae.decoder_rows, one.ae.decoder_rows, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------- the first batch


def test_the_geometric_median_has_the_least_summed_distance() -> None:
    g = torch.Generator().manual_seed(4)
    points = torch.cat([torch.randn(90, 5, generator=g), 50 + torch.randn(10, 5, generator=g)])  # a tenth are outliers
    median = geometric_median(points)

    def distance(centre: Tensor) -> float:
        return (points - centre).norm(dim=1).sum().item()

    nearby = median + 0.05 * torch.nn.functional.normalize(torch.randn(200, 5, generator=g), dim=1)
    assert all(distance(median) < distance(other) for other in nearby)
    assert distance(median) < 0.9 * distance(points.mean(0))


def test_the_geometric_median_of_equal_points_is_that_point() -> None:
    torch.testing.assert_close(geometric_median(torch.full((5, 3), 2.0)), torch.full((3,), 2.0))
    assert geometric_median(torch.zeros(5, 3)).eq(0).all()


@every
@pytest.mark.parametrize(
    "x", [torch.zeros(4, D), torch.ones(4, D), torch.arange(D)[None] - 2.0], ids=["zeros", "equal", "one row"]
)
def test_degenerate_batches_leave_a_finite_loss_and_weights(architecture: str, x: Tensor) -> None:
    extra = {"dead_after_tokens": 1} if architecture == "top_k" else {}
    trainer = train(make(architecture, **extra), [x] * 20)  # past the first look at the dead
    assert trainer.last is not None and trainer.last.loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
