"""Neuron resampling: that it happens when it should, to the weights themselves, and starts latents as it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from trainer_cases import RESAMPLING, B, D, F, batches, make, same_bits, synthetic, targets, train, weights

from dictionary_learning.errors import UserError
from dictionary_learning.trainers import SAETrainer

every = pytest.mark.parametrize("architecture", RESAMPLING)
DEAD = slice(F // 2, None)
STEPS_OF_RUN = 60


def with_dead(architecture: str, **settings: Any) -> Any:
    """A trainer half of whose latents can't fire, after five steps."""
    trainer: Any = make(architecture, **{"resample_steps": 100} | settings)
    with torch.no_grad():
        trainer.ae.encoder_bias[DEAD] = -100.0
    data = batches(5)
    return train(trainer, data, target=targets(data, F) if trainer.ae.is_transcoder else None)


def dead_mask() -> Tensor:
    mask = torch.zeros(F, dtype=torch.bool)
    mask[DEAD] = True
    return mask


def moments(trainer: SAETrainer) -> dict[str, Tensor]:
    """Name -> [rows, 2 x width], both of Adam's moments of a parameter, by rows."""
    optimizer = trainer._optimizer
    return {
        name: torch.cat(
            [optimizer.adam.state[leaf][key].reshape(len(leaf), -1) for key in ("exp_avg", "exp_avg_sq")], 1
        )
        for name, leaf in optimizer.leaves.items()
    }


