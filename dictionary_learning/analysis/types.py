"""What passes between the rooms of the analysis: statistics of F latents, and the examples kept of each.

Arrays are numpy's, on the CPU: they are what files hold and what reports and tables are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of a latent's active values, in the table of latents


class Examples(NamedTuple):
    """E places in texts for each of F latents, the best first; where there are fewer, `document_FE` is -1.

    value_FE: float32, the latent's activation at the place. document_FE: int64, the number of its document in the
    stream. position_FE: int32, the place's token in the document. corpus_FE: int16, index into the names of corpora.

    Of token sources a window of W tokens around the place, all of one document and one context: token_FEW: int32,
    token ids, -1 outside the document. act_FEW: float32, the latent's activation at each. peak_FE: int16, the place's
    index in the window. Of sources of whole texts W is 0, and the texts are found by document.
    """

    value_FE: np.ndarray
    document_FE: np.ndarray
    position_FE: np.ndarray
    corpus_FE: np.ndarray
    token_FEW: np.ndarray
    act_FEW: np.ndarray
    peak_FE: np.ndarray


class Probes(NamedTuple):
    """R places drawn from all rows, in the order of the stream, and which of F latents fire in the text around each.

    document_R: int64. corpus_R: int16. token_RW: int32, the text, -1 outside of it; W is 0 where rows are whole texts.
    fired_RF: bool, whether a latent fires at any of these tokens, or in the whole text.
    """

    document_R: np.ndarray
    corpus_R: np.ndarray
    token_RW: np.ndarray
    fired_RF: np.ndarray


@dataclass(frozen=True)
class FeatureStatistics:
    """Of F latents on the rows (tokens, or whole texts) of one pass, which came from C corpora.

    rows: rows seen. documents: documents seen. active_F: int64, rows in which a latent fired. documents_F: int64,
    documents in which it did. mean_F, std_F, max_F: float64, of its active values (0 where it never fired).
    quantiles_FQ: float64, of its active values at `QUANTILES`. dead where active_F is 0.

    corpora: the names. rows_C, documents_C: int64, what came from each. active_CF, documents_CF: int64.
    rate_sum_CF, rate_square_CF: float64, over the documents of a corpus: sum and sum of squares of a latent's firing
    rate within the document, which is what tests between corpora need.

    coactive_M: int32, the latents whose pairs were counted. coactive_MM: int64, rows in which both fired.

    probes: None where rows come from nowhere.
    """

    rows: int
    documents: int
    active_F: np.ndarray
    documents_F: np.ndarray
    mean_F: np.ndarray
    std_F: np.ndarray
    max_F: np.ndarray
    quantiles_FQ: np.ndarray
    corpora: list[str]
    rows_C: np.ndarray
    documents_C: np.ndarray
    active_CF: np.ndarray
    documents_CF: np.ndarray
    rate_sum_CF: np.ndarray
    rate_square_CF: np.ndarray
    coactive_M: np.ndarray
    coactive_MM: np.ndarray
    top: Examples
    samples: Examples
    probes: Probes | None = None

    @property
    def density_F(self) -> np.ndarray:
        """[F] float64, the share of rows in which a latent fires: its firing rate."""
        return self.active_F / max(self.rows, 1)
