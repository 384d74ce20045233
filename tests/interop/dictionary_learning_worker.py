"""Runs in the real `dictionary-learning`, which has our import name and therefore a process of its own.

    python dictionary_learning_worker.py train FOLDER    trains one small dictionary of each trainer into FOLDER
    python dictionary_learning_worker.py read FOLDER     reads every dictionary below FOLDER

Both write beside each dictionary what the package itself computes with it: answers.pt with x, codes, x_hat and
the metrics of one batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import get_nested_folders, load_dictionary

D, F, K, STEPS = 12, 40, 5, 40
SCHEDULE = {"warmup_steps": 2, "sparsity_warmup_steps": 2}
ANNEAL = {**SCHEDULE, "anneal_start": 10, "p_end": 0.3, "n_sparsity_updates": 4}
BY_K = {"k": K, "warmup_steps": 2, "threshold_start_step": 0, "threshold_beta": 0.5}
TRAINERS: list[dict[str, Any]] = [
    {"trainer": StandardTrainer, **SCHEDULE},
    {"trainer": StandardTrainerAprilUpdate, **SCHEDULE},
    {"trainer": TopKTrainer, **BY_K},
    {"trainer": BatchTopKTrainer, **BY_K},
    {"trainer": MatryoshkaBatchTopKTrainer, "group_fractions": [0.25, 0.75], **BY_K},
    {"trainer": JumpReluTrainer, "bandwidth": 0.1, "target_l0": 4.0, **SCHEDULE},
    {"trainer": GatedSAETrainer, **SCHEDULE},
    {"trainer": PAnnealTrainer, **ANNEAL},
    {"trainer": GatedAnnealTrainer, **ANNEAL},
]


def inputs(rows: int) -> torch.Tensor:
    directions = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    codes = torch.rand(rows, 20) * (torch.rand(rows, 20) < 0.2)
    return 4 * codes @ directions + 0.5


def train(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"steps": STEPS, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "gpt2", "device": "cpu"}
    configs = [{**sizes, "lr": 1e-2, **trainer} for trainer in TRAINERS]
    trainSAE(
        (inputs(64) for _ in range(STEPS + 200)), configs, STEPS, save_dir=str(folder), device="cpu",
        normalize_activations=True,
    )  # fmt: skip
    new = AutoEncoderNew(D, F)  # no trainer's config names it
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    (folder / "new").mkdir()
    torch.save(new.state_dict(), folder / "new" / "ae.pt")
    trainer = {"dict_class": "AutoEncoderNew", "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "gpt2"}
    (folder / "new" / "config.json").write_text(json.dumps({"trainer": trainer}))


def answer(folder: Path) -> None:
    torch.manual_seed(5)
    for name in get_nested_folders(str(folder)):
        dictionary, _ = load_dictionary(name, "cpu")
        x = inputs(50)
        with torch.no_grad():
            x_hat, codes = dictionary(x, output_features=True)
        measured = evaluate(dictionary, iter([x]))
        torch.save({"x": x, "codes": codes, "x_hat": x_hat, "measured": measured}, Path(name) / "answers.pt")


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    if task == "train":
        train(place)
    answer(place)
