"""Streaming mean and variance against numpy in one piece, and the z-score made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dictionary_learning.activations.statistics import RunningMoments, ZScore, load_zscores, save_zscores
from dictionary_learning.errors import UserError


def moments_of(x_ND: torch.Tensor, sizes: list[int]) -> RunningMoments:
    moments = RunningMoments(x_ND.shape[1])
    for part in x_ND.split(sizes):
        moments.update(part)
    return moments


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), seed=st.integers(0, 99))
def test_any_cut_into_blocks_gives_the_moments_of_the_whole(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e-6, 1e6, 0.0])
    x = x + torch.tensor([0.0, 1000.0, -5.0, 0.1])
    moments, whole = moments_of(x, sizes), x.numpy()
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean_D, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance_D, whole.var(0), rtol=1e-3, atol=1e-20)
    assert 3 in moments.constant_dimensions
    half = len(x) // 2
    left, right = moments_of(x[:half], [half]), moments_of(x[half:], [len(x) - half])
    left.merge(right)
    torch.testing.assert_close(left.variance_D, moments.variance_D, rtol=1e-6, atol=1e-20)


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    """Where sums of squares in float32, and even float64, give nonsense."""
    x = 1e8 + torch.randn(4096, 3, dtype=torch.float64)
    moments = moments_of(x, [1024] * 4)
    np.testing.assert_allclose(moments.variance_D, x.numpy().var(0), rtol=1e-9)


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    x = torch.randn(20, 3)
    bad = x.clone()
    bad[4, 1], bad[11, 0], bad[11, 2] = torch.nan, torch.inf, -torch.inf
    moments = moments_of(bad, [7, 13])
    keep = [row for row in range(20) if row not in (4, 11)]
    assert (moments.count, moments.rows_not_finite) == (18, 2)
    np.testing.assert_allclose(moments.mean_D, x[keep].double().numpy().mean(0), rtol=1e-12)
    assert "2 of 20 rows hold a NaN or an infinity" in moments.report("mlp")


def test_constant_dimensions_are_named_and_keep_scale_one() -> None:
    x = torch.randn(1000, 3)
    x[:, 1] = 0.1  # its sum of squares is not zero in floating point
    moments = moments_of(x, [333, 333, 334])
    assert moments.constant_dimensions == [1]
    assert moments.report("mlp") == "'mlp': 1 constant dimension (1) keeps scale 1."
    assert moments.zscore().scale_D[1] == 1.0
    z = moments.zscore().apply(x)
    assert z[:, 1].abs().max() < 1e-6 and torch.isfinite(z).all()
    many = moments_of(torch.zeros(3, 12), [3])
    assert "12 constant dimensions (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...) keep scale 1" in many.report("mlp")
    assert moments_of(torch.randn(10, 2), [10]).report("mlp") == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_z_scores_have_zero_mean_and_unit_variance_and_go_back(dtype: torch.dtype, tmp_path: Path) -> None:
    x = (torch.randn(5000, 4) * torch.tensor([1.0, 30.0, 0.01, 5.0]) + torch.tensor([0.0, 200.0, 1.0, -3.0])).to(dtype)
    zscore = moments_of(x, [5000]).zscore()
    z = zscore.apply(x)
    assert z.dtype == dtype
    coarse = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(z.double().mean(0), torch.zeros(4).double(), rtol=0, atol=coarse)
    torch.testing.assert_close(z.double().var(0, correction=0), torch.ones(4).double(), rtol=coarse, atol=0)
    torch.testing.assert_close(zscore.invert(z), x, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=coarse)
    save_zscores(tmp_path / "z.safetensors", {"mlp.out:in": zscore, "resid": zscore})
    loaded = load_zscores(tmp_path / "z.safetensors")
    assert set(loaded) == {"mlp.out:in", "resid"} and torch.equal(loaded["resid"].apply(x), z)


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"width 3 are expected, got shape \(2, 4\)"):
        RunningMoments(3).update(torch.zeros(2, 4))
    with pytest.raises(UserError, match="no finite row"):
        moments_of(torch.full((2, 2), torch.nan), [2]).zscore()
    with pytest.raises(UserError, match="of width 2, the activations of 3"):
        ZScore(torch.zeros(2), torch.ones(2)).apply(torch.zeros(1, 3))
    (tmp_path / "z.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable file of z-scores"):
        load_zscores(tmp_path / "z.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no z-scores: its tensors are a"):
        load_zscores(tmp_path / "other.safetensors")
