"""Several corpora in one analysis: each gives its part, and goes by a name of its own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_cases import SMALL, write_texts

from dictionary_learning import open_corpus
from dictionary_learning.analysis.job import analyze
from dictionary_learning.analysis.mixed_texts import MOST_LABELS, OTHERS, MixedTexts, open_corpora
from dictionary_learning.analysis.one_pass import Measures
from dictionary_learning.corpus import TextStream
from dictionary_learning.errors import UserError


def test_several_corpora_each_give_their_part_of_a_bounded_number_of_tokens(run: Path, tmp_path: Path) -> None:
    long = write_texts(tmp_path / "long.jsonl", ["the river ran past the old mill and the town " * 40] * 40)
    folder = analyze(run, against=[f"rivers={long}"], measures=Measures(**SMALL | {"tokens": 3000, "ablate": 0}))
    info = folder.info
    assert list(info["corpora"])[0] == "medqa" or "rivers" in info["corpora"]
    statistics = folder.statistics("trainer_0")
    of = dict(zip(statistics.corpora, statistics.rows_C.tolist(), strict=True))
    assert sum(of.values()) == 3000
    assert 0.3 < of["rivers"] / 3000 < 0.7
    assert info["settings"]["against"] == ["rivers"]
    assert info["corpora"]["rivers"] == open_corpus(long).fingerprint
    table = folder.table("trainer_0")
    assert {f"{kind}:rivers" for kind in ("rate", "log2_ratio", "p", "q")} <= set(table)
    assert np.array_equal(table["rate:rivers"], statistics.active_CF[statistics.corpora.index("rivers")] / of["rivers"])
    top, _ = folder.examples("trainer_0")
    assert set(np.unique(top.corpus_FE[top.document_FE >= 0])) <= set(range(len(statistics.corpora)))


def test_mixed_texts_take_from_whoever_gave_least_and_go_on(tmp_path: Path) -> None:
    short = write_texts(tmp_path / "a.jsonl", [f"a{i:03}" for i in range(40)], source="short")
    long = write_texts(tmp_path / "b.jsonl", [f"b{i:03}" * 4 for i in range(40)])
    corpora = open_corpora([short, f"long={long}"])

    def stream(**options: Any) -> MixedTexts:
        return MixedTexts(corpora, **options)

    texts = list(stream())
    assert len(texts) == 80 and sorted(text.text for text in texts) == sorted(
        [f"a{i:03}" for i in range(40)] + [f"b{i:03}" * 4 for i in range(40)]
    )
    assert [text.corpus for text in texts[:6]] == ["short", "long", "short", "short", "short", "short"]
    by_text = stream(by_text=True, keep=True)
    assert [text.corpus for text in list(by_text)[:4]] == ["short", "long", "short", "long"]
    by_text.forget(before=70, but=[3])
    assert list(by_text.kept) == [3, *range(70, 80)] and by_text.kept[3] == ("long", "b001" * 4)
    begun = stream(seed=5)
    for _ in range(33):
        next(begun)
    again = stream(seed=5)
    again.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert list(again) == list(begun) == list(stream(seed=5))[33:]
    assert again.origin == {"short": 0, "long": 1}


def test_names_of_corpora_must_tell_them_apart(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", ["x"], source="general")
    with pytest.raises(UserError, match="Two corpora are called 'a.jsonl'.*--against other=PATH"):
        open_corpora([path], [path])
    with pytest.raises(UserError, match="'general' is the name of a corpus and of texts in another"):
        list(MixedTexts(open_corpora([path], [f"general={path}"])))
    assert [entry.label for entry in open_corpora([path], [f"same text={path}"])] == [None, "same text"]


def test_texts_that_each_name_a_corpus_are_no_more_than_can_be_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "urls.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "source_dataset": f"site {i}"}) + "\n" for i in range(100)))
    named = write_texts(tmp_path / "a.jsonl", ["x"])
    texts = list(MixedTexts(open_corpora([str(path), f"named={named}"]), by_text=True))
    labels = Counter(text.corpus for text in texts)
    assert len(labels) == MOST_LABELS and labels["named"] == 1 and labels[OTHERS] == 100 - (MOST_LABELS - 2)
    assert len(texts) == 101


def test_splits_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", [f"Bone number {number} is long." for number in range(150)])
    documents = {}
    for split in ("all", "train", "heldout"):
        measures = Measures(**SMALL | {"tokens": None, "ablate": 0, "effects": False, "split": split})
        folder = analyze(run, corpus=[path], dictionaries=["trainer_0"], measures=measures, overwrite=True)
        documents[split] = folder.info["documents"]
    heldout = len(list(TextStream(open_corpus(path), split="heldout")))
    assert documents == {"all": 150, "train": 150 - heldout, "heldout": heldout} and heldout > 0
