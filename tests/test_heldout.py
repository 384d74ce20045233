"""The held-out loss: measured right, without a trace in training, and what is made of it."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dictionary_learning import trainSAE
from dictionary_learning.activations.in_memory import InMemoryActivations
from dictionary_learning.errors import UserError
from dictionary_learning.evaluation import PooledMetrics
from dictionary_learning.heldout import HeldOut, heldout_loss
from dictionary_learning.trainers import TRAINERS, StandardTrainer, TopKTrainer
from dictionary_learning.training import TrainingRun
from dictionary_learning.utils import load_dictionary

D, F, B, STEPS = 12, 32, 32, 30
SPARSITY: dict[str, dict[str, Any]] = {
    "jump_relu": {"target_l0": 4.0},
    "matryoshka_batch_top_k": {"k": 4, "group_fractions": [0.25, 0.75]},
    **{name: {"l1_penalty": 0.05} for name in ("standard", "standard_april_update", "gated")},
    **{name: {"initial_sparsity_penalty": 0.05, "anneal_start": 8} for name in ("p_anneal", "gated_anneal")},
}


def activations(rows: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 24, generator=g) * (torch.rand(rows, 24, generator=g) < 0.1)
    return 3 * (codes @ torch.randn(24, D, generator=torch.Generator().manual_seed(99)) + 0.5)


def config(architecture: str, **changes: Any) -> dict[str, Any]:
    sizes = {"activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "toy", "device": "cpu", "seed": 0}
    return {"trainer": TRAINERS[architecture], **sizes, **SPARSITY.get(architecture, {"k": 4}), **changes}


def data() -> InMemoryActivations:
    return InMemoryActivations(activations(400), B, epochs=None)


def interrupted_at(step: int) -> Callable[[TrainingRun, int], None]:
    def callback(run: TrainingRun, done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


def lines(folder: Path, key: str = "heldout_loss") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def same(a: Any, b: Any) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


class Worsening:
    """A callback that spoils every dictionary behind a step, so that an earlier one is the best."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, run: TrainingRun, step: int) -> None:
        if step >= self.step:
            for trainer in run.trainers:
                with torch.no_grad():
                    trainer.ae.decoder_bias.add_(1.0)


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_looking_changes_nothing_in_training(architecture: str) -> None:
    plain = trainSAE(data(), [config(architecture)], STEPS, normalize_activations=True)[0]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    watched = trainSAE(
        data(), [config(architecture)], STEPS, normalize_activations=True, callbacks=[HeldOut(activations(70, 5), 3)]
    )[0]
    assert same(plain, watched) and torch.equal(torch.get_rng_state(), before)


def test_every_eval_steps_and_the_last_step_are_logged_for_every_dictionary(tmp_path: Path) -> None:
    configs = [config("top_k"), config("standard")]
    trainSAE(data(), configs, STEPS, save_dir=tmp_path, log_steps=8, callbacks=[HeldOut(activations(70, 5), 8)])
    assert [(row["step"], row["trainer"]) for row in lines(tmp_path)] == [
        (step, name) for step in (8, 16, 24, 30) for name in ("trainer_0", "trainer_1")
    ]
    assert all("loss" in row for row in lines(tmp_path)), "one line a step, with the metrics of training"
    assert lines(tmp_path)[-2]["heldout_loss"] < lines(tmp_path)[0]["heldout_loss"]


def test_a_look_between_two_log_steps_has_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    watch = HeldOut(activations(70, 5), 4)
    trainSAE(data(), [config("top_k")], 9, save_dir=tmp_path, log_steps=6, verbose=True, callbacks=[watch])
    assert [(row["step"], "loss" in row) for row in lines(tmp_path)] == [(4, False), (8, False), (9, True)]
    assert "heldout_loss" in capsys.readouterr().out and not caplog.records, "no sink was switched off"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", ["tensor", "array", "mapping", "batches", "generator"])
def test_what_is_measured_is_what_the_dictionaries_do_on_the_held_out_rows(form: str, normalize: bool) -> None:
    x = activations(70, 5)
    given: Any = {
        "tensor": x,
        "array": x.numpy(),
        "mapping": {"a": x},
        "batches": list(x.split(9)),
        "generator": (part for part in x.split(9)),
    }[form]
    trainer = TopKTrainer(STEPS, D, F, 4, 0, "toy", device="cpu", seed=0)
    watch = HeldOut(given, 100, batch_rows=16)
    run = TrainingRun(data(), [trainer], STEPS, normalize_activations=normalize, callbacks=[watch])
    dictionary = run.run()[0]
    loss, result = watch.latest[0]
    wanted = PooledMetrics(dictionary)
    wanted.update(x)
    expected = wanted.result()
    assert result.tokens == 70 and result.l0 == pytest.approx(expected.l0)
    assert result.frac_variance_explained == pytest.approx(expected.frac_variance_explained, abs=1e-5)
    error = (x - dictionary(x)).pow(2).sum(1).mean().item() / run.norm_factor(0) ** 2
    assert loss == pytest.approx(error, rel=1e-4)


