"""The real `dictionary-learning` and ours read each other's trained folders and compute the same: `make test-interop`.

It has our import name, so it lies in a folder of its own and runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dictionary_learning import load_dictionary, trainSAE
from dictionary_learning.evaluation import evaluate
from dictionary_learning.formats.dictionary_learning import write
from dictionary_learning.trainers import TRAINERS
from dictionary_learning.utils import get_nested_folders

PEER = Path(os.environ.get("DICTIONARY_LEARNING_PEER", Path(sys.prefix) / "peer"))
PEER_PYTHON = os.environ.get("DICTIONARY_LEARNING_PYTHON", sys.executable)
WORKER = Path(__file__).with_name("dictionary_learning_worker.py")
CLASSES = [
    *("AutoEncoder", "AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"),
    *("JumpReluAutoEncoder", "GatedAutoEncoder", "AutoEncoder", "GatedAutoEncoder", "AutoEncoderNew"),
]
D, F, STEPS = 12, 40, 40

if not (PEER / "dictionary_learning").is_dir():
    pytest.skip("needs the environment of `make test-interop`", allow_module_level=True)

differences: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _say_the_differences() -> object:
    yield
    print("\ndictionary-learning 0.1.0: largest differences, relative to 1 + |value|")
    for name, value in differences.items():
        print(f"  {name}: {value:.1e}")


def in_the_package(task: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(PEER), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [PEER_PYTHON, str(WORKER), task, str(folder)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    in_the_package("train", folder)
    return folder


def same(name: str, folder: Path) -> str:
    """Compare what our reading of a folder computes with the package's answers there; the class it is here."""
    dictionary, _ = load_dictionary(folder)
    answers = torch.load(folder / "answers.pt", weights_only=True)
    with torch.no_grad():
        x_hat, codes = dictionary(answers["x"], output_features=True)
    assert 0 < (answers["codes"] != 0).float().mean() < 1
    for found, wanted in ((codes, answers["codes"]), (x_hat, answers["x_hat"])):
        difference = ((found - wanted).abs() / (1 + wanted.abs())).max().item()
        differences[name] = max(difference, differences.get(name, 0.0))
        assert difference <= 1e-6
    measured = evaluate(dictionary, [answers["x"]])
    # It takes the mean error out of the error, which the model does not.
    biased = (answers["x"] - x_hat).mean(0).pow(2).sum() / answers["x"].var(0, correction=0).sum()
    measured["frac_variance_explained"] += biased.item()
    assert {key: measured[key] for key in answers["measured"]} == pytest.approx(answers["measured"], rel=1e-4)
    return type(dictionary).__name__


@pytest.mark.parametrize("index", range(len(CLASSES)))
def test_a_folder_trained_by_the_package_computes_the_same_here(theirs: Path, index: int) -> None:
    folder = theirs / ("new" if index == len(CLASSES) - 1 else f"trainer_{index}")
    _, config = load_dictionary(folder)
    trainer = config["trainer"].get("trainer_class", "by hand")
    assert same(f"trained there, read here: {trainer}", folder) == CLASSES[index]
    assert config["trainer"]["activation_dim"] == D and config["trainer"]["lm_name"] == "gpt2"


def test_the_package_finds_as_many_folders_as_we_do(theirs: Path) -> None:
    assert len(get_nested_folders(theirs)) == len(CLASSES)


def test_a_dictionary_of_each_of_our_trainers_computes_the_same_there(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    settings = {
        "matryoshka_batch_top_k": {"k": 5, "group_fractions": [0.25, 0.75]},
        "jump_relu": {"target_l0": 4.0, "bandwidth": 0.1},
        **{name: {"k": 5} for name in ("top_k", "batch_top_k")},
    }
    names = [name for name in TRAINERS if name != "group_max"]  # a class that the package does not have
    sizes = {"activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "gpt2", "device": "cpu", "seed": 0}
    configs = [{"trainer": TRAINERS[name], **sizes, **settings.get(name, {})} for name in names]
    directions = torch.randn(20, D, generator=generator)
    data = [
        (torch.rand(64, 20, generator=generator) * (torch.rand(64, 20, generator=generator) < 0.2)) @ directions
        for _ in range(STEPS)
    ]
    for name, dictionary in zip(names, trainSAE(data, configs, STEPS, normalize_activations=True), strict=True):
        config = {"trainer": {"lm_name": "gpt2", "layer": 3, "submodule_name": "resid_post_layer_3"}}
        write(dictionary, config, tmp_path / name)
    in_the_package("read", tmp_path)
    for name in names:
        same(f"trained here, read there: {name}", tmp_path / name)
