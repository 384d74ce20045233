"""A script written for the `dictionary-learning` package runs here unchanged, on the embedded model.

The same file runs with the package itself in an environment of its own (dictionary-learning 0.1.0, nnsight 0.3).
"""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from signatures import recorded_modules

from data_prep.embedded import MODEL_DIR
from dictionary_learning.corpus import open_corpus
from dictionary_learning.utils import load_dictionary

SCRIPT = Path(__file__).with_name("peer_script.py")


def test_the_script_imports_and_passes_only_what_the_package_has() -> None:
    recorded, tree = recorded_modules(), ast.parse(SCRIPT.read_text(encoding="utf-8"))
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dictionary_learning"):
            for alias in node.names:
                assert alias.name in recorded[str(node.module)], alias.name
                imported[alias.name] = str(node.module)
    assert len(imported) >= 8
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        if call.func.id in imported:  # type: ignore[attr-defined]
            entry = recorded[imported[call.func.id]][call.func.id]  # type: ignore[attr-defined]
            entry = recorded[entry["from"]][call.func.id] if "from" in entry else entry  # type: ignore[attr-defined]
            arguments = entry["parameters"] if "parameters" in entry else entry["members"]["__init__"]["parameters"]
            known = {argument.partition(" = ")[0] for argument in arguments}
            assert {keyword.arg for keyword in call.keywords} <= known


def test_the_script_trains_saves_loads_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    lines = (text.text.replace("\n", " ") for text in open_corpus("embedded").read(0))
    texts.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(MODEL_DIR), str(texts), str(tmp_path / "run")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(results) == {"standard", "top_k"}
    for name, dict_class in (("standard", "AutoEncoder"), ("top_k", "AutoEncoderTopK")):
        measured = results[name]
        assert (measured["dict_class"], measured["ctx_len"]) == (dict_class, 32)
        assert measured["frac_variance_explained"] > 0.45 and 0.3 < measured["frac_recovered"] < 1
        assert measured["loss_original"] < measured["loss_reconstructed"] < measured["loss_zero"]
    assert results["top_k"]["l0"] == 16
    for index in (0, 1):
        folder = tmp_path / "run" / f"trainer_{index}"
        assert (folder / "checkpoints" / "ae_30.safetensors").is_file()
        _, config = load_dictionary(folder)
        assert config["trainer"]["norm_factor"] > 0 and config["trainer"]["lr"] == 1e-3
