"""That it learns: small problems each architecture must solve, and the metrics that say so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from trainer_cases import (
    ARCHITECTURES,
    SWITCHING,
    B,
    D,
    F,
    batches,
    explained,
    forced,
    make,
    synthetic,
    train,
)

from dictionary_learning.trainers import JumpReluTrainer

every = pytest.mark.parametrize("architecture", ARCHITECTURES)
GENTLE: dict[str, dict[str, Any]] = {
    "standard": {"l1_penalty": 1e-3},
    "standard_april_update": {"l1_penalty": 1e-3},
    "top_k": {"k": 8},
    "group_max": {"k": 8},
    "batch_top_k": {"k": 8},
    "matryoshka_batch_top_k": {"k": 8, "group_weights": [0.1, 0.1, 0.8]},
    "jump_relu": {"target_l0": None, "sparsity_penalty": 1e-4, "bandwidth": 0.05},
    "gated": {"l1_penalty": 1e-3},
    "p_anneal": {"initial_sparsity_penalty": 1e-3, "anneal_start": 200},
    "gated_anneal": {"initial_sparsity_penalty": 1e-3, "anneal_start": 200},
}


@every
def test_a_dictionary_overfits_256_rows(architecture: str) -> None:
    x = batches(1, rows=256, width=16)[0]
    trainer = make(architecture, activation_dim=16, dict_size=64, steps=400, **GENTLE[architecture])
    train(trainer, [x] * 400)
    assert explained(trainer, x) > (0.93 if architecture == "group_max" else 0.98)  # one of each eight


@pytest.mark.parametrize(
    ("architecture", "skip"),
    [(name, False) for name in ARCHITECTURES] + [(name, True) for name in ("standard", "top_k", "jump_relu", "gated")],
)
def test_a_transcoder_learns_what_a_module_does(architecture: str, skip: bool) -> None:
    """The output of a linear map and its ReLU, of another width and in other units."""
    data = batches(400, rows=128)
    g = torch.Generator().manual_seed(3)
    M = 5 * torch.randn(D, 5, generator=g)
    ys = [x @ M + 3 * torch.relu(x @ M) + 2 for x in data]
    gentle = GENTLE[architecture] | ({"l1_penalty": 1e-2} if "l1_penalty" in GENTLE[architecture] else {})
    trainer = make(architecture, output_dim=5, skip=skip, dict_size=40, steps=400, **gentle)
    train(trainer, data, target=ys)
    x = torch.cat(batches(4, rows=128, seed=9))
    assert explained(trainer, x, x @ M + 3 * torch.relu(x @ M) + 2) > (0.9 if skip else 0.8)
    assert trainer.ae(x).shape == (len(x), 5) and (trainer.ae.W_skip is not None) == skip
    if skip:
        assert trainer.ae.W_skip is not None and trainer.ae.W_skip.norm() > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bf16_encoder_explains_as_much(architecture: str) -> None:
    data, _ = synthetic(300)
    settings: dict[str, Any] = {"activation_dim": 24, "dict_size": 80, "steps": 300}
    x = torch.cat(synthetic(8, seed=6)[0])
    found = []
    for dtype in ("fp32", "bf16"):
        trainer = make(architecture, encoder_dtype=dtype, **settings)
        if architecture in SWITCHING:
            forced(trainer, True)
        train(trainer, data)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.ae.parameters())
        found.append(explained(trainer, x))
    assert found[1] > found[0] - 0.002 and found[0] > 0.5  # runs drift apart: some end up higher by more than that


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
    before = trainer.compute_loss(x, x, 5)  # the update moves the weights after its loss
    trainer.update(5, x)
    metrics = trainer.metrics(x)
    assert metrics["loss"] == pytest.approx(before.loss.item(), rel=1e-5)
    assert metrics["l0"] == pytest.approx(before.l0.item())
    assert metrics["nz_frac"] == pytest.approx(before.fired_F.float().mean().item())
    expected = 1 - ((x - before.x_hat_BD).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()
    assert metrics["frac_variance_explained"] == pytest.approx(expected, abs=1e-5)
    for name, term in before.terms.items():
        assert metrics[name] == pytest.approx(term.item(), rel=1e-4), name
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_variance_explained_counts_a_constant_error_and_is_nan_where_nothing_varies() -> None:
    """As in an evaluation: a reconstruction that is off by the same vector everywhere is not perfect."""
    trainer = train(make("standard"), batches(1))
    x = batches(2)[1]
    for y, x_hat, expected in (
        (x, x + 1, 1 - x.numel() / (x - x.mean(0)).pow(2).sum().item()),
        (x[:1], x[:1], math.nan),
    ):
        assert trainer.last is not None
        trainer.last = trainer.last._replace(x_hat_BD=x_hat)
        assert trainer.metrics(y)["frac_variance_explained"] == pytest.approx(expected, abs=1e-5, nan_ok=True)


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
