"""Rows of made-up text, dictionaries of every architecture, and their statistics by a plain loop over rows and latents.

Weights and activations are multiples of 1/4, so that every code is exact in float32 whatever the shape of the product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.types import Provenance
from dictionary_learning.analysis.statistics import StatisticsPass
from dictionary_learning.analysis.types import Examples, FeatureStatistics, Probes
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderTopK,
    BatchTopKSAE,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
)

D, F, CONTEXT = 6, 14, 16
CORPORA = ["cardiology", "oncology", "chess"]
TOP, SAMPLES, WINDOW, COACTIVE = 3, 5, 8, 4
SETTINGS: dict[str, Any] = {"top": TOP, "samples": SAMPLES, "window": WINDOW, "coactive": COACTIVE}


class Stream(NamedTuple):
    x_ND: Tensor
    provenance: Provenance

    def rows(self, begin: int, end: int) -> Stream:
        return Stream(self.x_ND[begin:end], Provenance(*(column[begin:end] for column in self.provenance)))

    def cut(self, *places: int) -> Iterator[Stream]:
        for begin, end in itertools.pairwise([0, *places, len(self.x_ND)]):
            yield self.rows(begin, end)


def quarters(*shape: int, low: int = -8, high: int = 9, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, shape) / 4).float()


def stream(rows: int = 400, seed: int = 0) -> Stream:
    """Documents of 1 to 40 tokens after each other in contexts of 16; some rows (special tokens) are left out."""
    g = np.random.default_rng(seed)
    lengths = g.integers(1, 41, rows)
    document_N = np.repeat(np.arange(rows), lengths)[:rows]
    position_N = np.concatenate([np.arange(n) for n in lengths])[:rows]
    corpus_N = g.integers(0, len(CORPORA), rows)[document_N]
    columns = [document_N * 3, position_N, g.integers(0, 50, rows), corpus_N, np.arange(rows) // CONTEXT]
    keep = g.random(rows) < 0.95
    x_ND = quarters(rows, D, seed=seed)[torch.from_numpy(keep)]
    return Stream(x_ND, Provenance(*(torch.from_numpy(column[keep]) for column in columns)))


@torch.no_grad()
def with_weights(dictionary: Dictionary) -> Dictionary:
    for number, parameter in enumerate(dictionary.parameters()):
        parameter.copy_(quarters(*parameter.shape, low=-3, high=4, seed=number + 7))
    dictionary.encoder_rows[3] = 0  # a dead latent
    dictionary.encoder_bias[3] = -1
    return dictionary


def jumprelu() -> Dictionary:
    dictionary = with_weights(JumpReluAutoEncoder(D, F))
    dictionary.get_parameter("threshold").data.fill_(1.5)
    return dictionary


def batch_top_k() -> Dictionary:
    dictionary = with_weights(BatchTopKSAE(D, F, 3))
    dictionary.get_buffer("threshold").fill_(1.25)
    return dictionary


def gated() -> Dictionary:
    dictionary = with_weights(GatedAutoEncoder(D, F))
    dictionary.get_parameter("r_mag").data.zero_()
    dictionary.get_parameter("gate_bias").data[3] = -1
    return dictionary


DICTIONARIES: dict[str, Callable[[], Dictionary]] = {
    "standard": lambda: with_weights(AutoEncoder(D, F)),
    "top_k": lambda: with_weights(AutoEncoderTopK(D, F, 3)),
    "batch_top_k": batch_top_k,
    "jumprelu": jumprelu,
    "gated": gated,
    "identity, which has negative codes": lambda: IdentityDict(D),
}


def run(dictionary: Dictionary, batches: Iterator[Stream], **settings: Any) -> FeatureStatistics:
    streamed = StatisticsPass(dictionary, **{**SETTINGS, **settings})
    for batch in batches:
        streamed.update(*batch)
    return streamed.finish(CORPORA)


def every(contexts: int, data: Stream) -> Iterator[Stream]:
    """Batches of so many contexts, as sources give them."""
    number_N = data.provenance.context_N // contexts
    return data.cut(*(np.flatnonzero(np.diff(number_N.numpy())) + 1).tolist())


def assert_equal(got: FeatureStatistics, want: FeatureStatistics) -> None:
    """Bit for bit."""
    for name, value in vars(want).items():
        mine = getattr(got, name)
        if isinstance(value, Examples | Probes):
            for field in value._fields:
                np.testing.assert_array_equal(getattr(mine, field), getattr(value, field), f"{name}.{field}")
        else:
            np.testing.assert_array_equal(mine, value, name)
            assert getattr(value, "dtype", None) == getattr(mine, "dtype", None), name


# ------------------------------------------------------------------------------------------- the plain loop


def by_hand(dictionary: Dictionary, data: Stream) -> dict[str, Any]:
    """What `FeatureStatistics` says, one row and latent after the other."""
    with torch.no_grad():
        codes_NF = dictionary.encode(data.x_ND).abs().numpy()
    document_N, position_N, token_N, corpus_N, context_N = (column.tolist() for column in data.provenance)
    n, latents = codes_NF.shape
    values: list[list[float]] = [[] for _ in range(latents)]
    active_CF = np.zeros((len(CORPORA), latents), dtype=int)
    fired: dict[int, list[int]] = {}
    length: dict[int, int] = {}
    pairs_FF = np.zeros((latents, latents), dtype=int)
    segment_N = [list(g) for _, g in itertools.groupby(range(n), lambda i: (document_N[i], context_N[i]))]
    segment_of = {row: segment for segment in segment_N for row in segment}
    peaks: list[dict[Any, tuple[float, int]]] = [{} for _ in range(latents)]
    for row in range(n):
        length[document_N[row]] = length.get(document_N[row], 0) + 1
        counts = fired.setdefault(document_N[row], [0] * latents)
        for f in range(latents):
            value = float(codes_NF[row, f])
            if value == 0:
                continue
            values[f].append(value)
            active_CF[corpus_N[row], f] += 1
            counts[f] += 1
            segment = (document_N[row], context_N[row])
            if value > peaks[f].get(segment, (0.0, 0))[0]:
                peaks[f][segment] = (value, row)
            for g in range(latents):
                pairs_FF[f, g] += codes_NF[row, g] != 0
    documents_CF = np.zeros_like(active_CF)
    rate_sum_CF, rate_square_CF = np.zeros(active_CF.shape), np.zeros(active_CF.shape)
    documents_C = [0] * len(CORPORA)
    for document, counts in fired.items():
        corpus = corpus_N[document_N.index(document)]
        documents_C[corpus] += 1
        for f, count in enumerate(counts):
            documents_CF[corpus, f] += count > 0
            rate_sum_CF[corpus, f] += count / length[document]
            rate_square_CF[corpus, f] += (count / length[document]) ** 2

    def example(f: int, row: int) -> dict[str, Any]:
        segment = segment_of[row]
        begin = max(min(row - WINDOW // 2, segment[-1] + 1 - WINDOW), segment[0])
        inside = [i for i in range(begin, begin + WINDOW) if i <= segment[-1]]
        padding = WINDOW - len(inside)
        return {
            "value_FE": codes_NF[row, f],
            "document_FE": document_N[row],
            "position_FE": position_N[row],
            "corpus_FE": corpus_N[row],
            "token_FEW": [token_N[i] for i in inside] + [-1] * padding,
            "act_FEW": [codes_NF[i, f] for i in inside] + [0.0] * padding,
            "peak_FE": row - begin,
        }

    best = [sorted(found.values(), key=lambda pair: (-pair[0], pair[1]))[:TOP] for found in peaks]
    return {
        "rows": n,
        "documents": len(fired),
        "values": values,
        "codes": codes_NF,
        "active_F": np.array([len(v) for v in values]),
        "documents_F": documents_CF.sum(0),
        "rows_C": np.bincount(corpus_N, minlength=len(CORPORA)),
        "documents_C": np.array(documents_C),
        "active_CF": active_CF,
        "documents_CF": documents_CF,
        "rate_sum_CF": rate_sum_CF,
        "rate_square_CF": rate_square_CF,
        "pairs_FF": pairs_FF,
        "top": [[example(f, row) for _, row in rows] for f, rows in enumerate(best)],
        "example": example,
    }
