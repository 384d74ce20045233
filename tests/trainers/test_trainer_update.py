"""One update, against a plain loop of autograd, clipping and torch's Adam; what an update may depend on, and what may
not change it."""

from __future__ import annotations

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
    UNIT_NORM,
    B,
    D,
    F,
    auxk_of,
    batches,
    forced,
    in_float64,
    make,
    same_bits,
    targets,
    train,
    weights,
)
from trainer_formulas import decoder_bias, encoder_bias, encoder_rows, formula, what_the_equations_need

from dictionary_learning.errors import UserError
from dictionary_learning.kernels import ENVIRONMENT
from dictionary_learning.trainers import SAETrainer
from dictionary_learning.trainers.trainer import geometric_median

every = pytest.mark.parametrize("architecture", ARCHITECTURES)
IN_DATA_UNITS = ("bias", "b_dec", "b_enc", "encoder.bias", "threshold", "decoder_bias", "gate_bias", "mag_bias")


def plainly_trained(
    trainer: SAETrainer, data: list[Tensor], ys: list[Tensor] | None, lr: float, warmup: int, decay: int,
    clip: float | None, dead: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """What `trainer`'s parameters should be after `data`: the formula, autograd, projections and torch's own Adam."""
    architecture, steps = trainer.architecture, trainer.steps
    p = {name: tensor.detach().clone().contiguous().requires_grad_() for name, tensor in trainer.ae.named_parameters()}
    decoder, along = ("W_dec", 1) if "W_dec" in p else ("decoder.weight", 0)
    normed = architecture != "standard_april_update"
    y0 = data[0] if ys is None else ys[0]
    scale = y0.pow(2).sum(1).mean().sqrt()
    with torch.no_grad():
        decoder_bias(p).copy_(geometric_median(y0))
        if ys is not None:
            encoder_rows(p).mul_(scale / data[0].pow(2).sum(1).mean().sqrt())
        if ys is not None or architecture == "jump_relu":
            encoder_bias(p).sub_(encoder_rows(p) @ geometric_median(data[0]))
            if "mag_bias" in p:
                p["mag_bias"].copy_(p["gate_bias"])
        if architecture == "jump_relu":
            p["threshold"].mul_(scale)
    unit = scale / (data if ys is None else ys)[0].shape[1] ** 0.5
    groups = [{"params": [p[name]], "lr": 0.0, "unit": unit if name in IN_DATA_UNITS else 1.0} for name in p]
    adam = torch.optim.Adam(groups)
    trainer.input_scale = float(scale)  # which the formula's settings are taken from
    for step, x in enumerate(data):
        s = what_the_equations_need(trainer, step) | {"dead": dead}
        loss = formula(architecture, p, x, None if ys is None else ys[step], **s)
        adam.zero_grad()
        (loss / unit**2).backward()
        for name, leaf in p.items():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            if name in IN_DATA_UNITS:
                leaf.grad *= unit
        grad = p[decoder].grad
        assert grad is not None
        if normed:
            grad -= (grad * p[decoder].detach()).sum(along, keepdim=True) * p[decoder].detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(p.values()), clip)
        warm = min(1.0, (step + 1) / (warmup + 1))
        for group in adam.param_groups:
            group["lr"] = lr * warm * min(1.0, (steps - step) / (steps - decay)) * group["unit"]
        adam.step()
        with torch.no_grad():
            if normed:
                p[decoder] /= p[decoder].norm(dim=along, keepdim=True)
            if architecture == "jump_relu":
                p["threshold"].clamp_(min=1e-6 * scale)
    return {name: leaf.detach() for name, leaf in p.items()}


