"""What fires by number: what counts as fired, dead latents and AuxK, the running threshold, groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import BY_K, B, D, F, auxk_of, batches, make, synthetic, train

from dictionary_learning.errors import UserError
from dictionary_learning.trainers import TopKTrainer
from dictionary_learning.trainers.dead_latents import COUNT_INTERVAL

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
    trainer.initialize = lambda x_BD, y_BD: None  # type: ignore[method-assign]
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
        auxk_of(trainer).some_dead = True
        trainer.tokens_since_fired_F[LIVING:] = 3 * ROWS
        trainer.compute_loss(x, x, 0).loss.backward()
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
        trainer.initialize(scale * x, scale * x)
        auxk_of(trainer).some_dead = True
        terms.append(trainer.compute_loss(scale * x, scale * x, 0).terms["auxk_loss"].item())
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
    trainer = train(top_k(dead_after_tokens=100 * B), batches(COUNT_INTERVAL + 2))
    assert trainer.last is not None and "auxk_loss" not in trainer.last.terms
    assert trainer.metrics(batches(1)[0])["dead_latents"] == 0


def test_dead_latents_are_noticed_at_the_second_look() -> None:
    trainer = with_crowded_out_latents()
    for step, x in enumerate(synthetic(2 * COUNT_INTERVAL + 2)[0]):
        trainer.update(step, x)
        assert trainer.last is not None
        assert ("auxk_loss" in trainer.last.terms) == (step > 2 * COUNT_INTERVAL)
        assert trainer.metrics(x)["dead_latents"] == (trainer.tokens_since_fired_F >= 3 * ROWS).sum()


@pytest.mark.parametrize("architecture", BY_K)
def test_the_decoder_bias_enters_auxk_once(architecture: str) -> None:
    """The residual lacks the bias already: where dead latents explain nothing, AuxK is the residual's second moment,
    and it does not pull at the bias."""
    trainer = make(architecture, auxk_alpha=1.0)
    x = batches(1)[0]
    trainer.initialize(x, x)
    auxk_of(trainer).some_dead, auxk_of(trainer).dead_after_tokens = True, 1
    with torch.no_grad():
        trainer.ae.encoder_bias[20:] = -100.0
    trainer.tokens_since_fired_F[20:] = 1
    out = trainer.compute_loss(x, x, 0)
    residual = x - out.x_hat_BD.detach()
    fraction = residual.pow(2).sum(1).mean() / residual.var(0, correction=0).sum()
    assert out.terms["auxk_loss"].item() == pytest.approx(fraction.item(), rel=1e-5)  # 4 dead, as many as AuxK may use
    assert not out.terms["auxk_loss"].requires_grad or all(
        grad is None or grad.eq(0).all()
        for grad in torch.autograd.grad(out.terms["auxk_loss"], list(trainer.ae.parameters()), allow_unused=True)
    )


@pytest.mark.parametrize(("steps", "batches_without"), [(600, 20), (50, 10)])
def test_dead_after_tokens_defaults_to_a_thirtieth_of_the_run(steps: int, batches_without: int) -> None:
    trainer = top_k(steps=steps)
    assert trainer.config["dead_after_tokens"] is None  # the batch is not known yet
    trainer.update(0, batches(1)[0])
    assert trainer.config["dead_after_tokens"] == batches_without * B


# ------------------------------------------------------------------------------------------------- batches, groups


@pytest.mark.parametrize("architecture", ["batch_top_k", "matryoshka_batch_top_k"])
def test_the_threshold_of_a_batch_follows_its_smallest_active_value(architecture: str) -> None:
    trainer = make(architecture, threshold_beta=0.9, threshold_start_step=2)
    expected = -1.0
    for step, x in enumerate(batches(10)):
        f = trainer.ae.encode(x, use_threshold=False) if step else None
        trainer.update(step, x)
        if step >= 2:
            assert f is not None
            smallest = f[f > 0].min().item()
            expected = smallest if expected < 0 else 0.9 * expected + 0.1 * smallest
        assert trainer.ae.threshold.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", ["batch_top_k", "matryoshka_batch_top_k"])
def test_by_its_threshold_a_dictionary_fires_k_latents_on_fresh_data(architecture: str) -> None:
    k, (data, _) = 3, synthetic(250)
    trainer = train(make(architecture, activation_dim=24, dict_size=80, steps=250, k=k), data)
    fresh = torch.cat(synthetic(8, rows=256, seed=77)[0])
    assert (trainer.ae.encode(fresh) > 0).sum(1).float().mean().item() == pytest.approx(k, rel=0.05)


def test_a_batch_without_positives_leaves_the_threshold() -> None:
    trainer = make("batch_top_k", threshold_start_step=0)
    train(trainer, batches(2))
    before = trainer.ae.threshold.item()
    with torch.no_grad():
        trainer.ae.encoder_bias.fill_(-100.0)
    trainer.update(2, batches(3)[2])
    assert trainer.ae.threshold.item() == before > 0 and trainer.last is not None and trainer.last.l0 == 0


def test_batch_topk_gives_hard_inputs_more_latents_and_k_on_average() -> None:
    trainer = make("batch_top_k", k=3)
    x = batches(1)[0]
    trainer.initialize(x, x)
    x[: B // 2] += 3 * torch.randn(B // 2, D)
    codes = trainer.preactivations(x).batch_top_k(3 * B)
    per_row = torch.bincount(codes.entries.rows_N, minlength=B)
    assert per_row.sum() == 3 * B and per_row[: B // 2].sum() > 2 * B


def test_group_max_fires_one_latent_of_each_group_at_most() -> None:
    trainer = make("group_max", k=4)
    train(trainer, batches(10))
    f = trainer.ae.encode(torch.cat(batches(4, seed=3)))
    per_group = (f > 0).view(-1, 4, F // 4).sum(2)
    assert per_group.max() == 1 and per_group.float().mean() > 0.5
    out = trainer.compute_loss(x := batches(1)[0], x, 10)
    torch.testing.assert_close(out.x_hat_BD, trainer.ae(x))
    with pytest.raises(UserError, match="24 latents can't be split into k = 5 groups"):
        make("group_max", k=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_fractions": [0.5, 0.4]}, "group_fractions must be positive and add up to 1"),
        ({"group_fractions": [1.5, -0.5]}, "group_fractions must be positive and add up to 1"),
        ({"group_fractions": []}, "group_fractions must be positive and add up to 1"),
        ({"group_fractions": [0.01, 0.99]}, "leave a group of 24 latents without any"),
        ({"group_weights": [1.0, 1.0]}, "group_weights must be 3 non-negative numbers"),
        ({"group_weights": [1.0, -1.0, 1.0]}, "group_weights must be 3 non-negative numbers"),
        ({"group_weights": [0.0, 0.0, 0.0]}, "group_weights must be 3 non-negative numbers"),
    ],
)
def test_impossible_groups_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("matryoshka_batch_top_k", **settings)


def test_groups_have_the_fractions_asked_for_and_the_last_takes_the_rest() -> None:
    trainer: Any = make("matryoshka_batch_top_k", dict_size=25)
    assert trainer.config["group_sizes"] == trainer.ae.group_sizes.tolist() == [4, 8, 13]
    assert trainer.config["group_weights"] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("architecture", ["top_k", "batch_top_k", "matryoshka_batch_top_k"])
def test_k_falls_to_what_was_asked_for(architecture: str) -> None:
    trainer = make(architecture, k_anneal_steps=4)
    l0 = []
    for step, x in enumerate(batches(6)):
        trainer.update(step, x)
        assert trainer.last is not None
        l0.append(trainer.last.l0.item())
    asked = trainer.config["k"]
    assert l0[0] > l0[2] > asked and l0[4:] == [asked, asked]
    with pytest.raises(UserError, match="k_anneal_steps must be positive and below"):
        make(architecture, k_anneal_steps=10_000)
