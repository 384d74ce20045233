"""Which entries are active: the largest of a row or a batch, and those above a cutoff."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dictionary_learning.kernels import select

KINDS = ("normal", "ties", "constant", "one group", "with -inf")


def values(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "constant":
        x = torch.zeros_like(x)
    elif kind == "one group":  # the largest all fall into one of the first round's groups
        x[:, :: max(1, columns // select.GROUP)] += 100
    elif kind == "with -inf":
        x[:, columns // 3 :] = -torch.inf
    return x


def assert_the_k_largest(x: Tensor, indices_Rk: Tensor, k: int) -> None:
    assert indices_Rk.shape == (len(x), k) and indices_Rk.dtype == torch.int64
    assert all(len(set(row)) == k for row in indices_Rk.tolist())  # no entry twice
    found = x.gather(1, indices_Rk).sort(dim=1, descending=True).values
    assert torch.equal(found, x.topk(k, dim=1).values)


@settings(max_examples=120)
@given(
    rows=st.integers(1, 5), groups=st.integers(1, 24), kind=st.sampled_from(KINDS), k=st.integers(1, 6),
    odd=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_two_rounds_find_the_k_largest(rows: int, groups: int, kind: str, k: int, odd: bool, seed: int) -> None:
    columns = groups * select.GROUP + (3 if odd else 0)
    x = values(kind, rows, columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "TWO_ROUNDS_FROM", 1)
        assert_the_k_largest(x, select.top_k(x, k), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "k"), [(4096, 1), (4096, 64), (6144, 32), (6144, 97), (4100, 5), (300, 300)])
def test_top_k_at_the_sizes_that_are_used(kind: str, columns: int, k: int) -> None:
    x = values(kind, 9, columns, 0)
    assert_the_k_largest(x, select.top_k(x, k), k)


def test_two_rounds_are_taken_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above test them."""
    seen = []
    whole = Tensor.topk
    monkeypatch.setattr(Tensor, "topk", lambda self, *a, **b: seen.append(self.shape[-1]) or whole(self, *a, **b))
    select.top_k(torch.randn(2, 4096), 8)
    assert seen == [4096 // select.GROUP, select.GROUP * 8]
    seen.clear()
    select.top_k(torch.randn(2, 4080), 8)
    assert seen == [4080]


@settings(max_examples=60)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 40), fraction=st.floats(0, 1), kind=st.sampled_from(KINDS),
    two_rounds=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_batch_top_k_finds_the_largest_of_the_batch(
    rows: int, columns: int, fraction: float, kind: str, two_rounds: bool, seed: int
) -> None:
    x = values(kind, rows, columns, seed)
    number = max(1, round(fraction * x.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "TWO_ROUNDS_FROM", 1 if two_rounds else 10**9)
        flat_N = select.batch_top_k(x, number)
    assert torch.equal(flat_N, flat_N.unique())  # ascending, none twice
    assert torch.equal(x.flatten()[flat_N].sort(descending=True).values, x.flatten().topk(number).values)


@given(rows=st.integers(1, 6), columns=st.integers(1, 9), share=st.floats(0, 1), room=st.integers(1, 80))
def test_places_are_those_of_the_true_elements(rows: int, columns: int, share: float, room: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(room)) < share
    right = mask.flatten().nonzero()[:, 0]
    flat_N, real_N = select.places(mask, None)
    assert torch.equal(flat_N, right) and real_N is None
    flat_N, real_N = select.places(mask, room)
    assert real_N is not None and flat_N.shape == real_N.shape == (room,)
    assert torch.equal(flat_N[real_N], right[:room])  # what there is no room for are the last
    assert flat_N.diff().ge(0).all() and flat_N.max() < mask.numel()  # the rest fill up at places that exist
