"""Codes, dense and on entries: every operation and all its gradients against dense autograd, and what memory that is
shared between steps may and may not do."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dictionary_learning.kernels import Entries, cpu, reference
from dictionary_learning.kernels.codes import Codes, DenseCodes, Encoder, EncoderDtype, Preactivations, SparseCodes

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
PARTS = 3
Inputs = dict[str, Tensor]


def inputs_of(
    seed: int, B: int = 6, D: int = 5, F: int = 12, dtype: torch.dtype = torch.float64, kind: str = ""
) -> Inputs:
    """x, the encoder's and the decoder's parameters, and weights of the loss below; all are differentiated."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (B, D), "W_enc": (F, D), "b_enc": (F,), "b_pre": (D,), "W_dec": (F, D), "v": (F,), "u": (F,)}
    out = {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}
    if kind == "ties":
        out["W_enc"], out["b_enc"] = out["W_enc"][:1].expand(F, D).clone(), torch.zeros(F, dtype=dtype)
    elif kind == "duplicate rows":
        out["x"] = out["x"][:1].expand(B, D).clone()
    elif kind == "no positives":
        out["b_enc"] = out["b_enc"] - 1000
    elif kind == "zeros":
        out["x"] = out["b_pre"].expand(B, D).clone()
    return {name: tensor.requires_grad_() for name, tensor in out.items()}


def product(
    p: Inputs, kernels: ModuleType = cpu, dtype: EncoderDtype = "fp32", bias: bool = True, pre: bool = True
) -> Preactivations:
    encoder = Encoder(p["W_enc"], p["b_enc"] if bias else None, p["b_pre"] if pre else None)
    return Preactivations(p["x"], encoder, kernels, dtype)  # type: ignore[arg-type]


def plain_pre(p: Inputs, bias: bool = True, pre: bool = True) -> Tensor:
    z = (p["x"] - p["b_pre"] if pre else p["x"]) @ p["W_enc"].T
    return z + p["b_enc"] if bias else z


def draws(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def by_codes(codes: Codes, p: Inputs) -> list[Tensor]:
    """[B, D], a scalar, [B, D], a scalar, [B], and of entries the parts of the reconstruction: every operation."""
    acts = torch.relu(codes.pre)
    scaled = acts * codes.per_latent(p["v"])
    plain, total = codes.decode(acts, p["W_dec"])
    weighted, weighted_total = codes.decode(scaled, p["W_dec"], p["u"])
    out = [plain, total, weighted, weighted_total, codes.row_sums(acts.square())]
    if isinstance(codes, SparseCodes):
        part_F = torch.arange(len(p["v"])) % PARTS
        out.append(codes.decode_parts(scaled, p["W_dec"], part_F, PARTS))
    return out


def by_autograd(z: Tensor, on: Tensor, p: Inputs, parts: bool) -> list[Tensor]:
    """The same of a [B, F] matrix of pre-activations, of which `on` [B, F] says how often each is an entry."""
    acts = torch.relu(z) * on
    scaled = acts * p["v"]
    out = [acts @ p["W_dec"], acts.sum(), scaled @ p["W_dec"], (scaled * p["u"]).sum()]
    out.append((torch.relu(z).square() * on).sum(1))
    if parts:
        masks = torch.stack([torch.arange(len(p["v"])) % PARTS == part for part in range(PARTS)])
        out.append(torch.stack([(scaled * mask) @ p["W_dec"] for mask in masks], 1))
    return out


def with_gradients(out: list[Tensor], p: Inputs) -> list[Tensor]:
    """The results, and the gradients of a loss in which each takes part in a way of its own."""
    loss = sum(
        ((i + 1) * draws(tensor.shape, tensor.dtype) * (tensor + 0.1 * tensor**2)).sum() for i, tensor in enumerate(out)
    )
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    return [tensor.detach().clone() for tensor in out] + [
        torch.zeros_like(one) if grad is None else grad.clone() for grad, one in zip(grads, p.values(), strict=True)
    ]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    tolerance = TOLERANCE[expected[0].dtype]
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale, msg=lambda m, i=i: f"{i}: {m}")


