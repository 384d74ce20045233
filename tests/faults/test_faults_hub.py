"""A model and a corpus that change on the Hub between a run and its resume."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from analysis_cases import SMALL, make_run

from data_prep import sources
from dictionary_learning import hub_corpus, record
from dictionary_learning.analysis.job import analyze
from dictionary_learning.analysis.one_pass import Measures
from dictionary_learning.corpus import open_corpus
from dictionary_learning.evaluate_command import main as evaluate

OLD, NEW = "0" * 40, "f" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A Hub whose datasets hold the commit that they are read at; which were read at which."""
    read: list[tuple[str, str | None]] = []

    def rows(path: str, split: str, first_row: int, place: Any = None, revision: str | None = None) -> Iterator[Any]:
        read.append((path, revision))
        yield from [{"text": f"as of {revision}"}] * 3

    monkeypatch.setattr(sources, "open_hub_split", rows)
    monkeypatch.setattr(hub_corpus, "dataset_commits", lambda paths: dict.fromkeys(paths, NEW))
    return read


def test_a_resumed_run_reads_the_commits_that_it_began_with_or_says_that_they_are_gone() -> None:
    harness = Path(__file__).with_name("hub_harness.py")
    done = subprocess.run([sys.executable, str(harness)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The resumed run read what it began with." in done.stdout


def test_a_dataset_is_read_at_one_commit_from_the_first_look_on(hub: list[tuple[str, str | None]]) -> None:
    newest = open_corpus("user/texts")
    assert [text.text for text in newest.read(0)] == [f"as of {NEW}"] * 3
    assert newest.commits == {"user/texts": NEW} and newest.fingerprint == f"hub:user/texts:train:{NEW}"
    assert set(hub) == {("user/texts", NEW)}
    older = open_corpus("user/texts", commits={"user/texts": OLD})
    assert [text.text for text in older.read(1)] == [f"as of {OLD}"] * 3 and older.fingerprint.endswith(f":{OLD}")
    unknown = open_corpus("user/texts", commits={})  # of a run from before commits were noted
    assert next(unknown.read(0)).text == "as of None" and unknown.fingerprint == "hub:user/texts:train"


def test_the_medical_corpora_are_read_at_one_commit_each(
    hub: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "format_record", lambda raw: raw.record["text"])
    monkeypatch.setattr(sources, "question_of", lambda raw: raw["text"])
    paths = {spec.hub_path for spec in sources.CORPORA.values()}
    six = open_corpus("medical_qa")
    assert six.commits == dict.fromkeys(paths, NEW)
    assert {text.text for text in six.read(0)} == {f"as of {NEW}"}
    assert set(hub) == {(path, NEW) for path in paths}
    changed = open_corpus("medical_qa", commits=dict(six.commits) | {"openlifescienceai/medqa": OLD})
    assert len({six.fingerprint, changed.fingerprint, open_corpus("medical_qa", commits={}).fingerprint}) == 3
    assert open_corpus("openlifescienceai/medqa").fingerprint == f"hub:openlifescienceai/medqa:{NEW}"


def test_commits_are_those_of_the_same_model_and_corpus(tmp_path: Path) -> None:
    from types import SimpleNamespace

    written = {
        "config": {"model_name": "user/model", "corpus": "user/texts"},
        "model": {"revision": OLD},
        "corpus_commits": {"user/texts": NEW},
    }
    (tmp_path / "run.json").write_text(json.dumps(written))

    def commits(model: str, corpus: str) -> record.Commits:
        config: Any = SimpleNamespace(model_name=model, corpus=corpus)
        return record.commits_of(tmp_path, config)

    assert commits("user/model", "user/texts") == record.Commits(OLD, {"user/texts": NEW})
    assert commits("user/other", "texts.jsonl") == record.Commits(None, None)
    for damaged in ("[]", '{"config": 3, "model": [], "corpus_commits": "x"}', '{"config": {}, "model": {}}'):
        (tmp_path / "run.json").write_text(damaged)
        assert commits("user/model", "user/texts") == record.Commits(None, None)


def test_a_changed_tokenizer_is_another_run(tokenizer: Any, tokenizer_bos_eos_pad: Any) -> None:
    assert record.tokenizer_digest(tokenizer) == record.tokenizer_digest(tokenizer)
    assert record.tokenizer_digest(tokenizer) != record.tokenizer_digest(tokenizer_bos_eos_pad)


def test_evaluation_and_analysis_read_what_their_run_read(
    hub: list[tuple[str, str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["corpus"], facts["corpus_commits"] = "user/texts", {"user/texts": OLD}
    facts["corpus_fingerprint"] = f"hub:user/texts:train:{OLD}"
    (run / "run.json").write_text(json.dumps(facts))
    texts = [{"text": text.text} for text in open_corpus("embedded").read(0)]

    def rows(path: str, split: str, first_row: int, place: Any = None, revision: str | None = None) -> Iterator[Any]:
        hub.append((path, revision))
        yield from texts[first_row:]

    monkeypatch.setattr(sources, "open_hub_split", rows)
    assert evaluate([str(run), "--device", "cpu", "--tokens", "300"]) == 0
    assert evaluate([str(run), "--device", "cpu", "--tokens", "300", "--corpus", "hf://user/texts"]) == 0
    assert analyze(run, measures=Measures(**SMALL), device="cpu").info["commits"] == {"user/texts": OLD}
    assert set(hub) == {("user/texts", OLD)}
    settings: dict[str, Any] = {"measures": Measures(**SMALL), "device": "cpu", "out": tmp_path / "more"}
    begun = analyze(run, corpus=["user/more"], against=["user/texts"], **settings).info
    assert begun["commits"] == {"user/more": NEW, "user/texts": OLD}
    for newest in ({}, {"user/more": OLD}):  # without a network, and behind a push
        monkeypatch.setattr(hub_corpus, "dataset_commits", lambda paths, newest=newest: newest)
        assert analyze(run, corpus=["user/more"], against=["user/texts"], **settings).info == begun
