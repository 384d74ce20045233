"""The activations of the quality benchmark: a folder with train.safetensors and eval.safetensors, `acts` [N, D].

They are given, or made here: token states of a sentence encoder over a corpus, without special tokens, scaled to a mean
squared norm of D, in float16. A record is held out whole (by a hash of its key), so no text stands on both sides.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dictionary_learning.errors import UserError

SPLITS = {"train": "train", "eval": "heldout"}  # the files, and the parts of the corpus


def prepare(folder: str, corpus: str, encoder: str, layer: int, max_tokens: int, heldout: float) -> Path:
    """The folder with both files, made from the corpus if one is given and they are not there.

    Raises:
        UserError: neither files nor a corpus; see `SentenceEncoder.load` and `open_corpus`.
    """
    if not folder:
        raise UserError(
            "The quality benchmark needs activations: give --quality.acts FOLDER with train.safetensors and "
            "eval.safetensors, or with --quality.corpus a folder in which to make them."
        )
    path = Path(folder)
    if all((path / f"{name}.safetensors").exists() for name in SPLITS):
        return path
    if not corpus:
        raise UserError(
            f"{folder} holds no train.safetensors and eval.safetensors: give --quality.corpus to make them there."
        )
    make(path, corpus, encoder, layer, max_tokens, heldout)
    return path


def make(path: Path, corpus: str, encoder: str, layer: int, max_tokens: int, heldout: float, seed: int = 0) -> None:
    """Write both files, and meta.json with what they are."""
    from dictionary_learning.activations.sentence_encoder import SentenceActivations, SentenceEncoder
    from dictionary_learning.corpus import TextStream, open_corpus

    model = SentenceEncoder.load(encoder, max_length=max_tokens)
    rows: dict[str, Tensor] = {}
    for name, split in SPLITS.items():
        texts = TextStream(open_corpus(corpus), split=split, heldout_fraction=heldout)
        source = SentenceActivations(model, texts, level="token", hook_points=f"resid_post_layer_{layer - 1}")
        rows[name] = torch.cat([next(iter(batch.acts.values())) for batch in source])
    d = rows["train"].shape[1]
    raw = sum(float(part.double().pow(2).sum()) for part in rows["train"].split(1 << 16)) / len(rows["train"])
    scale, draw = (d / raw) ** 0.5, torch.Generator().manual_seed(seed)
    path.mkdir(parents=True, exist_ok=True)
    meta = {"layer": layer, "d": d, "scale": scale, "heldout_fraction": heldout} | {k: len(v) for k, v in rows.items()}
    for name, rows_ND in rows.items():
        shuffled = rows_ND[torch.randperm(len(rows_ND), generator=draw)].mul_(scale).half()
        temporary = path / f"{name}.tmp"
        save_file({"acts": shuffled}, temporary)
        temporary.replace(path / f"{name}.safetensors")
    (path / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def heldout_rows(path: Path) -> Tensor:
    return load_file(path / "eval.safetensors")["acts"].float()


def description(path: Path) -> dict[str, Any]:
    """Sizes, and a digest by which other activations are told from these."""
    digest, sizes = hashlib.sha256(), {}
    for name in SPLITS:
        acts = load_file(path / f"{name}.safetensors")["acts"]
        digest.update(acts[:: max(1, len(acts) // 500)].float().numpy().tobytes())
        sizes[f"{name}_rows"], sizes["d"] = len(acts), acts.shape[1]
    return sizes | {"digest": digest.hexdigest()[:16]}
