"""Losses and gradients that are not finite, and memory that runs out."""

from __future__ import annotations

import csv
import gc
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import STEPS, B, Messages, activations, at_step, config, same_bits, stream, trainer, weights
from torch import Tensor

from dictionary_learning import trainSAE
from dictionary_learning.errors import UserError
from dictionary_learning.trainers import SAETrainer
from dictionary_learning.training_run import TrainingRun
from dictionary_learning.utils import load_dictionary

BAD = 9  # the step (counted from 1) at which something is not finite


def break_loss(broken: SAETrainer, value: float, step: int = BAD) -> SAETrainer:
    true_loss = broken.compute_loss

    def compute_loss(x_BD: Tensor, y_BD: Tensor, now: int) -> Any:
        out = true_loss(x_BD, y_BD, now)
        return out._replace(loss=out.loss * value) if now == step - 1 else out

    broken.compute_loss = compute_loss  # type: ignore[method-assign]
    return broken


def break_gradient(broken: SAETrainer, step: int = BAD) -> SAETrainer:
    """The gradient of the loss with respect to one bias is NaN, the loss is not."""
    seen = []

    def spoil(grad: Tensor) -> Tensor:
        seen.append(1)
        return grad * float("nan") if len(seen) == step else grad

    broken.ae.decoder_bias.register_hook(spoil)
    return broken


BREAKS = {
    "loss": lambda one: break_loss(one, float("nan")),
    "loss of infinity": lambda one: break_loss(one, float("inf")),
    "gradient": break_gradient,
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("architecture", ["top_k", "jump_relu", "standard"])
def test_a_dictionary_that_is_not_finite_stops_with_its_last_good_weights_and_the_others_go_on(
    how: str, architecture: str, tmp_path: Path
) -> None:
    said, good = Messages(), {}
    trainers = [trainer(architecture, seed=0), trainer(architecture, seed=1), trainer(architecture, seed=2)]
    BREAKS[how](trainers[1])
    run = TrainingRun(stream(), trainers, STEPS, save_dir=tmp_path, log_steps=4, sinks=[said])
    run.callbacks = [at_step(BAD - 1, lambda run: good.update(weights(run, 1)))]
    run.run()
    assert same_bits(good, weights(run, 1)), "the weights are not those of the step before"
    assert run.step == STEPS and not run.stopped
    alone = TrainingRun(stream(), [trainer(architecture, seed=0), trainer(architecture, seed=2)], STEPS)
    alone.run()
    assert same_bits(weights(run, 0), weights(alone, 0)) and same_bits(weights(run, 2), weights(alone, 1))
    what = how.split()[0]
    why = f"its {what} was NaN or infinite at step {BAD}"
    assert run.stopped_dictionaries == {"trainer_1": why}
    assert [text for text in said.texts if "trainer_1 is stopped" in text and why in text]
    saved = json.loads((tmp_path / "trainer_1" / "config.json").read_text())["trainer"]
    assert (saved["stopped_at_step"], saved["stopped"]) == (BAD, why)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["trainer"] == "trainer_1"] == [4, 8, BAD]
    assert rows[[row.get("stopped_at_step") for row in rows].index(BAD)]["trainer"] == "trainer_1"
    loaded = load_dictionary(tmp_path / "trainer_1")[0](activations(50))
    assert loaded.isfinite().all()


def test_without_clipping_a_bad_gradient_is_found_too() -> None:
    broken = break_gradient(trainer(grad_clip_norm=None))
    run = TrainingRun(stream(), [broken, trainer(seed=1)], STEPS)
    run.run()
    assert list(run.stopped_dictionaries) == ["trainer_0"]
    assert all(value.isfinite().all() for value in weights(run, 0).values())