def test_several_hook_points_are_measured_each_on_its_own() -> None:
    x, y = activations(70, 5), 2 * activations(70, 6).flip(1)
    batches = [{"a": activations(B, seed), "b": activations(B, seed + 50).flip(1)} for seed in range(STEPS)]
    configs = [config("top_k", submodule_name=name) for name in ("a", "b")]
    watch = HeldOut({"a": x, "b": y}, 100)
    dictionaries = trainSAE(batches, configs, STEPS, normalize_activations=True, callbacks=[watch])
    for index, (dictionary, rows) in enumerate(zip(dictionaries, (x, y), strict=True)):
        wanted = PooledMetrics(dictionary)
        wanted.update(rows)
        found = watch.latest[index][1].frac_variance_explained
        assert found == pytest.approx(wanted.result().frac_variance_explained, abs=1e-5)


def test_a_transcoder_is_measured_on_its_target() -> None:
    pairs = torch.stack([activations(400), activations(400).flip(1)], dim=1)
    heldout = torch.stack([activations(70, 5), activations(70, 5).flip(1)], dim=1)
    watch = HeldOut(heldout, 100)
    dictionary = trainSAE(
        InMemoryActivations(pairs, B, epochs=None), [config("top_k")], STEPS, transcoder=True, callbacks=[watch]
    )[0]
    error = (heldout[:, 1] - dictionary(heldout[:, 0])).pow(2).sum(1).mean().item()
    assert watch.latest[0][0] == pytest.approx(error, rel=1e-4)


def test_the_penalty_counts_in_full_while_it_still_warms_up() -> None:
    trainer = StandardTrainer(
        100, D, F, 0, "toy", l1_penalty=0.5, warmup_steps=0, sparsity_warmup_steps=90, device="cpu", seed=0
    )
    x = activations(B)
    trainer.update(0, x)
    f, x_hat = trainer.ae.encode(x), trainer.ae(x)
    wanted = (x - x_hat).pow(2).sum(1).mean() + 0.5 * f.sum(1).mean()
    assert heldout_loss(trainer, x, x) == pytest.approx(wanted.item(), rel=1e-5)


def test_auxk_which_comes_and_goes_is_left_out() -> None:
    trainer = TopKTrainer(100, D, F, 4, 0, "toy", device="cpu", seed=0, auxk_alpha=1.0)
    x = activations(B)
    trainer.update(0, x)
    trainer.tokens_since_fired_F[::2] = 10**9
    trainer.auxk.some_dead = True
    with_auxk = trainer.compute_loss(x, x, 1)
    assert with_auxk.terms["auxk_loss"] > 0
    wanted = (x - with_auxk.x_hat_BD).pow(2).sum(1).mean().item()
    assert heldout_loss(trainer, x, x) == pytest.approx(wanted, rel=1e-4)
    assert with_auxk.loss.item() > 1.01 * wanted


def test_the_scheduler_plateau_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TopKTrainer(STEPS, D, F, 4, 0, "toy", device="cpu", seed=0, scheduler="plateau", lr=1e-3)
    told: list[float] = []
    assert trainer.plateau is not None
    monkeypatch.setattr(trainer.plateau, "observe", told.append)
    watch = HeldOut(activations(70, 5), 10)
    losses: list[float] = []
    keep = [watch, lambda run, step: losses.append(watch.latest[0][0]) if step % 10 == 0 else None]
    TrainingRun(data(), [trainer], STEPS, callbacks=keep).run()
    assert told == losses and len(told) == 3


def test_a_plateau_halves_the_rate() -> None:
    trainer = TopKTrainer(80, D, F, 4, 0, "toy", device="cpu", seed=0, scheduler="plateau", lr=1e-3, warmup_steps=0)
    TrainingRun(data(), [trainer], 80, callbacks=[Worsening(20), HeldOut(activations(70, 5), 5)]).run()
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-3


def test_the_best_dictionary_is_the_result(tmp_path: Path) -> None:
    configs = [config("top_k"), config("standard")]
    x = activations(70, 5)
    kept: list[Any] = []

    def keep(run: TrainingRun, step: int) -> None:
        if step == 15:
            kept.extend(run.dictionary(index, best=False) for index in range(2))

    watch = HeldOut(x, 5, save_best_only=True)
    returned = trainSAE(
        data(),
        configs,
        STEPS,
        save_dir=tmp_path,
        save_steps=[30],
        normalize_activations=True,
        callbacks=[Worsening(16), watch, keep],
    )
    for index, dictionary in enumerate(returned):
        loaded, saved = load_dictionary(tmp_path / f"trainer_{index}")
        assert same(dictionary, kept[index]) and torch.equal(loaded(x), kept[index](x))
        assert saved["trainer"]["best_step"] == 15
        told = [row for row in lines(tmp_path) if row["trainer"] == f"trainer_{index}"]
        assert saved["trainer"]["best_heldout_loss"] == min(row["heldout_loss"] for row in told)
        checkpoint = tmp_path / f"trainer_{index}" / "checkpoints" / "ae_30.safetensors"
        assert not torch.equal(type(dictionary).from_pretrained(checkpoint)(x), dictionary(x)), "a step's own weights"


