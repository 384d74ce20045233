"""Rates by corpus: the test keeps its level where labels mean nothing, and finds what was planted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_ind

from dictionary_learning.analysis.corpora import (
    benjamini_hochberg,
    compare_corpora,
    compare_groups,
    small_corpora,
    specific_corpus,
)
from dictionary_learning.analysis.types import Examples, FeatureStatistics
from dictionary_learning.errors import UserError

NONE = Examples(*(np.zeros(0) for _ in Examples._fields))


def statistics_of(counts_DF: np.ndarray, length_D: np.ndarray, corpus_D: np.ndarray) -> FeatureStatistics:
    """Of documents with so many rows, in which each latent fired so often."""
    in_CD = (np.arange(corpus_D.max() + 1)[:, None] == corpus_D).astype(int)
    rate_DF = counts_DF / length_D[:, None]
    nothing = np.zeros(counts_DF.shape[1])
    return FeatureStatistics(
        rows=int(length_D.sum()),
        documents=len(length_D),
        active_F=counts_DF.sum(0),
        documents_F=(counts_DF > 0).sum(0),
        mean_F=nothing,
        std_F=nothing,
        max_F=nothing,
        quantiles_FQ=nothing[:, None],
        corpora=[f"corpus {number}" for number in range(len(in_CD))],
        rows_C=in_CD @ length_D,
        documents_C=in_CD.sum(1),
        active_CF=in_CD @ counts_DF,
        documents_CF=in_CD @ (counts_DF > 0),
        rate_sum_CF=in_CD @ rate_DF,
        rate_square_CF=in_CD @ rate_DF**2,
        coactive_M=np.zeros(0),
        coactive_MM=np.zeros((0, 0)),
        top=NONE,
        samples=NONE,
    )


def bursty(sizes: Sequence[int], latents: int, seed: int, planted: int = 0, times: float = 1.0) -> tuple[Any, ...]:
    """Documents in which latents fire in bursts, as on text: most rates are 0, and lengths differ. In the second corpus
    the first latents fire `times` as often."""
    g = np.random.default_rng(seed)
    corpus_D = g.permutation(np.repeat(np.arange(len(sizes)), sizes))
    length_D = np.maximum(5, g.lognormal(4, 0.8, len(corpus_D))).astype(int)
    p_DF = 10 ** g.uniform(-4.5, -0.5, latents) * g.gamma(0.1, 10, (len(corpus_D), latents))
    p_DF[np.ix_(corpus_D == 1, np.arange(latents) < planted)] *= times
    return g.binomial(length_D[:, None], np.minimum(p_DF, 1)), length_D, corpus_D


@pytest.mark.parametrize("sizes", [(800, 800), (2000, 200, 30), (2000, 40), (200, 200, 10)])
def test_shuffled_labels_give_no_more_discoveries_than_the_level_says(sizes: tuple[int, ...]) -> None:
    comparison = compare_corpora(statistics_of(*bursty(sizes, 1000, seed=1)))
    tested = ~np.isnan(comparison.p_CF)
    assert tested.mean() > 0.5
    for level in (0.05, 0.01, 0.001):
        for p_F, tested_F in zip(comparison.p_CF, tested, strict=True):
            slack = 4 * np.sqrt(level / tested_F.sum())
            assert np.mean(p_F[tested_F] < level) <= level + slack
    assert not (comparison.q_CF < 0.05).any()
    assert not specific_corpus(comparison).astype(bool).any()


def test_planted_latents_are_found_and_named_and_others_are_not() -> None:
    statistics = statistics_of(*bursty((1500, 500, 100), 1000, seed=2, planted=200, times=6))
    named = specific_corpus(compare_corpora(statistics))
    frequent_F = statistics.documents_F >= 100
    assert np.mean(named[:200][frequent_F[:200]] == "corpus 1") > 0.8
    assert set(named[:200]) <= {"corpus 1", ""}
    assert np.mean(named[200:] != "") < 0.005


def test_rates_ratios_and_p_are_those_of_the_definitions() -> None:
    counts_DF, length_D, corpus_D = bursty((60, 40), 30, seed=3)
    comparison = compare_corpora(statistics_of(counts_DF, length_D, corpus_D))
    rate_DF, own = counts_DF / length_D[:, None], corpus_D == 0
    for f in np.flatnonzero((counts_DF > 0).sum(0) >= 5):
        both = [ttest_ind(rate_DF[own, f], rate_DF[~own, f], equal_var=equal).pvalue for equal in (True, False)]
        np.testing.assert_allclose(comparison.p_CF[:, f], max(both), rtol=1e-6)
    active, rest = counts_DF[own].sum(0), counts_DF[~own].sum(0)
    np.testing.assert_allclose(comparison.rate_CF[0], active / length_D[own].sum())
    smoothed = ((active + 0.5) / (length_D[own].sum() + 1)) / ((rest + 0.5) / (length_D[~own].sum() + 1))
    np.testing.assert_allclose(comparison.log2_ratio_CF[0], np.log2(smoothed))
    np.testing.assert_allclose(comparison.log2_ratio_CF[1], -np.log2(smoothed))
    tested = ~np.isnan(comparison.p_CF)
    np.testing.assert_array_equal(comparison.q_CF[tested], false_discovery_control(comparison.p_CF[tested]))


def test_latents_and_corpora_with_too_little_to_go_by_are_not_tested() -> None:
    length_D, corpus_D = np.full(49, 10), np.repeat([0, 1, 2], [20, 20, 9])
    counts_DF = np.zeros((49, 3), dtype=int)
    counts_DF[:4, 0] = 3  # fires in four documents
    counts_DF[:5, 1] = 3  # in five
    statistics = statistics_of(counts_DF, length_D, corpus_D)
    tested = ~np.isnan(compare_corpora(statistics).p_CF)
    assert tested.tolist() == [[False, True, False], [False, True, False], [False, False, False]]
    assert small_corpora(statistics) == ["corpus 2"]
    assert np.isnan(benjamini_hochberg(np.array([np.nan]))).all()


def test_a_latent_that_always_fires_belongs_to_no_corpus() -> None:
    length_D, corpus_D = np.full(40, 10), np.repeat([0, 1], 20)
    counts_DF = np.stack([np.full(40, 10), np.full(40, 3), 10 * (corpus_D == 1)], axis=1)
    comparison = compare_corpora(statistics_of(counts_DF, length_D, corpus_D))
    assert comparison.p_CF.tolist() == [[1, 1, 0], [1, 1, 0]]
    assert specific_corpus(comparison).tolist() == ["", "", "corpus 1"]


def test_groups_are_compared_as_one_corpus_made_of_them_would_be() -> None:
    counts_DF, length_D, corpus_D = bursty((100, 80, 60, 40), 50, seed=4)
    statistics = statistics_of(counts_DF, length_D, corpus_D)
    groups = compare_groups(statistics, ["corpus 0", "corpus 3"])
    merged = compare_corpora(statistics_of(counts_DF, length_D, np.where(np.isin(corpus_D, [0, 3]), 0, 1)))
    assert groups.corpora == ["corpus 0 + corpus 3"]
    np.testing.assert_allclose(groups.p_CF[0], merged.p_CF[0])
    np.testing.assert_allclose(groups.log2_ratio_CF[0], merged.log2_ratio_CF[0])
    two = compare_groups(statistics, ["corpus 0"], ["corpus 1"])
    only = np.isin(corpus_D, [0, 1])
    alone = compare_corpora(statistics_of(counts_DF[only], length_D[only], corpus_D[only]))
    np.testing.assert_allclose(two.p_CF[0], alone.p_CF[0])


@pytest.mark.parametrize(
    ("group", "against", "sentence"),
    [
        (["corpus 9"], None, "There is no corpus 'corpus 9': there are corpus 0, corpus 1"),
        (["corpus 0"], ["corpus 0", "corpus 1"], "'corpus 0' stands on both sides"),
        ([], None, "nothing has 0"),
        (["corpus 0", "corpus 1"], None, "at least 10 documents on each side, and 'corpus 2' has 5"),
    ],
)
def test_comparisons_that_can_not_be_are_refused(group: list[str], against: list[str] | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compare_groups(statistics_of(*bursty((20, 20, 5), 3, seed=5)), group, against)


def test_one_corpus_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(UserError, match="takes two of them"):
        compare_corpora(statistics_of(*bursty((20,), 3, seed=5)))
