"""Disks that are full, read-only or gone: training goes on where it can, nothing finished is lost, one sentence."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_cases import (
    STEPS,
    B,
    FailingDisk,
    Messages,
    activations,
    at_step,
    config,
    same_bits,
    settled,
    states,
    stream,
    trainer,
    weights,
)

from dictionary_learning import storage, trainSAE
from dictionary_learning.errors import UserError
from dictionary_learning.training_run import TrainingRun


def lines(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_states_costs_states_and_not_the_run(
    number: int, disk: FailingDisk, tmp_path: Path
) -> None:
    said = Messages()
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, state_every=5, sinks=[said])

    def breaks(run: TrainingRun) -> None:
        disk.parts, disk.number = (".step_",), number

    run.callbacks = [settled, at_step(7, breaks), at_step(18, lambda run: setattr(disk, "parts", ()))]
    run.run()
    unbroken = TrainingRun(stream(), [trainer()], STEPS)
    unbroken.run()
    assert same_bits(weights(run), weights(unbroken))
    warned = [text for text in said.texts if "was not written" in text]
    assert len(warned) == 2 and os.strerror(number) in warned[0]
    assert "the state of step 10 was not written" in warned[0] and "the newest is that of step 5" in warned[0]
    assert run.states.saved_step == STEPS and states(tmp_path)[-1] == STEPS
    assert not list((tmp_path / "state").glob(".*")), "half a state was left behind"


def test_the_run_does_not_claim_a_state_that_it_lacks(disk: FailingDisk, tmp_path: Path) -> None:
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, state_every=10)

    run.callbacks = [settled, at_step(12, lambda run: setattr(disk, "parts", (".step_",)))]
    run.run()
    assert run.states.saved_step == 10 and states(tmp_path) == [10]
    assert run.save_state() is None
    disk.parts = ()
    assert run.save_state() == tmp_path / "state" / f"step_{STEPS:09d}"


def test_on_a_full_disk_the_older_state_gives_way_to_the_last(
    tmp_path: Path, disk: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        storage.save_state(tmp_path, step, step)
    first, true_write = [True], storage.write_tensors

    def full_once(path: Path, tensors: object) -> None:
        if first.pop() if first else False:
            raise OSError(errno.ENOSPC, "No space left on device")
        true_write(path, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "write_tensors", full_once)
    storage.save_state(tmp_path, 3, 3)
    assert [path.name for path in storage.saved_states(tmp_path)] == ["step_000000003", "step_000000002"]


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(disk: FailingDisk, tmp_path: Path) -> None:
    said = Messages()
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, save_steps=[3, 9], sinks=[said])
    run.callbacks = [at_step(5, lambda run: setattr(disk, "parts", ("checkpoints",)))]
    run.run()
    assert [path.name for path in (tmp_path / "trainer_0" / "checkpoints").iterdir()] == ["ae_3.safetensors"]
    assert any("trainer_0 was not written at step 9" in text for text in said.texts)
    assert (tmp_path / "trainer_0" / "ae.safetensors").exists()


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path: Path) -> None:
    """/dev/full refuses every write with ENOSPC."""
    log = tmp_path / "metrics.jsonl"

    def fill(run: TrainingRun) -> None:
        log.rename(tmp_path / "kept")
        log.symlink_to("/dev/full")

    def room(run: TrainingRun) -> None:
        log.unlink()
        (tmp_path / "kept").rename(log)

    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, log_steps=2)
    run.callbacks = [at_step(5, fill), at_step(11, room)]
    run.run()
    assert lines(tmp_path) == list(range(2, STEPS + 1, 2))


def test_a_log_that_can_not_be_written_to_the_end_is_an_error(tmp_path: Path) -> None:
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, log_steps=2, final_state=True)

    def fill(run: TrainingRun) -> None:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    run.callbacks = [at_step(5, fill)]
    with pytest.raises(UserError, match="No space left on device.*free some space.*--resume; the state of step 24"):
        run.run()
    assert (tmp_path / "trainer_0" / "ae.safetensors").exists(), "the dictionaries were written before"


def test_a_disk_that_refuses_the_dictionaries_ends_in_a_sentence_and_resume_finishes(
    disk: FailingDisk, job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("unbroken") == 0
    for number, remedy in ((errno.ENOSPC, "free some space"), (errno.EROFS, "make it writable again")):
        with disk.refusing("ae.safetensors", number=number):
            assert job("run", *(["--resume"] if Path("run").exists() else [])) == 2
        err = capsys.readouterr().err
        assert [line for line in err.splitlines() if line.startswith("Error: ")] and "Traceback" not in err
        assert remedy in err and "--resume; the state of step 20 is kept" in err
    assert job("run", "--resume") == 0
    for file in ("trainer_0/ae.safetensors", "trainer_0/eval_results.json", "metrics.jsonl"):
        assert Path("run", file).read_bytes() == Path("unbroken", file).read_bytes(), file


def test_what_no_disk_takes_in_the_end_is_kept_until_there_is_room(
    disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []  # of a run without progress, whose waiting nobody would understand

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            disk.parts = ()

    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=wait))
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, final_state=True)
    with disk.refusing(".step_", "ae.safetensors"):
        run.run()
    assert waits == [20.0] * 3 and states(tmp_path) == [STEPS]
    assert (tmp_path / "trainer_0" / "ae.safetensors").exists()
    told = [text for text in caplog.messages if "takes neither" in text]
    assert len(told) == 1 and "No space left on device" in told[0] and "for 33 minutes" in told[0]


def test_a_signal_gives_up_waiting_for_room(disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminate = SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(storage, "time", terminate)
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, final_state=True)
    with disk.refusing(".step_", "ae.safetensors"), pytest.raises(UserError, match="free some space.*no state was"):
        run.run()


def test_a_run_that_was_stopped_does_not_say_that_it_waits(
    disk: FailingDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = at_step(3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, final_state=True, callbacks=[stop])
    with disk.refusing(".step_", "ae.safetensors"), pytest.raises(UserError, match="free some space"):
        run.run()
    assert not [text for text in caplog.messages if "takes neither" in text]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_folder_that_no_longer_lets_write_ends_in_a_sentence(
    number: int, disk: FailingDisk, job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save_dir is given relative to the working folder, the system names files by their whole path."""
    with disk.refusing("ae.safetensors", number=number):
        assert job("run") == 2
    err = capsys.readouterr().err
    assert "Error: 'run' can't be written" in err and "make it writable again" in err and "Traceback" not in err


def test_a_full_disk_elsewhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'/elsewhere/hub/model' can't be written .No space left"):
        with storage.disk_faults_said(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/hub/model")
    with pytest.raises(FileNotFoundError), storage.disk_faults_said(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path) + "-other/file")
    with pytest.raises(PermissionError), storage.disk_faults_said(tmp_path):
        raise PermissionError(errno.EPERM, "Operation not permitted", 7)  # a descriptor in place of a path


def test_a_broken_writer_is_no_silent_one(tmp_path: Path) -> None:
    """What is no fault of the disk is raised: a state that can't be kept is a bug of whoever made it."""

    class Bad:
        def state_dict(self) -> dict[str, object]:
            return {"x": object()}

        def __call__(self, run: TrainingRun, step: int) -> None: ...

    with pytest.raises(TypeError, match="a state can't hold a object"):
        trainSAE(stream(), [config()], STEPS, save_dir=tmp_path, state_every=5, callbacks=[Bad()])


def test_data_without_a_state_is_trained_on_all_the_same(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No state was saved"):
        trainSAE(list(activations().split(B)), [config()], STEPS, save_dir=tmp_path, state_every=10)
    assert (tmp_path / "trainer_0" / "ae.safetensors").exists() and not (tmp_path / "state").exists()
