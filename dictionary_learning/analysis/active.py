"""The active codes of one chunk of rows: what every statistic of latents is counted from.

In: a dense code matrix [N, F] and where its rows come from. Out: `Active`, the K codes other than 0 as three columns
(row, latent, value) in the order of rows, and for each row the stretch of text it lies in. Statistics then cost time in
proportion to the latents that fire, and reading the dense matrix once is the only part that grows with F.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.types import Provenance
from dictionary_learning.errors import UserError


class Rows(NamedTuple):
    """Where N rows come from: int64 tensors [N] beside the codes.

    `segment_N` numbers the stretches of a document within a context; that of row i is the rows `start_N[i]` to
    `end_N[i] - 1`.
    """

    document_N: Tensor
    position_N: Tensor
    token_N: Tensor
    corpus_N: Tensor
    segment_N: Tensor
    start_N: Tensor
    end_N: Tensor

    @classmethod
    def of(cls, provenance: Provenance, device: torch.device) -> Rows:
        """The columns of a provenance (on the CPU) and its segments, sent to the device in one piece."""
        starts = segment_starts(provenance)
        lengths = np.diff(starts, append=len(provenance.document_N))
        start_N = np.repeat(starts, lengths)
        segments = (np.repeat(np.arange(len(starts)), lengths), start_N, start_N + np.repeat(lengths, lengths))
        columns = [provenance.document_N, provenance.position_N, provenance.token_N, provenance.corpus_N]
        return cls(*torch.stack([*columns, *map(torch.from_numpy, segments)]).to(device, non_blocking=True))


class Active(NamedTuple):
    """The K codes other than 0 of N rows, in the order of rows: `codes_NF[row_K, latent_K]` has magnitude `value_K`.

    codes_NF, value_K: float32. row_K, latent_K: int64. first_row: the number of row 0 in the stream. rows: None where
    the source does not say where rows come from.
    """

    codes_NF: Tensor
    row_K: Tensor
    latent_K: Tensor
    value_K: Tensor
    first_row: int
    rows: Rows | None

    @classmethod
    def of(cls, codes_NF: Tensor, first_row: int, rows: Rows | None) -> Active:
        """Find the active codes.

        A negative code (no architecture here has them, others' may) counts by its magnitude.

        Raises:
            UserError: a code is not a number.
        """
        codes_NF = codes_NF.float().contiguous()
        if codes_NF.device.type == "cpu":  # NumPy finds them in less than half of the time that PyTorch takes
            flat_K = torch.from_numpy(np.flatnonzero((codes_NF != 0).numpy()))
        else:
            flat_K = codes_NF.view(-1).nonzero().flatten()
        row_K = flat_K // codes_NF.shape[1]
        value_K = codes_NF.view(-1).index_select(0, flat_K).abs_()
        if not torch.isfinite(value_K).all():
            place = int(row_K[~torch.isfinite(value_K)][0])
            raise UserError(
                f"A code of row {first_row + place:,} is NaN or infinite: its activations must be finite numbers."
            )
        return cls(codes_NF, row_K, flat_K - row_K * codes_NF.shape[1], value_K, first_row, rows)


def segment_starts(provenance: Provenance) -> np.ndarray:
    """[S] int64, the rows at which another document or another context begins."""
    documents, contexts = provenance.document_N.numpy(), provenance.context_N.numpy()
    changes = (np.diff(documents) != 0) | (np.diff(contexts) != 0)
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def add_at(total: Tensor, index_K: Tensor, values: Tensor) -> None:
    """`total[index_K[i]] += values[i]`, in the order of i on the CPU, and in one that does not change on CUDA (where
    the additions of `index_add_` race, so that sums of floats would differ from run to run)."""
    if total.device.type == "cpu" or not total.is_floating_point():
        total.index_add_(0, index_K, values)
    else:
        total.index_put_((index_K,), values, accumulate=True)