def counts(entries: Entries) -> Tensor:
    out = torch.zeros(entries.n_rows, entries.n_latents, dtype=torch.int64)
    return out.index_put_((entries.rows_N, entries.latents_N), torch.ones((), dtype=torch.int64), accumulate=True)


SELECTIONS: dict[str, Callable[[Preactivations], SparseCodes]] = {
    "top_k 1": lambda pre: pre.top_k(1),
    "top_k 5": lambda pre: pre.top_k(5),
    "top_k all": lambda pre: pre.top_k(12),
    "batch_top_k": lambda pre: pre.batch_top_k(11),
    "batch_top_k all": lambda pre: pre.batch_top_k(pre.x_BD.shape[0] * 12),
    "group_max": lambda pre: pre.group_max(4),
    "above 0": lambda pre: pre.above(0.0),
    "above by latent": lambda pre: pre.above(torch.linspace(-1, 1, 12).to(pre.x_BD)),
    "above all": lambda pre: pre.above(1e9),
}


@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("selection", SELECTIONS)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 999), B=st.integers(1, 6), D=st.integers(1, 6), dtype=st.sampled_from(list(TOLERANCE)),
    kind=st.sampled_from(["", "ties", "duplicate rows", "no positives", "zeros"]), bias=st.booleans(),
    pre=st.booleans(),
)  # fmt: skip
def test_sparse_codes_are_dense_autograd_at_their_entries(
    selection: str, kernels: ModuleType, seed: int, B: int, D: int, dtype: torch.dtype, kind: str, bias: bool, pre: bool
) -> None:
    p = inputs_of(seed, B, D, dtype=dtype, kind=kind)
    codes = SELECTIONS[selection](product(p, kernels, bias=bias, pre=pre))
    z = plain_pre(p, bias, pre)
    torch.testing.assert_close(codes.pre.detach(), z.detach()[codes.entries.rows_N, codes.entries.latents_N])
    expected = with_gradients(by_autograd(z, counts(codes.entries), p, parts=True), p)
    assert_same(with_gradients(by_codes(codes, p), p), expected)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 999), B=st.integers(1, 6), D=st.integers(1, 6), dtype=st.sampled_from(list(TOLERANCE)),
    kind=st.sampled_from(["", "duplicate rows", "no positives"]), bias=st.booleans(), pre=st.booleans(),
)  # fmt: skip
def test_dense_codes_are_dense_autograd(
    seed: int, B: int, D: int, dtype: torch.dtype, kind: str, bias: bool, pre: bool
) -> None:
    p = inputs_of(seed, B, D, dtype=dtype, kind=kind)
    expected = with_gradients(by_autograd(plain_pre(p, bias, pre), torch.ones(()), p, parts=False), p)
    assert_same(with_gradients(by_codes(product(p, bias=bias, pre=pre).dense(), p), p), expected)


@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_relu_is_that_of_pre(way: str) -> None:
    p = inputs_of(3)
    found, expected = [], torch.relu(plain_pre(p))
    codes: Codes = product(p).dense() if way == "dense" else product(p).above(-1e9)
    found = codes.relu()
    x_hat, total = codes.decode(found, p["W_dec"])
    assert_same(with_gradients([x_hat, total], p), with_gradients([expected @ p["W_dec"], expected.sum()], p))


def test_two_decodes_of_one_dense_step_keep_their_gradients_apart() -> None:
    p = inputs_of(4)
    codes, z = product(p).dense(), plain_pre(p)
    one, two = torch.relu(codes.pre), codes.pre.square()
    found = [codes.decode(one, p["W_dec"])[0], codes.decode(two, p["W_dec"])[0]]
    assert_same(with_gradients(found, p), with_gradients([torch.relu(z) @ p["W_dec"], z.square() @ p["W_dec"]], p))


