"""Runs and analyses to report on: made through the writers that real ones are made with, as odd as asked for."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.types import Examples
from dictionary_learning.storage import write_json

WORDS = (
    "the patient with acute renal failure was given insulin and the serum glucose fell while blood pressure rose in "
    "most women who had asthma or a stroke after surgery for breast cancer which drug inhibits reuptake of serotonin "
    "nerve artery vein muscle lung liver heart kidney infection fever child trial placebo risk dose therapy chronic"
).split()
HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=2>",
    "\u202egnp.exe\u202c",
    "a\u0000b\u0007c\u001b[31m",
    "\ud800",
    "👩‍⚕️🏴‍☠️",
    "مرحبا",
    "\"'`&amp;",
    "\n\t\r",
]
CORPORA = ["pubmedqa", "medmcqa", "medqa"]
ARCHITECTURES = ["top_k", "jump_relu", "standard"]


def make_run(folder: Path, dictionaries: int = 3, width: int = 96, status: str = "complete", **record: Any) -> Path:
    """A run of small dictionaries, with a log and an evaluation."""
    names = [f"trainer_{i}" for i in range(dictionaries)]
    specs = [
        {
            "architecture": ARCHITECTURES[i % 3],
            "hook_point": "resid_post_layer_2",
            "width": width,
            "sparsity": {"k": 8 * (i + 1)},
            "seed": 0,
        }
        for i in range(dictionaries)
    ]
    config = {"model_name": "embedded", "corpus": "embedded", "num_tokens": 50_000, "dictionaries": specs}
    about = {"name": "model", "architecture": "GPT2LMHeadModel", "parameters": 2615424}
    facts = {"status": status, "config": config, "model": about, "versions": {"torch": "2.13.0"}, "tokens_done": 50_000}
    write_json(
        folder / "run.json",
        facts | {"started": "2026-01-02T03:04:05+00:00", "git_revision": "0123456789abcdef"} | record,
    )
    lines = []
    for step in range(1, 41):
        for i, name in enumerate(names):
            row = {
                "step": step * 5,
                "tokens": step * 1250,
                "trainer": name,
                "loss": 3 / step + 0.1 * i,
                "l0": 8.0 * (i + 1),
            }
            row |= {"frac_variance_explained": 1 - 1 / step, "nz_frac": 0.8, "dead_latents": 3.0 * i}
            lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for i, (name, spec) in enumerate(zip(names, specs, strict=True)):
        trainer = {
            "architecture": spec["architecture"],
            "dict_class": "AutoEncoderTopK",
            "dict_size": width,
            "lr": 0.002,
            "k": 8 * (i + 1),
        }
        write_json(
            folder / name / "config.json",
            {"trainer": trainer | {"submodule_name": spec["hook_point"], "seed": 0}, "buffer": {}},
        )
        result = {
            "l0": 8.0 * (i + 1),
            "frac_variance_explained": 0.8 + 0.04 * i,
            "frac_recovered": 0.9 + 0.03 * i,
            "kl": 0.2,
            "mse": 0.1,
        }
        write_json(folder / name / "eval_results.json", result | {"frac_alive": 0.9, "tokens": 2857, "cossim": 0.9})
    return folder


def vocabulary(size: int = 400) -> dict[int, str]:
    """Token strings with a leading space, some of them suffixes without one."""
    return {i: f" {WORDS[i % len(WORDS)]}" if i < 2 * len(WORDS) else WORDS[i % len(WORDS)][-3:] for i in range(size)}


def examples(
    rng: np.random.Generator,
    text_DT: np.ndarray,
    features: int,
    kept: int,
    window: int,
    scale_F: np.ndarray,
    alive_F: np.ndarray,
) -> Examples:
    """Places in the texts; each latent fires there, and on a few tokens around."""
    documents, length = text_DT.shape
    shape = (features, kept)
    value_FE = -np.sort(-(rng.random(shape) * scale_F[:, None]), axis=1)
    document_FE = np.where(alive_F[:, None], rng.integers(0, documents, shape), -1)
    position_FE = rng.integers(0, length, shape)
    peak = window // 2
    offset_FEW = position_FE[..., None] - peak + np.arange(window)
    inside_FEW = (offset_FEW >= 0) & (offset_FEW < length) & alive_F[:, None, None]
    token_FEW = np.where(inside_FEW, text_DT[document_FE[..., None].clip(0), offset_FEW.clip(0, length - 1)], -1)
    act_FEW = np.where(rng.random(token_FEW.shape) < 0.06, rng.random(token_FEW.shape) * value_FE[..., None], 0)
    act_FEW[..., peak] = value_FE
    return Examples(
        value_FE.astype(np.float32),
        document_FE.astype(np.int64),
        position_FE.astype(np.int32),
        (document_FE % len(CORPORA)).astype(np.int16),
        token_FEW.astype(np.int32),
        np.where(inside_FEW, act_FEW, 0).astype(np.float32),
        np.full(shape, peak, np.int16),
    )


def make_analysis(
    run: Path,
    names: Sequence[str] = ("trainer_0", "trainer_1"),
    features: int = 96,
    top: int = 5,
    samples: int = 10,
    window: int = 16,
    *,
    text_DT: np.ndarray | None = None,
    strings: Mapping[int, str] | None = None,
    corpora: Sequence[str] = CORPORA,
    labels: Mapping[int, str] | None = None,
) -> AnalysisFolder:
    """The analysis of a run; latent 3 is dead, latent 5 dense."""
    rng = np.random.default_rng(0)
    strings = vocabulary() if strings is None else strings
    if text_DT is None:
        text_DT = (rng.zipf(1.3, (40, 120)) - 1) % len(strings)
    folder = AnalysisFolder(run / "analysis")
    entries = [
        {
            "name": name,
            "hook_point": "resid_post_layer_2",
            "dict_class": "AutoEncoderTopK",
            "architecture": "top_k",
            "dict_size": features,
            "l0": 8.0,
        }
        for name in names
    ]
    info = {
        "status": "complete",
        "settings": {"top": top},
        "model": {},
        "corpora": {c: "0" for c in corpora},
        "rows": text_DT.size,
    }
    folder.write_info(info | {"documents": len(text_DT), "unit": "token", "dictionaries": entries, "versions": {}})
    folder.write_vocabulary(strings)
    for name in names:
        alive_F = np.arange(features) != 3
        scale_F = rng.random(features) * 10 + 1
        found = (
            examples(rng, text_DT, features, top, window, scale_F, alive_F),
            examples(rng, text_DT, features, samples, window, scale_F, alive_F),
        )
        write_examples(folder, name, *found)
        words = [string for string in strings.values() if string != "\ud800"]  # which parquet can't hold
        folder.write_table(name, columns(rng, features, alive_F, scale_F, words, corpora, labels or {}), corpora)
    return folder


def columns(
    rng: np.random.Generator,
    features: int,
    alive_F: np.ndarray,
    scale_F: np.ndarray,
    words: list[str],
    corpora: Sequence[str],
    labels: Mapping[int, str],
) -> dict[str, Any]:
    """A table of latents."""
    density = np.where(alive_F, 10 ** rng.uniform(-5, -1.2, features), 0.0)
    density[min(5, features - 1)] = 0.4
    status = ["dead" if d == 0 else "dense" if d > 0.1 else "" for d in density]
    table: dict[str, Any] = {
        "feature": np.arange(features, dtype=np.int32),
        "density": density,
        "active": (density * 4800).astype(np.int64),
    }
    table |= {
        "documents": (density * 40).astype(np.int64),
        "mean": scale_F * 0.3,
        "std": scale_F * 0.1,
        "max": np.where(alive_F, scale_F, 0),
    }
    table |= {q: scale_F * share for q, share in (("q10", 0.1), ("q25", 0.2), ("q50", 0.3), ("q75", 0.5), ("q90", 0.7))}
    table["status"] = status
    several = list(corpora) if len(corpora) > 1 else []
    for corpus in several:
        table |= {f"rate:{corpus}": density * rng.random(features), f"log2_ratio:{corpus}": rng.normal(size=features)}
        table |= {f"p:{corpus}": rng.random(features), f"q:{corpus}": rng.random(features) ** 4}
    table["corpus"] = [
        several[f % len(several)] if several and f % 4 == 0 and alive_F[f] else "" for f in range(features)
    ]
    pick = rng.integers(0, len(words), (features, 10))
    near = rng.integers(0, features, (features, 6)).astype(np.int32)
    falling = np.sort(rng.random((features, 10)))[:, ::-1]
    table |= {
        "coactive": list(near[:, :4]),
        "coactive_jaccard": list(falling[:, :4]),
        "neighbours": list(near),
        "neighbour_cosines": list(falling[:, :6]),
    }
    table |= {"top_tokens": [[words[i] for i in row] for row in pick], "top_logits": list(3 * falling)}
    table |= {"bottom_tokens": [[words[-1 - i] for i in row] for row in pick], "bottom_logits": list(-3 * falling)}
    table["ablation_loss"] = np.where(alive_F, rng.normal(0.01, 0.01, features), np.nan)
    table["label"] = [
        labels.get(f, f"{WORDS[f % len(WORDS)]}, {WORDS[(f * 7) % len(WORDS)]}" if f % 2 else "")
        for f in range(features)
    ]
    table["label_share"] = np.where(np.arange(features) % 2, 0.9, np.nan)
    return table


def write_examples(folder: AnalysisFolder, name: str, top: Examples, samples: Examples) -> None:
    """As `AnalysisFolder.write_statistics` does, without the statistics, which a report doesn't read."""
    from safetensors.numpy import save_file

    arrays = {
        f"{kind}.{field.rpartition('_')[0]}": np.ascontiguousarray(array)
        for kind, part in (("top", top), ("sample", samples))
        for field, array in zip(Examples._fields, part, strict=True)
    }
    (folder.path / name).mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder.path / name / "examples.safetensors", metadata={"facts": "{}"})


