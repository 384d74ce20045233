"""Which latents are whose? Firing rates in each corpus against all others, tested, and corrected for many tests.

In: `FeatureStatistics`. Out: `CorpusComparison`: rates, ratios, p and q of every latent and corpus, and from these a
label.

What is tested. Tokens of one document depend on each other, so the unit is the document: its firing rate is one
observation. That assumes documents to be independent draws (near-duplicates are not), and it speaks of the corpora as
they are, with their lengths, layouts and subjects: it does not say why they differ.

p is the larger of two, of t tests on these rates: Welch's (a variance for each side) and Student's (one variance). Most
latents are rare, so most rates are 0, and where corpora differ in size each test alone is wrong by orders of magnitude.
Where a latent did not fire in the smaller one, Welch's takes its variance to be 0, and 0 of 50 documents beside 250 of
5,000 to be no chance. Where by chance it fired in 3 of 50 beside 17 of 5,000, Student's takes the variance of the many
for that of the few. The larger of both keeps the level under shuffled labels at any sizes (tests show it); it is
cautious about rare latents of small corpora, and costs little where documents are many.

q: Benjamini and Hochberg 1995, "Controlling the false discovery rate", over all tested latents and corpora. The tests
are dependent (one corpus is another's rest), in the positive way for which the procedure still holds (Benjamini and
Yekutieli 2001, theorem 1.2) as far as latents that fire together go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dictionary_learning.analysis.types import FeatureStatistics
from dictionary_learning.errors import UserError, did_you_mean

MIN_FIRED = 5  # documents in which a latent fired; of one in fewer nothing can be said
MIN_DOCUMENTS = 10  # documents of either side
MAX_Q, MIN_RATIO = 0.01, 2.0  # of a label
_ROUNDING = 1e-12  # a variance below this share of the mean square is that of equal values


@dataclass(frozen=True)
class CorpusComparison:
    """Of F latents in C corpora (or groups of them), each against what is beside it; float64 [C, F].

    rate_CF: share of rows in which a latent fires. log2_ratio_CF: of that rate and the one in the other rows, half a
    firing and one row being added to both sides, so that 0 in few rows is no infinity. p_CF: two-sided. q_CF: the
    smallest false discovery rate at which the difference is taken for one. p and q are NaN where there was no test: of
    latents that fired in fewer than `MIN_FIRED` documents, of sides that have fewer than `MIN_DOCUMENTS`.
    """

    corpora: list[str]
    rate_CF: np.ndarray
    log2_ratio_CF: np.ndarray
    p_CF: np.ndarray
    q_CF: np.ndarray


def compare_corpora(statistics: FeatureStatistics) -> CorpusComparison:
    """Every corpus against all others together.

    Raises:
        UserError: there is only one.
    """
    if len(statistics.corpora) < 2:
        raise UserError("To compare corpora takes two of them, and the text has one: give records with source_dataset.")
    own = _Side.of(statistics, np.eye(len(statistics.corpora), dtype=np.int64))
    return _compare(statistics.corpora, own, _Side.of(statistics, 1 - np.eye(len(statistics.corpora), dtype=np.int64)))


def compare_groups(
    statistics: FeatureStatistics, group: Sequence[str], against: Sequence[str] | None = None
) -> CorpusComparison:
    """Some corpora together against others together (None: all others), as medical text against a general one.

    Raises:
        UserError: no such corpus, one on both sides, a side that is empty or of fewer than `MIN_DOCUMENTS` documents.
    """
    against = [name for name in statistics.corpora if name not in group] if against is None else against
    for name in (*group, *against):
        if name not in statistics.corpora:
            known = ", ".join(statistics.corpora)
            raise UserError(f"There is no corpus '{name}': there are {known}.{did_you_mean(name, statistics.corpora)}")
    if both := set(group) & set(against):
        raise UserError(f"The corpus '{min(both)}' stands on both sides of the comparison: leave it out of one.")
    sides = []
    for names in (group, against):
        chosen_C = np.array([[name in names for name in statistics.corpora]], dtype=np.int64)
        documents = int((chosen_C @ statistics.documents_C)[0])
        if documents < MIN_DOCUMENTS:
            shown = " and ".join(f"'{name}'" for name in names) or "nothing"
            raise UserError(
                f"A comparison takes at least {MIN_DOCUMENTS} documents on each side, and {shown} has {documents}."
            )
        sides.append(_Side.of(statistics, chosen_C))
    return _compare([" + ".join(group)], *sides)


def small_corpora(statistics: FeatureStatistics) -> list[str]:
    """Names of the corpora that have too few documents for a test."""
    pairs = zip(statistics.corpora, statistics.documents_C.tolist(), strict=True)
    return [name for name, documents in pairs if documents < MIN_DOCUMENTS]


def specific_corpus(comparison: CorpusComparison, *, max_q: float = MAX_Q, min_ratio: float = MIN_RATIO) -> np.ndarray:
    """[F] str, the corpus that a latent is specific to: of those where q is below `max_q` and the rate at least
    `min_ratio` times that elsewhere, the one of the largest ratio; "" where there is none."""
    specific_CF = (comparison.q_CF < max_q) & (comparison.log2_ratio_CF >= np.log2(min_ratio))
    best_F = np.where(specific_CF, comparison.log2_ratio_CF, -np.inf).argmax(axis=0)
    return np.where(specific_CF.any(axis=0), np.array(comparison.corpora, dtype=object)[best_F], "").astype(str)


@dataclass(frozen=True)
class _Side:
    """One side of each comparison: its documents n_C1, those in which a latent fired, mean and standard deviation of
    the documents' rates; its rows, and those in which a latent fired."""

    n_C1: np.ndarray
    fired_CF: np.ndarray
    mean_CF: np.ndarray
    std_CF: np.ndarray
    rows_C1: np.ndarray
    active_CF: np.ndarray

    @classmethod
    def of(cls, statistics: FeatureStatistics, chosen_GC: np.ndarray) -> _Side:
        """The corpora chosen for each comparison, 1 or 0, taken together."""
        n_C1 = (chosen_GC @ statistics.documents_C)[:, None]
        mean_CF = chosen_GC @ statistics.rate_sum_CF / np.maximum(n_C1, 1)
        square_CF = chosen_GC @ statistics.rate_square_CF
        spread_CF = square_CF - n_C1 * mean_CF**2
        spread_CF = np.where(spread_CF > _ROUNDING * square_CF, spread_CF, 0)
        std_CF = np.sqrt(spread_CF / np.maximum(n_C1 - 1, 1))
        rows_C1, active_CF = (chosen_GC @ statistics.rows_C)[:, None], chosen_GC @ statistics.active_CF
        return cls(n_C1, chosen_GC @ statistics.documents_CF, mean_CF, std_CF, rows_C1, active_CF)