@every
@pytest.mark.parametrize(
    ("way", "dict_size", "scale", "clip"),
    [("sae", F, 0.05, 1.0), ("sae", F, 30.0, 0.03), ("sae", 8, 1.0, None), ("transcoder", 20, 1.0, 1.0),
     ("skip", F, 7.0, 0.5)],
)  # fmt: skip
@pytest.mark.parametrize("steps", ["sparse", "dense"])
def test_updates_are_plain_autograd_and_adam(
    architecture: str, way: str, dict_size: int, scale: float, clip: float | None, steps: str
) -> None:  # fmt: skip
    """In float64, and in the float32 of every run. With dict_size = D, the decoder is square, and its transpose has the
    same shape."""
    if architecture in BY_K and steps == "dense":
        pytest.skip("always sparse")
    data = [x.double() for x in batches(9, scale=scale)]
    ys = None if way == "sae" else targets(data)
    settings: dict[str, Any] = {"steps": 20, "lr": 3e-3, "warmup_steps": 4, "decay_start": 6, "grad_clip_norm": clip}
    if "anneal" in architecture:
        settings["anneal_start"] = 15  # the schedule of p has tests of its own
    dead = None
    if architecture in BY_K:  # a fixed set of the dead, all through
        dead = torch.arange(dict_size) % 3 == 0
        settings["auxk_alpha"] = 0.5

    def made(dtype: torch.dtype = torch.float64) -> SAETrainer:
        trainer = make(architecture, dict_size=dict_size, **settings, **TRANSCODERS[way])
        if dtype == torch.float64:
            in_float64(trainer)
        if architecture in SWITCHING:
            return forced(trainer, steps == "sparse")
        auxk = auxk_of(trainer)
        auxk.some_dead, auxk.dead_after_tokens = True, 1
        auxk.dead = lambda: dead  # type: ignore[method-assign]
        auxk.after_update = lambda step, rows: None  # type: ignore[method-assign]
        return trainer

    expected = plainly_trained(made(), data, ys, 3e-3, 4, 6, clip, dead)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 3e-4)):
        trainer = train(made(dtype), data, target=ys)
        for name, parameter in trainer.ae.named_parameters():
            unit = trainer.input_scale if name in IN_DATA_UNITS else 1.0
            found, right = parameter.detach().double() / unit, expected[name] / unit
            torch.testing.assert_close(
                found, right, rtol=tolerance, atol=tolerance, msg=lambda m, n=name, d=dtype: f"{n}, {d}: {m}"
            )


def test_the_projection_does_not_depend_on_how_many_rows_it_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(5)
    whole = weights(train(make("top_k"), data))
    monkeypatch.setattr("dictionary_learning.trainers.optimizer.ROWS_AT_ONCE", 7)
    assert same_bits(whole, weights(train(make("top_k"), data)))


@pytest.mark.parametrize("architecture", UNIT_NORM)
def test_decoder_rows_keep_unit_norm(architecture: str) -> None:
    for extra in ({}, {"output_dim": 5}):
        trainer = make(architecture, lr=0.1, **extra)
        data = batches(10)
        for step, x in enumerate(data):
            trainer.update(step, x, targets([x])[0] if extra else None)
            torch.testing.assert_close(trainer.ae.decoder_rows.norm(dim=1), torch.ones(F), rtol=0, atol=1e-5)


def test_the_april_update_leaves_decoder_norms_free() -> None:
    trainer = train(make("standard_april_update", lr=0.02), batches(10))
    assert (trainer.ae.decoder_rows.norm(dim=1) - 1).abs().max() > 0.01


@every
def test_the_loss_of_an_update_is_that_of_compute_loss_and_the_batch_is_left_alone(architecture: str) -> None:
    trainer = train(make(architecture), batches(3))
    x = batches(4)[3]
    kept, expected = x.clone(), trainer.compute_loss(x, x, 3).loss.detach()
    torch.testing.assert_close(trainer.update(3, x), expected)
    assert torch.equal(x, kept) and trainer.last is not None and not trainer.last.loss.requires_grad


@every
def test_reference_kernels_train_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra: dict[str, Any] = {"dead_after_tokens": 2 * B} if architecture in BY_K else {}
    trained = []
    for kernels in ("cpu", "reference"):
        monkeypatch.setenv(ENVIRONMENT, kernels)
        trainer = make(architecture, **extra)
        if architecture in SWITCHING:
            forced(trainer, True)
        trained.append(weights(train(in_float64(trainer), batches())))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-7, atol=1e-8)


# ------------------------------------------------------------------------------------------------- no side effects


def everything(architecture: str) -> dict[str, Any]:
    """Settings with which all that an architecture has takes part in a short run."""
    if architecture in BY_K:
        return {"dead_after_tokens": 2 * B, "dict_size": 3 * F, "threshold_start_step": 3}
    return {"resample_steps": 9, "dict_size": 3 * F} if architecture in RESAMPLING else {"dict_size": D}


@every
def test_losses_metrics_and_logs_between_updates_change_nothing(architecture: str) -> None:
    extra = everything(architecture) | ({"dict_size": F} if architecture == "jump_relu" else {})
    quiet, watched = make(architecture, **extra), make(architecture, **extra)
    for step, x in enumerate(batches()):
        quiet.update(step, x)
        watched.update(step, x)
        watched.loss(x, step=step, logging=True)
        watched.loss(batches(1, seed=5)[0])
        watched.compute_loss(x, x, step)
        watched.metrics(x)
        watched.get_logging_parameters()
        _ = watched.config
        watched.state_dict()
        if step == 15 and architecture in SWITCHING:  # once sparse, too
            forced(quiet, True)
            forced(watched, True)
    assert same_bits(weights(quiet), weights(watched))
    assert torch.equal(quiet.tokens_since_fired_F, watched.tokens_since_fired_F)


