"""The one measure of the quality benchmark: metrics of a dictionary given as arrays, on the held-out rows.

In: the file that a worker wrote (see workers/quality_common.py) and what it said of it. Out: numbers. Ours and the
peers' go through the same code: `Coder` says how it encodes, `PooledMetrics` measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.formats.coder import Coder, to_dictionary
from dictionary_learning.metrics import PooledMetrics

ROWS = 4096  # of a batch; pooled metrics don't depend on it
DENSE = 0.1  # share of rows above which a latent counts as dense
AGREES = 1e-4  # relative difference of a row's reconstruction
TIES = 2  # rows that may differ: equal pre-activations at the k-th place


def measure(path: Path, info: dict[str, Any], k: int, heldout_ND: Tensor) -> dict[str, float]:
    """Metrics of a dictionary.

    Raises:
        ValueError: the arrays don't compute what the trainer's own forward does.
    """
    arrays = load_file(path)
    own_BD = arrays.pop("own_x_hat_BD")
    coder = Coder(
        arrays["encoder_FD"],
        arrays["encoder_bias_F"],
        arrays["decoder_FO"],
        arrays["decoder_bias_O"],
        info["activation"],
        info["subtracts_bias"],
        k=k if info["activation"] in ("topk", "groupmax") else None,
        threshold_F=arrays.get("threshold_F"),
        r_mag_F=arrays.get("r_mag_F"),
        mag_bias_F=arrays.get("mag_bias_F"),
    )
    dictionary = to_dictionary(coder)
    x_BD = heldout_ND[: len(own_BD)]
    difference_B = (dictionary(x_BD) - own_BD).norm(dim=1) / x_BD.norm(dim=1)
    if not int((difference_B <= AGREES).sum()) >= len(x_BD) - TIES:  # NaN doesn't agree
        raise ValueError(f"the arrays give another reconstruction than its own forward (by {difference_B.max():.1e})")
    return pooled(dictionary, heldout_ND)


@torch.no_grad()
def pooled(dictionary: Dictionary, heldout_ND: Tensor) -> dict[str, float]:
    """l0, explained_variance about the mean, alive, dense (shares of the latents), max_cosine (mean over latents of the
    largest cosine to another decoder row), norm_error (largest deviation of a decoder row's norm from 1)."""
    metrics, fired_F = PooledMetrics(dictionary), torch.zeros(dictionary.dict_size)
    for x_BD in heldout_ND.split(ROWS):
        metrics.update(x_BD)
        fired_F += (dictionary.encode(x_BD) != 0).sum(0)
    result = metrics.result()
    rows_FD = dictionary.decoder_rows.double()
    norms_F = rows_FD.norm(dim=1)
    return {
        "l0": result.l0,
        "explained_variance": result.frac_variance_explained,
        "alive": result.frac_alive,
        "dense": float((fired_F > DENSE * len(heldout_ND)).double().mean()),
        "max_cosine": max_cosine(rows_FD / norms_F.clamp_min(1e-12)[:, None]),
        "norm_error": float((norms_F - 1).abs().max()),
    }


def max_cosine(unit_FD: Tensor) -> float:
    """Mean over rows of the largest cosine to another row."""
    largest = []
    for start in range(0, len(unit_FD), ROWS):
        cosines = unit_FD[start : start + ROWS] @ unit_FD.T
        cosines.diagonal(start).fill_(-2)
        largest.append(cosines.amax(1))
    return float(torch.cat(largest).mean())
