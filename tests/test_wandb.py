"""Weights & Biases beside training: whatever it does, the weights, the record and the time stay what they are."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_wandb import CALLS, FakeWandb, Server
from test_tracking import wandb_records

from dictionary_learning import tracking, weights_and_biases
from dictionary_learning.errors import UserError
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

ROOT = Path(__file__).resolve().parent.parent
KEY = "planted-" + "k" * 33
STEPS, LOG_STEPS = 20, 2


def train(folder: Path | None, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(32, 8, generator=generator) for _ in range(STEPS)]
    shared = {"activation_dim": 8, "dict_size": 16, "layer": 0, "lm_name": "toy", "seed": 0}
    configs = [{"trainer": TopKTrainer, "k": 4, **shared}, {"trainer": StandardTrainer, **shared}]
    return trainSAE(data, configs, STEPS, save_dir=folder, log_steps=LOG_STEPS, **options)


@pytest.fixture(scope="module")
def unlogged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without Weights & Biases."""
    folder = tmp_path_factory.mktemp("unlogged")
    train(folder)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "server")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Put a fake in wandb's place; what hangs in it goes on when the test is over."""
    fakes = []

    def put(fake: FakeWandb) -> FakeWandb:
        fakes.append(fake)
        if fake.hangs_at:  # else the fake answers at once, but for how busy the machine is
            monkeypatch.setattr(weights_and_biases, "PATIENCE", 0.5)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield put
    for fake in fakes:
        fake.released.set()


def same_result(folder: Path, unlogged: Path) -> None:
    for file in (
        "metrics.jsonl",
        *(f"trainer_{i}/{name}" for i in (0, 1) for name in ("ae.safetensors", "config.json")),
    ):
        assert (folder / file).read_bytes() == (unlogged / file).read_bytes(), file


# ------------------------------------------------------------------------------------------------- all is well


def test_a_run_a_dictionary_with_config_metrics_by_token_and_artifacts(
    tmp_path: Path, server: Server, install: Any, unlogged: Path
) -> None:
    install(FakeWandb(server))
    folder = tmp_path / "first run"
    folder.mkdir()
    (folder / "report.html").write_text("<p>report</p>")
    train(folder, use_wandb=True, wandb_project="p", wandb_entity="e", run_cfg={"corpus": "toy"})
    same_result(folder, unlogged)
    runs = server.by_name()
    assert len(runs) == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for index, run in enumerate(runs.values()):
        name = f"trainer_{index}"
        assert (run["project"], run["entity"], run["group"], run["exit"]) == ("p", "e", "first run", 0)
        assert run["config"]["activation_dim"] == 8 and run["config"]["corpus"] == "toy"
        assert run["metrics"] == {"tokens": None, "*": "tokens"}
        expected = [
            (row["step"], {k: v for k, v in row.items() if k not in ("step", "trainer") and v is not None})
            for row in rows
            if row["trainer"] == name
        ]
        assert run["history"] == expected and len(expected) == STEPS // LOG_STEPS
        reports = ["e/p/first-run-report:v0"] if index == 0 else []
        assert run["artifacts"] == [f"e/p/first-run-{name}:v0", *reports]
    assert server.artifacts["e/p/first-run-report:v0"]["report.html"].read_text() == "<p>report</p>"
    marker = json.loads((folder / "wandb.json").read_text())
    assert [entry["step"] for entry in marker["runs"].values()] == [STEPS, STEPS]
    assert KEY not in (folder / "wandb.json").read_text()


def test_a_dictionary_comes_back_from_its_artifact(tmp_path: Path, server: Server, install: Any) -> None:
    install(FakeWandb(server))
    trained = train(tmp_path / "run", use_wandb=True, wandb_project="p", wandb_entity="e")
    x = torch.randn(5, 8)
    for index, original in enumerate(trained):
        for version in (":v0", ":latest", ""):
            loaded, config = load_dictionary(f"wandb://e/p/run-trainer_{index}{version}")
            assert torch.equal(loaded.encode(x), original.encode(x))
            assert config["trainer"]["lm_name"] == "toy"


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("wandb://nothing", "write wandb://entity/project/name:version"),
        ("wandb://a/b/c/d:v0", "write wandb://entity/project/name:version"),
        ("wandb://e/p/absent:v0", "can't be had from Weights & Biases: artifact 'e/p/absent:v0' not found"),
    ],
)
def test_a_wrong_reference_is_one_sentence(server: Server, install: Any, reference: str, sentence: str) -> None:
    install(FakeWandb(server))
    with pytest.raises(UserError, match="artifact") as caught:
        load_dictionary(reference)
    assert sentence in str(caught.value)


