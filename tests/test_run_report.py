"""A run and what is made of it afterwards: whose analysis may take whose place, and what is old says so."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from dictionary_learning import demo
from dictionary_learning.analysis import one_pass
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.cli import main as cli
from dictionary_learning.report.data import read_run
from dictionary_learning.report.page import _analysis

RUN = "run --layers 1 --architectures top_k --batch_size 256 --widths 64 --buffer_contexts 64 --eval_tokens 600"
SHORT = "--num_tokens 2048"
SWEEP = """
from dictionary_learning.config import Sweep
from demo_config_original import PRESETS
SWEEP = Sweep(architectures=("top_k",), sparsities={"top_k": {"k": (4, 8)}})
"""

pytestmark = pytest.mark.usefixtures("sweep_config")


@pytest.fixture
def sweep_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two dictionaries, of which the run's own report analyses one."""
    shutil.copy(Path(__file__).resolve().parent.parent / "demo_config.py", tmp_path / "demo_config_original.py")
    (tmp_path / "demo_config.py").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def train(command: str) -> int:
    return demo.main(["--save_dir", *shlex.split(command)])


def analyze(command: str) -> int:
    return cli(["analyze", "run", "--tokens", "900", *shlex.split(command)])


def analysed() -> list[str]:
    return AnalysisFolder("run/analysis").names


def notes() -> list[str]:
    """At the head of the report."""
    _analysis(Path("run"), data := read_run(Path("run")))
    return [note["text"] for note in data.notes]


def interrupt_the_analysis(patch: pytest.MonkeyPatch) -> None:
    true_run = one_pass.OnePass.run

    def run(self: one_pass.OnePass, *given: object) -> bool:
        signal.raise_signal(signal.SIGINT)
        return true_run(self, *given)  # type: ignore[arg-type]

    patch.setattr(one_pass.OnePass, "run", run)


def test_a_resume_needs_no_setting_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(f"{RUN} {SHORT} --no-report") == 0
    before = json.loads(Path("run/run.json").read_text())["config"]
    capsys.readouterr()
    assert train("run --resume --num_tokens 3072 --no-report") == 0
    assert "Resuming at step 8 of 12" in capsys.readouterr().out
    assert json.loads(Path("run/run.json").read_text())["config"] == before | {"num_tokens": 3072}
    assert train("run --resume --layers 2 --no-report") == 2  # what is given counts
    assert "began with other settings" in capsys.readouterr().err


def test_an_analysis_of_the_run_gives_way_to_the_users_and_that_to_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(f"{RUN} {SHORT}") == 0
    (own,) = analysed()
    automatic = Path("run/analysis/analysis.json").read_bytes()
    assert analyze("--dry_run") == 0
    assert Path("run/analysis/analysis.json").read_bytes() == automatic
    assert analyze("") == 0
    assert analysed() == ["trainer_0", "trainer_1"]
    users = Path("run/analysis/analysis.json").read_bytes()
    capsys.readouterr()
    assert analyze(f"--dictionaries {own}") == 2
    assert "is complete, of other settings (dictionaries): give the same, another folder" in capsys.readouterr().err
    assert train("run --resume") == 0
    assert "The report takes the analysis that is there" in capsys.readouterr().out
    assert Path("run/analysis/analysis.json").read_bytes() == users


def test_an_interrupt_in_the_analysis_ends_as_one_and_its_advice_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_the_analysis(patch)
        assert train(f"{RUN} {SHORT}") == 130
    said = capsys.readouterr().out
    assert "Stopped in the analysis; the run is complete." in said
    assert not Path("run/report.html").exists()
    commands = said.strip().splitlines()[-1].strip().split(" && ")
    assert [command.split()[:2] for command in commands] == [["sae-factory", "analyze"], ["sae-factory", "report"]]
    for command in commands:
        assert cli(command.split()[1:] + (["--tokens", "900"] if "analyze" in command else [])) == 0
    assert analysed() == ["trainer_0", "trainer_1"] and Path("run/report.html").is_file()


def test_what_was_analysed_before_it_was_trained_on_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(f"{RUN} {SHORT}") == 0
    (name,) = analysed()
    assert notes() == []
    steer = ["steer", f"run/{name}", *"--features 0 --mode add --value 2 --relative --prompts kidney".split()]
    describe = ["describe", "run", "--dry_run"]
    capsys.readouterr()
    assert train("run --resume --num_tokens 3072 --no-report") == 0
    assert "run/report.html was made before this: sae-factory analyze run" in capsys.readouterr().out
    for command in (steer, describe):
        assert cli(command) == 2
        assert f"{name} was trained on since it was analysed" in capsys.readouterr().err
    assert notes() == [f"{name}: trained on since the analysis, which tells of the weights before. To make it again:"]
    assert train("run --resume --num_tokens 3072") == 0  # whose own analysis is of no further use
    assert notes() == []
    other = {"trainer_0": "trainer_1", "trainer_1": "trainer_0"}[analysed()[0]]
    assert cli(["steer", f"run/{other}", *steer[2:]]) == 2
    said = capsys.readouterr().err
    assert "add it with `sae-factory analyze" in said and f"run --dictionaries {name} {other} --overwrite`" in said