def test_without_save_best_only_the_last_is_the_result(tmp_path: Path) -> None:
    last = trainSAE(data(), [config("top_k")], STEPS, callbacks=[Worsening(16)])[0]
    watch = HeldOut(activations(70, 5), 5)
    watched = trainSAE(data(), [config("top_k")], STEPS, save_dir=tmp_path, callbacks=[Worsening(16), watch])[0]
    assert same(last, watched)
    assert "best_step" not in load_dictionary(tmp_path / "trainer_0")[1]["trainer"]


@pytest.mark.parametrize("stop", [9, 10, 12, 22])
def test_a_resumed_run_has_the_same_best_and_the_same_log(stop: int, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [Worsening(16), HeldOut(activations(70, 5), 5, save_best_only=True)]

    configs = [config("top_k", scheduler="plateau", lr=1e-3), config("jump_relu")]
    settings: dict[str, Any] = {"normalize_activations": True, "log_steps": 4}
    unbroken = trainSAE(data(), configs, STEPS, save_dir=tmp_path / "a", callbacks=callbacks(), **settings)
    broken = tmp_path / "b"
    trainSAE(data(), configs, STEPS, save_dir=broken, callbacks=[*callbacks(), interrupted_at(stop)], **settings)
    resumed = trainSAE(data(), configs, STEPS, save_dir=broken, resume=True, callbacks=callbacks(), **settings)
    assert all(same(a, b) for a, b in zip(unbroken, resumed, strict=True))
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (broken / "metrics.jsonl").read_text()


def test_a_state_saved_on_the_way_knows_of_the_look_at_its_own_step(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def killed(run: TrainingRun, step: int) -> None:
        assert run.states is not None
        run.states.finish()  # on a busy machine too, the state of step 10 is begun there
        if step == 13:
            raise Killed

    watch = HeldOut(activations(70, 5), 10, save_best_only=True)
    with pytest.raises(Killed):
        trainSAE(data(), [config("top_k")], STEPS, save_dir=tmp_path, state_every=10, callbacks=[watch, killed])
    again = HeldOut(activations(70, 5), 10, save_best_only=True)
    spoilt = [Worsening(11), again]
    trainSAE(data(), [config("top_k")], STEPS, save_dir=tmp_path, resume=True, callbacks=spoilt)
    assert again.best[0].step == 10


def test_a_resume_without_the_callback_is_refused(tmp_path: Path) -> None:
    watch = HeldOut(activations(70, 5), 5)
    trainSAE(data(), [config("top_k")], STEPS, save_dir=tmp_path, callbacks=[watch, interrupted_at(7)])
    with pytest.raises(UserError, match="had the callbacks HeldOut, this one has none"):
        trainSAE(data(), [config("top_k")], STEPS, save_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(0, D), "no held-out activations"),
        ([], "no held-out activations"),
        ({"a": torch.zeros(3, D), "b": torch.zeros(4, D)}, r"as many rows at every hook point, got a: \[3, 12\]"),
        (torch.zeros(30, D).index_fill(0, torch.tensor([21]), float("nan")), "NaN or an infinity in row 21"),
        ([torch.zeros(8, D), torch.full((8, D), float("inf"))], r"row 8 \(batch 1\)"),
        ([torch.zeros(8, D), torch.zeros(D)], r"Batch 1 .* must be rows, got shape \[12\]"),
        (3, "a tensor, a mapping or batches, got int"),
    ],
)
def test_held_out_activations_that_cannot_be_used_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeldOut(given, 5, batch_rows=10)


def test_numbers_that_cannot_be_are_refused() -> None:
    for settings in ({"eval_steps": 0}, {"eval_steps": 1.5}, {"eval_steps": 5, "batch_rows": 0}):
        with pytest.raises(UserError, match="must be a positive integer"):
            HeldOut(activations(4), **settings)


def test_activations_of_another_width_are_refused_when_the_run_looks() -> None:
    with pytest.raises(UserError, match=f"expects activations of width {D}, the data has {D + 1}"):
        trainSAE(data(), [config("top_k")], 3, callbacks=[HeldOut(torch.randn(8, D + 1), 1)])


def test_the_snippet_of_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (snippet,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "HeldOut" in block]
    monkeypatch.chdir(tmp_path)
    names = {"trainSAE": trainSAE, "activations": activations(3000), "configs": [config("top_k")]}
    exec(snippet, names)  # noqa: S102
    assert load_dictionary("runs/one/trainer_0")[1]["trainer"]["best_step"] == names["data"].steps == 15
