"""The parts of the statistics on their own: quantiles, samples, co-activation, memory, density."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dictionary_learning.activations.types import Provenance
from dictionary_learning.analysis import coactivation, density, statistics
from dictionary_learning.analysis.active import Active
from dictionary_learning.analysis.coactivation import CoactivePairs
from dictionary_learning.analysis.examples import quantile_samples
from dictionary_learning.analysis.quantiles import RELATIVE_ERROR, LogHistogram
from dictionary_learning.analysis.statistics import StatisticsPass, bytes_needed
from dictionary_learning.analysis.types import QUANTILES, Examples
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK, IdentityDict

# ------------------------------------------------------------------------------------------- quantiles


@given(
    st.lists(st.floats(2.0**-16, 65535.0, width=32), min_size=1, max_size=200),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_quantiles_are_those_of_the_sorted_values_within_the_stated_error(values: list[float], q: list[float]) -> None:
    histogram, value_K = LogHistogram(2), torch.tensor(values)
    histogram.add(torch.ones(len(values), dtype=torch.int64), value_K)
    got = histogram.quantiles(q, torch.stack([torch.tensor(0.0), value_K.max()]))
    exact = np.quantile(value_K.double().numpy(), q, method="inverted_cdf")
    assert (abs(got[1] - exact) <= RELATIVE_ERROR * exact).all()
    assert (got[1] <= max(values)).all()
    assert not got[0].any()


def test_quantiles_of_many_values_are_much_closer_than_the_bound() -> None:
    value_K = torch.distributions.LogNormal(0.0, 1.0).sample((100_000,))
    histogram = LogHistogram(1)
    histogram.add(torch.zeros(len(value_K), dtype=torch.int64), value_K)
    np.testing.assert_allclose(
        histogram.quantiles(QUANTILES, value_K.max()[None])[0], np.quantile(value_K.numpy(), QUANTILES), rtol=0.003
    )


def test_values_outside_the_octaves_are_counted_at_their_ends() -> None:
    histogram = LogHistogram(1)
    histogram.add(torch.zeros(3, dtype=torch.int64), torch.tensor([1e-30, 1e-30, 1e30]))
    low, high = histogram.quantiles((0.5, 1.0), torch.tensor([1e30]))[0]
    assert low < 2.0**-15.9
    assert 2.0**15.9 < high <= 1e30


def test_quantile_samples_are_put_into_the_part_that_they_fall_into() -> None:
    value_FE = np.array([[9.0, 5.0, 3.0, 2.5, 1.0, 0.0]], dtype=np.float32)
    document_FE = np.array([[4, 4, 4, 4, 4, -1]])
    samples = Examples(value_FE, document_FE, *(np.zeros(0) for _ in range(5)))
    assert quantile_samples(samples, np.array([[1.0, 2.0, 3.0, 4.0, 6.0]])).tolist() == [[5, 4, 2, 2, 0, -1]]


# ------------------------------------------------------------------------------------------- samples


def rows_of_one_document(rows: int, contexts: int = 1) -> Provenance:
    place_N = torch.arange(rows)
    return Provenance(0 * place_N, place_N, place_N, 0 * place_N, place_N // -(-rows // contexts))


def sampled_positions(seed: int, latents: int = 300, rows: int = 1000) -> np.ndarray:
    streamed = StatisticsPass(IdentityDict(latents), samples=8, seed=seed)
    provenance = rows_of_one_document(rows)
    for first in range(0, rows, 100):
        part = Provenance(*(column[first : first + 100] for column in provenance))
        streamed.update(torch.ones(100, latents), part)
    return streamed.finish().samples.position_FE


def test_samples_are_drawn_uniformly_and_without_repetition() -> None:
    position_FE = sampled_positions(seed=0)
    assert all(len(set(row)) == 8 for row in position_FE.tolist())
    assert chisquare(np.bincount(position_FE.ravel() // 50, minlength=20)).pvalue > 0.001
    assert kstest(position_FE.min(axis=1), lambda x: 1 - (1 - (x + 1) / 1000).clip(0, 1) ** 8).pvalue > 0.001
    correlation = np.corrcoef(np.sort(position_FE, axis=1)[:-1, 0], np.sort(position_FE, axis=1)[1:, 0])[0, 1]
    assert abs(correlation) < 0.2  # neighbouring latents draw on their own


def test_seeds_draw_different_samples_and_one_seed_the_same() -> None:
    np.testing.assert_array_equal(sampled_positions(seed=1), sampled_positions(seed=1))
    shared = [
        len(set(a) & set(b)) for a, b in zip(sampled_positions(1).tolist(), sampled_positions(2).tolist(), strict=True)
    ]
    assert np.mean(shared) < 0.2  # 8 * 8 / 1000 is expected


def test_the_top_examples_come_from_different_stretches_of_text() -> None:
    streamed = StatisticsPass(IdentityDict(1), top=4, window=5)
    streamed.update(torch.arange(1.0, 41).flip(0)[:, None], rows_of_one_document(40, contexts=3))
    top = streamed.finish().top
    assert top.value_FE.tolist() == [[40.0, 26.0, 12.0, 0.0]]
    assert top.document_FE.tolist() == [[0, 0, 0, -1]]
    assert top.peak_FE[0, :3].tolist() == [0, 0, 0]
    assert top.token_FEW[0, 1].tolist() == [14, 15, 16, 17, 18]


# ------------------------------------------------------------------------------------------- co-activation


def codes(rows: int, latents: int, most: float = 0.5) -> Tensor:
    g = torch.Generator().manual_seed(0)
    rate_F = torch.linspace(most, 0.0, latents)
    return (torch.rand(rows, latents, generator=g) < rate_F[torch.randperm(latents, generator=g)]).float()


@pytest.mark.parametrize("most", [0.5, 0.05])
@pytest.mark.parametrize("choice_rows", [1, 50, 128, 1000])
def test_pairs_are_counted_from_the_first_row_on(
    choice_rows: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coactivation, "CHOICE_ROWS", choice_rows)
    monkeypatch.setattr(coactivation, "_BLOCK_ROWS", 30)
    codes_NF = codes(300, 40, most)
    pairs = CoactivePairs(40, 6)
    for first in range(0, 300, 64):
        pairs.add(Active.of(codes_NF[first : first + 64], first, None))
    active_F = codes_NF.sum(0).long()
    latents, counts = pairs.result(active_F)
    early_F = codes_NF[:choice_rows].sum(0)
    candidates = [f for f in early_F.argsort(descending=True, stable=True)[:12].tolist() if early_F[f] > 0]
    want = sorted(candidates, key=lambda f: (-int(active_F[f]), f))[:6]
    assert latents.tolist() == want
    torch.testing.assert_close(counts, (codes_NF[:, want].t() @ codes_NF[:, want]).long())


def test_few_rows_are_held_where_many_latents_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "HELD", 100)
    pairs = CoactivePairs(40, 6)
    pairs.add(Active.of(torch.ones(10, 40), 0, None))
    assert pairs.state_dict()["held"] is None
    assert pairs.result(torch.full((40,), 10))[1].tolist() == [[10] * 6] * 6


def test_latents_that_never_fire_and_no_latents_at_all_have_no_pairs() -> None:
    codes_NF = torch.zeros(10, 5)
    codes_NF[:, 2] = 1
    for number, want in ((3, [2]), (0, [])):
        pairs = CoactivePairs(5, number)
        pairs.add(Active.of(codes_NF, 0, None))
        latents, counts = pairs.result(codes_NF.sum(0).long())
        assert latents.tolist() == want
        assert counts.shape == (len(want), len(want))


# ------------------------------------------------------------------------------------------- memory


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made inside it take at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage().data_ptr()) not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in tensors(value)]


@pytest.mark.parametrize("kind", ["sparse", "all latents fire"])
def test_state_and_working_memory_stay_within_what_is_stated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CHUNK_CODES", {"cpu": 1 << 20})
    monkeypatch.setattr(coactivation, "HELD", 1 << 15)
    F, rows, sparse = 2048, 1024, kind == "sparse"
    dictionary = AutoEncoderTopK(8, F, 24) if sparse else AutoEncoder(8, F)
    if not sparse:
        torch.nn.init.constant_(dictionary.encoder_bias, 100.0)
    settings = {"top": 3, "samples": 4, "window": 16, "coactive": 64}
    streamed = StatisticsPass(dictionary, **settings)
    corpora, most = 3, 0
    for batch in range(3 if sparse else 1):
        provenance = rows_of_one_document(rows, contexts=32)
        number_N = torch.arange(rows) // 100 + 1000 * batch
        provenance = provenance._replace(document_N=number_N, corpus_N=number_N % corpora)
        x_ND = torch.randn(rows, 8)
        with Allocated() as allocated:
            streamed.update(x_ND, provenance)
        most = max(most, allocated.most)
    state, working = bytes_needed(F, corpora=corpora, l0=24 if sparse else None, **settings)
    held = sum(tensor.nbytes for tensor in tensors(streamed.state_dict()))
    assert 0.5 * state < held <= state
    assert 0.3 * working < most <= working


# ------------------------------------------------------------------------------------------- density


def test_densities_are_put_into_words_and_bins() -> None:
    density_F = np.array([0.0, 1.0, 0.1, 0.5, 1e-3])
    assert density.log10_density(density_F).tolist() == pytest.approx([-10, 0, -1, np.log10(0.5), -3])
    counts, edges = density.density_histogram(density_F, bins=20)
    assert (counts.sum(), counts[0], counts[-1], edges[0], edges[-1]) == (5, 1, 2, -10, 0)
    assert density.dead_latents(density_F).tolist() == [0]
    assert density.dense_latents(density_F).tolist() == [1, 3]
    assert density.status(density_F).tolist() == ["dead", "dense", "", "dense", ""]
