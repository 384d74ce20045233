"""What the statistics of a dictionary's latents cost a row, beside loops over rows and latents.

`python -m benchmarks run --only analysis`. On activations of the embedded model with a TopK dictionary that was trained
on them for a moment, three ways to the same: our pass (`analysis/statistics.py`), a loop over rows and latents that
reads one code after the other, as tutorials have it, and a loop over latents, each vectorised over all rows. The loops
are given all codes, encoded and in memory, which the pass neither needs nor is given; they leave out what tells
co-activation. They are run on some of the rows or latents, and their time is scaled by rows times latents.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import Report, Table
from dictionary_learning.activations.types import Provenance
from dictionary_learning.dictionary import Dictionary

HOOK_POINT = "resid_post_layer_2"
TOP, SAMPLES, WINDOW, QUANTILES = 10, 20, 64, (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass
class Options:
    """Sizes and repetitions of the analysis benchmark."""

    m: int = 1536
    k: int = 32
    rows: int = 60_000
    training_steps: int = 100
    loop_rows: int = 128
    loop_latents: int = 128
    rounds: int = 3

    def quick(self) -> Options:
        few = {"rows": self.rows // 5, "training_steps": 20, "loop_rows": 32, "loop_latents": 32, "rounds": 2}
        return Options(**vars(self) | few)


class Sample(NamedTuple):
    """Batches of rows with their provenance, and a dictionary trained on them."""

    dictionary: Dictionary
    batches: list[tuple[Tensor, Provenance]]
    corpora: list[str]


def measure(options: Options, threads: int | None = None) -> dict[str, Any]:
    """Nanoseconds a row and latent of each way, the best of some rounds that go by turns."""
    from dictionary_learning.analysis.statistics import bytes_needed

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        sample = make_sample(options)
        with torch.no_grad():
            codes_NF = torch.cat([sample.dictionary.encode(x_ND) for x_ND, _ in sample.batches])
        provenance = joined([provenance for _, provenance in sample.batches])
        n, F = codes_NF.shape
        some_rows, some_latents = min(options.loop_rows, n), min(options.loop_latents, F)
        ways: dict[str, tuple[Callable[[], Any], int]] = {
            "pass": (lambda: stream(sample), n * F),
            "encoder": (lambda: encode_all(sample), n * F),
            "elements": (lambda: loop_over_rows_and_latents(codes_NF[:some_rows], provenance), some_rows * F),
            "latents": (lambda: loop_over_latents(codes_NF, provenance, some_latents), n * some_latents),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(options.rounds):
            for name, (way, codes) in ways.items():
                begin = time.perf_counter()
                way()
                best[name] = min(best[name], 1e9 * (time.perf_counter() - begin) / codes)
    finally:
        torch.set_num_threads(before)
    state, working = bytes_needed(F, corpora=len(sample.corpora), l0=options.k)
    sizes = {"state": state, "working": working, "codes": codes_NF.nbytes}
    return {"nanoseconds": best, "rows": n, "latents": F, "l0": int((codes_NF != 0).sum()) / n, "bytes": sizes}


def make_sample(options: Options) -> Sample:
    from data_prep.embedded import MODEL_DIR
    from dictionary_learning.activations.language_model import LanguageModelActivations, TracedLM
    from dictionary_learning.corpus import TextStream, open_corpus
    from dictionary_learning.packing import ContextPacker
    from dictionary_learning.trainers import TopKTrainer

    lm = TracedLM.load(str(MODEL_DIR))
    texts = TextStream(open_corpus("embedded"), epochs=None, seed=0)
    packer = ContextPacker(texts, lm.tokenizer, ctx_len=128, batch_contexts=16)
    source = LanguageModelActivations(lm, packer, HOOK_POINT, provenance=True)
    batches: list[tuple[Tensor, Provenance]] = []
    while sum(len(x_ND) for x_ND, _ in batches) < options.rows:
        batch = next(source)
        assert batch.provenance is not None
        batches.append((batch.acts[HOOK_POINT], batch.provenance))
    x_ND = torch.cat([x_ND for x_ND, _ in batches])
    trainer = TopKTrainer(
        options.training_steps, x_ND.shape[1], options.m, options.k, 2, "embedded", seed=0, device="cpu"
    )
    g = torch.Generator().manual_seed(0)
    for step in range(options.training_steps):
        trainer.update(step, x_ND[torch.randint(len(x_ND), (1024,), generator=g)])
    return Sample(trainer.ae, batches, packer.corpora)


def joined(parts: list[Provenance]) -> Provenance:
    return Provenance(*map(torch.cat, zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------- three ways to the same


def stream(sample: Sample) -> Any:
    """Our pass, its encoder included."""
    from dictionary_learning.analysis.statistics import StatisticsPass

    statistics = StatisticsPass(sample.dictionary, top=TOP, samples=SAMPLES, window=WINDOW)
    for x_ND, provenance in sample.batches:
        statistics.update(x_ND, provenance)
    return statistics.finish(sample.corpora)


@torch.no_grad()
def encode_all(sample: Sample) -> None:
    """What the encoder alone costs of that."""
    for x_ND, _ in sample.batches:
        sample.dictionary.encode(x_ND)


def loop_over_rows_and_latents(codes_NF: Tensor, provenance: Provenance) -> list[dict[str, Any]]:
    """Of each latent: how often it fires, in which documents and corpora, its values, and its highest activations."""
    found: list[dict[str, Any]] = [
        {"count": 0, "values": [], "corpora": {}, "documents": {}, "top": []} for _ in range(codes_NF.shape[1])
    ]
    for row in range(len(codes_NF)):
        document, position = int(provenance.document_N[row]), int(provenance.position_N[row])
        corpus = int(provenance.corpus_N[row])
        for latent in range(codes_NF.shape[1]):
            value = codes_NF[row, latent].item()
            if value == 0:
                continue
            of = found[latent]
            of["count"] += 1
            of["values"].append(value)
            of["corpora"][corpus] = of["corpora"].get(corpus, 0) + 1
            of["documents"][document] = of["documents"].get(document, 0) + 1
            heapq.heappush(of["top"], (value, document, position))
            if len(of["top"]) > TOP:
                heapq.heappop(of["top"])
    for of in found:
        of["mean"] = sum(of["values"]) / max(of["count"], 1)
        of["top"].sort(reverse=True)
    return found


def loop_over_latents(codes_NF: Tensor, provenance: Provenance, latents: int) -> list[dict[str, Any]]:
    """The same, a latent after the other, with windows of text and samples; vectorised over the rows."""
    document_N = provenance.document_N.unique_consecutive(return_inverse=True)[1]
    segment = torch.stack([provenance.document_N, provenance.context_N]).unique_consecutive(dim=1, return_inverse=True)
    segment_N, rows_D = segment[1], torch.bincount(document_N)
    corpus_D = torch.zeros_like(rows_D).scatter_(0, document_N, provenance.corpus_N)
    found = []
    for latent in range(latents):
        code_N = codes_NF[:, latent]
        row_K = code_N.nonzero().flatten()
        value_K = code_N[row_K]
        of: dict[str, Any] = {"count": len(row_K)}
        found.append(of)
        if not len(row_K):
            continue
        rate_D = torch.bincount(document_N[row_K], minlength=len(rows_D)) / rows_D
        of["corpora"] = torch.bincount(provenance.corpus_N[row_K])
        of["rates"] = torch.bincount(corpus_D, weights=rate_D), torch.bincount(corpus_D, weights=rate_D.square())
        of["documents"] = torch.bincount(corpus_D, weights=(rate_D > 0).double())
        of["mean"], of["std"], of["max"] = value_K.double().mean(), value_K.double().std(correction=0), value_K.max()
        of["quantiles"] = value_K.quantile(torch.tensor(QUANTILES)) if len(value_K) < 2**24 else None
        peak_S = torch.zeros(int(segment_N[-1]) + 1).scatter_reduce_(0, segment_N[row_K], value_K, "amax")
        peaks_K = row_K[value_K == peak_S[segment_N[row_K]]]
        top = peaks_K[code_N[peaks_K].topk(min(TOP, len(peaks_K))).indices]
        samples = row_K[torch.randperm(len(row_K))[:SAMPLES]]
        window_EW = torch.cat([top, samples])[:, None] + torch.arange(WINDOW) - WINDOW // 2
        window_EW.clamp_(0, len(code_N) - 1)
        of["top"], of["windows"] = code_N[top], (provenance.token_N[window_EW], code_N[window_EW])
    return found


# ------------------------------------------------------------------------------------------- what is said of it


def report(data: dict[str, Any], options: dict[str, Any]) -> Report:
    taken, F = data["nanoseconds"], data["latents"]
    ways = {
        "one pass, encoder included": "pass",
        "of which the encoder": "encoder",
        "loop over rows and latents, codes given": "elements",
        "loop over latents, all codes in memory": "latents",
    }
    rows = [
        [words, f"{taken[name]:.3g}", f"{taken[name] * F / 1e3:,.1f}", f"{taken[name] / taken['pass']:,.3g} x"]
        for words, name in ways.items()
    ]
    sizes = {name: f"{size / 2**20:,.0f} MiB" for name, size in data["bytes"].items()}
    title = (
        f"Rates, quantiles, corpora, documents and examples of {F:,} latents (L0 {data['l0']:.0f}) on {data['rows']:,} "
        "rows of the embedded model, d = 192."
    )
    remarks = [
        f"The loop over rows and latents was run on {options['loop_rows']} rows, that over latents on "
        f"{options['loop_latents']} latents; their times are scaled by rows times latents. They do not count "
        "co-activation, which the pass does.",
        f"Memory: the pass keeps {sizes['state']} and takes at most {sizes['working']} as it works, however long the "
        f"text; all codes of these rows are {sizes['codes']}.",
    ]
    return Report(
        "Analysis", [Table(title, ["way", "ns a row and latent", "µs a row", "beside the pass"], rows)], remarks
    )


def plot(data: dict[str, Any], folder: Path) -> None:
    """Four numbers need no plot."""
