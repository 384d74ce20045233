"""What `--help` says, and what it leaves out; that arguments are read all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from dictionary_learning.command_line import parse


@dataclass
class Args:
    """Do a thing."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    layers: tuple[int, ...] | None = None
    """Layers, from 0."""
    out: Path | None = None
    """Where to."""
    largest: float | None = 10.0
    """Rows above it are left out (None: keep all)."""
    words: tuple[str, ...] = ()
    """Words."""
    report: bool = True
    """Make a report."""
    private: bool = False
    """Keep it private."""
    size: Annotated[int, tyro.conf.arg(metavar="MB")] = 5
    """Megabytes."""


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as left:
        parse(Args, ["--help"], "sae-factory thing")
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_help_says_what_a_reader_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the second is the same as the first
        lines = [line.strip("│ \n") for line in help_of(capsys, monkeypatch).splitlines()]
        text = " ".join(" ".join(lines).split())
        assert "usage: sae-factory thing [-h] [OPTIONS] RUN" in text
        assert "RUN Folder of the run. (required)" in text
        assert "--out PATH Where to. --largest" in text
        assert "--largest {None}|FLOAT Rows above it are left out (None: keep all). (default: 10.0)" in text
        assert "Words. --report, --no_report Make a report. (default: True)" in text
        assert "Keep it private. --size MB Megabytes. (default: 5)" in text
        assert "default: None" not in text and "default: )" not in text and "default: False" not in text


def test_arguments_are_read() -> None:
    assert parse(Args, ["runs/a"]) == Args(Path("runs/a"))
    given = ["--layers", "1", "2", "--largest", "None", "--no-report", "--private", "--size", "7", "--words", "a"]
    assert parse(Args, ["runs/a", *given]) == Args(
        Path("runs/a"), (1, 2), largest=None, words=("a",), report=False, private=True, size=7
    )


@pytest.mark.parametrize("given", [["--out", "a", "b"], ["--sise", "3"], ["--size", "big"], []])
def test_a_wrong_argument_exits_with_2(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(Args, ["runs/a", *given] if given else [])
    assert left.value.code == 2 and capsys.readouterr().err


def test_output_that_nobody_reads_is_no_traceback() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "dictionary_learning", "--help"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
