"""Corpora that vanish, break or end, a Hub that fails, a thread that dies, signals: a state is saved, and a resume ends
as the unbroken run does."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_cases import STEPS, B, Messages, at_step, config, same_bits, states, stream, trainer

from dictionary_learning import trainSAE
from dictionary_learning.read_ahead import ReadAhead
from dictionary_learning.training_run import TrainingRun

TEXTS = [
    f"Patient {i} takes drug {i % 7} for {i % 11} days, and the pain in joint {i % 5} subsides." for i in range(240)
]


def write_corpus(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def replace_text(path: Path, text: str) -> None:
    """All at once: a thread may be about to read it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def after(step: int, action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of a run of the main job, once."""
    true_step = TrainingRun._one_step
    done: list[int] = []

    def one_step(run: TrainingRun) -> None:
        true_step(run)
        if run.step == step and not done:
            done.append(step)
            action()

    monkeypatch.setattr(TrainingRun, "_one_step", one_step)


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """(what was printed, the sentence of the error)."""
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) <= 1 and "Traceback" not in err
    return out, errors[0] if errors else ""


def same_files(*files: str) -> None:
    for file in files or ("trainer_0/ae.safetensors", "trainer_0/eval_results.json", "metrics.jsonl"):
        assert Path("run", file).read_bytes() == Path("unbroken", file).read_bytes(), file


def test_a_corpus_file_that_vanishes_and_comes_back_costs_nothing(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(Path("texts.jsonl"))
    assert job("unbroken", corpus="texts.jsonl", steps=40) == 0
    after(6, lambda: os.rename("texts.jsonl", "elsewhere"), monkeypatch)
    assert job("run", "--read_ahead", "1", corpus="texts.jsonl", steps=40) == 2
    out, error = said(capsys)
    assert "texts.jsonl' is not readable: " in error and "No such file" in error
    step = states(Path("run"))[-1]
    assert f"The state of step {step:,} is saved" in out and 6 <= step < 40
    assert json.loads(Path("run/run.json").read_text())["status"].startswith("failed: Corpus file")
    os.rename("elsewhere", "texts.jsonl")
    assert job("run", "--resume", corpus="texts.jsonl", steps=40) == 0
    same_files()


def test_a_line_truncated_in_the_middle_of_a_run_is_named_and_once_mended_costs_nothing(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_corpus(Path("texts.jsonl")).read_text()
    assert job("unbroken", corpus="texts.jsonl", steps=40) == 0
    after(6, lambda: replace_text(Path("texts.jsonl"), whole[:-40]), monkeypatch)
    assert job("run", "--read_ahead", "1", corpus="texts.jsonl", steps=40) == 2
    assert "texts.jsonl', line 240, is not valid JSON" in said(capsys)[1]
    assert states(Path("run"))[-1] >= 6
    Path("texts.jsonl").write_text(whole + whole.splitlines(keepends=True)[0])
    assert job("run", "--resume", corpus="texts.jsonl", steps=40) == 2
    assert "The corpus 'texts.jsonl' has changed since the run in 'run' began" in said(capsys)[1]
    Path("texts.jsonl").write_text(whole)
    assert job("run", "--resume", corpus="texts.jsonl", steps=40) == 0
    same_files()


def test_a_damaged_shard_of_parquet_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], job: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    Path("shards").mkdir()
    for part in (0, 1):
        rows = pyarrow.Table.from_pylist([{"text": text} for text in TEXTS[120 * part : 120 * part + 120]])
        pyarrow.parquet.write_table(rows, f"shards/{part}.parquet", row_group_size=20)
    data = bytearray(Path("shards/1.parquet").read_bytes())
    data[4:400] = b"\xff" * 396  # a page; the footer is whole
    Path("shards/1.parquet").write_bytes(data)
    assert job("run", corpus="shards") == 2
    assert "shards/1.parquet' is not readable as parquet" in said(capsys)[1]


class LocalHub:
    """Serves the rows of a dataset over HTTP, and answers with the next of `failures` first, while there are any."""

    def __init__(self, texts: list[str]) -> None:
        hub = self
        self.failures: list[int] = []
        self.asked = 0
        lines = [json.dumps({"text": text}) for text in texts]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked += 1
                if hub.failures:
                    return self.send_error(hub.failures.pop(0))
                data = "\n".join(lines[int(self.path.removeprefix("/")) :]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if hub.cut else data)
                hub.cut = False
                return None

            def log_message(self, *_: Any) -> None: ...

        self.cut = False  # the next answer breaks off
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def rows(self, hub_path: str, split: str, first_row: int) -> Iterator[dict[str, Any]]:
        address = f"http://127.0.0.1:{self.server.server_port}/{first_row}"
        with urllib.request.urlopen(address) as answer:
            expected = int(answer.headers["Content-Length"])
            got = 0
            for line in answer:
                got += len(line)
                if line.endswith(b"\n") or got == expected:
                    yield json.loads(line)
            if got < expected:
                raise ConnectionResetError("the answer broke off")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    from data_prep import sources

    served = LocalHub(TEXTS)
    monkeypatch.setattr(sources, "open_hub_split", served.rows)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_a_hub_that_is_busy_broken_and_away_for_a_while_changes_no_byte(
    job: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job("unbroken", corpus="hf://user/texts", steps=40) == 0

    def fails() -> None:
        hub.failures, hub.cut = [429, 500, 503, 429], True

    after(4, fails, monkeypatch)
    asked = hub.asked
    assert job("run", corpus="hf://user/texts", steps=40) == 0
    assert not hub.failures and not hub.cut and hub.asked > asked + 5
    same_files()


def test_a_hub_that_stays_away_ends_the_run_in_a_sentence_and_a_resume_goes_on(
    job: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("unbroken", corpus="hf://user/texts", steps=40) == 0
    after(4, lambda: setattr(hub, "failures", [503] * 200), monkeypatch)
    assert job("run", "--read_ahead", "2", corpus="hf://user/texts", steps=40) == 2
    out, error = said(capsys)
    assert "Could not read user/texts (split train) from the Hub after 100 tries" in error and "503" in error
    assert "is saved; a resume goes on from there" in out
    hub.failures = []
    assert job("run", "--resume", corpus="hf://user/texts", steps=40) == 0
    same_files()


def test_a_signal_while_the_hub_stays_away_saves_a_state_and_a_resume_goes_on(
    job: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from data_prep import sources
    from dictionary_learning import read_ahead

    waits, released = [], threading.Event()

    def wait(seconds: float) -> None:
        """Of the thread that reads, or of this one. The signal comes once: behind the run it would end the tests."""
        waits.append(seconds)
        if len(waits) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        released.wait()

    assert job("unbroken", corpus="hf://user/texts", steps=40) == 0
    after(4, lambda: setattr(hub, "failures", [503] * 200), monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "time", SimpleNamespace(sleep=wait))
        patch.setattr(read_ahead, "JOIN_S", 0.1)
        assert job("run", corpus="hf://user/texts", steps=40) == 143
    assert "Stopped by SIGTERM after step" in (out := said(capsys)[0]) and "its state is saved. Go on with:" in out
    assert len(waits) == 1, "it went on trying"
    hub.failures = []
    released.set()
    assert job("run", "--resume", corpus="hf://user/texts", steps=40) == 0
    same_files()


def test_a_reading_thread_that_dies_is_told_and_a_resume_ends_as_the_unbroken_run(tmp_path: Path) -> None:
    class Source:
        """Batches that a thread reads ahead, one of which kills it once."""

        dies = [9]

        def __init__(self) -> None:
            self.inner, self.given = stream(), 0

        def __iter__(self) -> Source:
            return self

        def __next__(self) -> Any:
            if self.dies == [self.given]:
                self.dies.clear()
                raise RuntimeError("the worker was killed")
            batch, self.given = next(self.inner), self.given + 1
            return batch

        def state_dict(self) -> dict[str, Any]:
            return {"inner": self.inner.state_dict(), "given": self.given}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.inner.load_state_dict(state["inner"])
            self.given = state["given"]

    run = TrainingRun(ReadAhead(Source(), 3), [trainer()], STEPS, save_dir=tmp_path)
    with pytest.raises(RuntimeError, match="the worker was killed"):
        run.run()
    assert states(tmp_path) == [9]
    resumed = trainSAE(ReadAhead(Source(), 1), [config()], STEPS, save_dir=tmp_path, resume=True)[0]
    assert same_bits(dict(resumed.state_dict()), dict(trainSAE(stream(), [config()], STEPS)[0].state_dict()))


def test_a_stream_that_ends_early_is_no_finished_run(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dictionary_learning.corpus import TextStream

    write_corpus(Path("texts.jsonl"))
    once = TextStream.__init__
    monkeypatch.setattr(TextStream, "__init__", lambda self, *a, **k: once(self, *a, **{**k, "epochs": 1}))
    assert job("run", corpus="texts.jsonl", steps=40) == 3
    assert "The activations ended after" in said(capsys)[0]
    record = json.loads(Path("run/run.json").read_text())
    assert record["status"] == "stopped: end of stream" and 0 < record["steps_done"] < 40
    assert Path("run/summary.csv").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_state_and_prints_how_to_go_on(
    number: int, code: int, job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("unbroken") == 0
    after(8, lambda: os.kill(os.getpid(), number), monkeypatch)
    assert job("run") == code
    out, _ = said(capsys)
    assert f"Stopped by {signal.Signals(number).name} after step 8; its state is saved. Go on with:" in out
    assert "--resume" in out.splitlines()[-1] and states(Path("run"))[-1] == 8
    assert job("run", "--resume") == 0
    same_files()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_last_state_is_written_ends_the_run_before_the_evaluation(
    number: int, code: int, job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dictionary_learning import storage

    assert job("unbroken") == 0
    true_save = storage.save_state

    def save_state(folder: Path, step: int, tree: Any) -> Path:
        if step == 20:
            os.kill(os.getpid(), number)
        return true_save(folder, step, tree)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_state", save_state)
        assert job("run") == code
    assert f"Stopped by {signal.Signals(number).name} after step 20; its state is saved" in said(capsys)[0]
    assert not Path("run/summary.csv").exists() and Path("run/trainer_0/ae.safetensors").exists()
    assert job("run", "--resume") == 0
    same_files()


def test_sigterm_in_the_evaluation_prints_how_to_go_on(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("dictionary_learning.evaluation.evaluate_dictionaries", terminated)
        assert job("run") == 143
    assert "the dictionaries are trained and saved. Go on with:" in said(capsys)[0]
    assert job("run", "--resume") == 0 and "Resuming at step 20 of 20" in said(capsys)[0]


def test_a_second_interrupt_does_not_wait_for_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dictionary_learning import storage

    stuck = threading.Event()
    monkeypatch.setattr(storage, "save_state", lambda *_: stuck.wait())  # a disk that hangs

    def twice(run: TrainingRun) -> None:
        run.save_state(wait=False)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    run = TrainingRun(stream(), [trainer()], STEPS, save_dir=tmp_path, callbacks=[at_step(3, twice)])
    with pytest.raises(KeyboardInterrupt):
        run.run()
    stuck.set()


def test_every_kind_of_data_error_leaves_a_state(tmp_path: Path) -> None:
    class Breaking:
        def __init__(self) -> None:
            self.inner = stream()

        def __iter__(self) -> Breaking:
            return self

        def __next__(self) -> Any:
            if self.inner.rows_drawn >= 5 * B:
                raise OSError("the cable was pulled")
            return next(self.inner)

        def state_dict(self) -> dict[str, Any]:
            return self.inner.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.inner.load_state_dict(state)

    messages = Messages()
    with pytest.raises(OSError, match="the cable was pulled"):
        TrainingRun(Breaking(), [trainer()], STEPS, save_dir=tmp_path, sinks=[messages]).run()
    assert states(tmp_path) == [5] and "The state of step 5 is saved; a resume goes on from there." in messages.texts
    done = trainSAE(stream(), [config()], STEPS, save_dir=tmp_path, resume=True)[0]
    assert same_bits(dict(done.state_dict()), dict(trainSAE(stream(), [config()], STEPS)[0].state_dict()))
