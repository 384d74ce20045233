"""A dataset whose commit is gone from the Hub: each command advises what it has, and no option of another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from analysis_cases import make_run

from data_prep import sources
from dictionary_learning import hub_corpus
from dictionary_learning.cli import main as cli

OLD, NEW = "0" * 40, "f" * 40


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a dataset of the Hub holds; its old commit is gone."""
    from datasets.exceptions import DatasetNotFoundError

    held = [{"text": f"The dose of drug {number} is given in the morning."} for number in range(400)]

    def rows(path: str, split: str, first_row: int, place: Any = None, revision: str | None = None) -> Iterator[Any]:
        if revision == OLD:
            raise DatasetNotFoundError(f"Revision '{OLD}' doesn't exist")
        yield from held[first_row:]

    monkeypatch.setattr(sources, "open_hub_split", rows)
    monkeypatch.setattr(hub_corpus, "dataset_commits", lambda paths: dict.fromkeys(paths, NEW))
    return held


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert cli(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"commit {OLD[:12]}" in said and said.count(" where that commit is gone, ") == 1, said
    return said.split(" where that commit is gone, ")[1]


def test_evaluate_and_analyze_advise_another_text(
    texts: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["corpus"], facts["corpus_commits"] = "user/texts", {"user/texts": OLD}
    (run / "run.json").write_text(json.dumps(facts))
    assert refused(capsys, "evaluate", str(run), "--device", "cpu") == "give another text as --corpus."
    said = refused(capsys, "analyze", str(run), "--device", "cpu")
    assert said == "give another text as --corpus (and --overwrite, where there is an analysis of the old one)."


def test_harvest_advises_another_folder(
    texts: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--corpus", "user/texts", "--device", "cpu", "--num_tokens", "300", "--ctx_len", "32")
    assert cli(["harvest", "--out", str(tmp_path / "acts"), *options]) == 0
    manifest = json.loads((tmp_path / "acts" / "manifest.json").read_text())
    assert manifest["corpus"]["commits"] == {"user/texts": NEW}
    (tmp_path / "acts" / "manifest.json").write_text(json.dumps(manifest).replace(NEW, OLD))
    said = refused(capsys, "harvest", "--out", str(tmp_path / "acts"), *options)
    assert said == "a new folder as --out takes the newest."
    assert cli(["harvest", "--out", str(tmp_path / "new"), *options]) == 0


def test_train_advises_its_override() -> None:
    with pytest.raises(sources.CommitError, match="where that commit is gone, --override takes the newest"):
        raise sources.CommitError("Could not read user/texts")
