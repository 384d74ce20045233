"""A resumed run is the same run: what may not change, what may be made longer, states written behind the training."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from fault_cases import STEPS, B, D, F, at_step, config, same_bits, settled, states, stream, trainer, weights

from dictionary_learning import demo, resume, storage, trainSAE
from dictionary_learning.errors import UserError
from dictionary_learning.states import StateWriter
from dictionary_learning.trainers import TRAINERS
from dictionary_learning.training_run import TrainingRun

SPARSITY: dict[str, dict[str, Any]] = {
    "matryoshka_batch_top_k": {"k": 4, "group_fractions": [0.25, 0.75]},
    **{name: {"l1_penalty": 0.05} for name in ("standard", "standard_april_update", "gated")},
    **{name: {"initial_sparsity_penalty": 0.05} for name in ("p_anneal", "gated_anneal")},
}


def settings(architecture: str, **changes: Any) -> dict[str, Any]:
    given = config(architecture, **changes)
    return {k: v for k, v in given.items() if k != "k" or "k" in SPARSITY.get(architecture, {"k": 4})} | SPARSITY.get(
        architecture, {}
    )


# ---------------------------------------------------------------------------------------------- another run is refused


def test_what_differs_is_named_field_by_field() -> None:
    old = {"a": 1, "list": [{"lr": None, "k": 4}, {"lr": 0.1}], "same": (1, 2), "gone": "x"}
    new = {"a": 1, "list": [{"lr": 0.5, "k": 4}, {"lr": 0.1}], "same": [1, 2], "new": [3]}
    found = [str(difference) for difference in resume.differences(old, new)]
    assert found == ["list[0].lr: None -> 0.5", "gone: 'x' -> None", "new: None -> [3]"]
    assert [str(d) for d in resume.differences({"l": [1]}, {"l": [1, 2]})] == ["l: [1] -> [1, 2]"]
    assert resume.differences(old, old) == []


def test_a_changed_setting_of_a_trainer_is_refused_by_name_unless_it_is_allowed(tmp_path: Path) -> None:
    trainSAE(stream(), [config()], 12, save_dir=tmp_path, state_every=6, callbacks=[settled])
    with pytest.raises(UserError, match=r"\(trainer_0.lr: 0.01 -> 0.001; trainer_0.auxk_alpha: 0.125 -> 0.25\)"):
        trainSAE(stream(), [config(auxk_alpha=0.25, lr=1e-3)], STEPS, save_dir=tmp_path, resume=True)
    with pytest.warns(UserWarning, match="goes on with another setting, trainer_0.lr: .* -> 0.001"):
        trainSAE(stream(), [config(lr=1e-3)], STEPS, save_dir=tmp_path, resume=True, override=True)
    assert states(tmp_path) == [6, 12], "a state was written without being asked for"


def test_a_state_that_cannot_fit_is_one_sentence_also_when_all_is_allowed(tmp_path: Path) -> None:
    trainSAE(stream(), [config()], 12, save_dir=tmp_path, state_every=6)
    with pytest.raises(UserError, match="The saved state does not fit this run"):
        trainSAE(stream(), [config(dict_size=2 * F)], 12, save_dir=tmp_path, resume=True, override=True)
    with pytest.raises(UserError, match="has 1 dictionaries, this one 2"):
        trainSAE(stream(), [config(), config(seed=1)], 12, save_dir=tmp_path, resume=True, override=True)
    with pytest.raises(UserError, match="has done 12 steps: it can't end at step 6"):
        trainSAE(stream(), [config()], 6, save_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    "hostile",
    [[], None, {"step": 1}, {"trainers": 5, "step": 1}, {"trainers": [[]], "step": "1"}, {"trainers": [7], "step": 1}],
)
def test_a_state_that_says_anything_at_all_is_one_sentence(hostile: Any) -> None:
    run = TrainingRun(stream(), [trainer()], STEPS)
    with pytest.raises(UserError, match="The saved state does not fit this run"):
        run.load_state_dict(hostile)


SMALL = ["--num_tokens", "5120", "--batch_size", "256", "--widths", "32", "--buffer_contexts", "64", "--ctx_len", "32"]
SMALL += ["--eval_tokens", "300", "--layers", "1", "--architectures", "gated", "--device", "cpu", "--no-report"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the main job in a folder of its own: (exit code, what was printed, the sentence of an error)."""
    monkeypatch.chdir(tmp_path)

    def job(*arguments: str) -> tuple[int, str, str]:
        code = demo.main(["--save_dir", "run", *SMALL, *arguments])
        return code, *capsys.readouterr()

    return job


