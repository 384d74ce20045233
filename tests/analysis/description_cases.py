"""An analysis of made-up text, in which each latent fires on a word of its own, for tests of descriptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dictionary_learning.analysis.folder import COLUMNS, COMPLETE, AnalysisFolder, corpus_columns
from dictionary_learning.analysis.types import Examples, FeatureStatistics, Probes

WORDS = ["fracture", "insulin", "kidney", "asthma", "tumour", "fever"]
FILLER = ["the", "of", "and", "patient", "with", "in"]
LATENTS = len(WORDS) + 1  # the last is dead
TOP, SAMPLES, WIDTH = 10, 20, 9
PLACES = 60


def write_analysis(path: Path, filler: list[str] = FILLER, names: tuple[str, ...] = ("trainer_0",)) -> AnalysisFolder:
    """An analysis in which latent f fires on the word f, in documents of its own, each unlike all others."""
    strings = {number: f" {word}" for number, word in enumerate([*WORDS, *filler])}
    strings |= {1000 + number: f" n{number}" for number in range(LATENTS * SAMPLES + PLACES)}
    rng = np.random.default_rng(0)
    token = np.full((LATENTS, SAMPLES, WIDTH), -1, np.int32)
    token[:-1] = rng.integers(len(WORDS), len(WORDS) + len(filler), size=(LATENTS - 1, SAMPLES, WIDTH))
    act = np.zeros(token.shape, np.float32)
    value = np.zeros((LATENTS, SAMPLES), np.float32)
    document = np.full((LATENTS, SAMPLES), -1, np.int64)
    for f in range(LATENTS - 1):
        token[f, :, 4] = f
        token[f, :, 0] = 1000 + f * SAMPLES + np.arange(SAMPLES)
        value[f] = act[f, :, 4] = np.linspace(8.0, 1.0, SAMPLES)
        document[f] = f * SAMPLES + np.arange(SAMPLES)
    flat = np.full((LATENTS, SAMPLES), 4, np.int32)
    samples = Examples(value, document, flat, flat.astype(np.int16) % 2, token, act, flat.astype(np.int16))
    top = Examples(*(array[:, :TOP] for array in samples))
    active = (document >= 0).sum(1)
    zeros, two = np.zeros(LATENTS), np.zeros((2, LATENTS))
    statistics = FeatureStatistics(
        rows=10_000,
        documents=500,
        active_F=active,
        documents_F=active,
        mean_F=zeros,
        std_F=zeros,
        max_F=value.max(1).astype(np.float64),
        quantiles_FQ=np.zeros((LATENTS, 5)),
        corpora=["medical", "general"],
        rows_C=np.array([5000, 5000]),
        documents_C=np.array([250, 250]),
        active_CF=two.astype(np.int64),
        documents_CF=two.astype(np.int64),
        rate_sum_CF=two,
        rate_square_CF=two,
        coactive_M=np.zeros(0, np.int32),
        coactive_MM=np.zeros((0, 0), np.int64),
        top=top,
        samples=samples,
        probes=_probes(rng, len(filler)),
    )
    folder = AnalysisFolder(path)
    entries = [{"name": name} for name in names]
    corpora = dict.fromkeys(statistics.corpora, "fingerprint")
    head = {"settings": {"against": ["general"]}, "unit": "token", "documents": 500, "corpora": corpora}
    folder.write_info({"status": COMPLETE, "dictionaries": entries, **head})
    folder.write_vocabulary(strings)
    lists = {name: [[] for _ in range(LATENTS)] for name, kind in COLUMNS.items() if kind.startswith("list")}
    columns = {name: zeros for name in (*COLUMNS, *corpus_columns(statistics.corpora))} | lists
    columns |= {"density": statistics.density_F, "documents": active, "active": active, "feature": np.arange(LATENTS)}
    columns |= {"status": [""] * (LATENTS - 1) + ["dead"], "corpus": [""] * LATENTS, "label": [*WORDS, ""]}
    columns |= {
        "label_share": np.linspace(0.9, 0.3, LATENTS),
        "top_tokens": [[" of", '"quote'] for _ in range(LATENTS)],
    }
    columns |= {"rate:medical": np.full(LATENTS, 0.004), "log2_ratio:general": np.full(LATENTS, -5.0)}
    integers = [name for name, kind in COLUMNS.items() if kind.startswith("int")]
    columns |= {name: np.asarray(columns[name]).astype(np.int64) for name in integers}
    for name in names:
        folder.write_statistics(name, statistics)
        folder.write_table(name, columns, statistics.corpora)
    return folder


def _probes(rng: np.random.Generator, filler: int) -> Probes:
    """Texts of other documents, each unlike all others and with one of the words."""
    token = rng.integers(len(WORDS), len(WORDS) + filler, size=(PLACES, WIDTH)).astype(np.int32)
    token[:, 4] = np.arange(PLACES) % len(WORDS)
    token[:, 0] = 1000 + LATENTS * SAMPLES + np.arange(PLACES)
    fired = token[:, 4, None] == np.arange(LATENTS)
    return Probes(1000 + np.arange(PLACES), np.zeros(PLACES, np.int16), token, fired)