def test_trained_among_others_or_alone_a_dictionary_is_the_same_bits() -> None:
    def together() -> list[SAETrainer]:
        sizes = [F, 2 * F, 8]
        return [make(name, dict_size=size, seed=i) for name in ARCHITECTURES for i, size in enumerate(sizes)]

    data = batches(20)
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
    train(make(architecture, seed=3, **everything(architecture)), batches(12))
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_the_seed_fixes_the_initial_weights(architecture: str) -> None:
    torch.manual_seed(1)
    one = weights(make(architecture, seed=3))
    torch.manual_seed(2)
    assert same_bits(one, weights(make(architecture, seed=3)))
    rows = [make(architecture, seed=seed).ae.decoder_rows for seed in (3, 4, None, None)]
    assert all(not torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))


@every
def test_transcoders_need_a_target_and_autoencoders_have_none(architecture: str) -> None:
    x = batches(1)[0]
    with pytest.raises(UserError, match="an autoencoder has no target"):
        make(architecture).update(0, x, x)
    with pytest.raises(UserError, match="a transcoder needs the output that belongs to its input"):
        make(architecture, output_dim=D).update(0, x)


# ------------------------------------------------------------------------------------------------- units of the data


def in_units(architecture: str, factor: float) -> dict[str, Any]:
    """What of the settings has the units of the data, for data that is `factor` times as large."""
    if architecture == "gated_anneal":  # "Lp^p" begins at p = 1
        return {"initial_sparsity_penalty": 0.05 * factor}
    name = {"p_anneal": "initial_sparsity_penalty"}.get(architecture, "l1_penalty")
    return {} if architecture in BY_K or architecture == "jump_relu" else {name: 0.05 * factor}


@every
@pytest.mark.parametrize("power", [-6, 5, 9])
def test_training_on_scaled_activations_gives_the_scaled_dictionary(architecture: str, power: int) -> None:
    # Powers of two scale floating-point numbers exactly, so nothing but the units may differ: to the last bit.
    extra: dict[str, Any] = {"dead_after_tokens": 2 * B, "threshold_start_step": 3} if architecture in BY_K else {}
    if architecture in RESAMPLING:
        extra = {"resample_steps": 15}
    data, factor = batches(25), 2.0**power
    if "anneal" in architecture:
        extra |= {"anneal_start": 24, "n_sparsity_updates": 2}  # roots and powers round
    one = train(make(architecture, **extra), data)
    scaled = train(make(architecture, **extra | in_units(architecture, factor)), [x * factor for x in data])
    assert scaled.input_scale == one.input_scale * factor
    one.ae.scale_biases(factor)
    assert same_bits(weights(one), weights(scaled))


@every
def test_training_on_activations_twenty_times_as_large_is_the_same(architecture: str) -> None:
    """In float64, and with p = 1 throughout: below, the slope of f^p has no bound at 0, and rounding grows."""
    data = batches(30)
    extra = {"p_end": 1.0} if "anneal" in architecture else {}
    one = train(in_float64(make(architecture, **extra)), data)
    scaled = train(
        in_float64(make(architecture, **extra | in_units(architecture, 20))), [x.double() * 20 for x in data]
    )
    one.ae.scale_biases(20)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(scaled)[name], tensor, rtol=1e-6, atol=1e-6)


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
@pytest.mark.parametrize("way", ["sae", "skip"])
@pytest.mark.parametrize(
    "x", [torch.zeros(4, D), torch.ones(4, D), torch.arange(D)[None] - 2.0], ids=["zeros", "equal", "one row"]
)
def test_degenerate_batches_leave_a_finite_loss_and_weights(architecture: str, x: Tensor, way: str) -> None:
    extra: dict[str, Any] = {"dead_after_tokens": 1} if architecture in BY_K else {}
    extra |= {"resample_steps": 7} if architecture in RESAMPLING else {}
    trainer = make(architecture, **extra, **TRANSCODERS[way])
    train(trainer, [x] * 36, target=None if way == "sae" else targets([x]) * 36)  # past the second look at the dead
    assert trainer.last is not None and trainer.last.loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