class Fused:
    """What the kernels of CUDA compute, in torch: the optimiser refuses on the device, and the host asks every so many
    steps."""

    @staticmethod
    def gradient_squares(W_FD: Tensor, grad_FD: Tensor, project: bool) -> Tensor:
        along = (W_FD * grad_FD).sum(1, keepdim=True) * W_FD if project else 0.0
        return (grad_FD - along).square().sum()

    @staticmethod
    def adam_step(W_FD: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, step: Tensor, lr: Tensor, scale: Tensor,
                  project: bool) -> None:  # fmt: skip
        grad = (grad - (W_FD * grad).sum(1, keepdim=True) * W_FD if project else grad) * scale
        m.mul_(0.9).add_(grad, alpha=0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
        W_FD.sub_(lr.float() / (1 - 0.9**step) * m / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        if project:
            W_FD.div_(W_FD.norm(dim=1, keepdim=True))


def test_where_only_the_device_knows_the_weights_stay_good_until_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dictionary_learning.trainers.optimizer.fused_adam_for", lambda device: Fused)
    steps, good = 48, {}
    broken, other = break_loss(trainer(steps=steps), float("nan")), trainer(steps=steps, seed=1)
    run = TrainingRun(stream(B * steps + 400), [broken, other], steps)
    run.callbacks = [at_step(BAD - 1, lambda run: good.update(weights(run)))]
    noticed = []
    run.callbacks.append(lambda run, step: noticed.append(step) if run.stopped_dictionaries and not noticed else None)
    run.run()
    assert BAD < noticed[0] <= BAD + 2 * 16 + 1
    assert run.stopped_dictionaries == {"trainer_0": f"its loss was NaN or infinite at step {BAD}"}
    for name, value in weights(run).items():
        if name != "threshold":
            torch.testing.assert_close(value, good[name], rtol=1e-6, atol=1e-7)
    assert run.step == steps and weights(run, 1)["decoder.weight"].isfinite().all()


def test_a_dictionary_that_refuses_steps_is_not_resampled_before_that_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dictionary_learning.trainers.optimizer.fused_adam_for", lambda device: Fused)
    steps, resampled = 48, []
    pair = [trainer("standard", steps=steps, seed=seed, resample_steps=BAD + 1, warmup_steps=2) for seed in (0, 1)]
    for number, one in enumerate(pair):
        monkeypatch.setattr(one, "resample_neurons", lambda *_, number=number: resampled.append(number))
    break_loss(pair[0], float("nan"))
    TrainingRun(stream(B * steps + 400), pair, steps).run()
    assert resampled == [1, 1, 1, 1]


def test_a_stopped_dictionary_stays_stopped_over_a_resume(tmp_path: Path) -> None:
    trainers = [break_loss(trainer(seed=0), float("nan")), trainer(seed=1)]
    run = TrainingRun(stream(), trainers, STEPS, save_dir=tmp_path, state_every=12)
    run.callbacks = [at_step(14, lambda run: setattr(run._request, "reason", "SIGINT"))]
    run.run()
    kept = weights(run, 0)
    assert run.step == 14
    both = [config(seed=0), config(seed=1)]
    resumed = trainSAE(stream(), both, STEPS, save_dir=tmp_path, resume=True)
    assert same_bits(kept, dict(resumed[0].state_dict()))
    assert same_bits(dict(resumed[1].state_dict()), dict(trainSAE(stream(), both, STEPS)[1].state_dict()))
    assert json.loads((tmp_path / "trainer_0" / "config.json").read_text())["trainer"]["stopped_at_step"] == BAD


def test_a_run_in_which_nothing_can_go_on_ends(tmp_path: Path) -> None:
    run = TrainingRun(stream(), [break_loss(trainer(), float("nan"))], STEPS, save_dir=tmp_path, final_state=True)
    run.run()
    assert (run.stopped, run.step) == ("no dictionary can go on", BAD)
    assert (tmp_path / "trainer_0" / "ae.safetensors").exists()


def test_the_main_job_reports_a_dictionary_that_stopped(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kill_harness import CONFIG

    from dictionary_learning import demo

    true_trainers = demo.make_trainers

    def make_trainers(*arguments: Any) -> list[Any]:
        first, second = true_trainers(*arguments)
        return [break_loss(first, float("nan")), second]

    monkeypatch.setattr(demo, "make_trainers", make_trainers)
    assert job("run", dictionaries=CONFIG["dictionaries"]) == 0
    why = f"its loss was NaN or infinite at step {BAD}"
    said = capsys.readouterr().out
    assert f"trainer_0 ended early, {why}" in said and "trainer_0 (stopped)" in said
    record = json.loads(Path("run/run.json").read_text())
    assert record["stopped_dictionaries"] == {"trainer_0": why} and record["status"] == "complete"
    rows = {row["trainer"]: row for row in csv.DictReader(Path("run/summary.csv").open())}
    assert rows["trainer_0"]["stopped"] == why and rows["trainer_1"]["stopped"] == ""
    monkeypatch.setattr(demo, "make_trainers", lambda *a: [break_loss(one, float("inf")) for one in true_trainers(*a)])
    assert job("none") == 3
    assert json.loads(Path("none/run.json").read_text())["status"] == "stopped: no dictionary can go on"


# ---------------------------------------------------------------------------------------------- memory


def small_memory(lm: Any, fits: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forwards of more than `fits` contexts run out of memory; the list of all that were tried."""
    from dictionary_learning.activations.traced_lm import TracedLM

    tried: list[int] = []
    true_capture = TracedLM.capture

    def capture(self: Any, tokens_CL: Tensor, *arguments: Any, **options: Any) -> Any:
        tried.append(len(tokens_CL))
        if len(tokens_CL) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return true_capture(self, tokens_CL, *arguments, **options)

    monkeypatch.setattr(TracedLM, "capture", capture)
    return tried


@pytest.fixture(scope="module")
def lm() -> Any:
    from data_prep.embedded import MODEL_DIR
    from dictionary_learning.activations.fitting import FittingLM

    return FittingLM.load(str(MODEL_DIR), device="cpu")


def test_a_forward_that_does_not_fit_is_halved_and_gives_the_same_rows(
    lm: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(lm), "most_contexts", None)
    tokens = torch.randint(0, 200, (13, 8), generator=torch.Generator().manual_seed(0))
    points = ["resid_post_layer_0", "mlp_out_layer_1"]
    whole = lm.capture(tokens, points)
    tried = small_memory(lm, 4, monkeypatch)
    with caplog.at_level(logging.WARNING):
        parts = lm.capture(tokens, points)
    assert list(parts) == points
    for name in points:
        torch.testing.assert_close(parts[name], whole[name])
    assert tried == [13, 6, 3, 3, 3, 3, 1]
    assert "does not suffice for a forward of 13 contexts: going on with 6 at once" in caplog.text
    assert "set harvest_contexts to 3" in caplog.text
    tried.clear()
    lm.capture(tokens, points)
    assert tried == [3, 3, 3, 3, 1], "running out is remembered"
    del lm.most_contexts


def test_memory_that_runs_out_inside_of_the_model_leaves_nothing_behind(
    lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hook, no lock, no activation of the forward that failed: its memory must be free for the next one."""
    monkeypatch.setattr(type(lm), "most_contexts", None)
    tokens = torch.randint(0, 200, (13, 8), generator=torch.Generator().manual_seed(0))
    whole = lm.capture(tokens, "resid_post_layer_1")["resid_post_layer_1"]
    seen: list[weakref.ref[Tensor]] = []

    def run_out(module: Any, inputs: Any) -> None:
        seen.append(weakref.ref(inputs[0]))
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    left: list[int] = []
    monkeypatch.setattr(
        "dictionary_learning.activations.fitting.log.warning",
        lambda *_: left.append(sum(r() is not None for r in seen)),
    )
    handle = lm.module.get_submodule("transformer.h.1.mlp").register_forward_pre_hook(run_out)
    try:
        gc.disable()
        parts = lm.capture(tokens, "resid_post_layer_1")["resid_post_layer_1"]
    finally:
        gc.enable()
        handle.remove()
    torch.testing.assert_close(parts, whole)
    assert left == [0, 0] and not lm._lock._is_owned()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.module.modules())
    del lm.most_contexts


def test_a_context_that_does_not_fit_alone_says_what_to_lower(
    lm: Any, monkeypatch: pytest.MonkeyPatch, job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small_memory(lm, 0, monkeypatch)
    assert job("run") == 2
    err = capsys.readouterr().err
    assert "does not suffice for one context of 32 tokens: set ctx_len to 16" in err and "Traceback" not in err


def test_another_error_of_the_forward_is_not_taken_for_one_of_memory(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dictionary_learning.activations.traced_lm import TracedLM

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(TracedLM, "capture", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        lm.capture(torch.zeros(2, 4, dtype=torch.long), "resid_post_layer_0")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_a_buffer_that_does_not_fit_says_what_to_lower(
    error: Exception, monkeypatch: pytest.MonkeyPatch, job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("dictionary_learning.demo.make_buffer", too_large)
    assert job("run") == 2
    err = capsys.readouterr().err
    assert "does not suffice for this run: set buffer_contexts to 32 or batch_size to 128" in err
    assert "Traceback" not in err and not Path("run").exists()


def test_a_step_that_does_not_fit_says_which_setting_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer()

    def too_large(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(one, "compute_loss", too_large)
    with pytest.raises(UserError, match=f"step of .*TopK.* on {B} rows: set the batch size to {B // 2}"):
        TrainingRun(stream(), [one], STEPS).run()
