"""`sae-factory doctor`: the command, its table, its JSON and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_diagnosis import fails_to_import, nobody_logged_in  # noqa: F401 - the fixture is for every test here, too

from dictionary_learning import __version__, doctor


def test_a_table_that_ends_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--seconds", "0.4", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for part in (
        f"{__version__}, in ",
        "torch",
        torch.__version__,
        "Hugging Face Hub",
        "writing",
        "MB/s",
        "harvest",
        "training step",
    ):
        assert part in printed
    assert "Everything essential works" in printed
    assert list(tmp_path.iterdir()) == []


def test_json_holds_every_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--json", "--seconds", "0", "--folder", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "warn"
    found = {line["name"]: line for line in said["findings"]}
    assert found["torch"] == {
        "group": "versions",
        "name": "torch",
        "status": "ok",
        "found": torch.__version__,
        "remedy": "",
    }
    assert {line["group"] for line in said["findings"]} == {"versions", "devices", "accounts", "room", "extras"}
    assert all(line["remedy"] for line in said["findings"] if line["status"] != "ok")


def test_what_is_essential_fails_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fails_to_import(monkeypatch, "nnsight", RuntimeError("a broken\nbuild"))
    assert doctor.main(["--json", "--folder", str(tmp_path)]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "fail"
    broken = next(line for line in said["findings"] if line["name"] == "nnsight")
    assert broken["status"] == "fail" and broken["remedy"] == "pip install 'nnsight'"
    assert broken["found"] == "can't be imported (RuntimeError: a broken build)"
    assert "speed" not in {line["group"] for line in said["findings"]}


@pytest.mark.parametrize("missing", ["tyro", "rich"])
def test_what_the_command_itself_needs_is_a_finding_too(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in (missing, "tyro")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert doctor.main([]) == 2
    printed = capsys.readouterr().out
    assert f"pip install '{missing}'" in printed and torch.__version__ in printed


def test_what_breaks_in_the_probe_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("none [red]left[/red]")

    monkeypatch.setattr("dictionary_learning.demo.load_model", broken)
    (finding,) = doctor.speed("cpu", 1.0)
    assert finding.status == "fail" and "MemoryError: none [red]left[/red]" in finding.found
    doctor.print_findings([finding])
    assert "[red]left[/red]" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_named() -> None:
    (finding,) = doctor.speed("cuda:7", 1.0)
    assert finding.status == "fail" and "cuda:7" in finding.found
