"""What can not be analysed is said in one sentence, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_cases import POINTS, SMALL, files_of, make_dictionary, make_run, write_texts

from dictionary_learning.analysis import one_pass
from dictionary_learning.analysis.job import analyze
from dictionary_learning.analysis.one_pass import Measures
from dictionary_learning.errors import UserError


def test_dead_dictionaries_are_said_to_be_dead(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead, live = make_dictionary(), make_dictionary(1)
    with torch.no_grad():
        dead.encoder_rows.zero_()
        dead.encoder_bias.fill_(-1)
    both = make_run(run.parent / "both", [dead, live])
    measures = Measures(**SMALL | {"tokens": 1200})
    folder = analyze(both, measures=measures)
    assert "no latent of trainer_0 fired on 1,200 tokens" in capsys.readouterr().err
    assert set(folder.table("trainer_0")["status"]) == {"dead"} and folder.table("trainer_0")["label"][0] == ""
    assert json.loads((folder.path / "trainer_0" / "top_activations_trainer_0.json").read_text()) == {}
    with pytest.raises(UserError, match="No latent of trainer_0 fired on 1,200 tokens, so there is nothing to analyse"):
        analyze(both, dictionaries=["trainer_0"], measures=measures, out=run.parent / "out")
    assert files_of(run.parent / "out") == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "rum"}, r"no run or dictionary at .*Did you mean 'run'"),
        (
            {"dictionaries": ["trainer_5"]},
            "no dictionary 'trainer_5', but trainer_0, trainer_1.*Did you mean 'trainer_",
        ),
        ({"dictionaries": ["front"]}, "has no summary yet, which says which are best"),
        ({"hook_point": "resid_post_layer_9"}, "Layer 9 .* is out of range"),
        (
            {"hook_point": "transformer.h.0.mlp.c_fc"},
            "trainer_0 is of width 192, but 'transformer.h.0.mlp.c_fc' .* 768",
        ),
        ({"corpus": ["nowhere.jsonl"]}, "Corpus 'nowhere.jsonl' not found"),
        ({"ctx_len": 100_000}, "ctx_len 100000 is longer than"),
        ({"out": "run/run.json"}, "is a file: give a folder"),
        ({"out": "run/trainer_0"}, "holds other files and no analysis"),
        ({"device": "tpu"}, "'tpu' is not a device"),
        ({"state_every": -1}, "state_every must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    options = {"source": "run", "measures": Measures(**SMALL)} | options
    if "out" in options:
        options["out"] = Path(options["out"])
    with pytest.raises(UserError, match=said) as error:
        analyze(options.pop("source"), **options)
    assert "\n" not in str(error.value)
    assert not (run / "analysis").exists()


@pytest.mark.parametrize("name", ["tokens", "top", "samples", "window"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        Measures(**{name: 0})


def test_another_model_is_refused_unless_it_is_named(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["model"]["weights"] = "0123456789abcdef"
    (run / "run.json").write_text(json.dumps(record))
    measures = Measures(**SMALL | {"tokens": 500, "ablate": 0})
    with pytest.raises(UserError, match="weights of 'embedded' are not those .* --model_name"):
        analyze(run, measures=measures)
    assert analyze(run, model_name="embedded", measures=measures).info["rows"] == 500


def test_a_small_corpus_is_analysed_with_a_warning_and_an_empty_one_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_texts(tmp_path / "few.jsonl", ["The femur is a bone of the leg."] * 3)
    empty = write_texts(tmp_path / "empty.jsonl", ["", "  "])
    measures = Measures(**SMALL | {"ablate": 0})
    with pytest.raises(UserError, match=r"Corpus 'empty.jsonl' is empty"):
        analyze(run, corpus=[empty], measures=measures)
    folder = analyze(run, corpus=[few], against=["embedded"], measures=Measures(**SMALL | {"tokens": 900, "ablate": 0}))
    said = capsys.readouterr().err
    assert "only 900 tokens were seen" in said
    assert "too few documents to test what is specific to few.jsonl" in said
    assert np.isnan(folder.table("trainer_0")["p:few.jsonl"]).all()


def test_what_nobody_says_is_asked_for(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original / "trainer_0", tmp_path / "alone")
    options: dict[str, Any] = {"out": tmp_path / "out", "measures": Measures(**SMALL | {"tokens": 500, "ablate": 0})}
    with pytest.raises(UserError, match="no corpus of its own: add --corpus"):
        analyze(tmp_path / "alone", **options)
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    del config["trainer"]["lm_name"], config["trainer"]["submodule_name"]
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="alone does not say at which hook point .* --hook_point"):
        analyze(tmp_path / "alone", corpus=["embedded"], **options)
    with pytest.raises(UserError, match="which model it belongs to: add --model_name"):
        analyze(tmp_path / "alone", corpus=["embedded"], hook_point=POINTS[0], **options)
    folder = analyze(tmp_path / "alone", corpus=["embedded"], hook_point=POINTS[0], model_name="embedded", **options)
    assert folder.names == ["alone"] and folder.info["rows"] == 500


def test_a_folder_that_can_not_be_written_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *args: Any) -> None:
        raise OSError(28, "No space left on device", str(run / "analysis" / "state"))

    monkeypatch.setattr(one_pass.storage, "save_state", full)
    with pytest.raises(UserError, match="can't be written .No space left on device.*the same command again"):
        analyze(run, measures=Measures(**SMALL))