def make_whole_texts(run: Path, texts: Sequence[str], features: int = 8) -> AnalysisFolder:
    """The analysis of a sentence encoder: the texts themselves are the examples."""
    rng = np.random.default_rng(0)
    folder = make_analysis(run, ["trainer_0"], features, top=len(texts), samples=2)
    folder.write_info({**folder.info, "unit": "text"})
    folder.write_vocabulary({})
    folder.write_texts({10 * d: {"corpus": CORPORA[0], "text": text} for d, text in enumerate(texts)})

    def whole(kept: int) -> Examples:
        shape = (features, kept)
        document_FE = np.tile(10 * np.arange(kept, dtype=np.int64), (features, 1))
        value_FE = -np.sort(-rng.random(shape).astype(np.float32))
        none = np.zeros((*shape, 0))
        return Examples(
            value_FE,
            document_FE,
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int16),
            none.astype(np.int32),
            none.astype(np.float32),
            np.zeros(shape, np.int16),
        )

    write_examples(folder, "trainer_0", whole(len(texts)), whole(2))
    return folder


def part(page: Path, name: str) -> bytes:
    """A part of a report, unpacked."""
    found = re.search(
        rf'<script type="text/plain" id="{re.escape(name)}">([^<]*)</script>', page.read_text(encoding="utf-8")
    )
    assert found is not None, f"no part {name}"
    return gzip.decompress(base64.b64decode(found[1]))


def told(page: Path) -> dict[str, Any]:
    """What a report knows from the start."""
    return json.loads(part(page, "run"))
