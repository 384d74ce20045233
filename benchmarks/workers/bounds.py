"""The bounds of a step: what the dense products, the encoder's product alone and Adam cost on this machine.

Nothing can train a dictionary with the dense products of plain autograd in less than `dense`; a sparse step keeps
`matmul`, the encoder's product. Each is taken two ways: "default" as torch computes it, and "fastest", the quickest
way known here that gives the exact fp32 product (checked against float64; where none beats the default, the same).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from worker import Contestant, fp32_product, timed

EXACT = 2e-6
"""Largest error an fp32 product over some thousand terms may have, relative to its largest entry."""


def fastest_precision(d: int, m: int, batch: int, device: str) -> str | None:
    """The oneDNN setting under which an fp32 product is exact and quickest here; None for torch's default."""
    if device != "cpu" or not hasattr(torch.backends.mkldnn, "matmul"):  # since torch 2.9
        return None
    x, w, out = torch.randn(batch, d), torch.randn(m, d), torch.empty(batch, m)
    truth = x[:64].double() @ w.double().t()
    best, precision = _median_seconds(lambda: torch.mm(x, w.t(), out=out)), None
    for candidate in ("tf32", "bf16"):
        with fp32_product(candidate):
            seconds = _median_seconds(lambda: torch.mm(x, w.t(), out=out))
        error = float((out[:64] - truth).abs().max() / truth.abs().max())
        if error < EXACT and seconds < 0.95 * best:
            best, precision = seconds, candidate
    return precision


def _median_seconds(product: Callable[[], object]) -> float:
    def step() -> None:
        product()

    seconds = timed(step, 6)["seconds"][1:]
    return sorted(seconds)[len(seconds) // 2]


def matmul(d: int, m: int, batch: int, way: str, device: str = "cpu", dtype: str = "float32") -> Contestant:
    """The encoder's product alone, into memory that is there."""
    kind = getattr(torch, dtype)
    x, w = torch.randn(batch, d, device=device, dtype=kind), torch.randn(m, d, device=device, dtype=kind)
    out = torch.empty(batch, m, device=device, dtype=kind)
    return _products([lambda: torch.mm(x, w.t(), out=out)], d, m, batch, way, device, dtype)


def dense(d: int, m: int, batch: int, way: str, device: str = "cpu", dtype: str = "float32") -> Contestant:
    """The five dense products of a step by plain autograd, without anything between them: encode, decode, and the
    gradients of the codes, of the decoder and of the encoder."""
    kind = getattr(torch, dtype)
    x_BD, w_FD = torch.randn(batch, d, device=device, dtype=kind), torch.randn(m, d, device=device, dtype=kind)
    codes_BF, x_hat_BD, grad_FD = w_FD.new_empty(batch, m), w_FD.new_empty(batch, d), w_FD.new_empty(m, d)
    products: list[Callable[[], object]] = [
        lambda: torch.mm(x_BD, w_FD.t(), out=codes_BF),
        lambda: torch.mm(codes_BF, w_FD, out=x_hat_BD),
        lambda: torch.mm(x_BD, w_FD.t(), out=codes_BF),
        lambda: torch.mm(codes_BF.t(), x_BD, out=grad_FD),
        lambda: torch.mm(codes_BF.t(), x_BD, out=grad_FD),
    ]
    return _products(products, d, m, batch, way, device, dtype)


def encoder_and_adam(d: int, m: int, batch: int, way: str = "default", device: str = "cpu") -> Contestant:
    """The encoder's product and fused Adam over the weights of a dictionary: what a step's cost may not outgrow."""
    x, out = torch.randn(batch, d, device=device), torch.empty(batch, m, device=device)
    weights = [torch.nn.Parameter(torch.randn(m, d, device=device)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    adam = torch.optim.Adam(weights, lr=1e-4, fused=True)

    @torch.no_grad()
    def product() -> None:
        torch.mm(x, weights[0].t(), out=out)

    return _products([product, lambda: adam.step()], d, m, batch, way, device, "float32")


def _products(
    products: list[Callable[[], object]], d: int, m: int, batch: int, way: str, device: str, dtype: str
) -> Contestant:
    precision = fastest_precision(d, m, batch, device) if way == "fastest" and dtype == "float32" else None

    def step() -> None:
        with fp32_product(precision) if precision else contextlib.nullcontext():
            for product in products:
                product()

    return Contestant(step, lambda: {"fp32_product": precision or "default"})


MAKERS = {"matmul": matmul, "dense": dense, "encoder_and_adam": encoder_and_adam}
