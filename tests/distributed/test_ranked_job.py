"""The main job on two ranks: started by torchrun, killed, gone on with on another number of ranks, started wrongly."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_launching import free_port, rank_environment
from safetensors.torch import load_file

from dictionary_learning import demo

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "dictionary_learning" / "demo.py")
LIMIT = 900  # seconds, on a very busy machine
CONFIG = """
from dictionary_learning.config import Sweep
from demo_config_original import PRESETS
SWEEP = Sweep(
    architectures=("top_k", "standard", "jump_relu"),
    sparsities={"top_k": {"k": (8,)}, "standard": {"l1_penalty": (0.1,)}, "jump_relu": {"target_l0": (8,)}},
)
"""
ARGUMENTS = [
    *("--num_tokens", "10240", "--batch_size", "256", "--widths", "64", "--buffer_contexts", "64"),
    *("--eval_tokens", "1500", "--layers", "1", "2", "--state_every", "10", "--log_steps", "5", "--no-report"),
]


DIES = """
import os, signal, time
from pathlib import Path
from dictionary_learning.training_run import TrainingRun

folder = Path(os.environ.get("DIES_IN", "nowhere"))
died = folder.with_suffix(".died")
one_step = TrainingRun._one_step

def deadly(run):  # as soon as there is a state, which the other rank began to write behind step 10
    one_step(run)
    while not (states := list((folder / "state").glob("step_*"))) and run.step > 10:
        time.sleep(0.01)
    if states:
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1" and "DIES_IN" in os.environ and not died.exists():
    TrainingRun._one_step = deadly
"""


def torchrun(save_dir: str, *arguments: str, restarts: int = 0, dies: bool = False) -> subprocess.Popen[str]:
    """The job on two ranks, of which the second is killed once if it `dies`; without restarts by our own launcher."""
    command = [sys.executable, "-m", "dictionary_learning.distributed", "--standalone", "--nproc_per_node", "2"]
    if restarts:
        command[2] = "torch.distributed.run"
    command += ["--max_restarts", str(restarts), *([DEMO] if restarts else ["train"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SAE_FACTORY_RANK_TIMEOUT": "600"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"DIES_IN": save_dir} if dies else {}
    command += ["--save_dir", save_dir, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a sweep of six dictionaries at two hook points."""
    shutil.copy(ROOT / "demo_config.py", tmp_path / "demo_config_original.py")
    (tmp_path / "demo_config.py").write_text(CONFIG + DIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def assert_same_run(run: Path, unbroken: Path, dictionaries: int = 6) -> None:
    """The same dictionaries, numbers and files, whoever wrote them."""
    for number in range(dictionaries):
        expected = load_file(unbroken / f"trainer_{number}" / "ae.safetensors")
        weights = load_file(run / f"trainer_{number}" / "ae.safetensors")
        for name, values in expected.items():
            torch.testing.assert_close(weights[name], values, rtol=1e-5, atol=1e-5)
        results = json.loads((run / f"trainer_{number}" / "eval_results.json").read_text())
        expected = json.loads((unbroken / f"trainer_{number}" / "eval_results.json").read_text())
        assert results == pytest.approx(expected, rel=1e-4)
    lines, expected_lines = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, unbroken)
    )
    key = ("step", "tokens", "trainer")
    assert [[line[k] for k in key] for line in lines] == [[line[k] for k in key] for line in expected_lines]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected_lines], rel=1e-4)
    names = [row["trainer"] for row in csv.DictReader((run / "summary.csv").open())]
    assert names == [row["trainer"] for row in csv.DictReader((unbroken / "summary.csv").open())]
    assert json.loads((run / "run.json").read_text())["status"] == "complete"


@pytest.mark.timeout(3 * LIMIT)
def test_a_rank_is_killed_and_any_number_of_ranks_goes_on(sweep: Path) -> None:
    unbroken, killed, moved = (sweep / name for name in ("unbroken", "killed", "moved"))
    launcher = torchrun("killed", *ARGUMENTS, dies=True)
    try:
        output = launcher.communicate(timeout=LIMIT)[0]
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "Another rank is gone or silent" in output and "--resume" in output
    assert "Rank 1 was ended by SIGKILL" in output and "Traceback" not in output
    assert json.loads((killed / "run.json").read_text())["status"].startswith("failed: Another rank is gone")
    assert not (killed / "summary.csv").exists()

    assert demo.main(["--save_dir", "unbroken", *ARGUMENTS]) == 0
    shutil.copytree(unbroken, moved)  # as it was when the last state but one had been written
    newest = sorted((moved / "state").glob("step_*"))[-1]
    shutil.rmtree(newest)
    shutil.rmtree(moved / "trainer_3")
    launcher = torchrun("moved", "--resume", *ARGUMENTS, restarts=1, dies=True)  # which then goes on by itself
    try:
        assert demo.main(["--save_dir", "killed", "--resume", *ARGUMENTS]) == 0
        output = launcher.communicate(timeout=2 * LIMIT)[0]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    assert output.count("Held-out results") == 1
    assert_same_run(killed, unbroken)
    assert_same_run(moved, unbroken)


@pytest.mark.timeout(2 * LIMIT)
def test_one_dictionary_is_split_over_two_ranks(sweep: Path) -> None:
    one = ["--architectures", "top_k", "--layers", "1", *ARGUMENTS, "--num_tokens", "5120"]
    launcher = torchrun("split", "--shard_latents", *one)
    try:
        output = launcher.communicate(timeout=LIMIT)[0]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    assert demo.main(["--save_dir", "whole", *one]) == 0
    assert_same_run(sweep / "split", sweep / "whole", dictionaries=1)


@pytest.mark.timeout(2 * LIMIT)
def test_a_wrong_launch_is_one_sentence_of_the_first_rank(sweep: Path) -> None:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, DEMO, "--save_dir", "wrong", *ARGUMENTS, "--seed", str(rank)],
            env=rank_environment(rank, 2, port, SAE_FACTORY_RANK_TIMEOUT="600"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], outputs
    sentence = "Error: Rank 1 differs from rank 0 in seed: start every rank with the same command"
    assert outputs[0][1].startswith(sentence) and outputs[0][1].count("\n") == 1, outputs
    assert outputs[1] == ("", "")
    assert not (sweep / "wrong").exists()