@every
def test_dead_latents_start_anew_from_inputs_explained_badly(architecture: str) -> None:
    trainer = with_dead(architecture)
    x, dead = batches(6)[5], dead_mask()
    before = weights(trainer)
    trainer.resample_neurons(dead, x)
    after = weights(trainer)
    directions = normalize(x - trainer.ae.decoder_bias.detach())
    rows = trainer.ae.decoder_rows.detach()[DEAD]
    similarity = rows @ directions.T
    torch.testing.assert_close(similarity.amax(1), torch.ones(F // 2))  # each is one of the batch's inputs
    assert len(set(similarity.argmax(1).tolist())) == F // 2  # none twice
    encoder = trainer.ae.encoder_rows.detach()
    torch.testing.assert_close(normalize(encoder[DEAD]), rows)
    alive_norm = encoder[~dead].norm(dim=1).mean().item()
    assert encoder[DEAD].norm(dim=1).tolist() == pytest.approx([0.2 * alive_norm] * (F // 2), rel=1e-5)
    assert trainer.ae.encoder_bias[DEAD].eq(0).all()
    if "gated" in architecture:
        assert trainer.ae.r_mag[DEAD].eq(0).all() and trainer.ae.mag_bias[DEAD].eq(0).all()
    for name, tensor in after.items():  # the living, and what belongs to no latent, are left alone
        axis = [i for i, size in enumerate(tensor.shape) if size == F]
        if axis:
            living = torch.arange(F)[~dead]
            assert torch.equal(tensor.index_select(axis[0], living), before[name].index_select(axis[0], living)), name
            assert not torch.equal(tensor, before[name]) or name in ("r_mag", "mag_bias")
        else:
            assert torch.equal(tensor, before[name]), name
    assert (trainer.ae.encode(x)[:, DEAD] > 0).any(0).all()  # each fires again, on its own input


@every
def test_moments_of_resampled_latents_are_forgotten_and_no_others(architecture: str) -> None:
    trainer = with_dead(architecture)
    before = {name: tensor.clone() for name, tensor in moments(trainer).items()}
    trainer.resample_neurons(~dead_mask(), batches(6)[5])
    for name, tensor in moments(trainer).items():
        if len(tensor) == F:
            assert tensor[: F // 2].eq(0).all() and before[name][: F // 2].ne(0).any(), name
            assert torch.equal(tensor[DEAD], before[name][DEAD])
        else:
            assert torch.equal(tensor, before[name]) and tensor.ne(0).any(), name


@every
def test_inputs_are_drawn_by_their_squared_loss_and_a_seed(architecture: str) -> None:
    """One input in a batch of copies that are explained without error is drawn every time."""
    drawn = []
    for seed in (0, 0, 1):
        trainer = with_dead(architecture, seed=0)
        trainer._generator.manual_seed(seed)
        trainer.resample_neurons(dead_mask(), batches(6)[5])
        drawn.append(trainer.ae.decoder_rows.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    trainer = with_dead(architecture)
    base = trainer.ae.decoder_bias.detach()
    with torch.no_grad():
        trainer.ae.encoder_bias.fill_(-100.0)
        trainer.ae.encoder_bias[0] = 0.0  # nothing fires on the bias itself, so it is explained exactly
        one = base + 3 * torch.ones(D)
    batch = base.repeat(B, 1)
    batch[7] = one
    mask = torch.zeros(F, dtype=torch.bool)
    mask[20] = True
    trainer.resample_neurons(mask, batch)
    torch.testing.assert_close(trainer.ae.decoder_rows[20].detach(), normalize(one - base, dim=0))


@every
def test_it_happens_every_so_many_steps_to_those_that_did_not_fire_in_the_last_half(architecture: str) -> None:
    trainer: Any = make(architecture, resample_steps=10, steps=STEPS_OF_RUN)
    with torch.no_grad():
        trainer.ae.encoder_bias[DEAD] = -100.0
    for step, x in enumerate(batches(20)):
        if step == 12:  # too late for the second time: six steps are not the half of ten
            with torch.no_grad():
                trainer.ae.encoder_bias[0] = -100.0
        trainer.update(step, x)
        bias = trainer.ae.encoder_bias.detach()
        assert (bias[DEAD] < -99).all() == (step < 9), step
        if step >= 12:
            assert (bias[0] < -99) == (step < 19)


@every
def test_the_learning_rate_warms_up_again(architecture: str) -> None:
    trainer: Any = make(architecture, resample_steps=10, steps=STEPS_OF_RUN, warmup_steps=3, decay_start=60, lr=1e-3)
    rates = []
    for step, x in enumerate(batches(14)):
        trainer.update(step, x)
        rates.append(trainer.metrics(x)["lr"] / 1e-3)
    warm = [0.25, 0.5, 0.75]
    assert rates == pytest.approx([*warm, *[1.0] * 7, *warm, 1.0])


@every
def test_no_more_latents_start_anew_than_there_are_inputs_and_none_if_all_are_dead(architecture: str) -> None:
    trainer = with_dead(architecture)
    before = weights(trainer)
    trainer.resample_neurons(torch.ones(F, dtype=torch.bool), batches(1)[0])
    trainer.resample_neurons(torch.zeros(F, dtype=torch.bool), batches(1)[0])
    assert same_bits(weights(trainer), before)
    trainer.resample_neurons(dead_mask(), batches(1)[0][:3])
    changed = (trainer.ae.encoder_bias.detach() == 0)[DEAD]
    assert changed.tolist() == [True] * 3 + [False] * (F // 2 - 3)


@every
def test_resampled_transcoders_take_rows_of_input_and_output(architecture: str) -> None:
    trainer = with_dead(architecture, output_dim=F, skip=True)  # an output as wide as the dictionary
    x = batches(6)[5]
    y = targets([x], F)[0]
    before = {name: tensor.clone() for name, tensor in moments(trainer).items()}
    trainer.resample_neurons(dead_mask(), x, y)
    directions = normalize(y - trainer.ae.decoder_bias.detach())
    best = trainer.ae.decoder_rows.detach()[DEAD] @ directions.T
    torch.testing.assert_close(best.amax(1), torch.ones(F // 2))
    drawn = best.argmax(1)
    f = trainer.ae.encode(x)[drawn, torch.arange(F)[DEAD]]
    assert (f > 0).all()  # each fires on the input that it was made from
    trainer.resample_neurons(dead_mask(), x + 50, y)  # and not on whatever has the offset that all inputs share
    assert 0.05 < (trainer.ae.encode(x + 50)[:, DEAD] > 0).float().mean() < 0.8
    for name in ("W_skip", trainer.ae.decoder_bias_name):  # [F, D] and [F], but not one a latent
        assert torch.equal(moments(trainer)[name], before[name])


def test_resampling_leaves_fewer_latents_dead() -> None:
    data, _ = synthetic(200)
    dead = []
    for resample_steps in (None, 50):
        trainer = make(
            "standard", activation_dim=24, dict_size=80, steps=200, l1_penalty=0.3, resample_steps=resample_steps
        )
        with torch.no_grad():
            trainer.ae.encoder_bias[40:] = -100.0
        train(trainer, data)
        dead.append((trainer.ae.encode(torch.cat(data[-20:])) > 0).any(0).logical_not().sum().item())
    assert dead[0] >= 40 and dead[1] < 20


@pytest.mark.parametrize("steps", [0, 2, 3.5, -1])
def test_resampling_within_the_warm_up_is_refused(steps: Any) -> None:
    with pytest.raises(UserError, match="resample_steps must be longer than the warm-up of 2 steps"):
        make("standard", resample_steps=steps)
