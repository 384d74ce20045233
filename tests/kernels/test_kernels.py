"""The fast kernels against plain dense autograd: same values, same gradients, whatever the shapes and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.kernels import ENVIRONMENT, cpu, kernels_for, reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ("x", "W_enc", "b_enc", "b_dec", "W_dec")


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
    """Inputs of a sparse step: rows B, width D, latents F, k active, with the degenerate kinds that data can be."""
    B, D, F = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    k = draw(st.sampled_from([1, F, draw(st.integers(1, F))]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    kind = draw(st.sampled_from(["plain", "ties", "duplicate rows", "no positives", "zeros"]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    problem: dict[str, Any] = {
        "x": normal(B, D), "W_enc": normal(F, D), "b_enc": normal(F), "b_dec": normal(D), "W_dec": normal(F, D)
    }  # fmt: skip
    if kind == "ties":
        problem["W_enc"] = problem["W_enc"][:1].expand(F, D).clone()
        problem["b_enc"] = torch.zeros(F, dtype=dtype)
    elif kind == "duplicate rows":
        problem["x"] = problem["x"][:1].expand(B, D).clone()
    elif kind == "no positives":
        problem["b_enc"] = problem["b_enc"] - 1000
    elif kind == "zeros":
        problem["x"] = problem["b_dec"].expand(B, D).clone()
    for name in ("x", "W_enc", "W_dec"):
        problem[name] = relaid(problem[name], draw(st.sampled_from(["contiguous", "transposed", "strided"])))
    pre = reference.preactivations(*(problem[name] for name in NAMES[:4]))
    # What topk picks, and any indices at all: a kernel has no say in which latents are active.
    top = pre.topk(k, dim=-1, sorted=False).indices
    problem["indices"] = draw(st.sampled_from([top, torch.randint(F, (B, k), generator=g)]))
    problem["weights"] = normal(B, D)
    return problem


def step(kernels: Any, problem: dict[str, Any]) -> list[Tensor]:
    """Pre-activations, codes and reconstruction of a step, and the gradients of a loss to all five inputs."""
    x, W_enc, b_enc, b_dec, W_dec = inputs = [problem[name].detach().requires_grad_() for name in NAMES]
    pre = kernels.preactivations(x, W_enc, b_enc, b_dec)
    values = torch.relu(kernels.select(pre, problem["indices"], x, W_enc, b_enc, b_dec))
    x_hat = kernels.decode(values, problem["indices"], W_dec) + b_dec
    loss = (problem["weights"] * x_hat).sum() + (x - x_hat).pow(2).sum() + values.pow(3).sum()
    return [pre.detach().clone(), values.detach(), x_hat.detach(), *torch.autograd.grad(loss, inputs)]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(problems())
def test_cpu_kernels_equal_dense_autograd(problem: dict[str, Any]) -> None:
    expected = step(reference, problem)
    found = step(cpu, problem)
    tolerance = TOLERANCE[problem["x"].dtype]
    for name, one, other in zip(("pre", "values", "x_hat", *NAMES), expected, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, name
        scale = max(1.0, one.abs().max().item())
        torch.testing.assert_close(
            other, one, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_cpu_kernels_pass_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 5), (7, 5), (7,), (5,), (7, 5))
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    indices = torch.tensor([[0, 3], [3, 6], [1, 1], [2, 0]])

    def forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor) -> Tensor:
        pre = cpu.preactivations(x, W_enc, b_enc, b_dec)
        return cpu.decode(cpu.select(pre, indices, x, W_enc, b_enc, b_dec), indices, W_dec) + b_dec

    assert torch.autograd.gradcheck(forward, inputs)


def test_gradients_are_formed_only_for_inputs_that_need_them() -> None:
    x, W, b, d = torch.randn(3, 4), torch.randn(6, 4).requires_grad_(), torch.zeros(6), torch.zeros(4)
    indices = torch.tensor([[0, 1], [2, 3], [4, 5]])
    cpu.select(cpu.preactivations(x, W, b, d), indices, x, W, b, d).sum().backward()
    assert W.grad is not None and x.grad is None and b.grad is None and d.grad is None


def test_a_latent_that_never_fired_gets_a_zero_gradient() -> None:
    W_dec = torch.randn(6, 4).requires_grad_()
    cpu.decode(torch.ones(3, 2), torch.tensor([[1, 4], [4, 1], [1, 4]]), W_dec).sum().backward()
    assert W_dec.grad is not None
    assert W_dec.grad[[0, 2, 3, 5]].eq(0).all() and W_dec.grad[[1, 4]].eq(3).all()


def test_weight_gradients_are_the_same_bits_every_time_and_on_any_number_of_threads() -> None:
    g = torch.Generator().manual_seed(1)
    indices = torch.randint(50, (400, 16), generator=g)
    values, rows = torch.randn(400, 16, generator=g), torch.randn(400, 24, generator=g)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            found.append(cpu.weight_gradient(values, indices, rows, 50))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_preactivations_share_memory_between_calls_and_stay_right_across_shapes_and_types() -> None:
    g = torch.Generator().manual_seed(2)
    for B, F, dtype in ((8, 20, torch.float32), (3, 5, torch.float32), (3, 5, torch.float64), (9, 40, torch.float32)):
        inputs = [torch.randn(shape, generator=g, dtype=dtype) for shape in ((B, 6), (F, 6), (F,), (6,))]
        torch.testing.assert_close(cpu.preactivations(*inputs), reference.preactivations(*inputs))
    before = cpu.preactivations(*inputs).data_ptr()
    assert cpu.preactivations(*inputs).data_ptr() == before  # no fresh pages in the steady state


def test_two_losses_may_be_computed_before_either_is_differentiated() -> None:
    g = torch.Generator().manual_seed(3)
    W, b, d = torch.randn(6, 4, generator=g).requires_grad_(), torch.zeros(6), torch.zeros(4)

    def loss(kernels: Any, x: Tensor) -> Tensor:
        pre = kernels.preactivations(x, W, b, d)
        indices = pre.detach().topk(2, dim=-1).indices
        return kernels.decode(kernels.select(pre, indices, x, W, b, d), indices, W).pow(2).sum()

    one, two = torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g)
    (expected,) = torch.autograd.grad(loss(reference, one) + loss(reference, two), W)
    (found,) = torch.autograd.grad(loss(cpu, one) + loss(cpu, two), W)
    torch.testing.assert_close(found, expected)


def test_the_environment_forces_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert kernels_for("cpu") is cpu and kernels_for(torch.device("cuda")) is reference
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert kernels_for("cpu") is reference
    monkeypatch.setenv(ENVIRONMENT, "")
    assert kernels_for("cpu") is cpu


def test_unknown_kernels_are_named_with_the_nearest_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "referense")
    with pytest.raises(UserError, match="SAE_FACTORY_KERNELS=referense is unknown.*Did you mean 'reference'"):
        kernels_for("cpu")
