"""Losses and their gradients against the papers' formulas, of every architecture, in float64 and float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import (
    ARCHITECTURES,
    BY_K,
    SETTINGS,
    SWITCHING,
    TRANSCODERS,
    F,
    auxk_of,
    batches,
    declare_dead,
    forced,
    in_float64,
    make,
    switch_of,
    targets,
)
from trainer_formulas import formula, what_the_equations_need

from dictionary_learning.kernels import ENVIRONMENT
from dictionary_learning.trainers import JumpReluTrainer, SAETrainer
from dictionary_learning.trainers.jumprelu import JumpReLUFunction
from dictionary_learning.trainers.sparse_switch import Densities
from dictionary_learning.trainers.trainer import LossLog

every = pytest.mark.parametrize("architecture", ARCHITECTURES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
STEPS_WAYS = [(name, "sparse") for name in ARCHITECTURES] + [(name, "dense") for name in SWITCHING]


def perturbed(trainer: SAETrainer, seed: int, dtype: torch.dtype = torch.float64) -> SAETrainer:
    """The trainer with parameters that are nothing special."""
    if dtype == torch.float64:
        in_float64(trainer)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.ae.named_parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=dtype)
            parameter.copy_(noise.abs() * 0.3 + 0.05 if name == "threshold" else parameter + 0.2 * noise)
    return trainer


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return batches(1, seed=seed)[0].to(dtype)


def assert_loss_and_gradients_follow(
    trainer: SAETrainer, x: Tensor, step: int, y: Tensor | None = None, **further: Any
) -> None:
    """The formula is evaluated in float64 whatever the trainer computes in."""
    tolerance = TOLERANCE[x.dtype]
    if x.dtype == torch.float32 and "anneal" in trainer.architecture:
        tolerance = 1e-4  # the slope of f^p near 0 magnifies what the product has rounded
    leaves = {name: p.detach().double().requires_grad_() for name, p in trainer.ae.named_parameters()}
    s = what_the_equations_need(trainer, step) | further
    expected = formula(trainer.architecture, leaves, x.double(), None if y is None else y.double(), **s)
    found = trainer.compute_loss(x, x if y is None else y, step).loss
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    trainer.ae.zero_grad()
    found.backward()
    expected.backward()
    for name, parameter in trainer.ae.named_parameters():
        assert parameter.grad is not None, name
        right = torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad
        assert right is not None
        scale = max(1.0, right.abs().max().item())
        torch.testing.assert_close(
            parameter.grad.double(), right, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", TRANSCODERS)
@pytest.mark.parametrize(("architecture", "steps"), STEPS_WAYS)
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_losses_and_gradients_are_the_papers(
    kernels: str, architecture: str, steps: str, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, kernels)
    for seed in range(3):
        trainer = perturbed(make(architecture, **TRANSCODERS[way]), seed, dtype)
        if architecture in SWITCHING:
            forced(trainer, steps == "sparse")
        x = batch(seed, dtype)
        y = None if way == "sae" else targets([x])[0]
        for step in (2, 25):  # the sparsity term warming up; p on its way down
            assert_loss_and_gradients_follow(trainer, x, step, y)


@pytest.mark.parametrize("k", [1, 6, F])
@pytest.mark.parametrize("architecture", BY_K)
def test_losses_by_k_hold_for_any_k(architecture: str, k: int) -> None:
    assert_loss_and_gradients_follow(perturbed(make(architecture, k=k), 3), batch(3), 0)


def test_the_penalty_of_a_standard_sae_warms_up_from_nothing() -> None:
    trainer = perturbed(make("standard", l1_penalty=0.3, sparsity_warmup_steps=4), 1)
    for step, weight in ((0, 0.0), (2, 0.15), (4, 0.3), (39, 0.3)):
        assert_loss_and_gradients_follow(trainer, batch(1), step, weight=weight)


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("way", ["sae", "skip"])
@pytest.mark.parametrize("number_dead", [1, 3, 4, 15, F])
@pytest.mark.parametrize("architecture", BY_K)
def test_auxk_is_the_residual_explained_by_dead_latents(
    architecture: str, number_dead: int, way: str, on_cuda: bool
) -> None:
    for seed in range(2):
        trainer = perturbed(make(architecture, auxk_alpha=0.7, **TRANSCODERS[way]), seed)
        assert auxk_of(trainer).size == trainer.ae.output_dim // 2
        dead = torch.zeros(F, dtype=torch.bool)
        dead[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:number_dead]] = True
        declare_dead(trainer, dead)
        if on_cuda:  # where there is room for some more
            auxk_of(trainer).room = number_dead + 5
        x = batch(seed)
        y = None if way == "sae" else targets([x])[0]
        assert_loss_and_gradients_follow(trainer, x, 0, y, dead=dead)


@pytest.mark.parametrize("architecture", BY_K)
def test_auxk_of_latents_that_came_back_to_life_is_nothing(architecture: str) -> None:
    trainer = declare_dead(perturbed(make(architecture, auxk_alpha=0.7), 0), torch.zeros(F, dtype=torch.bool))
    assert_loss_and_gradients_follow(trainer, batch(0), 0)
    assert trainer.compute_loss(batch(0), batch(0), 0).terms["auxk_loss"] == 0


# ------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("group_weights", [None, [0.5, 0.0, 2.0]])
def test_matryoshka_losses_are_those_of_the_prefixes_weighted_once(group_weights: list[float] | None) -> None:
    trainer = perturbed(make("matryoshka_batch_top_k", group_weights=group_weights), 2)
    x = batch(2)
    assert_loss_and_gradients_follow(trainer, x, 0, group_weights=group_weights or [1 / 3] * 3)
    out = trainer.compute_loss(x, x, 0)
    p = {name: parameter.detach() for name, parameter in trainer.ae.named_parameters()}
    s = {"k": 4, "group_sizes": [4, 8, 12]}
    prefixes = [formula("matryoshka_batch_top_k", p, x, group_weights=row, **s).item() for row in torch.eye(3).tolist()]
    assert out.terms["min_l2_loss"].item() == pytest.approx(min(prefixes))
    assert out.terms["max_l2_loss"].item() == pytest.approx(max(prefixes))
    if group_weights is None:  # the mean of the three, divided by three once
        assert out.loss.item() == pytest.approx(sum(prefixes) / 3)


def test_one_matryoshka_group_is_batch_topk() -> None:
    one = perturbed(make("matryoshka_batch_top_k", group_fractions=[1.0]), 0)
    other = perturbed(make("batch_top_k"), 1)
    pairs = {"b_dec": "b_dec", "encoder.bias": "b_enc"}
    with torch.no_grad():
        for name, named in pairs.items():
            other.ae.get_parameter(name).copy_(one.ae.get_parameter(named))
        other.ae.encoder_rows.copy_(one.ae.encoder_rows)
        other.ae.decoder_rows.copy_(one.ae.decoder_rows)
    x = batch(4)
    torch.testing.assert_close(one.compute_loss(x, x, 0).loss, other.compute_loss(x, x, 0).loss)


# ------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("architecture", ["gated", "gated_anneal"])
def test_the_gates_own_reconstruction_trains_the_gate_alone(architecture: str, sparse: bool) -> None:
    trainer = forced(perturbed(make(architecture), 1), sparse)
    x = batch(1)
    trainer.compute_loss(x, x, 0).terms["aux_loss"].backward()
    for name in ("decoder.weight", "r_mag", "mag_bias"):
        grad = trainer.ae.get_parameter(name).grad
        assert grad is None or grad.eq(0).all(), name
    for name in ("encoder.weight", "gate_bias"):
        grad = trainer.ae.get_parameter(name).grad
        assert grad is not None and grad.ne(0).any(), name


# ------------------------------------------------------------------------------------------------- JumpReLU


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("target_l0", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_jumprelu_bandwidth_and_penalty_are_in_units_of_the_data(
    target_l0: float | None, scale: float, sparse: bool
) -> None:
    for seed in range(3):
        trainer = make("jump_relu", target_l0=target_l0, sparsity_penalty=0.6, sparsity_warmup_steps=4)
        perturbed(forced(trainer, sparse), seed)
        trainer.input_scale = scale  # of the first batch
        assert_loss_and_gradients_follow(trainer, batch(seed), 2, weight=0.6 * scale**2 / 2, bandwidth=0.2 * scale)


def test_both_halves_of_the_jumprelu_window_reach_the_threshold() -> None:
    # Pre-activations outside, just below, just above, and outside a window of width 0.2 around the threshold 0.5.
    z = torch.tensor([[0.3], [0.45], [0.55], [0.7]], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], dtype=torch.float64)
    acts, _ = JumpReLUFunction.apply(z, theta, 0.2)
    assert acts.flatten().tolist() == [0, 0, 0.55, 0.7]
    d_z, d_theta = torch.autograd.grad((weight * acts).sum(), (z, theta))
    assert d_theta.item() == pytest.approx(-0.5 / 0.2 * 110)
    assert d_z.flatten().tolist() == [0, 0, 100, 1000]
    _, l0 = JumpReLUFunction.apply(z, theta, 0.2)
    assert l0 == 2
    (d_theta,) = torch.autograd.grad(7 * l0, theta)
    assert d_theta.item() == pytest.approx(-7 * 2 / 0.2)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_jumprelu_trainer_looks_at_pre_activations_below_the_threshold(sparse: bool) -> None:
    trainer = forced(make("jump_relu", dict_size=1, target_l0=None, sparsity_warmup_steps=0), sparse)
    assert isinstance(trainer, JumpReluTrainer)
    with torch.no_grad():
        trainer.ae.threshold.fill_(1.0)
    x = trainer.ae.W_enc.detach().T * 0.95  # z = 0.95, code 0, inside the window of 0.2
    trainer.compute_loss(x, x, 0).loss.backward()
    # Seen through the codes, which are 0 here, neither the error (slope -1.9 in f) nor L0 would reach the threshold.
    assert trainer.ae.threshold.grad is not None
    assert trainer.ae.threshold.grad.item() == pytest.approx((1.9 * 1.0 - 1) / 0.2, rel=1e-4)


def test_sparse_jumprelu_steps_hold_the_window_and_the_active_and_nothing_else() -> None:
    trainer = forced(perturbed(make("jump_relu"), 2), True)
    x = batch(2)
    z, theta = trainer.ae.preactivations(x), trainer.ae.get_parameter("threshold")
    codes = switch_of(trainer).codes(trainer.preactivations(x), theta.detach() - 0.1)
    expected = (z > theta - 0.1).nonzero()
    assert torch.equal(torch.stack([codes.entries.rows_N, codes.entries.latents_N], 1), expected)  # type: ignore[attr-defined]
    assert 0 < len(expected) < z.numel() / 2


# ------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("room", [1.0, 1.5])
@pytest.mark.parametrize("architecture", SWITCHING)
def test_a_step_with_a_fixed_number_of_entries_is_the_same(architecture: str, room: float) -> None:
    """As on CUDA, where asking how many there are would wait for the device: the missing ones are filled up."""
    trainer = perturbed(make(architecture), 3)
    x, switch = batch(3), switch_of(trainer)
    found = []
    for may_wait in (True, False):
        switch.may_wait, switch.sparse, switch.densities = may_wait, True, Densities(2.0, room / 2)
        trainer.ae.zero_grad()
        out = trainer.compute_loss(x, x, 25)
        out.loss.backward()
        grads = [parameter.grad for parameter in trainer.ae.parameters()]
        found.append([out.loss.detach(), out.x_hat_BD.detach(), out.firings_F, *grads])
    for one, other in zip(*found, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@every
def test_a_loss_output_says_what_fired_and_how_many(architecture: str) -> None:
    trainer = perturbed(make(architecture), 1)
    if architecture == "batch_top_k" or architecture.startswith("matryoshka"):
        trainer.ae.encode = lambda x, encode=trainer.ae.encode: encode(x, use_threshold=False)  # type: ignore[method-assign]
    x = batch(1)
    f = trainer.ae.encode(x)
    for sparse in (False, True):
        if architecture in SWITCHING:
            forced(trainer, sparse)
        out = trainer.compute_loss(x, x, 0)
        assert torch.equal(out.firings_F, (f > 0).sum(0).double())
        assert torch.equal(out.fired_F, (f > 0).any(0)) and out.fired_F.dtype == torch.bool
        assert out.l0.item() == pytest.approx((f > 0).sum(1).double().mean().item())
        torch.testing.assert_close(out.x_hat_BD, trainer.ae.reconstruct(f, x))


@every
def test_loss_with_logging_names_its_parts(architecture: str) -> None:
    trainer = make(architecture)
    x = batches(1)[0]
    log = trainer.loss(x, step=3, logging=True)
    assert isinstance(log, LossLog)
    assert torch.equal(log.x, x) and torch.equal(log.f, trainer.ae.encode(x))
    assert log.losses["loss"] == pytest.approx(trainer.compute_loss(x, x, 3).loss.item(), rel=1e-5)
    squares = (x - log.x_hat).pow(2).sum(1).mean().item()
    if "mse_loss" in log.losses:
        assert log.losses["mse_loss"] == pytest.approx(squares, rel=1e-5)
    else:
        assert log.losses["l2_loss"] <= squares * (1 + 1e-5) or architecture == "matryoshka_batch_top_k"
    plain = trainer.loss(x.bfloat16())
    assert isinstance(plain, Tensor) and plain.dtype == torch.float32


@every
def test_a_loss_passes_gradcheck_where_it_is_smooth(architecture: str) -> None:
    """Numerically, through the decoder and its bias, in which every architecture's choice of latents is constant."""
    trainer = perturbed(make(architecture, activation_dim=4, dict_size=12), 0)
    x = batches(1, rows=5, width=4)[0].double()
    decoder = dict(trainer.ae.named_parameters())["W_dec" if hasattr(trainer.ae, "W_dec") else "decoder.weight"]
    found = trainer.compute_loss(x, x, 0)
    aux = found.terms.get("aux_loss", torch.zeros(()))  # whose decoder is frozen
    (grad,) = torch.autograd.grad(found.loss - aux, decoder)
    direction = torch.randn(decoder.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(distance: float) -> float:
        with torch.no_grad():
            decoder.add_(distance * direction)
            out = trainer.compute_loss(x, x, 0)
            decoder.sub_(distance * direction)
            return (out.loss - out.terms.get("aux_loss", 0.0)).item()

    assert (loss(1e-6) - loss(-1e-6)) / 2e-6 == pytest.approx((grad * direction).sum().item(), rel=1e-6)


def test_every_architecture_of_the_registry_has_an_equation_here() -> None:
    assert set(ARCHITECTURES) == set(SETTINGS)
