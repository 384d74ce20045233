"""The files of an analysis: what is written is what is read, and what can't be read is said in one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_cases import statistics

from dictionary_learning.analysis.folder import COLUMNS, AnalysisFolder, corpus_columns
from dictionary_learning.analysis.types import Examples, FeatureStatistics
from dictionary_learning.errors import UserError

INFO: dict[str, Any] = {
    "status": "complete",
    "settings": {},
    "unit": "token",
    "corpora": {"a": "1", "b": "2"},
    "rows": 100,
    "documents": 9,
    "dictionaries": [{"name": "trainer_3", "l0": float("nan")}, {"name": "trainer_10"}],
}
STRINGS = {token: f" t{token}" for token in range(7)}


def columns(latents: int, corpora: tuple[str, ...]) -> dict[str, Any]:
    """A column of every kind, with what tables really hold: NaN, empty lists, and lists of one length."""
    made: dict[str, Any] = {}
    for name, kind in COLUMNS.items():
        if kind.startswith("list"):
            value: Any = "<x>" if kind == "list<string>" else 1.5 if "float" in kind else 2
            made[name] = [[], *([[value, value]] * (latents - 1))]
        else:
            made[name] = ["", *["é"] * (latents - 1)] if kind == "string" else np.arange(latents)
    made["ablation_loss"] = np.full(latents, np.nan)
    return made | {name: np.linspace(0, 1, latents) for name in corpus_columns(corpora)}


def written(folder: Path, **changes: Any) -> AnalysisFolder:
    out = AnalysisFolder(folder)
    out.write_info(INFO | changes)
    found = statistics()
    out.write_statistics("trainer_3", found)
    out.write_table("trainer_3", columns(4, ("a", "b")), found.corpora)
    out.write_vocabulary(STRINGS)
    return out


def assert_same(found: FeatureStatistics, wanted: FeatureStatistics) -> None:
    for field in dataclasses.fields(FeatureStatistics):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        pairs = zip(a, b, strict=True) if isinstance(a, Examples) else [(a, b)]
        for left, right in pairs:
            assert type(left) is type(right)
            if isinstance(left, np.ndarray):
                assert left.dtype == right.dtype and np.array_equal(left, right), field.name
            else:
                assert left == right


@pytest.mark.parametrize("window", [5, 0])
def test_statistics_come_back_exactly(tmp_path: Path, window: int) -> None:
    out = AnalysisFolder(tmp_path)
    out.write_info(INFO)
    wanted = statistics(window=window, corpora=("PubMedQA", "b/ü"))
    out.write_statistics("trainer_3", wanted)
    again = AnalysisFolder.open(tmp_path)
    assert_same(again.statistics("trainer_3"), wanted)
    top, samples = again.examples("trainer_3")
    assert top.value_FE.shape == (4, 3) and samples.token_FEW.shape == (4, 6, window)
    assert np.array_equal(np.load(tmp_path / "trainer_3" / "fire_rate_trainer_3.npy"), wanted.active_F / 100)


def test_a_table_comes_back_with_its_types_in_the_order_of_the_layout(tmp_path: Path) -> None:
    written(tmp_path)
    table = AnalysisFolder.open(tmp_path).table("trainer_3")
    names = list(table)
    assert names[names.index("status") + 1 : names.index("corpus")] == corpus_columns(["a", "b"])
    assert [name for name in names if ":" not in name] == list(COLUMNS)
    for name, kind in COLUMNS.items():
        assert table[name].dtype == (object if kind == "string" or kind.startswith("list") else np.dtype(kind))
    assert table["top_tokens"].tolist() == [[], ["<x>", "<x>"], ["<x>", "<x>"], ["<x>", "<x>"]]
    assert table["label"].tolist() == ["", "é", "é", "é"] and np.isnan(table["ablation_loss"]).all()


def test_a_table_must_be_the_layout(tmp_path: Path) -> None:
    out = written(tmp_path)
    with pytest.raises(ValueError, match="label_share"):
        out.write_table("trainer_3", {k: v for k, v in columns(4, ()).items() if k != "label_share"}, ["a"])
    with pytest.raises(ValueError, match="rate:a"):
        out.write_table("trainer_3", columns(4, ("a",)), ["a"])  # of one corpus there are no columns


def test_top_activations_are_plain_json(tmp_path: Path) -> None:
    out = written(tmp_path)
    top = statistics().top
    out.write_top_activations(
        "trainer_3", top, ["a", "b"], STRINGS, lambda document, tokens: f"{document}:{len(tokens)}"
    )
    data = json.loads((tmp_path / "trainer_3" / "top_activations_trainer_3.json").read_text())
    assert sorted(data) == ["1", "2", "3"]  # latent 0 never fired
    first = data["2"][0]
    tokens = top.token_FEW[2, 0][1:]  # what is outside the document is left out
    assert first["tokens"] == [STRINGS[token] for token in tokens]
    assert first["activations"] == pytest.approx(top.act_FEW[2, 0][1:].tolist(), rel=1e-3)
    assert first["text"] == f"{first['document']}:4" and first["corpus"] == "ab"[top.corpus_FE[2, 0]]
    assert first["activation"] == pytest.approx(top.value_FE[2, 0], rel=1e-3)


def test_vocabulary_texts_and_descriptions_are_numbered(tmp_path: Path) -> None:
    out = written(tmp_path)
    assert out.texts() == {} and out.descriptions("trainer_3") == {}
    out.write_texts({12: {"corpus": "a", "text": "<b>"}, 3: {"corpus": "b", "text": "\u202e"}})
    out.write_descriptions("trainer_3", {7: {"description": "bones", "score": float("nan")}})
    again = AnalysisFolder.open(tmp_path)
    assert again.vocabulary() == STRINGS
    assert again.texts() == {3: {"corpus": "b", "text": "\u202e"}, 12: {"corpus": "a", "text": "<b>"}}
    assert again.descriptions("trainer_3") == {7: {"description": "bones", "score": None}}
    assert again.info["dictionaries"][0]["l0"] is None  # JSON has no NaN


def test_the_same_analysis_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_the_analysis_of_a_run_is_found_in_it(tmp_path: Path) -> None:
    written(tmp_path / "run" / "analysis")
    assert AnalysisFolder.open(tmp_path / "run").path == tmp_path / "run" / "analysis"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("analysis.json", None, "There is no analysis in"),
        ("analysis.json", b"{", "not a readable JSON file"),
        ("analysis.json", b"[]", "does not describe an analysis"),
        ("analysis.json", json.dumps(INFO | {"version": 2}).encode(), "of version 2, not 1"),
        ("analysis.json", json.dumps({"version": 1, "status": "complete"}).encode(), "its 'settings' should be a dict"),
        ("analysis.json", json.dumps(INFO | {"version": 1, "status": "running"}).encode(), "is not complete"),
        (
            "analysis.json",
            json.dumps(INFO | {"version": 1, "dictionaries": [{"name": "../x"}]}).encode(),
            "the name of a folder",
        ),
        ("trainer_3/features.parquet", b"PAR1", "it is damaged"),
        ("trainer_3/features.parquet", None, "not complete, or the file was removed"),
        ("trainer_3/examples.safetensors", b"\0" * 40, "it is damaged"),
        ("trainer_3/statistics.safetensors", None, "not complete, or the file was removed"),
        ("vocabulary.json", b'{"x": "y"}', "whose keys are numbers"),
    ],
)
def test_what_is_damaged_or_missing_is_said(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    written(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        out = AnalysisFolder.open(tmp_path)
        out.table("trainer_3")
        out.statistics("trainer_3")
        out.vocabulary()


def test_files_of_something_else_are_told(tmp_path: Path) -> None:
    out = written(tmp_path)
    import pyarrow
    from pyarrow import parquet
    from safetensors.numpy import save_file

    parquet.write_table(pyarrow.table({"feature": [1]}), tmp_path / "trainer_3" / "features.parquet")
    with pytest.raises(UserError, match="lacks the column density"):
        out.table("trainer_3")
    save_file({"x": np.zeros(2)}, tmp_path / "trainer_3" / "examples.safetensors")
    with pytest.raises(UserError, match="lacks the array top.value"):
        out.examples("trainer_3")


def test_an_unknown_dictionary_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dictionary 'trainer_4'.*Did you mean 'trainer_3'"):
        written(tmp_path).table("trainer_4")