def test_gradients_are_formed_only_for_what_needs_them() -> None:
    for way in ("dense", "sparse"):
        p = {name: tensor.detach() for name, tensor in inputs_of(0).items()}
        p["W_enc"].requires_grad_()
        codes: Codes = product(p).dense() if way == "dense" else product(p).top_k(2)
        codes.decode(codes.relu(), p["W_dec"])[0].sum().backward()
        assert [name for name, tensor in p.items() if tensor.grad is not None] == ["W_enc"]


def test_firings_count_rows_and_zeros_did_not_fire() -> None:
    p = inputs_of(5)
    with torch.no_grad():
        p["b_enc"][4:] = -100  # so that top_k has to take what is not positive
    expected = ((z := plain_pre(p)) > 0).sum(0)
    assert torch.equal(product(p).dense().firings(torch.relu(z.detach())), expected.double())
    codes = product(p).top_k(8)
    assert torch.equal(codes.firings(codes.relu().detach()), expected.double())


# ------------------------------------------------------------------------------------------------- choosing entries


def test_top_k_among_some_latents_takes_others_only_to_fill_up() -> None:
    p, among = inputs_of(6), torch.zeros(12, dtype=torch.bool)
    among[[2, 5, 11]] = True
    for dtype in ("fp32", "bf16"):
        codes = product({name: t.float() for name, t in p.items()}, dtype=dtype).top_k(2, among)  # type: ignore[arg-type]
        assert among[codes.entries.latents_N].all()
        codes = product({name: t.float() for name, t in p.items()}, dtype=dtype).top_k(5, among)  # type: ignore[arg-type]
        latents = codes.entries.latents_N.view(-1, 5)
        assert all({2, 5, 11} <= set(row) and len(set(row)) == 5 for row in latents.tolist())
        chosen = among[codes.entries.latents_N]
        assert codes.pre[chosen].isfinite().all() and codes.pre[~chosen].eq(-torch.inf).all()


def test_batch_top_k_by_scaled_values_keeps_the_values_themselves() -> None:
    p, scale = inputs_of(7), torch.linspace(0.1, 3, 12, dtype=torch.float64)
    z = plain_pre(p).detach()
    right = (z * scale).flatten().topk(10).indices.sort().values
    codes = product(p).batch_top_k(10, scale)
    assert torch.equal(codes.entries.rows_N * 12 + codes.entries.latents_N, right)
    torch.testing.assert_close(codes.pre.detach(), z.flatten()[right])


@pytest.mark.parametrize("room", [1, 20, 41, 72])
def test_entries_of_a_fixed_number_are_the_same_step_and_what_overflows_is_left_out(room: int) -> None:
    p = inputs_of(8)
    z = plain_pre(p).detach()
    number = int((z > 0).sum())
    assert 20 < number < 72
    codes = product(p).above(0.0, room)
    assert codes.pre.shape == (room,) and codes.full is not None and bool(codes.full) == (room <= number)
    kept = torch.zeros(z.numel(), dtype=torch.int64)
    kept[(z.flatten() > 0).nonzero()[:room, 0]] = 1
    expected = with_gradients(by_autograd(plain_pre(p), kept.view_as(z), p, parts=True), p)
    assert_same(with_gradients(by_codes(codes, p), p), expected)


# ------------------------------------------------------------------------------------------------- reduced precision


@pytest.mark.parametrize("seed", range(3))
def test_a_bf16_product_proposes_and_full_precision_chooses(seed: int) -> None:
    p = inputs_of(seed, B=256, D=64, F=1024, dtype=torch.float32)
    with torch.no_grad():
        p["W_enc"] /= 8
    z = plain_pre(p).detach()
    for exact, found in (
        (product(p).top_k(32), product(p, dtype="bf16").top_k(32)),
        (product(p).batch_top_k(32 * 256), product(p, dtype="bf16").batch_top_k(32 * 256)),
    ):
        right, ours = (set((c.entries.rows_N * 1024 + c.entries.latents_N).tolist()) for c in (exact, found))
        assert len(ours) == len(right) and len(ours & right) / len(right) >= 0.999
        entries = found.entries
        torch.testing.assert_close(found.pre.detach(), z[entries.rows_N, entries.latents_N], rtol=1e-5, atol=1e-5)
        assert entries.rows_N.diff().ge(0).all()
    rounded = (p["x"] - p["b_pre"]).bfloat16() @ p["W_enc"].bfloat16().T
    alone = (rounded.float() + p["b_enc"]).topk(32).indices  # without choosing anew
    right = z.topk(32).indices
    missed = 1 - sum(len(set(a) & set(b)) for a, b in zip(alone.tolist(), right.tolist(), strict=True)) / right.numel()
    assert missed > 0.001