def _compare(names: Sequence[str], own: _Side, other: _Side) -> CorpusComparison:
    rate_CF = own.active_CF / np.maximum(own.rows_C1, 1)
    smoothed = [(side.active_CF + 0.5) / (side.rows_C1 + 1) for side in (own, other)]
    p_CF = _p_values(own, other)
    q_CF = benjamini_hochberg(p_CF)
    return CorpusComparison(list(names), rate_CF, np.log2(smoothed[0] / smoothed[1]), p_CF, q_CF)


def _p_values(own: _Side, other: _Side) -> np.ndarray:
    """[C, F], NaN where there is no test."""
    from scipy.stats import ttest_ind_from_stats

    sides = [(side.mean_CF, side.std_CF, np.broadcast_to(side.n_C1, side.mean_CF.shape)) for side in (own, other)]
    with np.errstate(divide="ignore", invalid="ignore"):
        welch, student = (ttest_ind_from_stats(*sides[0], *sides[1], equal_var=equal).pvalue for equal in (False, True))
    same_CF = np.isclose(own.mean_CF, other.mean_CF, rtol=_ROUNDING, atol=0)
    p_CF = np.where(same_CF, 1.0, np.fmax(welch, student))  # 0 / 0 where all documents have one rate
    enough_CF = own.fired_CF + other.fired_CF >= MIN_FIRED
    return np.where(enough_CF & (np.minimum(own.n_C1, other.n_C1) >= MIN_DOCUMENTS), p_CF, np.nan)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q of each p, in one family; NaN, which is no test, stays NaN."""
    from scipy.stats import false_discovery_control

    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested], method="bh")
    return q
