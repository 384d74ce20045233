"""The record is whole and strict, and no sink can stop the training."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dictionary_learning import tracking
from dictionary_learning.errors import UserError
from dictionary_learning.tracking import JsonlSink, ProgressSink, SilentSink, Tracker, WandbSink

VALUES = {"loss": 0.5, "l0": 32.0, "frac_variance_explained": 0.9, "nz_frac": 0.25, "lr": 1e-3}
CONFIGS: dict[str, dict[str, Any]] = {"trainer_0": {"wandb_name": "TopK", "k": 8}, "trainer_1": {}}


def strict(line: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def steps(path: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["trainer"]) for row in map(strict, path.read_text().splitlines())]


# ---------------------------------------------------------------------------------------------- the record


def test_one_complete_line_a_dictionary_and_step_in_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.start(0, CONFIGS)
    assert path.read_text() == ""
    bad = {"loss": math.nan, "l0": math.inf, "lr": -math.inf}
    for step in (5, 10):
        sink.metrics(step, step * 100, {"trainer_0": VALUES, "trainer_1": VALUES | bad})
        assert path.read_text().endswith("}\n"), "a line must be on disk when its step is logged"
    rows = [strict(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"step": 5, "tokens": 500, "trainer": "trainer_0", **VALUES}
    assert rows[3] == {"step": 10, "tokens": 1000, "trainer": "trainer_1", **VALUES} | dict.fromkeys(bad)


def test_a_resumed_run_drops_the_lines_it_repeats_and_those_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.start(0, CONFIGS)
    for step in (5, 10, 15):
        sink.metrics(step, step, {"trainer_0": VALUES, "trainer_1": VALUES})
    kept = path.read_text().splitlines(keepends=True)[:4]
    with path.open("ab") as handle:
        handle.write(b'{"tokens": 1}\n[5]\n7\n{"step": null}\n\xff\xfe\n{"step": 1, "trai')
    resumed = JsonlSink(path)
    resumed.start(12, CONFIGS)
    assert path.read_text() == "".join(kept)
    resumed.metrics(15, 15, {"trainer_0": VALUES})
    assert steps(path) == [(s, f"trainer_{i}") for s in (5, 10) for i in (0, 1)] + [(15, "trainer_0")]


def test_a_run_that_begins_anew_begins_an_empty_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    JsonlSink(path).start(0, CONFIGS)
    assert path.read_text() == ""


def test_a_resumed_run_without_a_record_begins_one(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "metrics.jsonl").start(12, CONFIGS)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# ---------------------------------------------------------------------------------------------- one stream, many sinks


class Recorder(SilentSink):
    """Writes every event down; fails at one kind of event when told to."""

    def __init__(self, fails_at: str = "") -> None:
        self.events: list[tuple[Any, ...]] = []
        self.fails_at = fails_at

    def _take(self, *event: Any) -> None:
        self.events.append(event)
        if event[0] == self.fails_at:
            raise ConnectionError("the logger's server is gone")

    def start(self, *arguments: Any) -> None:
        self._take("start", *arguments)

    def advance(self, *arguments: Any) -> None:
        self._take("advance", *arguments)

    def metrics(self, *arguments: Any) -> None:
        self._take("metrics", *arguments)

    def message(self, text: str) -> None:
        self._take("message", text)

    def finish(self, failed: bool) -> None:
        self._take("finish", failed)


def play(tracker: Tracker) -> list[tuple[Any, ...]]:
    """Send one of each event, two of the middle ones; the events as a sink sees them."""
    tracker.start(0, CONFIGS)
    for step in (1, 2):
        tracker.advance(step, step * 10)
        tracker.metrics(step, step * 10, {"trainer_0": VALUES})
    tracker.message("text")
    tracker.finish()
    middle = [
        event for s in (1, 2) for event in (("advance", s, s * 10), ("metrics", s, s * 10, {"trainer_0": VALUES}))
    ]
    return [("start", 0, CONFIGS), *middle, ("message", "text"), ("finish", False)]


def test_every_sink_sees_every_event_in_order() -> None:
    record, sinks = Recorder(), [Recorder(), Recorder()]
    expected = play(Tracker(record, sinks))
    assert record.events == sinks[0].events == sinks[1].events == expected


@pytest.mark.parametrize("event", ["start", "advance", "metrics", "message", "finish"])
def test_a_failing_sink_is_switched_off_while_the_others_go_on(event: str, caplog: pytest.LogCaptureFixture) -> None:
    record, broken, well = Recorder(), Recorder(event), Recorder()
    with caplog.at_level(logging.WARNING):
        expected = play(Tracker(record, [broken, well]))
    assert record.events == well.events == expected
    assert broken.events == expected[: [e[0] for e in expected].index(event) + 1]
    assert [entry.getMessage() for entry in caplog.records] == ["Recorder is switched off: the logger's server is gone"]


def test_a_record_that_cannot_be_written_stops_the_run() -> None:
    with pytest.raises(ConnectionError):
        play(Tracker(Recorder("metrics"), []))


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(SilentSink):
        def advance(self, step: int, tokens: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(Tracker(None, [Interrupted()]))


# ---------------------------------------------------------------------------------------------- the progress bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def test_the_log_line_says_where_the_run_is(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(10_000, ["trainer_1"], bar=False)
    sink.start(0, CONFIGS)
    sink.advance(1, 1000)
    sink.metrics(1, 1000, {"trainer_0": VALUES, "trainer_1": VALUES | {"dead_latents": 3.0}})
    clock.now += 10
    sink.advance(2, 5000)
    sink.metrics(2, 5000, {"trainer_0": VALUES, "trainer_1": VALUES | {"loss": math.nan}})
    sink.message("the end is near")
    sink.finish(False)
    numbers = "l0 32, frac_variance_explained 0.9, nz_frac 0.25, lr 0.001"
    assert capsys.readouterr().out.splitlines() == [
        f"trainer_1: step 1, loss 0.5, {numbers}  (starting)",
        f"trainer_1: step 2, loss nan, {numbers}  (400 tok/s, 12 s left)",
        "the end is near",
    ]


def test_the_rate_of_a_resumed_run_counts_only_its_own_tokens(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ProgressSink(100_000, ["trainer_0"], bar=False)
    sink.start(50, CONFIGS)
    sink.advance(51, 51_000)
    clock.now += 2
    sink.advance(52, 52_000)
    sink.metrics(52, 52_000, {"trainer_0": VALUES})
    assert "(500 tok/s, 96 s left)" in capsys.readouterr().out


def test_the_bar_shows_the_chosen_few_and_the_lines_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    sink = ProgressSink(4000, ["trainer_1"], bar=True, lines=False)
    sink.start(0, CONFIGS)
    for step in (1, 2):
        sink.advance(step, step * 2000)
        sink.metrics(step, step * 2000, {"trainer_0": VALUES, "trainer_1": VALUES})
    sink.finish(False)
    last = re.split(r"[\r\n]+", screen.getvalue().strip())[-1]
    assert "4.00k/4.00k" in last and "100%" in last
    assert "trainer_1: L0 32 FVE 0.900" in last and "trainer_0" not in last
    assert capsys.readouterr().out == ""


def test_there_is_no_bar_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    expected = play(Tracker(None, [ProgressSink(100, [])]))
    captured = capsys.readouterr()
    assert expected and captured.err == "" and captured.out == "text\n"


def test_a_run_that_ends_before_it_starts_can_be_finished() -> None:
    ProgressSink(100, []).finish(True)


# ---------------------------------------------------------------------------------------------- Weights & Biases


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, a LevelDB log: blocks of 32 KiB, pieces with a header of crc, length and type."""
    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:  # too short for a header: padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        at += 7 + length
        if at > len(data):  # still being written
            return
        record += data[at - length : at]
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def finished_runs(folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """`saved_runs`, once wandb's service has written `count` runs to their end; it writes on after `finish`."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        runs = saved_runs(folder)
        if sum("exit" in run for run in runs.values()) == count:
            return runs
        time.sleep(0.05)
    raise AssertionError(f"wandb did not finish {count} runs: {saved_runs(folder)}")


def saved_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """What the .wandb files below a folder hold: display name -> group, project, config, history, exit code."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = {}
    for path in folder.rglob("*.wandb"):
        found: dict[str, Any] = {"history": []}
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                found |= {name: getattr(record.run, name) for name in ("display_name", "run_group", "project")}
                found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found["history"].append(row)
            if record.HasField("exit"):
                found["exit"] = record.exit.exit_code
        runs[found.get("display_name", path.name)] = found
    return runs


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # whoever calls home hears nothing
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_wandb_offline_makes_one_run_a_dictionary_in_one_group(tmp_path: Path, offline: None) -> None:
    sink = WandbSink(project="", entity="", group="sweep-7", directory=tmp_path, config={"corpus": "texts", "k": 0})
    tracker = Tracker(None, [sink])
    tracker.start(0, {"trainer_0": CONFIGS["trainer_0"] | {"lr": math.nan}, "trainer_1": {}})
    for step in (10, 20):
        tracker.metrics(step, step * 100, {"trainer_0": VALUES, "trainer_1": VALUES | {"loss": float(step)}})
    tracker.finish(failed=True)
    assert tracker.sinks == [sink], "the sink was switched off"

    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert not list((tmp_path / "wandb").glob("run-*")), "a run went online"
    runs = finished_runs(tmp_path, 2)
    assert sorted(runs) == ["TopK-trainer_0", "dictionary-trainer_1"]
    assert {(run["run_group"], run["project"], run["exit"]) for run in runs.values()} == {("sweep-7", "sae-factory", 1)}
    configs = {name: {key: run["config"].get(key) for key in ("corpus", "k", "lr")} for name, run in runs.items()}
    assert configs == {
        "TopK-trainer_0": {"corpus": "texts", "k": 8, "lr": None},  # a dictionary's own setting goes before the facts
        "dictionary-trainer_1": {"corpus": "texts", "k": 0, "lr": None},
    }
    history = runs["dictionary-trainer_1"]["history"]
    assert [(row["_step"], row["tokens"], row["loss"], row["l0"]) for row in history] == [
        (10, 1000, 10.0, 32.0),
        (20, 2000, 20.0, 32.0),
    ]


def test_without_wandb_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'sae-factory\[wandb\]', or leave out --use_wandb"):
        WandbSink(project="p", entity=None, group="g", directory=None)
