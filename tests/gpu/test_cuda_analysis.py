"""Statistics of latents on CUDA: those of the CPU, and the same bit for bit after a resume. Skipped without one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from dictionary_learning.activations.types import Provenance
from dictionary_learning.analysis import coactivation
from dictionary_learning.analysis.statistics import StatisticsPass
from dictionary_learning.analysis.types import Examples, FeatureStatistics
from dictionary_learning.dictionary import AutoEncoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

D, F, ROWS, BATCH = 8, 64, 4096, 512


def dictionary(device: str) -> AutoEncoder:
    """Weights in quarters, so that codes are exact on every device."""
    sae, g = AutoEncoder(D, F), torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randint(-4, 5, parameter.shape, generator=g) / 4)
    return sae.to(device)


def batches() -> list[tuple[torch.Tensor, Provenance]]:
    x_ND = torch.randint(-4, 5, (ROWS, D), generator=torch.Generator().manual_seed(1)) / 4
    number_N = torch.arange(ROWS)
    document_N = number_N // 37
    columns = (document_N, number_N % 37, number_N % 50, document_N % 3, number_N // 64)
    rows = zip(x_ND.split(BATCH), *(column.split(BATCH) for column in columns), strict=True)
    return [(x, Provenance(*provenance)) for x, *provenance in rows]


def run(device: str, stop: int | None = None) -> FeatureStatistics:
    streamed = StatisticsPass(dictionary(device), window=16, coactive=8)
    for number, batch in enumerate(batches()):
        if number == stop:
            state: dict[str, Any] = copy.deepcopy(streamed.state_dict())
            streamed = StatisticsPass(dictionary(device), window=16, coactive=8)
            streamed.load_state_dict(state)
        streamed.update(*batch)
    return streamed.finish(["a", "b", "c"])


def differing(a: FeatureStatistics, b: FeatureStatistics) -> list[str]:
    names = []
    for name, value in vars(a).items():
        pairs = (
            zip(value, getattr(b, name), strict=True) if isinstance(value, Examples) else [(value, getattr(b, name))]
        )
        if not all(np.array_equal(mine, other) for mine, other in pairs):
            names.append(name)
    return names


def test_statistics_on_cuda_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "CHOICE_ROWS", 1000)
    on_cpu, on_cuda = run("cpu"), run("cuda")
    floats = ("mean_F", "std_F", "rate_sum_CF", "rate_square_CF")
    assert set(differing(on_cpu, on_cuda)) <= set(floats)
    for name in floats:
        np.testing.assert_allclose(getattr(on_cuda, name), getattr(on_cpu, name), rtol=1e-12)


def test_a_resume_on_cuda_ends_bit_for_bit_as_an_unbroken_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "CHOICE_ROWS", 1000)
    whole = run("cuda")
    for stop in (1, 5):
        assert differing(whole, run("cuda", stop)) == []