def test_artifacts_and_results_wait_for_the_evaluation(tmp_path: Path, server: Server, install: Any) -> None:
    """Training is over before the evaluation is: what it writes still gets into the runs."""
    install(FakeWandb(server))
    sink = tracking.WandbSink(project="p", entity="e", group="g", directory=tmp_path)
    sink.start(0, {"trainer_0": {}})
    sink.metrics(5, 50, {"trainer_0": {"loss": 1.0, "l0": float("nan")}})
    sink.finish(False)
    (tmp_path / "trainer_0").mkdir()
    for name in ("config.json", "ae.safetensors"):
        (tmp_path / "trainer_0" / name).write_text("{}")
    (tmp_path / "trainer_0" / "eval_results.json").write_text('{"l0": 4.5}')
    sink.close()
    sink.close()
    (run,) = server.runs.values()
    assert run["summary"] == {"eval/l0": 4.5}
    assert run["history"] == [(5, {"tokens": 50, "loss": 1.0})]
    assert set(server.artifacts["e/p/g-trainer_0:v0"]) == {"config.json", "ae.safetensors", "eval_results.json"}


def test_the_main_job_sends_its_evaluation(
    tmp_path: Path, server: Server, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dictionary_learning import demo

    install(FakeWandb(server))
    monkeypatch.chdir(tmp_path)
    sizes = "--num_tokens 4096 --batch_size 512 --widths 64 --buffer_contexts 64 --eval_tokens 500 --no-report".split()
    config = "from dictionary_learning.config import Sweep\nfrom demo_config_original import PRESETS\n"
    (tmp_path / "demo_config_original.py").write_text((ROOT / "demo_config.py").read_text())
    (tmp_path / "demo_config.py").write_text(config + "SWEEP = Sweep(('top_k',), {'top_k': {'k': (8,)}})\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.main(["--save_dir", "run", "--use_wandb", "--wandb_entity", "e", *sizes]) == 0
    (run,) = server.runs.values()
    results = json.loads((tmp_path / "run" / "trainer_0" / "eval_results.json").read_text())
    assert run["summary"] == {f"eval/{name}": value for name, value in results.items()}
    assert (run["project"], run["group"], run["exit"]) == ("sae-factory", "run", 0)
    assert "eval_results.json" in server.artifacts["e/sae-factory/run-trainer_0:v0"]


def test_training_that_fails_ends_its_runs_as_failed(tmp_path: Path, server: Server, install: Any) -> None:
    install(FakeWandb(server))

    def fail(run: Any, step: int) -> None:
        if step == 7:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path / "run", use_wandb=True, callbacks=[fail])
    assert [run["exit"] for run in server.runs.values()] == [1, 1]
    assert [[step for step, _ in run["history"]] for run in server.runs.values()] == [[2, 4, 6]] * 2
    assert not server.artifacts


def test_a_resumed_run_goes_on_in_its_runs_and_sends_what_was_missing(
    tmp_path: Path, server: Server, install: Any
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")

    def part(steps: range, start: int, closed: bool) -> None:
        sink = tracking.WandbSink(project="p", entity="e", group="g", directory=tmp_path)
        sink.start(start, {"trainer_0": {}})
        for step in steps:
            with (tmp_path / "metrics.jsonl").open("a") as handle:
                handle.write(json.dumps({"step": step, "tokens": step, "trainer": "trainer_0", "loss": 1.0}) + "\n")
            sink.metrics(step, step, {"trainer_0": {"loss": 1.0}})
        sink.finish(not closed)
        sink.close()

    install(FakeWandb(server, fails_at="log", after=2))
    part(range(1, 6), 0, closed=False)  # lines 1 and 2 arrive
    install(FakeWandb(server))
    part(range(6, 9), 5, closed=True)
    (run,) = server.runs.values()
    assert [step for step, _ in run["history"]] == list(range(1, 9))


# ------------------------------------------------------------------------------------------------- all is not well


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["hangs_at", "fails_at"])
def test_a_logger_that_hangs_or_fails_costs_nothing_but_its_log(
    how: str,
    call: str,
    tmp_path: Path,
    server: Server,
    install: Any,
    unlogged: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    install(FakeWandb(server, **{how: call}))
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", use_wandb=True)  # which ends, though the logger that hangs does not
    same_result(tmp_path / "run", unlogged)
    (warning,) = [entry.getMessage() for entry in caplog.records]
    reason = "it does not answer" if how == "hangs_at" else "the key *** is not valid"
    assert reason in warning and "sae-factory sync " in warning
    captured = capfd.readouterr()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert KEY not in warning + captured.out + captured.err
    assert not any(KEY.encode() in data for data in written)


def test_what_does_not_fit_into_the_queue_is_left_to_sync(
    tmp_path: Path, server: Server, install: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "QUEUE_LIMIT", 3)
    fake = install(FakeWandb(server, hangs_at="init"))
    monkeypatch.setattr(weights_and_biases, "PATIENCE", 60.0)
    sink = tracking.WandbSink(project="p", entity="e", group="g", directory=tmp_path)
    sink.start(0, {"trainer_0": {}})
    while "init" not in fake.calls:
        time.sleep(0.01)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 50):
            sink.metrics(step, step, {"trainer_0": {"loss": 1.0}})
    fake.hangs_at = ""
    fake.released.set()
    sink.close()
    (run,) = server.runs.values()
    assert [step for step, _ in run["history"]] == [1, 2, 3], "a hole in the log can't be filled later"
    assert run["exit"] == 0
    assert [entry.getMessage().count("log entries behind") for entry in caplog.records] == [1]


def test_without_a_folder_nothing_is_promised_for_later(
    server: Server, install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    install(FakeWandb(server, fails_at="init"))
    with caplog.at_level(logging.WARNING):
        assert len(train(None, use_wandb=True)) == 2
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert "training goes on" in warning and "sync" not in warning


# ------------------------------------------------------------------------------------------------- the real wandb

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_wandb
from dictionary_learning import weights_and_biases
weights_and_biases.PATIENCE = {patience}
test_wandb.train(Path({folder!r}), use_wandb=True)
"""


@pytest.fixture
def own_home(tmp_path: Path) -> dict[str, str]:
    """An environment in which wandb finds no key and writes nothing outside the test's folder."""
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "WANDB_BASE_URL": "http://127.0.0.1:9"}


def in_a_process(folder: Path, environment: dict[str, str], patience: float) -> str:
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), patience=patience)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("trouble", ["no key", "a bad key", "nobody listens", "nobody answers"])
def test_training_ends_well_and_soon_where_wandb_can_not(
    trouble: str, tmp_path: Path, own_home: dict[str, str], unlogged: Path
) -> None:
    key = {"no key": "", "a bad key": "planted-key"}.get(trouble, KEY)
    if key:
        own_home["WANDB_API_KEY"] = key
    with socket.create_server(("127.0.0.1", 0)) as mute:  # it accepts, and says nothing
        if trouble == "nobody answers":
            own_home["WANDB_BASE_URL"] = f"http://127.0.0.1:{mute.getsockname()[1]}"
        said = in_a_process(tmp_path / "run", own_home, patience=2.0)
    same_result(tmp_path / "run", unlogged)
    assert "Weights & Biases is switched off" in said and "sae-factory sync" in said and "Traceback" not in said
    if key:
        assert key not in said
        ours = [path for path in (tmp_path / "run").rglob("*") if "wandb" not in path.parts and path.is_file()]
        assert len(ours) >= 5 and not any(key.encode() in path.read_bytes() for path in ours)


