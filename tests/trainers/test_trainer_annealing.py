"""p-annealing: when p falls, how far, and that the pressure of the penalty stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import batches, make, synthetic, train, weights

from dictionary_learning.errors import UserError

every = pytest.mark.parametrize("architecture", ["p_anneal", "gated_anneal"])


def annealed(architecture: str = "p_anneal", **settings: Any) -> Any:
    defaults = {"steps": 40, "anneal_start": 10, "anneal_end": 30, "n_sparsity_updates": 5, "sparsity_queue_length": 3}
    return make(architecture, **defaults | settings)


@every
def test_p_falls_in_equal_steps_from_start_to_end(architecture: str) -> None:
    trainer = annealed(architecture, p_start=1.0, p_end=0.2)
    assert trainer.sparsity_update_steps == [10, 15, 20, 25, 30]
    p = [trainer.p(step) for step in range(40)]
    expected = [1.0] * 16 + [0.8] * 5 + [0.6] * 5 + [0.4] * 5 + [0.2] * 9  # set behind steps 10, 15, ...
    assert p == pytest.approx(expected)
    assert [trainer.next_p(step) for step in (0, 10)] == [None, None]
    assert [trainer.next_p(step) for step in (11, 15, 16, 30, 39)] == pytest.approx([0.8, 0.8, 0.6, 0.2, 0.2])


def test_continuous_annealing_changes_p_at_every_step() -> None:
    trainer = annealed(n_sparsity_updates="continuous", p_end=0.0, sparsity_function="Lp^p")
    assert trainer.sparsity_update_steps == list(range(10, 31))
    assert [trainer.p(step) for step in (10, 11, 21, 31, 39)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])
    assert annealed(n_sparsity_updates=1000).config["n_sparsity_updates"] == 21  # at most one a step


def test_the_defaults_lie_in_the_second_half_of_the_run() -> None:
    config = make("p_anneal", anneal_start=None, steps=100).config
    assert (config["anneal_start"], config["anneal_end"], config["p_start"], config["p_end"]) == (50, 90, 1, 0)


@every
@pytest.mark.parametrize("function", ["Lp", "Lp^p"])
def test_the_penalty_keeps_its_size_when_p_changes(architecture: str, function: str) -> None:
    """Behind a step that changes p, the coefficient takes on the ratio of the penalties over the last steps."""
    trainer = annealed(architecture, sparsity_function=function, sparsity_warmup_steps=0)
    coefficient, pairs = 0.05, []
    for step, x in enumerate(batches(40)):
        gate = trainer.ae.encode(x, return_gate=True)[1] if "gated" in architecture else trainer.ae.encode(x)
        if step == 0:
            trainer.update(step, x)
            continue
        old, new = trainer.lp_norm(gate, trainer.p(step)), None
        if trainer.next_p(step) is not None:
            new = trainer.lp_norm(gate, trainer.next_p(step))
            pairs.append((old.item(), new.item()))
        trainer.update(step, x)
        if step in trainer.sparsity_update_steps and pairs:
            last = torch.tensor(pairs[-3:], dtype=torch.float64).mean(0)
            coefficient *= (last[0] / last[1]).item()
        assert trainer.get_logging_parameters()["sparsity_coeff"] == pytest.approx(coefficient, rel=1e-4), step
    assert coefficient != pytest.approx(0.05, rel=0.1)


def test_the_lp_norm_by_hand() -> None:
    f = torch.tensor([[4.0, 0.0, 9.0], [0.0, 0.0, 0.0]])
    one, other = annealed(sparsity_function="Lp"), annealed(sparsity_function="Lp^p")
    assert other.lp_norm(f, 0.5).item() == pytest.approx((2 + 3) / 2)
    assert one.lp_norm(f, 0.5).item() == pytest.approx(25 / 2)
    assert one.lp_norm(f, 1.0).item() == other.lp_norm(f, 1.0).item() == pytest.approx(13 / 2)
    assert other.lp_norm(f, 0.0).item() == pytest.approx(2 / 2)  # the number of active latents


@every
@pytest.mark.parametrize("function", ["Lp", "Lp^p"])
def test_p_may_end_at_zero(architecture: str, function: str) -> None:
    """Lp stops at 0.1, since it has no value at 0; where p is 0 in Lp^p, the penalty has no slope."""
    trainer = annealed(architecture, p_end=0.0, sparsity_function=function)
    assert trainer.p(39) == pytest.approx(0.1 if function == "Lp" else 0.0)
    f = torch.tensor([[0.5, 0.0, 1e-30]], requires_grad=True)
    penalty = trainer.lp_norm(f, trainer.p(39))
    (slope,) = torch.autograd.grad(penalty, f)
    assert penalty.isfinite() and slope.isfinite().all() and slope[0, 1] == 0
    train(trainer, batches(40))
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    assert trainer.last.loss.isfinite() and 0 < trainer.get_logging_parameters()["sparsity_coeff"] < float("inf")


@every
def test_latents_that_are_all_silent_leave_the_coefficient_alone(architecture: str) -> None:
    trainer = annealed(architecture, lr=1e-9)
    data = batches(40)
    train(trainer, data[:1])
    with torch.no_grad():
        trainer.ae.encoder_bias.fill_(-1000.0)
    train(trainer, data[1:], start=1)
    assert trainer.get_logging_parameters()["sparsity_coeff"] == pytest.approx(0.05)
    assert trainer.last.loss.isfinite() and trainer.last.l0 == 0


def test_annealing_makes_codes_sparser_at_the_same_explained_variance_or_so() -> None:
    data, _ = synthetic(300)
    l0 = []
    for p_end in (1.0, 0.2):
        settings = {"activation_dim": 24, "dict_size": 80, "steps": 300, "initial_sparsity_penalty": 0.1}
        trainer = make("p_anneal", **settings, anneal_start=60, p_end=p_end, sparsity_function="Lp^p")
        train(trainer, data)
        l0.append((trainer.ae.encode(data[-1]) > 0).sum(1).float().mean().item())
    assert l0[1] < 0.9 * l0[0]


@every
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity_function": "L2"}, "sparsity_function must be 'Lp' or 'Lp\\^p', got 'L2'"),
        ({"initial_sparsity_penalty": -0.1}, "initial_sparsity_penalty must not be negative"),
        ({"anneal_start": 30}, "p is annealed from step 30 to step 30, which is not within"),
        ({"anneal_end": 41}, "not within the run's 40 steps"),
        ({"p_start": 0.5, "p_end": 0.6}, "p must fall from p_start to p_end"),
        ({"p_end": -0.1}, "p must fall from p_start to p_end"),
        ({"n_sparsity_updates": 0}, "n_sparsity_updates must be positive or 'continuous'"),
        ({"n_sparsity_updates": "often"}, "n_sparsity_updates must be positive or 'continuous'"),
        ({"sparsity_queue_length": 0}, "sparsity_queue_length positive"),
    ],
)
def test_impossible_annealing_is_refused(architecture: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        annealed(architecture, **settings)
