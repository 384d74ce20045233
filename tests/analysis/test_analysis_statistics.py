"""Streamed statistics against a plain loop over rows and latents, in all architectures and however rows are batched.

Weights and activations are multiples of 1/4, so that every code is exact in float32 whatever the shape of the product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dictionary_learning import storage
from dictionary_learning.activations.types import Provenance
from dictionary_learning.analysis import coactivation, probes, statistics
from dictionary_learning.analysis.statistics import StatisticsPass
from dictionary_learning.analysis.types import QUANTILES, Examples, FeatureStatistics, Probes
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderTopK,
    BatchTopKSAE,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
)
from dictionary_learning.errors import UserError

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


@pytest.fixture(params=DICTIONARIES)
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    return DICTIONARIES[request.param]()


@pytest.fixture(params=["one chunk", "small chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small chunks":
        monkeypatch.setattr(statistics, "CHUNK_CODES", {"cpu": 1})
        monkeypatch.setattr(statistics, "SEGMENT_ROWS", CONTEXT)


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


@given(st.lists(st.integers(0, 380), max_size=6), st.integers(0, 3))
def test_counts_samples_and_sums_do_not_depend_on_where_batches_end(places: list[int], seed: int) -> None:
    dictionary, data = DICTIONARIES["jumprelu"](), stream(seed=seed)
    whole, parts = (run(dictionary, data.cut(*cuts), seed=seed) for cuts in ([], sorted(places)))
    for name, value in vars(whole).items():
        if not isinstance(value, Examples | Probes):
            np.testing.assert_array_equal(getattr(parts, name), value, name)
    for field in ("value_FE", "document_FE", "position_FE", "corpus_FE"):
        np.testing.assert_array_equal(getattr(parts.samples, field), getattr(whole.samples, field))


def test_a_stretch_of_text_that_no_chunk_holds_is_cut_and_counted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, data = DICTIONARIES["jumprelu"](), stream()
    whole = run(dictionary, data.cut())
    monkeypatch.setattr(statistics, "CHUNK_CODES", {"cpu": 1})
    monkeypatch.setattr(statistics, "SEGMENT_ROWS", 5)
    parts = run(dictionary, data.cut())
    for name, value in vars(whole).items():
        if not isinstance(value, Examples | Probes):
            np.testing.assert_array_equal(getattr(parts, name), value, name)
    np.testing.assert_array_equal(parts.top.value_FE[:, 0], whole.top.value_FE[:, 0])
    assert ((parts.top.token_FEW >= 0).sum(axis=2) <= 5).all()


@pytest.mark.parametrize("stop", [0, 1, 150, 250, 379])
def test_a_resumed_pass_ends_bit_for_bit_as_an_unbroken_one(
    dictionary: Dictionary, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coactivation, "CHOICE_ROWS", 200)  # chosen before some of the stops, after others
    data = stream()
    unbroken = run(dictionary, data.cut(stop))
    before, after = data.cut(stop)
    first = StatisticsPass(dictionary, **SETTINGS)
    first.update(*before)
    storage.save_state(tmp_path, 1, first.state_dict())
    first.update(*after)  # which must not reach into the state that was saved
    second = StatisticsPass(dictionary, **SETTINGS)
    second.load_state_dict(storage.load_newest_state(tmp_path)[1])
    assert second.rows == len(before.x_ND)
    second.update(*after)
    assert_equal(second.finish(CORPORA), unbroken)
    assert_equal(first.finish(CORPORA), unbroken)


def test_looking_at_the_statistics_on_the_way_changes_nothing() -> None:
    dictionary, data = DICTIONARIES["top_k"](), stream()
    streamed = StatisticsPass(dictionary, **SETTINGS)
    for batch in data.cut(100, 200):
        streamed.update(*batch)
        assert_equal(streamed.finish(CORPORA), streamed.finish(CORPORA))
    assert_equal(streamed.finish(CORPORA), run(dictionary, data.cut(100, 200)))


def test_a_state_of_other_settings_is_refused() -> None:
    dictionary = DICTIONARIES["top_k"]()
    state = StatisticsPass(dictionary, top=4).state_dict()
    with pytest.raises(UserError, match="begun with top 4, not 5"):
        StatisticsPass(dictionary, top=5).load_state_dict(state)


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
