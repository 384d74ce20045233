"""Ctrl-C and SIGTERM where something hangs: the first saves a state, the second leaves at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import STEPS, B, at_step, config, same_bits, settled, states, stream
from kill_harness import CONFIG

from dictionary_learning import read_ahead, stopping, storage, trainSAE
from dictionary_learning.read_ahead import ReadAhead
from dictionary_learning.states import StateWriter
from dictionary_learning.stopping import StoppedWaiting, interruptible, stop_requests
from dictionary_learning.training_run import TrainingRun

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fake_wandb import FakeWandb, Server

ROOT = Path(__file__).resolve().parents[2]


def interrupt(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_interrupt_does_not_wait_for_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb(Server(tmp_path / "server"), hangs_at="init")
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def twice(run: Any) -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        trainSAE(stream(), [config()], STEPS, save_dir=tmp_path / "run", use_wandb=True, callbacks=[at_step(3, twice)])
    assert [thread for thread in threading.enumerate() if thread.name == "wandb"], "it was waited for"
    assert not caplog.records
    fake.released.set()


def test_a_second_interrupt_says_how_to_go_on(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_step = TrainingRun._one_step

    def one_step(run: TrainingRun) -> None:
        true_step(run)
        settled(run, run.step)
        if run.step == 8:
            interrupt()
            interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_one_step", one_step)
        assert job("run", "--state_every", "5") == 130
    out, err = capsys.readouterr()
    assert "Left at once, in step 9; the newest state that could be saved is of step 5. Go on with:" in out
    assert "Interrupted." in err and "Traceback" not in err
    assert job("run", "--resume") == 0 and "Resuming at step 5 of 20" in capsys.readouterr().out


def test_a_state_whose_end_was_not_waited_for_is_not_copied_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_save, goes_on, x = storage.save_state, threading.Event(), torch.zeros(1 << 16)

    def save_state(*given: Any) -> Path:
        goes_on.wait()
        return true_save(*given)

    monkeypatch.setattr(storage, "save_state", save_state)
    writer = StateWriter(tmp_path)
    writer.save(1, lambda: {"x": x})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "join", lambda thread: signal.raise_signal(signal.SIGINT))
        writer.finish()
    assert writer.busy, "it was forgotten"
    goes_on.set()
    x += 1
    writer.save(2, lambda: {"x": x}, wait=True)
    storage.shutil.rmtree(storage.state_folder(tmp_path, 2))
    assert storage.load_newest_state(tmp_path)[1]["x"].sum() == 0


CHILD = """
import sys
sys.path.insert(0, {root!r})
from dictionary_learning import demo, stopping, weights_and_biases
weights_and_biases.PATIENCE = 1e6
stopping.end_process(lambda: demo.main(sys.argv[1:]))
"""


def test_a_second_interrupt_ends_the_process_though_wandb_never_answers(tmp_path: Path) -> None:
    """The first one saves a state and says how to go on, before the server is waited for; the second gets rid of wandb,
    whose exit hooks would wait too."""
    pytest.importorskip("wandb")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_tokens": 10**9}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_API_KEY": "planted-" + "k" * 40, "OMP_NUM_THREADS": "1"}
    environment["WANDB__SERVICE_WAIT"] = "1000"  # seconds that its own process may take to start, half a minute else
    arguments = ["--save_dir", "run", "--config", "config.json", "--device", "cpu", "--use_wandb", "--no-report"]
    with socket.create_server(("127.0.0.1", 0)) as mute:  # it accepts, and says nothing
        environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{mute.getsockname()[1]}"
        command = [sys.executable, "-c", CHILD.format(root=str(ROOT)), *arguments, "--log_steps", "1"]
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        child = subprocess.Popen(command, env=environment, cwd=tmp_path, **piped)
        try:
            assert child.stdout is not None
            lines = iter(child.stdout.readline, "")
            assert any("step 3," in line for line in lines)
            mute.accept()  # wandb has begun to wait for its answer
            child.send_signal(signal.SIGINT)
            assert any("its state is saved. Go on with:" in line for line in lines)
            assert any(line.rstrip().endswith("--resume") for line in lines)
            child.send_signal(signal.SIGINT)
            assert child.wait() == 130
        finally:
            child.kill()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped: SIGINT"


# ---------------------------------------------------------------------------------------------- waits for data


def test_a_request_between_the_last_look_and_the_wait_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedWhenLookedAt:
        """Not asked to stop, and asked right behind the look that finds so."""

        def __init__(self) -> None:
            self.found, self.looked_at = "", False

        @property
        def reason(self) -> str:
            found = self.found
            if self.looked_at:
                self.looked_at = False
                interrupt()
            return found

        @reason.setter
        def reason(self, found: str) -> None:
            self.found = found

    monkeypatch.setattr(stopping, "StopRequest", AskedWhenLookedAt)
    with stop_requests(end_waits=True) as request:
        request.looked_at = True  # type: ignore[attr-defined]
        with pytest.raises(StoppedWaiting), interruptible():
            pytest.fail("it would wait for ever")
        assert request.reason == "SIGINT"


def soon(*_: Any) -> None:
    threading.Timer(0.1, interrupt).start()


class Stuck:
    """Batches of which one never comes, as from a Hub that does not answer."""

    def __init__(self, after: int) -> None:
        self.inner, self.after, self.released = stream(), after, threading.Event()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.inner.rows_drawn == self.after * B:
            if not self.after:
                soon()
            with interruptible():
                self.released.wait()
        return next(self.inner)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("after", [0, 5])
def test_a_run_that_waits_for_its_data_is_put_down_with_its_state(
    depth: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "JOIN_S", 0.1)
    stuck: Any = Stuck(after)
    with pytest.warns(UserWarning, match=f"Training stopped after {after} of {STEPS} steps: SIGINT"):
        data = ReadAhead(stuck, depth) if depth else stuck
        trainSAE(data, [config()], STEPS, save_dir=tmp_path, callbacks=[at_step(after, soon)])
    stuck.released.set()
    assert states(tmp_path) == [after]
    done = trainSAE(stream(), [config()], STEPS, save_dir=tmp_path, resume=True)[0]
    assert same_bits(dict(done.state_dict()), dict(trainSAE(stream(), [config()], STEPS)[0].state_dict()))


@pytest.mark.parametrize("reports", [False, True])
def test_a_callback_that_reads_data_is_let_to_its_end(reports: bool, tmp_path: Path) -> None:
    read = []

    def evaluate(run: Any, step: int) -> None:
        if step == 3:
            interrupt()
            read.append(next(ReadAhead(stream())))

    evaluate.reports = reports  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=f"Training stopped after 3 of {STEPS} steps: SIGINT"):
        trainSAE(stream(), [config()], STEPS, save_dir=tmp_path, callbacks=[evaluate])
    assert states(tmp_path) == [3] and len(read) == 1


def test_a_run_inside_of_another_gives_its_request_back() -> None:
    with stop_requests(end_waits=True):
        with stop_requests():
            pass
        interrupt()
        with pytest.raises(StoppedWaiting), interruptible():
            pytest.fail("it began to wait though it was asked to end")


def test_a_command_that_a_signal_ended_leaves_without_a_warning() -> None:
    program = "import multiprocessing, tqdm\nmultiprocessing.set_start_method('spawn')\n"
    program += "from dictionary_learning.stopping import end_process\n"
    program += "def command():\n    tqdm.tqdm(total=1).close()\n    print('said')\n    return 130\nend_process(command)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (130, "said\n") and "leaked" not in done.stderr


def test_a_request_ends_only_the_waits_of_a_run_that_takes_it() -> None:
    with stop_requests() as request:
        with interruptible():
            interrupt()
        assert request.reason == "SIGINT"
    with stop_requests(end_waits=True):
        interrupt()
        with pytest.raises(StoppedWaiting), interruptible():
            pytest.fail("it began to wait though it was asked to end")
    with interruptible():
        assert not stopping.in_a_hurry()
