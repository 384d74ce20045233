"""Quantiles of every latent's active values from one pass: a histogram a latent, with bins of equal relative width.

In: latents and their values. Out: quantiles [F, Q]. The bin of a float32 is its exponent and its first 4 mantissa bits,
so it is found by a shift, and needs no knowledge of the values' scale: 32 octaves from 2^-16 to 2^16 take 2 KiB a
latent. Sketches that adapt to the data would be more precise in the same memory, and could not be vectorised over
latents. The idea of log-spaced bins with bounded relative error is that of DDSketch (Masson, Rim and Lee 2019,
arXiv:1908.10693, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MANTISSA_BITS = 4
LOWEST, OCTAVES = -16, 32  # values below 2^-16 go to the first bin, those from 2^16 on to the last
BINS = OCTAVES << MANTISSA_BITS
RELATIVE_ERROR = 2.0**-MANTISSA_BITS  # at most, for values within the octaves

_SHIFT = 23 - MANTISSA_BITS
_FIRST_BIN = (127 + LOWEST) << MANTISSA_BITS  # of a float32, 127 being the bias of its exponent


class LogHistogram:
    """counts_FB: int32 [F, BINS], how many of a latent's values fell into each bin."""

    def __init__(self, dict_size: int, device: torch.device | str = "cpu") -> None:
        self.counts_FB = torch.zeros(dict_size, BINS, dtype=torch.int32, device=device)

    def add(self, latent_K: Tensor, value_K: Tensor) -> None:
        """Count positive float32 values."""
        bin_K = ((value_K.view(torch.int32) >> _SHIFT) - _FIRST_BIN).clamp_(0, BINS - 1)
        self.counts_FB.view(-1).index_add_(0, latent_K * BINS + bin_K, torch.ones_like(bin_K))

    def quantiles(self, quantiles: Sequence[float], max_F: Tensor) -> np.ndarray:
        """[F, Q] float64: the smallest value that a share q of a latent's n values does not exceed (the ceil(q n)-th),
        0 where it has none.

        Off by less than a sixteenth of itself (`RELATIVE_ERROR`): within a bin, values are taken to be spread evenly,
        which is much closer where they are many. Never above `max_F`, the largest value.
        """
        counts_FB = self.counts_FB.long()
        upto_FB = counts_FB.cumsum(1)
        n_F1 = upto_FB[:, -1:]
        q_Q = torch.tensor(quantiles, dtype=torch.float64, device=n_F1.device)
        rank_FQ = (q_Q * n_F1).ceil().clamp_min(1)
        bin_FQ = torch.searchsorted(upto_FB.double(), rank_FQ).clamp_max_(BINS - 1)
        inside_FQ = counts_FB.gather(1, bin_FQ)
        before_FQ = upto_FB.gather(1, bin_FQ) - inside_FQ
        share_FQ = (rank_FQ - before_FQ - 0.5) / inside_FQ.clamp_min(1)
        edges = torch.arange(BINS + 1, dtype=torch.int32, device=n_F1.device).add_(_FIRST_BIN) << _SHIFT
        edges = edges.view(torch.float32).double()
        value_FQ = edges[bin_FQ] + share_FQ * (edges[bin_FQ + 1] - edges[bin_FQ])
        value_FQ = torch.minimum(value_FQ, max_F[:, None].double())
        return torch.where(n_F1 > 0, value_FQ, 0.0).cpu().numpy()
