"""What several trainers compute: squared errors, the geometric median, seeded initialisation."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RowSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
        error_BD = x_hat_BD - y_BD
        ctx.save_for_backward(error_BD)
        return torch.linalg.vector_norm(error_BD, dim=-1).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, Tensor]:
        (error_BD,) = ctx.saved_tensors
        grad_BD = error_BD * (2 * grad_B)[:, None]
        return -grad_BD if ctx.needs_input_grad[0] else None, grad_BD


def row_squares(y_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """[B] squared error of each reconstruction."""
    return _RowSquares.apply(y_BD, x_hat_BD)


def geometric_median(points: Tensor, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """[D] point of least summed distance to `points` [B, D], by Weiszfeld's iteration; `tol` is relative."""
    guess_D = points.mean(dim=0)
    for _ in range(max_iter):
        weights_B = 1 / (points - guess_D).norm(dim=1).clamp_min(1e-8)
        previous_D, guess_D = guess_D, weights_B @ points / weights_B.sum()
        if (guess_D - previous_D).norm() < tol * guess_D.norm():
            break
    return guess_D


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's default generator inside the block and give it back as it was. None leaves it alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def argument_names(cls: type, last: type) -> set[str]:
    """What the constructor of a class takes, with what it passes on by `**` to those of its bases up to `last`."""
    names: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(last) + 1]:
        kinds = {name: taken.kind for name, taken in inspect.signature(base.__init__).parameters.items()}  # type: ignore[misc]
        names |= {name for name, kind in kinds.items() if kind.name in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")}
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    return names - {"self"}
