"""The Triton kernels against dense float64 arithmetic, against plain torch's Adam, and against a stable sort.

The same tests run on the GPU where there is one, and else in Triton's interpreter, which must be chosen before Triton
is imported: `test_triton_without_gpu.py` runs this file in a process of its own for that.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: test_triton_without_gpu.py runs these in the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dictionary_learning.kernels import Entries  # noqa: E402
from dictionary_learning.kernels import triton as kernels  # noqa: E402
from dictionary_learning.kernels import triton_top_k as top_k_kernels  # noqa: E402
from dictionary_learning.kernels.triton_adam import adam_step, gradient_squares  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
NEEDS_CUDA = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def relaid(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if layout == "strided":
        wide = tensor.new_zeros([2 * size for size in tensor.shape])
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    return tensor


layouts = st.sampled_from(["contiguous", "transposed", "strided"])


def random_entries(kind: str, N: int, B: int, F: int, g: torch.Generator) -> Entries:
    latents, rows = torch.randint(F, (N,), generator=g), torch.randint(B, (N,), generator=g).sort().values
    if kind == "one latent":
        latents[:] = F - 1
    elif kind == "one row":
        rows[:] = B - 1
    elif kind == "full":
        latents, rows = torch.arange(F).repeat(B), torch.arange(B).repeat_interleave(F)
    elif kind == "one place":
        latents[:], rows[:] = 0, 0
    return Entries.of_pairs(latents.to(DEVICE), rows.to(DEVICE), B, F)


def check_products(values_N: Tensor, rows_BD: Tensor, entries: Entries, W_FD: Tensor) -> None:
    """All four products beside dense float64 matrices; the tolerance is relative to what was summed up."""
    dense_BF = torch.zeros(entries.n_rows, entries.n_latents, dtype=torch.float64, device=DEVICE)
    dense_BF.index_put_((entries.rows_N, entries.latents_N), values_N.double(), accumulate=True)
    largest_BF = dense_BF.new_zeros(dense_BF.shape)
    largest_BF.index_put_((entries.rows_N, entries.latents_N), values_N.double().abs(), accumulate=True)
    rows, W = rows_BD.double(), W_FD.double()
    places = entries.rows_N, entries.latents_N
    found = {
        "bags": (kernels.bags(values_N, entries, W_FD), dense_BF @ W, largest_BF @ W.abs()),
        "dots": (kernels.dots(rows_BD, entries, W_FD), (rows @ W.t())[places], (rows.abs() @ W.abs().t())[places]),
        "weight_gradient": (
            kernels.weight_gradient(values_N, entries, rows_BD), dense_BF.t() @ rows, largest_BF.t() @ rows.abs(),
        ),
        "latent_sums": (kernels.latent_sums(values_N, entries), dense_BF.sum(0), largest_BF.sum(0)),
    }  # fmt: skip
    for name, (one, expected, size) in found.items():
        inputs = {"bags": (values_N, W_FD), "dots": (rows_BD, W_FD), "weight_gradient": (values_N, rows_BD)}
        double = any(t.dtype == torch.float64 for t in inputs.get(name, (values_N,)))
        assert one.dtype == (torch.float64 if double else torch.float32), name
        assert one.shape == expected.shape, name
        assert ((one.double() - expected).abs() <= (1e-14 if double else 1e-6) * size).all(), name


@pytest.mark.parametrize("window", [2, 4, 128])  # small, so that a few entries make several windows
@pytest.mark.parametrize("kind", ["random", "one latent", "one row", "one place", "full"])
@settings(max_examples=8)
@given(data=st.data())
def test_products_equal_dense_arithmetic(kind: str, window: int, data: st.DataObject) -> None:
    B, F, D = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 7, 17]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    entries = random_entries(kind, data.draw(st.integers(0, 35)), B, F, g)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=g).to(data.draw(st.sampled_from(FLOATS)))
        return relaid(made.to(DEVICE), data.draw(layouts))

    with mock.patch.object(kernels, "WINDOW", window):
        check_products(normal(len(entries.rows_N)), normal(B, D), entries, normal(F, D))


@pytest.mark.parametrize("D", [192, 768, 2304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_at_widths_of_language_models(D: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(D)
    entries = random_entries("random", 11, 3, 4, g)
    values, rows, W = torch.randn(11, generator=g), torch.randn(3, D, generator=g), torch.randn(4, D, generator=g)
    check_products(values.to(DEVICE), rows.to(DEVICE, dtype), entries, W.to(DEVICE, dtype))


@pytest.mark.parametrize("kind", ["one latent", "one row", "one place", "random"])
def test_thousands_of_entries_in_one_segment(kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    N, B, F, D = 2048 + 37, 5, 3, 6
    entries = random_entries(kind, N, B, F, g)
    values, rows, W = torch.randn(N, generator=g), torch.randn(B, D, generator=g), torch.randn(F, D, generator=g)
    check_products(values.to(DEVICE), rows.to(DEVICE), entries, W.to(DEVICE))


def test_a_large_segment_is_shared_out() -> None:
    """No program sums more than two windows' entries by itself: the rest reaches it as sums of windows."""
    N = 40 * kernels.WINDOW + 11
    entries = random_entries("one latent", N, 2, 2, torch.Generator().manual_seed(2))
    values = torch.randn(N, device=DEVICE)
    # Where the programs that sum windows do nothing, what is missing is all but the two ends.
    with (
        mock.patch.object(kernels, "_window_sums", mock.MagicMock()),
        mock.patch.object(Tensor, "new_empty", Tensor.new_zeros),
    ):
        alone = kernels.latent_sums(values, entries)[1]
    order = entries.by_latent[0]
    torch.testing.assert_close(alone, values[order[40 * kernels.WINDOW :]].sum())


