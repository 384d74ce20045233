"""A model's folder of which a file is damaged, as a download that broke off leaves it: one sentence that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.embedded import MODEL_DIR
from dictionary_learning import TracedLM
from dictionary_learning.errors import UserError


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_value(key: str, value: object) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {key: value})) and None


@pytest.mark.parametrize(
    ("file", "damage", "match"),
    [
        ("model.safetensors", cut, "SafetensorError: .*incomplete metadata"),
        ("model.safetensors", lambda file: file.write_bytes(b""), "SafetensorError: .*header too small"),
        ("config.json", cut, "not a valid JSON file"),
        ("config.json", with_value("n_layer", [[]]), "n_layer"),
        ("config.json", with_value("activation_function", "gelu_panh"), "KeyError: 'gelu_panh'"),
    ],
)
def test_a_damaged_model_is_said_in_one_sentence(
    file: str, damage: Callable[[Path], None], match: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(MODEL_DIR, tmp_path / "model")
    damage(folder / file)
    with pytest.raises(UserError, match=f"Could not load a language model from '.*model': .*{match}") as caught:
        TracedLM.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [cut, with_value("unk_token", [1])])
def test_a_damaged_tokenizer_is_said_in_one_sentence(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL_DIR, tmp_path / "model")
    damage(folder / "tokenizer_config.json")
    with pytest.raises(UserError, match="Could not load a tokenizer from '.*model'") as caught:
        TracedLM.load(MODEL_DIR, tokenizer=folder)
    assert "\n" not in str(caught.value)
