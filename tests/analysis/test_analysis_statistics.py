"""Streamed statistics against a plain loop over rows and latents, in all architectures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from statistics_cases import (
    COACTIVE,
    CONTEXT,
    CORPORA,
    DICTIONARIES,
    SAMPLES,
    SETTINGS,
    TOP,
    F,
    Stream,
    by_hand,
    every,
    run,
    stream,
)

from dictionary_learning.activations.types import Provenance
from dictionary_learning.analysis import probes, statistics
from dictionary_learning.analysis.statistics import StatisticsPass
from dictionary_learning.analysis.types import QUANTILES, Examples
from dictionary_learning.dictionary import Dictionary, IdentityDict
from dictionary_learning.errors import UserError


@pytest.fixture(params=DICTIONARIES)
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    return DICTIONARIES[request.param]()


@pytest.fixture(params=["one chunk", "small chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small chunks":
        monkeypatch.setattr(statistics, "CHUNK_CODES", {"cpu": 1})
        monkeypatch.setattr(statistics, "SEGMENT_ROWS", CONTEXT)


@pytest.mark.parametrize("contexts", [1, 3, 1000])
def test_streamed_statistics_equal_a_loop_over_rows_and_latents(
    dictionary: Dictionary, chunks: None, contexts: int
) -> None:
    data = stream()
    want, got = by_hand(dictionary, data), run(dictionary, every(contexts, data))
    assert (got.rows, got.documents, got.corpora) == (want["rows"], want["documents"], CORPORA)
    exactly = ("active_F", "documents_F", "rows_C", "documents_C", "active_CF", "documents_CF", "rate_sum_CF")
    for name in (*exactly, "rate_square_CF"):
        np.testing.assert_array_equal(getattr(got, name), want[name], name)
    np.testing.assert_array_equal(got.density_F, want["active_F"] / want["rows"])
    for f, values in enumerate(want["values"]):
        if not values:
            assert (got.mean_F[f], got.std_F[f], got.max_F[f], got.quantiles_FQ[f].any()) == (0, 0, 0, False)
            continue
        np.testing.assert_allclose(got.mean_F[f], np.mean(values), rtol=1e-12)
        np.testing.assert_allclose(got.std_F[f], np.std(values), rtol=1e-9, atol=1e-9)
        assert got.max_F[f] == max(values)
        exact = np.quantile(values, QUANTILES, method="inverted_cdf")
        np.testing.assert_allclose(got.quantiles_FQ[f], exact, rtol=1 / 16)
    assert (want["active_F"] == 0).any() == (not isinstance(dictionary, IdentityDict))
    order = np.argsort(-want["active_F"], kind="stable")[:COACTIVE]
    np.testing.assert_array_equal(got.coactive_M, order)
    np.testing.assert_array_equal(got.coactive_MM, want["pairs_FF"][np.ix_(order, order)])
    for f, examples in enumerate(want["top"]):
        assert (got.top.document_FE[f] >= 0).sum() == len(examples)
        for e, example in enumerate(examples):
            assert {name: getattr(got.top, name)[f, e].tolist() for name in Examples._fields} == {
                name: np.asarray(value).tolist() for name, value in example.items()
            }


def test_samples_are_rows_in_which_the_latent_fires_with_their_text(dictionary: Dictionary, chunks: None) -> None:
    data = stream()
    want, got = by_hand(dictionary, data), run(dictionary, every(2, data)).samples
    row_of = {(d, p): i for i, (d, p) in enumerate(zip(*(c.tolist() for c in data.provenance[:2]), strict=True))}
    for f, values in enumerate(want["values"]):
        taken = np.flatnonzero(got.document_FE[f] >= 0)
        assert len(taken) == min(SAMPLES, len(values))
        assert (np.diff(got.value_FE[f, taken]) <= 0).all()
        rows = [row_of[got.document_FE[f, e], got.position_FE[f, e]] for e in taken]
        assert len(set(rows)) == len(rows)
        for e, row in zip(taken, rows, strict=True):
            assert {name: getattr(got, name)[f, e].tolist() for name in Examples._fields} == {
                name: np.asarray(value).tolist() for name, value in want["example"](f, row).items()
            }
            assert got.act_FEW[f, e, got.peak_FE[f, e]] == got.value_FE[f, e] > 0


@pytest.mark.parametrize("places", [7, 1000])
def test_probes_are_rows_at_random_with_what_fires_around_them(
    dictionary: Dictionary, chunks: None, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PLACES", places)
    data = stream()
    codes_NF = by_hand(dictionary, data)["codes"]
    document_N, _, token_N, corpus_N, context_N = (column.numpy() for column in data.provenance)
    wanted = []
    for row, (document, context) in enumerate(zip(document_N, context_N, strict=True)):
        segment = np.flatnonzero((document_N == document) & (context_N == context))
        begin = max(min(row - probes.BEFORE, segment[-1] + 1 - probes.WIDTH), segment[0])
        inside = slice(begin, min(begin + probes.WIDTH, segment[-1] + 1))
        text = token_N[inside].tolist() + [-1] * (probes.WIDTH - len(token_N[inside]))
        fired = (codes_NF[inside] != 0).any(0).tolist()
        wanted.append((int(document), int(corpus_N[row]), text, fired))
    drawn = []
    for seed in range(3):
        found = run(dictionary, every(2, data), seed=seed).probes
        assert found is not None
        got = list(zip(*(column.tolist() for column in found), strict=True))
        assert len(got) == min(places, len(wanted)) and all(one in wanted for one in got)
        drawn.append(got)
    assert (drawn[0] == drawn[1] == drawn[2] == wanted) if places > len(wanted) else (drawn[0] != drawn[1])


def test_rows_of_whole_texts_have_no_windows() -> None:
    dictionary, data = DICTIONARIES["jumprelu"](), stream(200)
    number_N = torch.arange(len(data.x_ND))
    texts = Provenance(number_N, 0 * number_N, 0 * number_N - 1, data.provenance.corpus_N, number_N)
    got = run(dictionary, Stream(data.x_ND, texts).cut(64, 128))
    codes_NF = dictionary.encode(data.x_ND).detach().numpy()
    assert got.top.token_FEW.shape == got.top.act_FEW.shape == (F, TOP, 0)
    np.testing.assert_array_equal(got.documents_F, got.active_F)
    np.testing.assert_array_equal(got.rate_sum_CF, got.active_CF)
    np.testing.assert_array_equal(got.active_F, (codes_NF != 0).sum(0))
    assert got.probes is not None and got.probes.token_RW.shape == (len(data.x_ND), 0)
    np.testing.assert_array_equal(got.probes.fired_RF, codes_NF != 0)
    for f in np.flatnonzero(got.active_F >= TOP):
        np.testing.assert_array_equal(got.top.document_FE[f], np.argsort(-codes_NF[:, f], kind="stable")[:TOP])


def test_rows_from_nowhere_have_rates_but_no_documents_and_examples() -> None:
    dictionary, data = DICTIONARIES["jumprelu"](), stream(200)
    streamed = StatisticsPass(dictionary, **SETTINGS)
    for batch in data.cut(64, 128):
        streamed.update(batch.x_ND)
    got, want = streamed.finish(), by_hand(dictionary, data)
    np.testing.assert_array_equal(got.active_F, want["active_F"])
    np.testing.assert_array_equal(got.active_CF, want["active_F"][None])
    assert (got.corpora, got.rows_C.tolist(), got.documents) == ([""], [len(data.x_ND)], 0)
    assert (got.top.document_FE == -1).all() and (got.samples.document_FE == -1).all() and not got.documents_F.any()
    with pytest.raises(UserError, match="kind 'row', these are of kind 'token'"):
        streamed.update(*data)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top": 0}, "top must be an integer of at least 1, got 0"),
        ({"samples": 1.5}, "samples must be an integer of at least 1, got 1.5"),
        ({"window": 40_000}, "window must be at most 32767 tokens, got 40000"),
        ({"coactive": -1}, "coactive must be an integer of at least 0, got -1"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        StatisticsPass(DICTIONARIES["top_k"](), **settings)


def test_rows_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, data = StatisticsPass(DICTIONARIES["standard"]()), stream(40)
    with pytest.raises(UserError, match="gave no rows"):
        streamed.finish()
    with pytest.raises(UserError, match=r"reads rows of width 6, got shape \[40, 5\]"):
        streamed.update(torch.zeros(40, 5))
    broken = data.x_ND.clone()
    broken[7] = torch.nan
    with pytest.raises(UserError, match="A code of row 7 is NaN or infinite"):
        streamed.update(broken, data.provenance)
    monkeypatch.setattr(statistics, "MOST_ROWS", 30)
    with pytest.raises(UserError, match="at most 30 rows"):
        streamed.update(*data)
