"""Reports of odd runs: broken off, pulled, of other commands, half analysed; and of folders that hold no run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dictionary_learning.analysis.types import Examples
from dictionary_learning.errors import UserError
from dictionary_learning.report import write_report
from dictionary_learning.report.data import read_run
from tests.report.report_cases import make_analysis, make_run, told, write_examples


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_front_is_that_of_each_hook_point_and_quality(run: Path) -> None:
    values = {"trainer_0": (8, 0.9, 0.8), "trainer_1": (16, 0.85, 0.9), "trainer_2": (24, 0.95, 0.85)}
    for name, (l0, recovered, explained) in values.items():
        result = {"l0": l0, "frac_recovered": recovered, "frac_variance_explained": explained}
        (run / name / "eval_results.json").write_text(json.dumps(result))
    data = read_run(run)
    assert [d["front_recovered"] for d in data.dictionaries] == [True, False, True]
    assert [d["front_explained"] for d in data.dictionaries] == [True, True, False]
    assert data.best == "trainer_2"


def test_broken_off_run_is_told_by_its_log(run: Path) -> None:
    make_run(run, status="running")
    for path in run.glob("trainer_*/eval_results.json"):
        path.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[-1] = lines[-1][:40]  # cut short by a crash
    bad = [
        line.replace('"loss": ', '"loss": null, "was": ') if '"step": 200' in line and "trainer_0" in line else line
        for line in lines
    ]
    (run / "metrics.jsonl").write_text("\n".join([*bad, "", "[]", '{"trainer": 3}', "\x00"]))
    data = read_run(run)
    assert data.status["kind"] == "running"
    assert data.dictionaries[0]["measured"] == "batch" and data.dictionaries[0]["l0"] == 8
    assert data.dictionaries[0]["stopped"] == "its loss at step 200 is not a number"
    assert data.dictionaries[1]["stopped"] is None
    assert data.dictionaries[2]["stopped"] == "its log ends at step 195 of 200"
    assert write_report(run).is_file()


@pytest.mark.parametrize("name", ["../mine", "/etc", "..", "trainer_" + "9" * 5000])
def test_what_names_no_folder_of_the_run_is_no_dictionary(run: Path, name: str) -> None:
    make_run(run.parent / "mine")
    (run.parent / "mine" / "config.json").write_text('{"trainer": {"architecture": "of mine"}}')
    with (run / "metrics.jsonl").open("a") as log:
        log.write("\n" + json.dumps({"trainer": name, "step": 1, "tokens": 1, "loss": 1.0}))
    (run / "summary.csv").write_text(f"trainer,l0\n{name},3\ntrainer_0,8\n")
    assert read_run(run).names == ["trainer_0", "trainer_1", "trainer_2"]


def test_report_needs_nothing_but_run_json(run: Path) -> None:
    for path in [*run.glob("trainer_*"), run / "metrics.jsonl"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = told(write_report(run))
    assert [d["name"] for d in data["dictionaries"]] == ["trainer_0", "trainer_1", "trainer_2"]
    assert data["metrics"] == {} and data["best"] is None


def test_pulled_run_is_told_by_its_summary(run: Path) -> None:
    head = "trainer,architecture,hook_point,width,sparsity,l0,frac_variance_explained,frac_recovered,front"
    (run / "summary.csv").write_text(f"{head}\ntrainer_7,top_k,h,64,k=4,4.0,0.5,,True\n")
    entry = next(d for d in read_run(run).dictionaries if d["name"] == "trainer_7")
    assert (entry["l0"], entry["frac_recovered"], entry["sparsity"], entry["width"]) == (4.0, None, "k=4", 64)


def test_run_of_fit_is_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dictionaries=1)
    facts = {"command": "fit", "status": "complete", "activations": {"path": "acts", "hook_point": "h"}, "versions": {}}
    (run / "run.json").write_text(json.dumps(facts))
    data = told(write_report(run))
    assert ["Corpus", "acts"] in data["facts"] and data["status"]["kind"] == "complete"


def test_long_logs_are_thinned(run: Path) -> None:
    rows = [json.dumps({"step": s, "tokens": s, "trainer": "trainer_0", "loss": 1.0 / s}) for s in range(1, 2001)]
    (run / "metrics.jsonl").write_text("\n".join(rows))
    curve = read_run(run).curves["trainer_0"]
    assert len(curve["loss"]) <= 152 and curve["tokens"][0] == 1 and curve["tokens"][-1] == 2000


def test_dead_latents_are_a_share_of_the_width(run: Path) -> None:
    assert read_run(run).curves["trainer_2"]["dead"][0] == pytest.approx(6 / 96, rel=1e-4)


def test_incomplete_analysis_is_left_out_with_a_note(run: Path) -> None:
    folder = make_analysis(run)
    folder.write_info({**folder.info, "status": "running"})
    data = told(write_report(run))
    assert "analysis" not in data and any("not complete" in note["text"] for note in data["notes"])


def test_dictionaries_of_the_analysis_that_the_run_lacks_are_left_out(run: Path) -> None:
    make_analysis(run, ["trainer_0", "elsewhere"])
    assert [d.get("features") for d in told(write_report(run))["dictionaries"]] == [96, None, None]


def test_width_of_the_log_numbers_may_be_anything_json_can_hold(run: Path) -> None:
    rows = [
        {"step": "x", "tokens": [], "trainer": "trainer_0", "loss": {}, "l0": True},
        {"trainer": "trainer_\u202e\ud800", "step": 1e308},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "run.json").write_text(
        json.dumps({"config": {"dictionaries": [3, None, {"sparsity": []}]}, "versions": [], "model": 5})
    )
    (run / "trainer_0" / "config.json").write_text(json.dumps({"trainer": {"dict_size": "64", "lr": {}, "k": [1]}}))
    (run / "trainer_1" / "eval_results.json").write_text(json.dumps({"l0": None, "frac_recovered": 1e400}))
    assert write_report(run).is_file()


# ------------------------------------------------------------------------------------------------ bad input


def damage(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return path.name


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("run.json", "{", "run.json' is not a readable JSON file"),
        ("run.json", "[]", "run.json' should hold a JSON object"),
        ("trainer_1/config.json", "nope", "config.json' is not a readable JSON file"),
        ("trainer_1/eval_results.json", "3", "should hold a JSON object"),
        ("summary.csv", "a,b\n1,2\n", "has no column 'trainer'"),
        ("analysis/analysis.json", '{"version": 9}', "is of version 9"),
        ("analysis/trainer_0/features.parquet", "PAR1", "features.parquet' can't be read"),
        ("analysis/trainer_0/examples.safetensors", "x", "examples.safetensors' can't be read"),
        ("analysis/vocabulary.json", "[1]", "keys are numbers"),
    ],
)
def test_damaged_files_are_named(run: Path, file: str, text: str, said: str) -> None:
    make_analysis(run)
    damage(run / file, text)
    with pytest.raises(UserError, match=re.escape(said)):
        write_report(run)


def test_folders_without_a_run_are_refused(tmp_path: Path, run: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="There is no run in"):
            write_report(folder)
    with pytest.raises(UserError, match="max_mb must be positive"):
        write_report(run, max_mb=0)
    with pytest.raises(UserError, match=r"takes 0\.\d\d MB: --max_mb must be more"):
        write_report(run, max_mb=0.01)
    assert not (run / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another --out"):
        write_report(run, tmp_path / "file" / "report.html")


def test_arrays_of_other_sizes_than_the_table_are_refused(run: Path) -> None:
    folder = make_analysis(run)
    top, samples = folder.examples("trainer_0")
    write_examples(folder, "trainer_0", Examples(*(array[:50] for array in top)), samples)
    with pytest.raises(UserError, match="don't fit its table"):
        write_report(run)
