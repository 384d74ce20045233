"""A made-up run with its analysis, for every file of tests that wants one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from analysis_cases import SMALL, make_run

from dictionary_learning.analysis.job import analyze
from dictionary_learning.analysis.one_pass import Measures


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its analysis."""
    run = make_run(tmp_path_factory.mktemp("original") / "run")
    analyze(run, measures=Measures(**SMALL))
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """The same run before its analysis."""
    shutil.copytree(original, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))
    return tmp_path / "run"