def test_the_main_job_names_what_changed_and_goes_on_when_told_to(run: Any) -> None:
    assert run()[0] == 0
    code, _, err = run("--resume", "--batch_size", "128", "--seed", "1", "--dtype", "bfloat16")
    assert code == 2
    for change in ("batch_size: 256 -> 128", "seed: 0 -> 1", "dtype: 'float32' -> 'bfloat16'", "--override"):
        assert change in err
    record = json.loads(Path("run/run.json").read_text())
    began = record["started"]
    record["versions"]["torch"] = "2.0.0"
    record["corpus_fingerprint"] = "0" * 64
    Path("run/run.json").write_text(json.dumps(record))
    assert "The corpus 'embedded' has changed since the run in 'run' began (0000000000000000 -> " in run("--resume")[2]
    code, out, _ = run("--resume", "--override", "--eval_tokens", "200")
    assert code == 0
    assert "Warning: eval_tokens: 300 -> 200: from here on it is not the run that began." in out
    assert "Warning: torch: '2.0.0' -> " in out and "the last bits may differ" in out
    record = json.loads(Path("run/run.json").read_text())
    assert record["started"] == began and "eval_tokens: 300 -> 200" in record["resumed"][-1]["changed"]
    assert run("--override")[0] == 2, "without --resume there is nothing to override"


def test_a_run_whose_states_are_gone_does_not_begin_anew_over_what_it_made(run: Any) -> None:
    assert run()[0] == 0
    weights = Path("run/trainer_0/ae.safetensors").read_bytes()
    shutil.rmtree("run/state")
    code, _, err = run("--resume", "--num_tokens", "12800")
    assert code == 2 and "has no saved state any more (its state/ is gone)" in err and "--overwrite" in err
    assert Path("run/trainer_0/ae.safetensors").read_bytes() == weights


def test_a_damaged_state_is_told_in_a_sentence(run: Any) -> None:
    assert run("--state_every", "5")[0] == 0
    newest = storage.saved_states(Path("run/state"))[0]
    (newest / "manifest.json").unlink()
    code, out, err = run("--resume")
    assert code == 0 and f"Warning: The saved state {newest.name} is damaged (FileNotFoundError" in out
    assert "job.py" not in out + err


def test_a_run_that_is_none_is_no_traceback(run: Any) -> None:
    Path("run").mkdir()
    for content in ("{}", "[]", '{"config": {}, "model": 3}', "{"):
        Path("run/run.json").write_text(content)
        code, _, err = run("--resume")
        assert code == 2 and err.count("Error: ") == 1, content


# ---------------------------------------------------------------------------------------------- a longer run


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_a_finished_run_can_be_made_longer_whatever_it_trains(architecture: str, tmp_path: Path) -> None:
    given = settings(architecture)
    first = trainer_of(given, 12)
    trainSAE(stream(), [given], 12, save_dir=tmp_path, state_every=12)
    longer = trainSAE(stream(), [given], STEPS, save_dir=tmp_path, resume=True, state_every=12)[0]
    saved = json.loads((tmp_path / "trainer_0" / "config.json").read_text())["trainer"]
    assert (saved["lr"], saved["warmup_steps"]) == (first.lr, first.warmup_steps), "they are those it began with"
    assert saved["steps"] == STEPS and saved["decay_start"] == int(STEPS * 2 / 3), "the decay is laid anew"
    assert states(tmp_path)[-1] == STEPS and all(value.isfinite().all() for value in longer.state_dict().values())


def trainer_of(given: dict[str, Any], steps: int) -> Any:
    arguments = dict(given)
    return arguments.pop("trainer")(steps=steps, **arguments)


@pytest.mark.parametrize("architecture", ["top_k", "jump_relu"])
def test_with_a_constant_rate_a_longer_run_is_bit_for_bit_the_unbroken_one(architecture: str, tmp_path: Path) -> None:
    fixed: dict[str, Any] = {"scheduler": "constant", "lr": 1e-3, "warmup_steps": 2}
    if architecture == "top_k":
        fixed |= {"dead_after_tokens": 4 * B, "threshold_start_step": 3}
    else:
        fixed |= {"sparsity_warmup_steps": 4}
    given = settings(architecture, **fixed)
    trainSAE(stream(), [given], 12, save_dir=tmp_path, state_every=12)
    longer = trainSAE(stream(), [given], STEPS, save_dir=tmp_path, resume=True)[0]
    unbroken = trainSAE(stream(), [given], STEPS)[0]
    assert same_bits(dict(longer.state_dict()), dict(unbroken.state_dict()))


