"""Sentence encoders: whole texts kept by document, and states of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from analysis_cases import LATENTS, SMALL, files_of, make_sentence_run

from dictionary_learning import open_corpus
from dictionary_learning.analysis import one_pass
from dictionary_learning.analysis.job import analyze
from dictionary_learning.analysis.one_pass import Measures
from dictionary_learning.corpus import TextStream


@pytest.fixture
def sentence_run(tmp_path: Path) -> Path:
    return make_sentence_run(tmp_path)


def test_whole_texts_are_kept_by_document(sentence_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = analyze(sentence_run, measures=Measures(**SMALL | {"tokens": 30}))
    assert "only 30 texts were seen" in capsys.readouterr().err
    assert (folder.info["unit"], folder.info["rows"], folder.info["documents"]) == ("text", 30, 30)
    top, samples = folder.examples("trainer_0")
    assert top.token_FEW.shape == (LATENTS, 3, 0)
    texts = folder.texts()
    wanted = {int(d) for kept in (top, samples) for d in kept.document_FE.ravel() if d >= 0}
    assert set(texts) == wanted
    stream = [text.text for text in TextStream(open_corpus(str(sentence_run.parent / "texts.jsonl")), seed=0)]
    assert all(texts[number]["text"] == stream[number] for number in texts)
    assert {entry["corpus"] for entry in texts.values()} == {"texts.jsonl"}
    data = json.loads((folder.path / "trainer_0" / "top_activations_trainer_0.json").read_text())
    latent, entries = next(iter(data.items()))
    assert entries[0]["text"] == texts[int(top.document_FE[int(latent), 0])]["text"] and "tokens" not in entries[0]
    table = folder.table("trainer_0")
    assert np.isnan(table["ablation_loss"]).all() and table["top_tokens"].tolist() == [[]] * LATENTS
    assert folder.vocabulary() == {}


def test_texts_that_no_example_needs_are_dropped_on_the_way(
    sentence_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = Measures(**SMALL | {"tokens": None, "top": 1, "samples": 1})
    wanted = files_of(analyze(sentence_run, measures=measures).path)
    monkeypatch.setattr(one_pass, "TEXTS_HELD", 5)
    assert files_of(analyze(sentence_run, measures=measures, overwrite=True).path) == wanted


def test_texts_are_not_looked_up_at_every_batch_where_examples_need_more_than_are_held(
    sentence_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    documents = one_pass.OnePass._documents

    def counted(self: one_pass.OnePass) -> set[int]:
        looked.append(self.rows)
        return documents(self)

    monkeypatch.setattr(one_pass.OnePass, "_documents", counted)
    monkeypatch.setattr(one_pass, "TEXTS_HELD", 20)
    folder = analyze(sentence_run, measures=Measures(**SMALL | {"tokens": None}), state_every=0)
    assert folder.info["rows"] == len(folder.texts()) == 36  # all texts are needed
    assert len([rows for rows in looked if rows < 36]) == 1


def test_token_states_of_a_sentence_encoder(sentence_run: Path) -> None:
    run = json.loads((sentence_run / "run.json").read_text())
    run["config"]["sentence"]["level"] = "token"
    (sentence_run / "run.json").write_text(json.dumps(run))
    measures = Measures(**SMALL | {"tokens": 100})
    folder = analyze(sentence_run, hook_point="token_embeddings", measures=measures)
    assert folder.info["unit"] == "token" and folder.texts() == {}
    data = json.loads((folder.path / "trainer_0" / "top_activations_trainer_0.json").read_text())
    assert {"and"} < {token for entries in data.values() for entry in entries for token in entry["tokens"]}
