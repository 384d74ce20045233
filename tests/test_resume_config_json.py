"""A run on a local model folder whose config.json was edited: the weights are the same, the model is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep.embedded import MODEL_DIR
from dictionary_learning.cli import main as cli
from dictionary_learning.record import folder_digest

SMALL = ["--layers", "1", "--architectures", "top_k", "--widths", "192", "--num_tokens", "1024", "--batch_size", "256"]
SMALL += ["--ctx_len", "32", "--buffer_contexts", "64", "--eval_tokens", "256", "--no-report", "--device", "cpu"]


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_changed_config_json_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL_DIR, "model")
    command = ["train", "--save_dir", "run", "--model_name", "model", *SMALL]
    assert cli(command) == 0
    edit(Path("model/config.json"), layer_norm_epsilon=0.1)
    assert cli([*command, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "Error: The config.json of 'model' has changed since the run in 'run' began" in said and "--override" in said
    assert cli([*command, "--resume", "--override"]) == 0
    assert "Warning: The config.json of 'model' has changed" in capsys.readouterr().out
    resumed = json.loads(Path("run/run.json").read_text())["resumed"]
    assert resumed[-1]["changed"] == ["The config.json of 'model' has changed"]
    assert cli([*command, "--resume"]) == 0  # it is that of the run by now

    record = json.loads(Path("run/run.json").read_text())
    del record["model"]["config"]  # a run from before it was noted
    Path("run/run.json").write_text(json.dumps(record))
    edit(Path("model/config.json"), layer_norm_epsilon=0.2)
    assert cli([*command, "--resume"]) == 0


def test_who_wrote_a_config_json_and_how_is_no_change(tmp_path: Path) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    file, before = tmp_path / "model" / "config.json", folder_digest(str(tmp_path / "model"))
    edit(file, transformers_version="4.0.0", _name_or_path="elsewhere")
    assert folder_digest(str(tmp_path / "model")) == before != {}
    edit(file, activation_function="relu")
    assert folder_digest(str(tmp_path / "model")) != before
    assert folder_digest("embedded") == folder_digest("openai-community/gpt2") == {}