def test_the_same_input_gives_the_same_bits() -> None:
    g = torch.Generator().manual_seed(3)
    entries = random_entries("random", 300, 6, 5, g)
    values = torch.randn(300, generator=g).to(DEVICE)
    rows, W = torch.randn(6, 9, generator=g).to(DEVICE), torch.randn(5, 9, generator=g).to(DEVICE)
    for function, *inputs in (
        (kernels.bags, values, entries, W),
        (kernels.dots, rows, entries, W),
        (kernels.weight_gradient, values, entries, rows),
        (kernels.latent_sums, values, entries),
    ):
        assert torch.equal(function(*inputs), function(*inputs))


def test_no_rows_no_latents_no_entries() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    entries = Entries(none, none, none, 3)  # of no rows
    values, W = torch.empty(0, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    assert kernels.bags(values, entries, W).shape == (0, 4)
    assert kernels.dots(torch.empty(0, 4, device=DEVICE), entries, W).shape == (0,)
    assert torch.equal(kernels.weight_gradient(values, entries, torch.empty(0, 4, device=DEVICE)), 0 * W)
    assert torch.equal(kernels.latent_sums(values, entries), 0 * W[:, 0])


def plain_step(W: Tensor, grad: Tensor, optimizer: torch.optim.Adam, max_norm: float, project: bool) -> None:
    """What the fused kernels must equal, in plain torch."""
    if project:
        grad = grad - (grad * W.detach()).sum(1, keepdim=True) * W.detach()
    W.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([W], max_norm)
    optimizer.step()
    if project:
        with torch.no_grad():
            W.div_(W.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize(
    ("D", "dtype", "grad_dtype", "tolerance"),
    [
        (7, torch.float32, torch.float32, 1e-6),
        (192, torch.float32, torch.bfloat16, 1e-6),
        (1, torch.float32, torch.float32, 1e-6),
        (33, torch.float64, torch.float64, 1e-13),
    ],
)
def test_adam_equals_plain_torch(
    D: int, dtype: torch.dtype, grad_dtype: torch.dtype, tolerance: float, project: bool
) -> None:
    """Projection, clipping, Adam and normalisation, of two stacked dictionaries with rates of their own."""
    g = torch.Generator().manual_seed(D)
    n, F, rates, max_norm = 2, 3, (0.05, 0.003), 1.0
    W = torch.nn.functional.normalize(torch.randn(n, F, D, generator=g, dtype=dtype), dim=-1).to(DEVICE)
    moments = torch.zeros_like(W), torch.zeros_like(W)
    expected = [W[i].clone().requires_grad_() for i in range(n)]
    optimizers = [torch.optim.Adam([w], lr=lr, fused=True) for w, lr in zip(expected, rates, strict=True)]
    step = torch.zeros((), device=DEVICE)
    for t in range(4):
        # Gradients over and under the norm that is allowed.
        grad = (torch.randn(n, F, D, generator=g, dtype=dtype) * 10.0 ** (1 - t)).to(DEVICE, grad_dtype)
        for i in range(n):
            optimizers[i].param_groups[0]["lr"] = rates[i] * (1 - t / 10)
            plain_step(expected[i], grad[i].to(dtype), optimizers[i], max_norm, project)
        norms = gradient_squares(W, grad, project).sqrt()
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        lr = torch.tensor(rates, dtype=torch.float64, device=DEVICE) * (1 - t / 10)
        step += 1
        adam_step(W, grad, *moments, step=step, lr=lr, scale=scale, project=project)
        for i in range(n):
            state = optimizers[i].state[expected[i]]
            for found, right in (
                (W[i], expected[i]), (moments[0][i], state["exp_avg"]), (moments[1][i], state["exp_avg_sq"]),
            ):  # fmt: skip
                torch.testing.assert_close(found, right.detach(), rtol=tolerance, atol=tolerance)
    if project:
        torch.testing.assert_close(W.norm(dim=-1), torch.ones_like(W[..., 0]), rtol=1e-6, atol=0)


def test_adam_takes_scalars_for_one_dictionary_and_other_settings() -> None:
    g = torch.Generator().manual_seed(4)
    W, grads = torch.randn(5, 3, generator=g).to(DEVICE), torch.randn(3, 5, 3, generator=g).to(DEVICE)
    for betas, eps in (((0.0, 0.99), 1e-3), ((0.5, 0.0), 1e-8)):
        ours, right = W.clone(), W.clone().requires_grad_()
        moments = torch.zeros_like(W), torch.zeros_like(W)
        optimizer = torch.optim.Adam([right], lr=0.1, betas=betas, eps=eps, fused=True)
        for t, grad in enumerate(grads, start=1):
            right.grad = 0.25 * grad
            optimizer.step()
            adam_step(
                ours, grad, *moments, step=torch.tensor(t, device=DEVICE), lr=0.1,
                scale=torch.tensor([0.25], device=DEVICE), project=False, betas=betas, eps=eps,
            )  # fmt: skip
        torch.testing.assert_close(ours, right.detach(), rtol=1e-6, atol=1e-6)


def test_the_first_and_a_late_step_of_adam_are_corrected_in_full_precision() -> None:
    """1 - 0.999^t, in float32, is right to 1e-4 at t = 1. Moments of 0 make the step's size that of its correction."""
    for t in (1, 2, 100_000):
        W = torch.zeros(1, 2, device=DEVICE)
        grad, m, v = torch.tensor([[1.0, -2.0]], device=DEVICE), torch.zeros_like(W), torch.zeros_like(W)
        scale = torch.ones((), device=DEVICE)
        adam_step(W, grad, m, v, step=torch.tensor(t, device=DEVICE), lr=1.0, scale=scale, project=False, eps=0.0)
        size = (1 - 0.9) / (1 - 0.9**t) / (((1 - 0.999) / (1 - 0.999**t)) ** 0.5)
        torch.testing.assert_close(W, torch.tensor([[-size, size]], device=DEVICE), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_eps_of_zero_leaves_a_projected_row_finite() -> None:
    """Where a block is wider than the row, 0 / 0 outside of it must not reach the row's norm."""
    W = torch.nn.functional.normalize(torch.tensor([[1.0, 2.0, 2.0]], device=DEVICE), dim=1)
    one, grad = torch.ones((), device=DEVICE), torch.tensor([[1.0, -1.0, 2.0]], device=DEVICE)
    adam_step(W, grad, torch.zeros_like(W), torch.zeros_like(W), step=one, lr=0.1, scale=one, project=True, eps=0.0)
    torch.testing.assert_close(W.norm(), one)


def test_a_zero_row_stays_zero_and_gradients_are_left_alone() -> None:
    W, grad = torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    W[1, 2], grad[1] = 1.0, 3.0
    before, one = grad.clone(), torch.ones((), device=DEVICE)
    adam_step(
        W, grad, torch.zeros_like(W), torch.zeros_like(W), step=one, lr=0.1, scale=one, project=True
    )  # fmt: skip
    assert W[0].eq(0).all() and W.isfinite().all() and torch.equal(grad, before)


@settings(max_examples=15)
@given(
    st.integers(0, 4), st.sampled_from([1, 5, 40]), st.sampled_from(FLOATS), st.booleans(), layouts,
    st.integers(0, 2**16),
)  # fmt: skip
def test_gradient_squares(F: int, D: int, dtype: torch.dtype, project: bool, layout: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1).to(dtype)
    grad = torch.randn(F, D, generator=g).to(dtype)
    left = grad.double() - project * (grad.double() * W.double()).sum(1, keepdim=True) * W.double()
    found = gradient_squares(relaid(W.to(DEVICE), layout), relaid(grad.to(DEVICE), layout), project)
    torch.testing.assert_close(found.double().cpu(), left.square().sum(), rtol=2e-6, atol=2e-6)


def test_adam_refuses_what_it_would_do_wrong() -> None:
    W, one = torch.zeros(3, 4, device=DEVICE), torch.ones((), device=DEVICE)
    rest: dict[str, Any] = {"step": one, "lr": 0.1, "scale": one, "project": False}
    with pytest.raises(ValueError, match="contiguous"):
        adam_step(torch.zeros(4, 3, device=DEVICE).t(), W, W.clone(), W.clone(), **rest)
    with pytest.raises(ValueError, match="one shape"):
        adam_step(W, torch.zeros(4, 3, device=DEVICE), W.clone(), W.clone(), **rest)
    with pytest.raises(ValueError, match="betas"):
        adam_step(W, W.clone(), W.clone(), W.clone(), **rest, betas=(0.9, 1.0))


def check_top_k(pre_BF: Tensor, k: int) -> None:
    found = top_k_kernels.top_k(pre_BF, k)
    expected = pre_BF.cpu().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(found.indices.cpu(), expected)
    assert torch.equal(found.values, pre_BF.gather(1, found.indices))


def values_of(kind: str, shape: tuple[int, int], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=g).to(dtype)
    if kind == "odd":  # infinities, both zeros, the largest and the smallest numbers
        limits = torch.finfo(dtype)
        odd = [torch.inf, -torch.inf, 0.0, -0.0, limits.max, limits.min, limits.tiny, limits.tiny / 8, -1.0]
        return torch.tensor(odd, dtype=dtype)[torch.randint(len(odd), shape, generator=g)]
    if kind == "equal":
        return torch.full(shape, -torch.inf, dtype=dtype)
    x = torch.randn(shape, generator=g).to(dtype)
    return -x.abs() if kind == "negative" else x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "ties", "odd", "equal", "negative"])
@settings(max_examples=6)
@given(data=st.data())
def test_top_k_equals_a_stable_sort(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    B, F = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 2, 31, 32, 33, 70]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    pre_BF = relaid(values_of(kind, (B, F), dtype, g).to(DEVICE), data.draw(layouts))
    k = data.draw(st.sampled_from(sorted({0, 1, F // 2, F - 1, F})))
    # Chunks and blocks small enough for several of them.
    with (
        mock.patch.object(top_k_kernels, "CHUNK", data.draw(st.sampled_from([16, 32768]))),
        mock.patch.object(top_k_kernels, "WRITTEN", data.draw(st.sampled_from([8, 4096]))),
    ):
        check_top_k(pre_BF, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_of_wide_rows(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3 * top_k_kernels.CHUNK // 2 + 5, generator=torch.Generator().manual_seed(5))
    x[1] = x[1].clamp(max=1.0)  # more than k equal ones, in every chunk
    check_top_k(x.to(DEVICE, dtype), 64)


def test_top_k_refuses_a_k_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="between 0 and the 4 values"):
        top_k_kernels.top_k(torch.zeros(2, 4, device=DEVICE), 5)


@NEEDS_CUDA
def test_nothing_waits_for_the_device() -> None:
    g = torch.Generator().manual_seed(6)
    indices = torch.randint(50, (30, 4), generator=g).to(DEVICE)
    values, rows, W = (torch.randn(*shape, device=DEVICE) for shape in ((120,), (30, 8), (50, 8)))
    pre, one, moments = torch.randn(30, 50, device=DEVICE), torch.ones((), device=DEVICE), torch.zeros(2, 50, 8).cuda()

    def step() -> None:
        entries = Entries.of_rows(top_k_kernels.top_k(pre, 4).indices, 50)
        kernels.bags(values, entries, W)
        kernels.dots(rows, entries, W)
        grad = kernels.weight_gradient(values, Entries.of_rows(indices, 50), rows)
        kernels.latent_sums(values, entries)
        scale = gradient_squares(W, grad, True).rsqrt()
        adam_step(W, grad, *moments, step=one, lr=0.1, scale=scale, project=True)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_CUDA
def test_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    F, D = (1 << 16) + 3, 1 << 15
    W = torch.zeros(F, D, dtype=torch.bfloat16, device=DEVICE)
    W[-1], W[-2] = 1.0, 2.0
    entries = Entries.of_rows(torch.tensor([[F - 1, F - 2]], device=DEVICE), F)
    values, row = torch.tensor([3.0, 5.0], device=DEVICE), torch.full((1, D), 0.5, device=DEVICE)
    assert kernels.bags(values, entries, W).eq(13).all()
    assert kernels.dots(row, entries, W).tolist() == [D / 2, D]
    gradient = kernels.weight_gradient(values, entries, row)
    assert gradient[-1].eq(1.5).all() and gradient[-2].eq(2.5).all() and gradient[:-2].eq(0).all()
    del gradient
    one, moments = torch.ones((), device=DEVICE), [torch.zeros_like(W) for _ in range(2)]
    adam_step(W, W.clone(), *moments, step=one, lr=1.0, scale=one, project=False, eps=0.0)
    assert W[-1].eq(0).all() and W[-2].eq(1).all()
    del moments, W
    pre = torch.zeros((1 << 16) + 3, 1 << 15, dtype=torch.bfloat16, device=DEVICE)
    pre[-1, -7:] = 1.0
    found = top_k_kernels.top_k(pre, 7).indices
    assert torch.equal(found[-1].cpu(), torch.arange((1 << 15) - 7, 1 << 15)) and found[:-1].lt(7).all()
