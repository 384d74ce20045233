"""Valid files, small ones, each made by this project's own writers; the fuzzer starts from them.

Out: folders as a user has them: a run, a harvest, a dictionary in each format, activations, corpora, raw records.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dictionary_learning import storage
from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.activations.writer import ShardWriter
from dictionary_learning.config import DictionarySpec, RunConfig
from dictionary_learning.dictionary import AutoEncoderTopK, MatryoshkaBatchTopKSAE
from dictionary_learning.metrics import EvalResult
from dictionary_learning.summary import sorted_along_front, write_summary

D, F, K = 6, 10, 3
POINT = "resid_post_layer_2"
DIGEST = "0" * 16
SAE_CONFIG: dict[str, Any] = {"input_dims": D, "n_features": F, "k": K, "epochs": 2, "lr": 0.001, "scheduler": "wsd"}
CONFIG: dict[str, Any] = {
    "trainer": {
        "trainer_class": "TopKTrainer",
        "dict_class": "AutoEncoderTopK",
        "activation_dim": D,
        "dict_size": F,
        "k": K,
        "layer": 2,
        "lm_name": "gpt2",
        "submodule_name": POINT,
        "norm_factor": 2.5,
    },
    "buffer": {"ctx_len": 128, "remove_bos": True, "add_special_tokens": True},
}


def topk(k: int = K) -> AutoEncoderTopK:
    torch.manual_seed(0)
    dictionary = AutoEncoderTopK(D, F, k).requires_grad_(False)
    dictionary.threshold.fill_(0.5)
    return dictionary


def run_config() -> RunConfig:
    spec = DictionarySpec("top_k", POINT, F, {"k": K}, settings={"auxk_alpha": 0.1})
    return RunConfig("embedded", "embedded", [spec], 4096, 64, 8, 64, 512, "float32", 1000, 4)


def run(folder: Path) -> None:
    """A finished run of one dictionary, with its log, summary, marker of W&B, checksums and one saved state."""
    record = {
        "status": "complete",
        "config": run_config().to_dict(),
        "corpus_fingerprint": DIGEST,
        "model": {"name": "model", "weights": DIGEST},
        "versions": {"torch": "2"},
    }
    storage.write_json(folder / "run.json", record)
    storage.write_tensors(folder / "trainer_0" / "ae.safetensors", topk().state_dict())
    storage.write_json(folder / "trainer_0" / "config.json", CONFIG)
    result = EvalResult(3.0, 0.5, 0.1, 1.0, 2.0, 0.9, 0.9, 1.0, 1.0, 1000).to_dict()
    storage.write_json(folder / "trainer_0" / "eval_results.json", result)
    row = {"trainer": "trainer_0", "architecture": "top_k", "hook_point": POINT, "width": F, "sparsity": "k=3"}
    write_summary(folder / "summary.csv", sorted_along_front([{**row, "lr": 0.001, "seed": 0, **result}]))
    lines = [{"step": step, "tokens": 512 * step, "trainer": "trainer_0", "loss": 1.5} for step in (5, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = {"trainer_0": {"id": "abc", "step": 5, "sent": {"a": {"sha256": DIGEST, "reference": "wandb://a/b:v0"}}}}
    storage.write_json(folder / "wandb.json", {"project": "sae-factory", "entity": None, "group": "run", "runs": runs})
    names = ("trainer_0/config.json", "trainer_0/ae.safetensors")
    files = {name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(), "size": 1} for name in names}
    storage.write_json(folder / "checksums.json", {"version": 1, "best": "trainer_0", "files": files})
    tree = {"step": 10, "weights": torch.ones(2, 3), "numpy": {1: 2**100}, "nan": float("nan"), "list": [1, None, "a"]}
    storage.save_state(folder / "state", 10, tree)


def harvest(folder: Path) -> None:
    """A harvest of seven rows in two batches, complete."""
    header = {
        "format": "sae-factory activations",
        "version": 1,
        "model": {"name": "embedded", "digest": DIGEST},
        "hook_points": {POINT: {"width": D, "layer": 2, "path": "h.2", "io": "out"}},
        "dtype": "float32",
        "max_rows": 4,
        "corpus": {"name": "embedded", "fingerprint": DIGEST, "split": "train"},
        "settings": {"ctx_len": 4, "harvest_contexts": 1, "shard_rows": 100},
    }
    writer = ShardWriter(folder, header, 100)
    for rows in (4, 3):
        numbers = torch.arange(rows)
        writer.add(ActivationBatch({POINT: torch.randn(rows, D)}, Provenance(*[numbers] * 5)))
    contexts = {"pending": torch.arange(5), "texts": {"epoch": 0, "position": 3}}
    writer.flush({"contexts": contexts})
    manifest = json.loads((folder / "manifest.json").read_text())
    storage.write_json(folder / "unfinished.json", manifest)
    writer.finish({"contexts": contexts}, ["medqa"])


def dictionary(folder: Path, name: str) -> None:
    """A TopK dictionary in one of the formats."""
    from dictionary_learning import formats

    formats.write(topk(), {**CONFIG, "corpus": "embedded"}, folder, name)


def matryoshka(folder: Path) -> None:
    """The dictionary with the most in its file besides matrices."""
    torch.manual_seed(0)
    state = MatryoshkaBatchTopKSAE(D, F, K, [4, 6]).state_dict()
    storage.write_tensors(folder / "ae.safetensors", state)
    trainer = {**CONFIG["trainer"], "dict_class": "MatryoshkaBatchTopKSAE"}
    storage.write_json(folder / "config.json", {**CONFIG, "trainer": trainer})


def activations(folder: Path) -> None:
    """The same rows as .npy, .npz, .pt and .safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = torch.arange(9.0 * D).reshape(9, D)
    np.save(folder / "acts.npy", rows.numpy())
    np.savez(folder / "acts.npz", a=rows.numpy(), b=rows.numpy())
    torch.save({"a": rows, "b": rows * 2}, folder / "acts.pt")
    storage.write_tensors(folder / "acts.safetensors", {"a": rows, "b": rows * 2})


TEXTS = ["Which vitamin? The options are:", "Zweite é \u2028 Zeile", "", "a longer text " * 20]


def corpora(folder: Path) -> None:
    """Texts as .jsonl, .jsonl.gz, .jsonl.zst, .txt and .parquet."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import zstandard

    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "source_dataset": "medqa", "id": n}) for n, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "texts.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    parquet.write_table(pa.table({"text": TEXTS, "source_dataset": ["medqa"] * 4}), folder / "texts.parquet")


def records() -> dict[str, list[Any]]:
    """Raw records of each of the six corpora, as the embedded samples have them."""
    from data_prep.embedded import SAMPLES_DIR
    from data_prep.sources import CORPORA

    found = {}
    for name in CORPORA:
        file = next(iter(sorted((SAMPLES_DIR / name).glob("*.jsonl"))))
        with file.open(encoding="utf-8") as lines:
            found[name] = [json.loads(next(lines)) for _ in range(2)]
    return found