def test_reduced_entries_by_group_or_cutoff_have_exact_values_and_gradients() -> None:
    p = inputs_of(1, B=16, D=24, F=60, dtype=torch.float32)
    for choose in (lambda pre: pre.group_max(12), lambda pre: pre.above(0.5), lambda pre: pre.top_k(60)):
        codes = choose(product(p, dtype="bf16"))
        expected = with_gradients(by_autograd(plain_pre(p), counts(codes.entries), p, parts=True), p)
        assert_same(with_gradients(by_codes(codes, p), p), expected)


def test_tf32_on_a_cpu_is_full_precision() -> None:
    p = inputs_of(2, B=32, D=24, F=60, dtype=torch.float32)
    one, other = product(p).top_k(8), product(p, dtype="tf32").top_k(8)
    assert torch.equal(one.entries.latents_N, other.entries.latents_N) and torch.equal(one.pre, other.pre)


# ------------------------------------------------------------------------------------------------- shared memory


def a_loss(p: Inputs, way: str) -> Tensor:
    codes: Codes = product(p).dense() if way.startswith("dense") else product(p).top_k(5)
    acts = codes.relu() if way.endswith("relu") else torch.relu(codes.pre)
    x_hat, total = codes.decode(acts, p["W_dec"])
    return (x_hat - p["x"]).pow(2).sum() + 0.3 * total


@pytest.mark.parametrize("second", [(6, 12), (3, 12), (9, 24)], ids=["same", "smaller", "larger"])
@pytest.mark.parametrize("way", ["dense, pre", "dense, relu", "sparse, pre", "sparse, relu"])
def test_two_losses_before_a_backward_are_right_or_raise(way: str, second: tuple[int, int]) -> None:
    one, other = inputs_of(1), inputs_of(2, B=second[0], F=second[1])

    def grads(first_loss: Tensor, second_loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(first_loss + second_loss, [one["W_enc"], one["W_dec"], other["W_enc"]]))

    apart = [*torch.autograd.grad(a_loss(one, way), [one["W_enc"], one["W_dec"]])]
    apart += torch.autograd.grad(a_loss(other, way), [other["W_enc"]])
    try:
        found = grads(a_loss(one, way), a_loss(other, way))
    except RuntimeError as error:
        assert "modified" in str(error) and "inplace" in str(error) and way.startswith("dense")
    else:
        assert_same(found, apart)


def test_a_product_is_not_read_after_another_was_formed() -> None:
    one, other = product(inputs_of(1)), product(inputs_of(2))
    one.top_k(2)
    other.top_k(2)
    with pytest.raises(RuntimeError, match="written over"):
        one.top_k(3)
    assert isinstance(one.dense(), DenseCodes)


def test_products_of_many_shapes_and_types_do_not_disturb_each_other() -> None:
    for seed, (B, F, dtype) in enumerate(
        [(8, 20, torch.float32), (3, 5, torch.float32), (3, 5, torch.float64), (9, 40, torch.float32)]
    ):
        p = inputs_of(seed, B, 6, F, dtype)
        codes: Any = product(p).dense()
        torch.testing.assert_close(codes.pre, plain_pre(p))
        torch.testing.assert_close(
            product(p).top_k(2).pre.view(B, 2).sort(1).values, plain_pre(p).topk(2).values.sort(1).values
        )