def test_offline_the_runs_stay_on_disk_with_token_axis_and_artifacts(
    tmp_path: Path, own_home: dict[str, str], unlogged: Path
) -> None:
    said = in_a_process(tmp_path / "run", own_home | {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, patience=60.0)
    same_result(tmp_path / "run", unlogged)
    assert "switched off" not in said and KEY not in said
    assert not any(KEY.encode() in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((tmp_path / "run" / "wandb").rglob("*.wandb")):
        axes, artifacts, history = {}, [], 0
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("metric"):
                axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            if record.HasField("artifact"):
                artifacts.append((record.artifact.name, sorted(e.path for e in record.artifact.manifest.contents)))
            if record.HasField("request") and record.request.HasField("log_artifact"):
                artifact = record.request.log_artifact.artifact
                artifacts.append((artifact.name, sorted(e.path for e in artifact.manifest.contents)))
            history += record.HasField("history")
        assert axes["*"] == "tokens" and history == STEPS // LOG_STEPS
        found += artifacts
    files = ["ae.safetensors", "config.json"]
    assert sorted(found) == [("run-trainer_0", files), ("run-trainer_1", files)]
    marker = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert [(entry["step"], entry["sent"]) for entry in marker["runs"].values()] == [(0, {}), (0, {})]
