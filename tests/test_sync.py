"""`sae-factory sync`: everything that a run left on disk arrives at Weights & Biases, once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_wandb import FakeWandb, Run, Server
from test_wandb import KEY, LOG_STEPS, STEPS, train

from dictionary_learning.cli import main as cli
from dictionary_learning.utils import load_dictionary

LOGGED = list(range(LOG_STEPS, STEPS + 1, LOG_STEPS))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "server")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fakes: list[FakeWandb] = []

    def put(fake: FakeWandb) -> FakeWandb:
        fakes.append(fake)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield put
    for fake in fakes:
        fake.released.set()


def whole(server: Server) -> None:
    """Both dictionaries are there, each with every line and one version of its artifact."""
    assert len(server.by_name()) == 2
    assert [[step for step, _ in run["history"]] for run in server.runs.values()] == [LOGGED, LOGGED]
    assert sorted(server.artifacts) == ["me/p/run-trainer_0:v0", "me/p/run-trainer_1:v0"]


def sync(folder: Path, *options: str) -> int:
    return cli(["sync", str(folder), "--wandb_project", "p", *options])


def test_a_run_never_logged_arrives_whole(
    tmp_path: Path, server: Server, install: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    originals = train(tmp_path / "run")
    install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    whole(server)
    out = capsys.readouterr().out
    assert "trainer_1: 10 lines sent; wandb://me/p/run-trainer_1:v0" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(iter(server.runs.values()))
    assert first["history"][0][1]["tokens"] == rows[0]["tokens"] and first["history"][0][1]["loss"] == rows[0]["loss"]
    assert first["config"]["k"] == 4 and first["metrics"]["*"] == "tokens"
    x = torch.randn(3, 8)
    for index, original in enumerate(originals):
        loaded, _ = load_dictionary(f"wandb://me/p/run-trainer_{index}:v0")
        assert torch.equal(loaded(x), original(x))


def test_a_second_sync_sends_nothing_but_what_is_new(
    tmp_path: Path, server: Server, install: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run")
    install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    again = install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    assert again.calls == [] and capsys.readouterr().out.count("all of it is there") == 2
    (tmp_path / "run" / "report.html").write_text("<p>late</p>")
    assert sync(tmp_path / "run") == 0
    assert again.calls.count("init") == 1 and "log" not in again.calls
    assert server.artifacts.pop("me/p/run-report:v0")["report.html"].read_text() == "<p>late</p>"
    whole(server)


def test_what_live_logging_sent_is_not_sent_again(tmp_path: Path, server: Server, install: Any) -> None:
    install(FakeWandb(server))
    train(tmp_path / "run", use_wandb=True, wandb_project="p")
    whole(server)
    again = install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    assert again.calls == []


@pytest.mark.parametrize("call", ["init", "log", "log_artifact", "wait", "finish"])
@pytest.mark.parametrize("after", [0, 1])
def test_live_logging_that_broke_off_is_made_whole(
    call: str, after: int, tmp_path: Path, server: Server, install: Any
) -> None:
    install(FakeWandb(server, fails_at=call, after=after))
    train(tmp_path / "run", use_wandb=True, wandb_project="p")
    install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    if call in ("wait", "finish"):  # it arrived, but nobody said so: W&B itself drops a version that changes nothing
        for name in [name for name in server.artifacts if name.endswith(":v1")]:
            same = {file: path.read_bytes() for file, path in server.artifacts.pop(name).items()}
            assert same == {f: p.read_bytes() for f, p in server.artifacts[name.replace(":v1", ":v0")].items()}
    whole(server)


@pytest.mark.parametrize("lines", [0, 3, 14])
def test_a_sync_that_broke_off_goes_on(
    lines: int, tmp_path: Path, server: Server, install: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run")
    install(FakeWandb(server, fails_at="log", after=lines))
    assert sync(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: Weights & Biases could not take trainer_") and "run the same command again" in error
    assert error.count("\n") == 1 and "***" in error and KEY not in error
    install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    whole(server)


def test_offline_runs_are_sent_when_the_network_is_back(
    tmp_path: Path, server: Server, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "offline", True)
    install(FakeWandb(Server(tmp_path / "disk")))
    train(tmp_path / "run", use_wandb=True, wandb_project="p")
    monkeypatch.setattr(Run, "offline", False)
    install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    whole(server)


def test_a_run_killed_in_the_middle_of_a_line_is_sent_up_to_it(tmp_path: Path, server: Server, install: Any) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    line = json.dumps({"step": 2, "tokens": 64, "trainer": "trainer_10", "loss": None, "l0": 4.0})
    (folder / "metrics.jsonl").write_text(line + "\n[1]\n" + line[:30])
    install(FakeWandb(server))
    assert sync(folder) == 0
    (run,) = server.runs.values()
    assert run["history"] == [(2, {"tokens": 64, "l0": 4.0})] and run["artifacts"] == []


def test_dictionaries_are_sent_in_the_order_of_their_numbers(tmp_path: Path, server: Server, install: Any) -> None:
    rows = [{"step": 1, "tokens": 8, "trainer": f"trainer_{i}", "l0": 4.0} for i in (10, 2, 0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    install(FakeWandb(server))
    assert sync(tmp_path) == 0
    assert [run["name"] for run in server.runs.values()] == [f"dictionary-trainer_{i}" for i in (0, 2, 10)]


def test_another_project_gets_runs_of_its_own(tmp_path: Path, server: Server, install: Any) -> None:
    train(tmp_path / "run")
    install(FakeWandb(server))
    assert sync(tmp_path / "run") == 0
    assert cli(["sync", str(tmp_path / "run"), "--wandb_project", "q", "--group", "renamed"]) == 0
    assert sorted((run["project"], run["group"]) for run in server.runs.values()) == [
        ("p", "run"),
        ("p", "run"),
        ("q", "renamed"),
        ("q", "renamed"),
    ]


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("no run", "There is nothing to send in"),
        ("offline", "WANDB_MODE is 'offline', but a sync needs the network"),
        ("offline by its settings", "its settings say offline"),
        ("not installed", "Weights & Biases is not installed"),
        ("a damaged marker", "wandb.json' is damaged: delete it"),
        ("another group", "The run was logged in the group 'run'"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    trouble: str,
    sentence: str,
    tmp_path: Path,
    server: Server,
    install: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(FakeWandb(server))
    folder = tmp_path / "run"
    if trouble != "no run":
        train(folder)
    options: tuple[str, ...] = ()
    if trouble == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    elif trouble == "offline by its settings":
        monkeypatch.setattr(Run, "offline", True)
    elif trouble == "not installed":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif trouble == "a damaged marker":
        (folder / "wandb.json").write_text('{"runs": {"trainer_0": {}}, "group": "run"}')
    elif trouble == "another group":
        assert sync(folder) == 0
        options = ("--group", "other")
    assert sync(folder, *options) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("Error: ") and error.count("\n") == 1
