"""An analysis that was stopped, killed or begun otherwise: the same bytes, or a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from analysis_cases import SMALL, files_of, make_dictionary, make_run, make_sentence_run, write_texts

from data_prep.embedded import MODEL_DIR
from dictionary_learning.analysis import job, one_pass
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.job import Stopped, analyze
from dictionary_learning.analysis.one_pass import Measures
from dictionary_learning.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
KILLED_BEHIND_A_STATE = """
import os, signal, sys
from dictionary_learning import storage
from dictionary_learning.analysis import command
save_state = storage.save_state
def deadly(*arguments):
    save_state(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
storage.save_state = deadly
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("unit", ["token", "text"])
def test_a_stopped_analysis_goes_on_to_the_same_bytes(
    unit: str, original: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the pass (before any state, and behind one), stopped by a signal, and killed while it wrote files."""
    options: dict[str, Any] = {"measures": Measures(**SMALL), "state_every": 3}
    if unit == "text":
        run = make_sentence_run(tmp_path)
        options["measures"] = Measures(**SMALL | {"tokens": None})
        analyze(run, **options)
        wanted = files_of(run / "analysis")
        shutil.rmtree(run / "analysis")
    else:
        wanted = files_of(original / "analysis")
    take, taken = one_pass.OnePass._take, []

    def killed_at(batches: tuple[int, ...]) -> Any:
        def take_or_die(self: Any, batch: Any) -> None:
            if len(taken) in batches:
                taken.append(None)
                raise MemoryError
            if len(taken) == 8:
                signal.raise_signal(signal.SIGTERM)
            taken.append(take(self, batch))

        return take_or_die

    monkeypatch.setattr(one_pass.OnePass, "_take", killed_at((1, 6)))
    for _ in range(2):
        with pytest.raises(MemoryError):
            analyze(run, **options)
    states = run / "analysis" / "state"
    assert [path.name for path in states.glob("step_*")] == ["step_000000003"]
    with pytest.raises(Stopped, match="SIGTERM"):
        analyze(run, **options)
    assert (states / "step_000000005").is_dir()  # two batches further on
    with pytest.raises(UserError, match="not complete"):
        AnalysisFolder.open(run)
    if unit == "token":
        write = job.write_dictionary

        def write_or_die(folder: Any, subject: Any, *args: Any, **facts: Any) -> None:
            if subject.name == "trainer_1":
                raise MemoryError
            write(folder, subject, *args, **facts)

        monkeypatch.setattr(job, "write_dictionary", write_or_die)
        with pytest.raises(MemoryError):
            analyze(run, **options)
        monkeypatch.setattr(job, "write_dictionary", write)
    analyze(run, **options)
    found = files_of(run / "analysis")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_an_analysis_whose_process_was_killed_goes_on(
    original: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", KILLED_BEHIND_A_STATE, str(run), "--tokens", "2000", "--top", "3"]
    command += ["--samples", "6", "--window", "8", "--ablate", "5", "--state_every", "1", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((run / "analysis" / "analysis.json").read_text())["status"] == "running"
    analyze(run, measures=Measures(**SMALL), device="cpu")
    assert "Going on after" in capsys.readouterr().out
    found, wanted = files_of(run / "analysis"), files_of(original / "analysis")
    assert [name for name in wanted if found.get(name) != wanted[name]] == []


def test_a_complete_analysis_is_not_made_again(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass.OnePass, "run", None)
    assert analyze(original, measures=Measures(**SMALL)).info["rows"] == 2000


def test_other_settings_are_named_and_can_replace_it(run: Path) -> None:
    analyze(run, measures=Measures(**SMALL))
    with pytest.raises(UserError, match=r"other settings \(tokens, window, corpora, against\).*--overwrite"):
        analyze(
            run,
            against=[f"other={MODEL_DIR.parent / 'samples'}"],
            measures=Measures(**SMALL | {"tokens": 900, "window": 9}),
        )
    for other in ({"dictionaries": ["trainer_0"]}, {"hook_point": "resid_post_layer_1"}):
        with pytest.raises(UserError, match=r"other settings \(dictionaries\)"):
            analyze(run, **other, measures=Measures(**SMALL))
    folder = AnalysisFolder.open(run)
    for name in ("trainer_0", "trainer_1"):
        folder.write_descriptions(name, {3: {"description": "x"}})
    new = make_run(run.parent / "new", [make_dictionary(0), make_dictionary(7)])
    shutil.rmtree(run / "trainer_1")
    shutil.copytree(new / "trainer_1", run / "trainer_1")
    with pytest.raises(UserError, match=r"other settings \(dictionaries\)"):
        analyze(run, measures=Measures(**SMALL))
    folder = analyze(run, measures=Measures(**SMALL | {"ablate": 0}), overwrite=True)
    assert folder.descriptions("trainer_0") and not folder.descriptions("trainer_1")  # of another dictionary


def test_what_failed_before_it_measured_anything_binds_nobody(run: Path, tmp_path: Path) -> None:
    text = write_texts(tmp_path / "a.jsonl", ["The nerve supplies the muscle."] * 3, source="medqa")
    with pytest.raises(UserError, match="name it otherwise, as in --against other=PATH"):
        analyze(run, against=[f"medqa={text}"], measures=Measures(**SMALL))
    folder = analyze(run, against=[f"other={text}"], measures=Measures(**SMALL))
    assert "other" in folder.info["corpora"]
    with pytest.raises(UserError, match=r"other settings \(corpora\)"):  # all of it under one name
        analyze(run, corpus=["embedded=embedded"], against=[f"other={text}"], measures=Measures(**SMALL))


def test_damaged_states_are_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(job, "write_dictionary", die)
    with pytest.raises(MemoryError):
        analyze(run, measures=Measures(**SMALL))
    states = list((run / "analysis" / "state").glob("step_*"))
    for state in states:
        (state / "state.safetensors").write_bytes(b"")
    assert len(states) == 2
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="begin anew with --overwrite"):
        analyze(run, measures=Measures(**SMALL))
