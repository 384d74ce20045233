"""Examples of every latent, kept while a stream goes by: the best E by a score, with the text around them.

In: active codes and their scores. Out: `Examples`. With the activation as the score they are the top activating texts;
with a random key they are a uniform sample of the rows in which the latent fires (reservoir sampling by keys:
Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", algorithm A-Res with equal weights).

What can't be kept is dropped by one comparison with the worst that is kept, which is all that examples cost on a long
stream; only what may stay is sorted, and only what is new is cut out and copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.analysis.active import Active
from dictionary_learning.analysis.types import Examples

EMPTY = -1  # the score of a place that is not taken; real ones are not negative
_CUT_AT_ONCE = 1 << 14  # windows
_GOLDEN = 0x9E3779B97F4A7C15


class _Kept(NamedTuple):
    """What is known of the examples, [F, E] and [F, E, W]: the fields of `Examples`, their scores and rows."""

    score_FE: Tensor
    row_FE: Tensor  # in the stream
    value_FE: Tensor
    document_FE: Tensor
    position_FE: Tensor
    corpus_FE: Tensor
    peak_FE: Tensor
    token_FEW: Tensor
    act_FEW: Tensor


_EMPTY: dict[str, tuple[int, torch.dtype]] = {
    "score_FE": (EMPTY, torch.int64),
    "row_FE": (-1, torch.int64),
    "value_FE": (0, torch.float32),
    "document_FE": (-1, torch.int64),
    "position_FE": (-1, torch.int32),
    "corpus_FE": (-1, torch.int16),
    "peak_FE": (0, torch.int16),
    "token_FEW": (-1, torch.int32),
    "act_FEW": (0, torch.float32),
}


class BestExamples:
    """The `number` E candidates of the highest scores of each of F latents; of equal ones the earlier row.

    They lie in no order until `result`: a new one takes the place of the one that it drives out.
    """

    def __init__(self, dict_size: int, number: int, window: int, device: torch.device | str = "cpu") -> None:
        self.dict_size, self.number, self.window, self.device = dict_size, number, window, torch.device(device)

        def empty(name: str) -> Tensor:
            value, dtype = _EMPTY[name]
            shape = (dict_size, number, window) if name.endswith("W") else (dict_size, number)
            return torch.full(shape, value, dtype=dtype, device=device)

        self._kept = _Kept(*map(empty, _Kept._fields))
        self._worst_F = torch.full((dict_size,), EMPTY, dtype=torch.int64, device=device)

    def offer(self, active: Active, score_K: Tensor, *, one_a_segment: bool = False) -> None:
        """Keep the best of the active codes of the stream's next chunk.

        Args:
            score_K: int64, not negative.
            one_a_segment: only a latent's best in each segment is a candidate, so that the texts are different ones.
        """
        assert active.rows is not None
        entry_P = (score_K > self._worst_F[active.latent_K]).nonzero().flatten()
        if not len(entry_P):
            return
        entry_P = entry_P[score_K[entry_P].sort(descending=True, stable=True).indices]
        if one_a_segment:
            segment_P = active.rows.segment_N[active.row_K[entry_P]]
            key_P, by_key_P = (segment_P * self.dict_size + active.latent_K[entry_P]).sort(stable=True)
            entry_P = entry_P[by_key_P[_rank(key_P) == 0].sort().values]
        latent_P, by_latent_P = active.latent_K[entry_P].sort(stable=True)
        entry_P = entry_P[by_latent_P[_rank(latent_P) < self.number]]  # no more than E can stay
        place_P, entry_P = self._places(active, entry_P, score_K[entry_P])
        self._write(active, place_P, entry_P, score_K[entry_P])

    def _places(self, active: Active, entry_P: Tensor, score_P: Tensor) -> tuple[Tensor, Tensor]:
        """(places among the F E, candidates that take them): a place for each candidate that stays.

        Of a latent's candidates (they are grouped) and what is kept of it, together, the best E stay. So as many kept
        ones go as candidates stay, and in the order of latents the two lists fit each other.
        """
        latent_P = active.latent_K[entry_P]
        latent_U = torch.unique_consecutive(latent_P)
        kept = len(latent_U) * self.number
        latent_A = torch.cat([latent_U.repeat_interleave(self.number), latent_P])
        score_A = torch.cat([self._kept.score_FE[latent_U].view(-1), score_P])
        row_A = torch.cat([self._kept.row_FE[latent_U].view(-1), active.row_K[entry_P] + active.first_row])
        order_A = row_A.argsort(stable=True)
        order_A = order_A[score_A[order_A].argsort(descending=True, stable=True)]
        latent_A, by_latent_A = latent_A[order_A].sort(stable=True)
        order_A, stays_A = order_A[by_latent_A], _rank(latent_A) < self.number
        goes_P = order_A[~stays_A & (order_A < kept)]
        comes_P = order_A[stays_A & (order_A >= kept)] - kept
        return latent_U[goes_P // self.number] * self.number + goes_P % self.number, entry_P[comes_P]

    def _write(self, active: Active, place_P: Tensor, entry_P: Tensor, score_P: Tensor) -> None:
        assert active.rows is not None
        row_P, latent_P = active.row_K[entry_P], active.latent_K[entry_P]
        rows, kept = active.rows, self._kept
        for column_FE, new_P in (
            (kept.score_FE, score_P),
            (kept.row_FE, row_P + active.first_row),
            (kept.value_FE, active.value_K[entry_P]),
            (kept.document_FE, rows.document_N[row_P]),
            (kept.position_FE, rows.position_N[row_P]),
            (kept.corpus_FE, rows.corpus_N[row_P]),
        ):
            column_FE.view(-1)[place_P] = new_P.to(column_FE.dtype)
        for at in range(0, len(place_P) if self.window else 0, _CUT_AT_ONCE):
            part = slice(at, at + _CUT_AT_ONCE)
            self._cut(active, place_P[part], row_P[part], latent_P[part])
        touched_P = torch.unique_consecutive(latent_P)
        self._worst_F[touched_P] = kept.score_FE[touched_P].amin(dim=1)

    def _cut(self, active: Active, place_P: Tensor, row_P: Tensor, latent_P: Tensor) -> None:
        """The windows around rows: shifted where the segment would end, padded where it is shorter."""
        rows, kept, W = active.rows, self._kept, self.window
        assert rows is not None
        start_P, end_P = rows.start_N[row_P], rows.end_N[row_P]
        begin_P = torch.maximum(torch.minimum(row_P - W // 2, end_P - W), start_P)
        row_PW = begin_P[:, None] + torch.arange(W, device=self.device)
        inside_PW = row_PW < end_P[:, None]
        row_PW.clamp_max_(len(active.codes_NF) - 1)
        token_PW = torch.where(inside_PW, rows.token_N[row_PW], -1)
        act_PW = active.codes_NF.view(-1)[row_PW * self.dict_size + latent_P[:, None]].abs()
        kept.token_FEW.view(-1, W)[place_P] = token_PW.int()
        kept.act_FEW.view(-1, W)[place_P] = torch.where(inside_PW, act_PW, 0.0)
        kept.peak_FE.view(-1)[place_P] = (row_P - begin_P).to(torch.int16)

    def result(self) -> Examples:
        """The examples so far, of each latent the most active first and of equal ones the earlier row."""
        by_row_FE = self._kept.row_FE.argsort(dim=1, stable=True)
        value_FE = self._kept.value_FE.gather(1, by_row_FE)
        order_FE = by_row_FE.gather(1, value_FE.argsort(dim=1, descending=True, stable=True))
        place = (order_FE + torch.arange(self.dict_size, device=self.device)[:, None] * self.number).view(-1)

        def ordered(kept: Tensor) -> np.ndarray:
            return kept.flatten(0, 1)[place].view(kept.shape).cpu().numpy()

        return Examples(**{name: ordered(getattr(self._kept, name)) for name in Examples._fields})

    def state_dict(self) -> dict[str, Any]:
        return dict(self._kept._asdict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, kept in self._kept._asdict().items():
            kept.copy_(state[name])
        self._worst_F = self._kept.score_FE.amin(dim=1)


def activation_scores(value_K: Tensor) -> Tensor:
    """[K] int64 that are ordered as positive float32 values are: their bits."""
    return value_K.view(torch.int32).long()


def random_scores(active: Active, seed: int) -> Tensor:
    """[K] int64 in [0, 2^63), a random number of its own for each (row of the stream, latent, seed)."""
    row_K = active.row_K + active.first_row
    return random_keys(row_K * active.codes_NF.shape[1] + active.latent_K + 1, seed)


def random_keys(number_K: Tensor, seed: int) -> Tensor:
    """[K] int64 in [0, 2^63), a random number of its own for each (number, seed).

    A generator that counts needs no state but the number: with that of a row of the stream, a sample is the same
    whatever the batches, on every device, and after a resume. The mixing is that of SplitMix64 (Steele, Lea and Flood
    2014, "Fast splittable pseudorandom number generators", figure 14).
    """
    z_K = number_K * _signed(_GOLDEN) + _signed(_mixed(seed & _MASK))
    z_K = (z_K ^ _shifted(z_K, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_K = (z_K ^ _shifted(z_K, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z_K ^ _shifted(z_K, 31), 1)


def quantile_samples(samples: Examples, quantiles_FQ: np.ndarray) -> np.ndarray:
    """[F, E] int8, into which of the Q + 1 parts that quantiles cut a latent's active values each sample falls.

    0 is up to the first quantile, Q above the last; -1 where there is no sample.

    Args:
        quantiles_FQ: `FeatureStatistics.quantiles_FQ`, increasing along Q.
    """
    part_FE = (samples.value_FE[:, :, None] > quantiles_FQ[:, None, :]).sum(axis=2)
    return np.where(samples.document_FE >= 0, part_FE, -1).astype(np.int8)


def bytes_of_examples(dict_size: int, number: int, window: int) -> int:
    """Bytes that `BestExamples` keeps."""
    item = {name: dtype.itemsize for name, (_, dtype) in _EMPTY.items()}
    windows = sum(size for name, size in item.items() if name.endswith("W"))
    return dict_size * (number * (sum(item.values()) - windows + window * windows) + 8)


def working_bytes_of_examples(window: int) -> int:
    """Bytes that cutting windows takes for a moment."""
    return 40 * _CUT_AT_ONCE * window


_MASK = (1 << 64) - 1


def _rank(sorted_P: Tensor) -> Tensor:
    """[P] the place of each within the run of equal ones that it lies in."""
    return torch.arange(len(sorted_P), device=sorted_P.device) - torch.searchsorted(sorted_P, sorted_P)


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - (1 << 64) if number >> 63 else number


def _shifted(z_K: Tensor, bits: int) -> Tensor:
    """Shifted to the right, zeros coming in."""
    return (z_K >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(number: int) -> int:
    """A seed spread over 64 bits, so that neighbouring seeds are not neighbouring counters."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & _MASK
    return number ^ (number >> 31)
