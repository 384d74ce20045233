"""That it learns: small problems each architecture must solve, and the metrics that say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import ARCHITECTURES, B, D, F, batches, make, synthetic, train

from dictionary_learning.trainers import JumpReluTrainer

every = pytest.mark.parametrize("architecture", ARCHITECTURES)
GENTLE: dict[str, dict[str, Any]] = {
    "standard": {"l1_penalty": 1e-3},
    "top_k": {"k": 8},
    "jump_relu": {"target_l0": None, "sparsity_penalty": 1e-4, "bandwidth": 0.05},
}


def explained(trainer: Any, x: torch.Tensor) -> float:
    return 1 - ((x - trainer.ae(x)).var(0).sum() / x.var(0).sum()).item()


@every
def test_a_dictionary_overfits_256_rows(architecture: str) -> None:
    x = batches(1, rows=256, width=16)[0]
    trainer = make(architecture, activation_dim=16, dict_size=64, steps=400, **GENTLE[architecture])
    train(trainer, [x] * 400)
    assert explained(trainer, x) > 0.98


@pytest.mark.parametrize("target_l0", [3.0, 8.0])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_jumprelu_settles_at_its_target_l0(target_l0: float, scale: float) -> None:
    data, _ = synthetic(1000)
    trainer = make("jump_relu", activation_dim=24, dict_size=80, steps=1000, target_l0=target_l0, bandwidth=0.02)
    train(trainer, [scale * x for x in data])
    x = scale * torch.cat(data[-8:])
    l0 = (trainer.ae.encode(x) > 0).sum(1).float().mean().item()
    assert l0 == pytest.approx(target_l0, rel=0.15)


def test_jumprelu_thresholds_stay_positive_whatever_pushes_them() -> None:
    trainer = make(
        "jump_relu", target_l0=float(F), sparsity_penalty=50.0, lr=0.05, warmup_steps=0, sparsity_warmup_steps=0
    )
    assert isinstance(trainer, JumpReluTrainer)
    for step, x in enumerate(batches(40)):  # a target of every latent pushes all thresholds down
        trainer.update(step, x)
        assert (trainer.ae.threshold > 0).all()
    assert trainer.ae.threshold.min().item() == pytest.approx(1e-6 * trainer.input_scale)


def test_topk_finds_the_directions_that_made_the_data() -> None:
    data, directions = synthetic(500)
    trainer = train(make("top_k", activation_dim=24, dict_size=80, steps=500, k=5), data)
    similarity = (directions @ trainer.ae.decoder_rows.detach().T).amax(1)
    assert similarity.gt(0.9).float().mean() > 0.9


def test_a_larger_l1_penalty_gives_a_sparser_dictionary() -> None:
    data, _ = synthetic(200)
    l0 = []
    for penalty in (0.01, 0.3):
        trainer = train(make("standard", activation_dim=24, dict_size=80, steps=200, l1_penalty=penalty), data)
        l0.append((trainer.ae.encode(data[-1]) > 0).sum(1).float().mean().item())
    assert l0[1] < 0.5 * l0[0]


@every
def test_metrics_are_those_of_the_last_update(architecture: str) -> None:
    trainer = train(make(architecture), batches(5))
    x = batches(6)[5]
    f, x_hat = trainer.ae.encode(x), trainer.ae(x)  # before the update, which the loss is computed before
    loss = trainer.compute_loss(x, 5).loss.item()
    trainer.update(5, x)
    metrics = trainer.metrics(x)
    assert metrics["loss"] == pytest.approx(loss)
    assert metrics["l0"] == pytest.approx((f > 0).sum(1).float().mean().item())
    assert metrics["nz_frac"] == pytest.approx((f > 0).any(0).float().mean().item())
    expected = 1 - ((x - x_hat).var(0).sum() / x.var(0).sum()).item()
    assert metrics["frac_variance_explained"] == pytest.approx(expected, abs=1e-5)
    assert metrics["l2_loss"] == pytest.approx((x - x_hat).pow(2).sum(1).mean().item(), rel=1e-5)
    assert all(isinstance(value, float) for value in metrics.values())


@every
def test_metrics_need_an_update_first(architecture: str) -> None:
    with pytest.raises(RuntimeError, match=r"metrics\(\) before the first update"):
        make(architecture).metrics(torch.zeros(B, D))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_of_other_data_types_are_trained_on_in_float32(architecture: str, dtype: torch.dtype) -> None:
    data = [x.bfloat16() for x in batches(5)]
    one = train(make(architecture), [x.float() for x in data])
    other = train(make(architecture), [x.to(dtype) for x in data])
    assert torch.equal(one.ae.decoder_rows, other.ae.decoder_rows) and other.ae.decoder_rows.dtype == torch.float32