def test_the_main_job_makes_a_run_longer_and_not_shorter(run: Any) -> None:
    assert run()[0] == 0
    before = json.loads(Path("run/trainer_0/config.json").read_text())["trainer"]
    code, out, _ = run("--resume", "--num_tokens", "10240", "--read_ahead", "2")
    assert code == 0 and "Resuming at step 20 of 40." in out
    after = json.loads(Path("run/trainer_0/config.json").read_text())["trainer"]
    assert after["lr"] == before["lr"] and after["steps"] == 40 and after["decay_start"] == 26
    assert json.loads(Path("run/run.json").read_text())["steps_done"] == 40
    assert "num_tokens: 10240 -> 5120" in run("--resume")[2]


# ---------------------------------------------------------------------------------------------- reading ahead


@pytest.mark.parametrize(("before", "after"), [("0", "3"), ("2", "0")])
def test_a_resume_that_reads_ahead_differently_gives_the_same_bytes(
    before: str, after: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run()[0] == 0
    Path("run").rename("unbroken")
    true_step = TrainingRun._one_step

    def stops(self: TrainingRun) -> None:
        true_step(self)
        if self.step == 11:
            self._request.reason = "SIGINT"

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_one_step", stops)
        assert run("--read_ahead", before)[0] == 130
    assert run("--resume", "--read_ahead", after)[0] == 0
    for file in ("trainer_0/ae.safetensors", "trainer_3/ae.safetensors", "metrics.jsonl"):
        assert Path("run", file).read_bytes() == Path("unbroken", file).read_bytes(), file


# ---------------------------------------------------------------------------------------------- in the background


def test_states_written_behind_the_training_are_those_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slow and training is not: the states must hold what was when they were begun."""
    true_save = storage.save_state

    def slowly(*arguments: Any) -> Path:
        time.sleep(0.05)
        return true_save(*arguments)

    monkeypatch.setattr(storage, "save_state", slowly)
    seen: dict[int, Any] = {}
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, state_every=5)
    run.callbacks = [lambda run, step: seen.update({step: weights(run)})]
    run.run()
    assert run.states is not None and run.states.saved_step == STEPS
    for step in states(tmp_path):
        saved = storage.load_newest_state(tmp_path / "state")[1] if step == STEPS else None
        if saved is not None:
            assert same_bits(saved["trainers"][0]["ae"], seen[step])
    again = TrainingRun(stream(), [trainer()], STEPS)
    other = min(states(tmp_path))
    for path in (tmp_path / "state").glob("step_*"):
        if int(path.name[5:]) != other:
            path.rename(path.with_name(f"not_{path.name}"))
    again.load_state_dict(storage.load_newest_state(tmp_path / "state")[1])
    assert same_bits(weights(again), seen[again.step])
    again.run()
    assert same_bits(weights(again), weights(run))


def test_one_state_is_in_flight_at_most_and_the_next_one_waits_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most, go = [], [0], threading.Event()
    true_save = storage.save_state

    def watched(folder: Path, step: int, tree: Any) -> Path:
        at_work.append(step)
        most[0] = max(most[0], len(at_work))
        go.wait(10)
        at_work.remove(step)
        return true_save(folder, step, tree)

    monkeypatch.setattr(storage, "save_state", watched)
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, state_every=3)
    run.callbacks = [at_step(14, lambda run: go.set())]
    run.run()
    assert most == [1], "two states were written at once"
    assert run.step == STEPS and run.states is not None and run.states.saved_step == STEPS


def test_memory_for_states_is_made_once_and_used_again(tmp_path: Path) -> None:
    writer, live = StateWriter(tmp_path), {"a": torch.zeros(1 << 16), "b": [torch.ones(3), "text", 1.5, None]}
    writer.reserve(live)
    writer.finish()
    kept = dict(writer._memory)
    assert writer.nbytes == live["a"].numel() * 4, "small tensors are not worth keeping memory for"  # type: ignore[union-attr]
    for step in (1, 2):
        live["a"].fill_(step)  # type: ignore[union-attr]
        writer.save(step, lambda: live, wait=True)
    assert {name: x.data_ptr() for name, x in writer._memory.items()} == {n: x.data_ptr() for n, x in kept.items()}
    step, tree = storage.load_newest_state(tmp_path)
    assert step == 2 and tree["a"].eq(2).all() and tree["b"][1:] == ["text", 1.5, None]
    assert (writer.saved_step, writer.written, writer.failed) == (2, 2, None)


def test_a_state_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path)
    writer.save(5, lambda: {"x": 1}, wait=True)
    writer.save(5, lambda: pytest.fail("the state was taken again"), wait=True)
    assert writer.written == 1


def test_a_live_state_shares_the_ring_and_a_plain_one_does_not() -> None:
    data = stream()
    next(data)
    assert data.state_dict(live=True)["rows"]["a"].data_ptr() == data._rows["a"].data_ptr()
    assert data.state_dict()["rows"]["a"].data_ptr() != data._rows["a"].data_ptr()
    assert D == data._rows["a"].shape[1]
