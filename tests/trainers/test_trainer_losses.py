"""Losses and their gradients against the papers' formulas, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trainer_cases import ARCHITECTURES, D, F, batches, formula, make

from dictionary_learning.kernels import ENVIRONMENT
from dictionary_learning.trainers import JumpReluTrainer, SAETrainer, TopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReLU, Step
from dictionary_learning.trainers.trainer import LossLog


def perturbed(trainer: SAETrainer, seed: int) -> SAETrainer:
    """The trainer in float64 with parameters that are nothing special."""
    trainer.ae.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.ae.named_parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            parameter.copy_(noise.abs() * 0.3 + 0.05 if name == "threshold" else parameter + 0.2 * noise)
    return trainer


def assert_loss_and_gradients_follow(trainer: SAETrainer, x: Tensor, step: int, **settings: Any) -> None:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in trainer.ae.named_parameters()}
    expected = formula(trainer.architecture, leaves, x, **settings)
    found = trainer.compute_loss(x, step).loss
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    trainer.ae.zero_grad()
    found.backward()
    expected.backward()
    for name, parameter in trainer.ae.named_parameters():
        assert parameter.grad is not None and leaves[name].grad is not None
        torch.testing.assert_close(
            parameter.grad, leaves[name].grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: n + m
        )


def double_batch(seed: int) -> Tensor:
    return batches(1, seed=seed)[0].double()


@pytest.mark.parametrize("step", [0, 2, 39])
@given(seed=st.integers(0, 1000))
@settings(max_examples=8)
def test_standard_loss_is_squared_error_plus_l1_that_warms_up(step: int, seed: int) -> None:
    trainer = perturbed(make("standard", l1_penalty=0.3, sparsity_warmup_steps=4), seed)
    assert_loss_and_gradients_follow(trainer, double_batch(seed), step, weight=0.3 * min(1, step / 4))


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("k", [1, 4, F])
@given(seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_topk_loss_is_the_squared_error_of_the_k_largest(kernels: str, k: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, kernels)
        trainer = perturbed(make("top_k", k=k), seed)
    assert_loss_and_gradients_follow(trainer, double_batch(seed), 0, k=k)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("number_dead", [1, 3, 4, 15, F])
@given(seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_auxk_is_the_residual_explained_by_dead_latents(kernels: str, number_dead: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, kernels)
        trainer = perturbed(make("top_k", auxk_alpha=0.7, dead_after_tokens=100), seed)
    assert isinstance(trainer, TopKTrainer) and trainer.auxk_size == D // 2
    trainer.some_dead = True
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:number_dead]] = True
    trainer.tokens_since_fired_F.copy_(torch.where(dead, 100, 99))
    assert_loss_and_gradients_follow(
        trainer, double_batch(seed), 0, k=4, dead=dead, auxk_alpha=0.7, auxk_size=trainer.auxk_size
    )


@pytest.mark.parametrize("target_l0", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 20.0])
@given(seed=st.integers(0, 1000))
@settings(max_examples=6)
def test_jumprelu_loss_and_pseudo_derivatives_are_the_papers(target_l0: float | None, scale: float, seed: int) -> None:
    trainer = perturbed(make("jump_relu", target_l0=target_l0, sparsity_penalty=0.6, sparsity_warmup_steps=4), seed)
    trainer.input_scale = scale  # of the first batch: bandwidth and penalty are relative to it
    assert_loss_and_gradients_follow(
        trainer, double_batch(seed), 2, weight=0.6 * scale**2 / 2, target_l0=target_l0, bandwidth=0.2 * scale
    )


def test_both_halves_of_the_jumprelu_window_reach_the_threshold() -> None:
    # Pre-activations outside, just below, just above, and outside a window of width 0.2 around the threshold 0.5.
    z = torch.tensor([[0.3], [0.45], [0.55], [0.7]], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], dtype=torch.float64)
    d_z, d_theta = torch.autograd.grad((weight * JumpReLU.apply(z, theta, 0.2)).sum(), (z, theta))
    assert d_theta.item() == pytest.approx(-0.5 / 0.2 * 110)
    assert d_z.flatten().tolist() == [0, 0, 100, 1000]
    steps = Step.apply(z, theta, 0.2)
    assert steps.flatten().tolist() == [0, 0, 1, 1]
    (d_theta,) = torch.autograd.grad((weight * steps).sum(), theta)
    assert d_theta.item() == pytest.approx(-1 / 0.2 * 110)


def test_the_jumprelu_trainer_looks_at_pre_activations_below_the_threshold() -> None:
    trainer = make("jump_relu", dict_size=1, target_l0=None, sparsity_warmup_steps=0)
    assert isinstance(trainer, JumpReluTrainer)
    with torch.no_grad():
        trainer.ae.threshold.fill_(1.0)
    x = trainer.ae.W_enc.detach().T * 0.95  # z = 0.95, code 0, inside the window of 0.2
    trainer.compute_loss(x, 5).loss.backward()
    error = 2 * (0 - x) @ trainer.ae.W_dec.detach().T
    assert trainer.ae.threshold.grad is not None
    assert trainer.ae.threshold.grad.item() == pytest.approx(-1 / 0.2 * (1 + error.item()), rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loss_output_says_what_fired_and_how_many(architecture: str) -> None:
    trainer = perturbed(make(architecture), 1)
    x = double_batch(1)
    out = trainer.compute_loss(x, 0)
    f = trainer.ae.encode(x)
    assert torch.equal(out.fired_F, (f > 0).any(0)) and out.fired_F.dtype == torch.bool
    assert out.l0.item() == pytest.approx((f > 0).sum(1).double().mean().item())
    torch.testing.assert_close(out.x_hat_BD, trainer.ae(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_with_logging_names_its_parts(architecture: str) -> None:
    trainer = make(architecture)
    x = batches(1)[0]
    log = trainer.loss(x, step=3, logging=True)
    assert isinstance(log, LossLog)
    assert torch.equal(log.x, x) and torch.equal(log.f, trainer.ae.encode(x))
    assert log.losses["loss"] == pytest.approx(trainer.compute_loss(x, 3).loss.item())
    assert log.losses["l2_loss"] == pytest.approx((x - log.x_hat).pow(2).sum(1).mean().item(), rel=1e-5)
    plain = trainer.loss(x.bfloat16())
    assert isinstance(plain, Tensor) and plain.dtype == torch.float32
