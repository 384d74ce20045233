"""The products through entries against dense matrices, whatever the shapes and layouts, and the choice of kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.kernels import ENVIRONMENT, Entries, cpu, kernels_for, reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def relaid(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        wide = tensor.new_zeros(tensor.shape[0] * 2, tensor.shape[1] * 3)
        wide[::2, ::3] = tensor
        return wide[::2, ::3]
    return tensor


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Values [N] at entries of a [B, F] matrix, rows [B, D] and weights [F, D]: any places, none, all, the same one
    again and again."""
    B, D, F = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    kind = draw(st.sampled_from(["any", "none", "all", "one place", "one row", "one latent", "k a row"]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    N = 0 if kind == "none" else draw(st.integers(1, 3 * B))
    rows, latents = torch.randint(B, (N,), generator=g).sort().values, torch.randint(F, (N,), generator=g)
    if kind == "one place":
        rows[:], latents[:] = B - 1, F - 1
    elif kind == "one row":
        rows[:] = draw(st.integers(0, B - 1))
    elif kind == "one latent":
        latents[:] = draw(st.integers(0, F - 1))
    entries = Entries.of_pairs(latents, rows, B, F)
    if kind == "all":
        entries = Entries.of_flat(torch.arange(B * F), B, F)
    elif kind == "k a row":
        k = draw(st.integers(1, F))
        entries = Entries.of_rows(torch.randint(F, (B, k), generator=g), F)
    layouts = st.sampled_from(["contiguous", "transposed", "strided"])
    return {
        "entries": entries,
        "values_N": torch.randn(len(entries.latents_N), generator=g, dtype=dtype),
        "rows_BD": relaid(torch.randn(B, D, generator=g, dtype=dtype), draw(layouts)),
        "W_FD": relaid(torch.randn(F, D, generator=g, dtype=dtype), draw(layouts)),
    }


def products(kernels: Any, values_N: Tensor, entries: Entries, rows_BD: Tensor, W_FD: Tensor) -> dict[str, Tensor]:
    return {
        "bags": kernels.bags(values_N, entries, W_FD),
        "dots": kernels.dots(rows_BD, entries, W_FD),
        "weight_gradient": kernels.weight_gradient(values_N, entries, rows_BD),
        "latent_sums": kernels.latent_sums(values_N, entries),
    }


@settings(derandomize=True, max_examples=200, deadline=None)
@given(problems())
def test_cpu_products_equal_dense_ones(problem: dict[str, Any]) -> None:
    found, expected = products(cpu, **problem), products(reference, **problem)
    tolerance = TOLERANCE[problem["values_N"].dtype]
    for name, right in expected.items():
        assert found[name].shape == right.shape and found[name].dtype == right.dtype, name
        torch.testing.assert_close(
            found[name], right, rtol=tolerance, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_reference_products_are_what_they_say() -> None:
    """Entry by entry, in loops: what everything else is compared with."""
    g = torch.Generator().manual_seed(0)
    entries = Entries.of_pairs(torch.tensor([2, 2, 0, 1]), torch.tensor([0, 0, 2, 2]), 4, 3)
    values, rows, W = torch.randn(4, generator=g), torch.randn(4, 5, generator=g), torch.randn(3, 5, generator=g)
    bags, dots = torch.zeros(4, 5), torch.zeros(4)
    gradient, sums = torch.zeros(3, 5), torch.zeros(3)
    for n, (row, latent) in enumerate(zip(entries.rows_N.tolist(), entries.latents_N.tolist(), strict=True)):
        bags[row] += values[n] * W[latent]
        dots[n] = rows[row] @ W[latent]
        gradient[latent] += values[n] * rows[row]
        sums[latent] += values[n]
    expected = {"bags": bags, "dots": dots, "weight_gradient": gradient, "latent_sums": sums}
    torch.testing.assert_close(products(reference, values, entries, rows, W), expected)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_entries_say_where_rows_and_latents_begin(B: int, F: int, seed: int) -> None:
    flat = torch.randperm(B * F, generator=torch.Generator().manual_seed(seed))[: seed % (B * F + 1)].sort().values
    entries = Entries.of_flat(flat, B, F)
    assert torch.equal(entries.rows_N * F + entries.latents_N, flat) and entries.n_rows == B
    starts_B = entries.offsets_B.tolist()
    for row, (start, end) in enumerate(pairwise([*starts_B, len(flat)])):
        assert (entries.rows_N[start:end] == row).all() and (entries.rows_N == row).sum() == end - start
    order, rows, firsts = entries.by_latent
    assert torch.equal(rows, entries.rows_N[order])
    assert sorted(order.tolist()) == list(range(len(flat)))
    for latent, (start, end) in enumerate(pairwise([*firsts.tolist(), len(flat)])):
        assert (entries.latents_N[order[start:end]] == latent).all()
        assert (entries.latents_N == latent).sum() == end - start
        assert order[start:end].tolist() == sorted(order[start:end].tolist())


def test_a_latent_that_never_fired_gets_a_zero_gradient() -> None:
    entries = Entries.of_rows(torch.tensor([[1, 4], [4, 1], [1, 4]]), 6)
    gradient = cpu.weight_gradient(torch.ones(6), entries, torch.ones(3, 4))
    assert gradient[[0, 2, 3, 5]].eq(0).all() and gradient[[1, 4]].eq(3).all()


def test_products_are_the_same_bits_every_time_and_on_any_number_of_threads() -> None:
    g = torch.Generator().manual_seed(1)
    entries = Entries.of_rows(torch.randint(50, (400, 16), generator=g), 50)
    values, rows, W = (
        torch.randn(6400, generator=g),
        torch.randn(400, 24, generator=g),
        torch.randn(50, 24, generator=g),
    )
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            found.append(products(cpu, values, entries, rows, W))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


# ------------------------------------------------------------------------------------------------- which kernels


def test_the_environment_forces_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert kernels_for("cpu") is cpu
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert kernels_for("cpu") is reference and kernels_for(torch.device("cuda")) is reference
    monkeypatch.setenv(ENVIRONMENT, "")
    assert kernels_for("cpu") is cpu


def test_without_triton_a_gpu_gets_the_kernels_that_run_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr("dictionary_learning.kernels._has_triton", lambda: False)
    assert kernels_for("cuda") is cpu
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(UserError, match="needs the package triton"):
        kernels_for("cuda")


def test_unknown_kernels_are_named_with_the_nearest_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "referense")
    with pytest.raises(UserError, match="SAE_FACTORY_KERNELS=referense is unknown.*Did you mean 'reference'"):
        kernels_for("cpu")
