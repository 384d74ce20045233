"""A made-up run with its analysis, and one that a stand-in for a language model describes, for every file of tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from analysis_cases import SMALL, make_run
from description_cases import write_analysis
from openai_stub import ChatStub, knows

from dictionary_learning.analysis.describe import main
from dictionary_learning.analysis.folder import AnalysisFolder
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


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("SAE_FACTORY_API_KEY", raising=False)


@pytest.fixture
def analysis(tmp_path: Path) -> AnalysisFolder:
    """An analysis of made-up text, see `description_cases`."""
    return write_analysis(tmp_path / "run" / "analysis")


@pytest.fixture
def stub() -> Iterator[ChatStub]:
    with ChatStub(knows) as server:
        yield server


@pytest.fixture
def describe(analysis: AnalysisFolder, stub: ChatStub) -> Callable[..., int]:
    """The command on the analysis and the stub, with further arguments."""
    return lambda *more: main([str(analysis.path), "--endpoint", stub.url, "--model", "stub", *more])
