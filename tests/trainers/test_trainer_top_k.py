"""TopK's own affairs: what counts as fired, dead latents and AuxK, and the running threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import B, D, F, batches, make, synthetic, train

from dictionary_learning.trainers import TopKTrainer
from dictionary_learning.trainers.top_k import DEAD_COUNT_INTERVAL

LIVING, ROWS = 12, 128  # of `with_crowded_out_latents`, and in its batches


def top_k(**settings: Any) -> TopKTrainer:
    trainer = make("top_k", **settings)
    assert isinstance(trainer, TopKTrainer)
    return trainer


def with_bias(trainer: TopKTrainer, bias: float, latents: slice) -> TopKTrainer:
    with torch.no_grad():
        trainer.ae.encoder.bias[latents] = bias
    return trainer


def test_a_zero_that_topk_had_to_take_has_not_fired() -> None:
    trainer = with_bias(top_k(k=10), -100.0, slice(4, None))  # at most four latents can be positive
    trainer.update(0, batches(1)[0])
    assert trainer.last is not None
    assert not trainer.last.fired_F[4:].any() and trainer.last.fired_F[:4].all()
    assert 0 < trainer.last.l0 <= 4
    assert (trainer.tokens_since_fired_F[4:] == B).all() and (trainer.tokens_since_fired_F[:4] == 0).all()


def test_k_may_be_the_whole_width() -> None:
    trainer = top_k(k=F)
    data = batches(10)
    train(trainer, data)
    f = trainer.ae.encode(data[0])
    assert torch.equal(f, torch.relu(trainer.ae.preactivations(data[0])))
    assert trainer.last is not None and trainer.last.l0 < F


def test_tokens_since_a_latent_fired_are_counted_per_latent() -> None:
    trainer, since = top_k(dict_size=4 * F), torch.zeros(4 * F, dtype=torch.long)
    for step, x in enumerate(batches(12)):
        fired = (trainer.ae.encode(x) > 0).any(0) if step else None
        trainer.update(step, x)
        assert trainer.last is not None
        if fired is not None:  # before step 0 the bias has not been set from the data
            assert torch.equal(trainer.last.fired_F, fired)
        since = torch.where(trainer.last.fired_F, 0, since + len(x))
        assert torch.equal(trainer.tokens_since_fired_F, since)
    assert since.max() > since.min()


# ------------------------------------------------------------------------------------------------- the threshold


def test_the_threshold_follows_the_mean_smallest_kept_activation() -> None:
    trainer = top_k(threshold_beta=0.9, threshold_start_step=3)
    expected = -1.0
    for step, x in enumerate(batches(12)):
        kept = trainer.ae.encode(x, return_topk=True)[1] if step else None
        trainer.update(step, x)
        if step >= 3:
            assert kept is not None
            smallest = kept.masked_fill(kept <= 0, torch.inf).amin(1).mean().item()
            expected = smallest if expected < 0 else 0.9 * expected + 0.1 * smallest
        assert trainer.ae.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_rows_without_positives_do_not_enter_the_threshold() -> None:
    trainer = top_k(dict_size=3, k=2, threshold_start_step=0)
    rows = torch.nn.functional.normalize(torch.randn(3, D), dim=1)
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(rows)
    trainer.initialize = lambda x_BD: None
    away = -torch.linalg.pinv(rows) @ torch.ones(3)  # every pre-activation is -1
    x = torch.stack([2 * rows[0], away, away])
    kept = trainer.ae.encode(x[:1], return_topk=True)[1]
    smallest = kept[kept > 0].min().item()
    trainer.update(0, x)
    assert trainer.ae.threshold.item() == pytest.approx(smallest, rel=1e-5)
    trainer.update(1, torch.stack([away, away]))  # nothing positive at all: the threshold stays, nothing is poisoned
    assert trainer.ae.threshold.item() == pytest.approx(smallest, rel=1e-5)
    assert all(p.isfinite().all() for p in trainer.ae.parameters())


# ------------------------------------------------------------------------------------------------- dead latents, AuxK


def with_crowded_out_latents(**settings: Any) -> TopKTrainer:
    """All but 12 latents have so small an encoder that the 12 always win, though their pre-activations are positive."""
    settings = {"steps": 150, "lr": 1e-2, "warmup_steps": 0, "decay_start": 150} | settings
    trainer = top_k(activation_dim=24, dict_size=40, k=2, dead_after_tokens=3 * ROWS, **settings)
    with torch.no_grad():
        trainer.ae.encoder_rows[LIVING:] *= 1e-2
    return trainer


def test_auxk_gradients_reach_the_encoder_of_dead_latents_and_no_living_ones() -> None:
    x = synthetic(1)[0][0]
    gradients = []
    for alpha in (0.0, 1.0):
        trainer = with_crowded_out_latents(auxk_alpha=alpha)
        trainer.tokens_since_fired_F[LIVING:] = 3 * ROWS
        trainer.some_dead = True
        trainer.compute_loss(x, 0).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trainer.ae.named_parameters() if p.grad is not None})
    without, with_auxk = gradients
    dead, living = slice(LIVING, None), slice(0, LIVING)
    assert without["encoder.weight"][dead].eq(0).all() and without["decoder.weight"][:, dead].eq(0).all()
    assert with_auxk["encoder.weight"][dead].abs().sum(1).gt(0).any()
    assert with_auxk["encoder.bias"][dead].ne(0).any() and with_auxk["decoder.weight"][:, dead].ne(0).any()
    for name, index in (
        ("encoder.weight", living),
        ("encoder.bias", living),
        ("decoder.weight", (slice(None), living)),
    ):
        torch.testing.assert_close(with_auxk[name][index], without[name][index])


def test_auxk_is_relative_to_the_residual_so_that_units_cancel() -> None:
    x = synthetic(1)[0][0]
    terms = []
    for scale in (1.0, 100.0):
        trainer = with_crowded_out_latents()
        trainer.tokens_since_fired_F[LIVING:] = 3 * ROWS
        trainer.initialize(scale * x)
        trainer.some_dead = True
        terms.append(trainer.compute_loss(scale * x, 0).terms["auxk_loss"].item())
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)
    assert terms[0] == pytest.approx(1.0, abs=0.2)  # dead latents explain next to nothing yet


def test_auxk_revives_dead_latents() -> None:
    data, _ = synthetic(150)
    alive = {}
    for alpha in (0.0, 1 / 32):
        trainer = with_crowded_out_latents(auxk_alpha=alpha)
        train(trainer, data[:4])
        dead = trainer.tokens_since_fired_F == 4 * ROWS
        assert dead.sum() > 25
        train(trainer, data[4:], start=4)
        alive[alpha] = (trainer.tokens_since_fired_F[dead] < 3 * ROWS).float().mean().item()
    assert alive[0.0] == 0 and alive[1 / 32] > 0.8


def test_auxk_costs_nothing_while_no_latent_is_dead() -> None:
    trainer = train(top_k(), batches(DEAD_COUNT_INTERVAL + 2))
    assert trainer.last is not None and "auxk_loss" not in trainer.last.terms
    assert trainer.metrics(batches(1)[0])["dead_latents"] == 0


def test_dead_latents_are_noticed_at_the_second_look() -> None:
    trainer = with_crowded_out_latents()
    for step, x in enumerate(synthetic(2 * DEAD_COUNT_INTERVAL + 2)[0]):
        trainer.update(step, x)
        assert trainer.last is not None
        assert ("auxk_loss" in trainer.last.terms) == (step > 2 * DEAD_COUNT_INTERVAL)
        assert trainer.metrics(x)["dead_latents"] == (trainer.tokens_since_fired_F >= 3 * ROWS).sum()


def test_dead_after_tokens_defaults_to_a_tenth_of_the_run() -> None:
    trainer = top_k(steps=50)
    assert trainer.config["dead_after_tokens"] is None  # the batch is not known yet
    trainer.update(0, batches(1)[0])
    assert trainer.config["dead_after_tokens"] == 5 * B
