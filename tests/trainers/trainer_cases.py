"""Trainers to test, data to train them on, and every architecture's loss written out once more in plain autograd.

`formula` owes nothing to the package: parameters come in as a dict of leaves, the loss of the paper comes out. The
straight-through gradients to a JumpReLU threshold are written as terms of value zero that carry them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.trainers import TRAINERS, SAETrainer

D, F, B, STEPS = 8, 24, 32, 40
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_penalty": 0.05},
    "top_k": {"k": 4},
    "jump_relu": {"target_l0": 4.0, "bandwidth": 0.2},
}
ARCHITECTURES = list(TRAINERS)


def make(architecture: str, **settings: Any) -> SAETrainer:
    """A small trainer of an architecture; `settings` overrides."""
    arguments: dict[str, Any] = {
        "steps": STEPS, "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "toy", "seed": 0, "device": "cpu"
    }  # fmt: skip
    return TRAINERS[architecture](**(arguments | SETTINGS[architecture] | settings))


def batches(number: int = STEPS, rows: int = B, width: int = D, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Batches of sparse mixtures of 12 fixed directions plus a common offset, mean squared norm about `scale`^2."""
    g = torch.Generator().manual_seed(99)
    directions = torch.nn.functional.normalize(torch.randn(12, width, generator=g), dim=1)
    offset = 0.3 * torch.randn(width, generator=g)
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(number):
        codes = torch.rand(rows, 12, generator=g) * (torch.rand(rows, 12, generator=g) < 0.25)
        out.append(scale * (codes @ directions + offset + 0.02 * torch.randn(rows, width, generator=g)))
    return out


def synthetic(steps: int, rows: int = 128, width: int = 24, features: int = 40) -> tuple[list[Tensor], Tensor]:
    """Rows with each of 40 unit directions present one time in ten."""
    g = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(features, width, generator=g), dim=1)
    codes = (torch.rand(steps, rows, features, generator=g) < 0.1) * (
        0.5 + torch.rand(steps, rows, features, generator=g)
    )
    return list(codes @ directions), directions


def train(trainer: SAETrainer, data: list[Tensor], start: int = 0) -> SAETrainer:
    for step, x in enumerate(data, start=start):
        trainer.update(step, x)
    return trainer


def weights(trainer: SAETrainer) -> dict[str, Tensor]:
    """A copy of everything in the trainer's dictionary."""
    return {name: tensor.detach().clone() for name, tensor in trainer.ae.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def formula(architecture: str, p: dict[str, Tensor], x: Tensor, **s: Any) -> Tensor:
    """The loss of a batch by the paper's equations; `s` holds what they need, `s["weight"]` being the sparsity term's.

    standard: Bricken et al. 2023. top_k: arXiv:2406.04093, sections 2.3, 2.4 and A.2; with `s["dead"]` [F] AuxK is in.
    jump_relu: arXiv:2407.14435, eq. 9 with the pseudo-derivatives of eqs. 11 and 12.
    """
    if architecture == "jump_relu":
        z, theta, width = x @ p["W_enc"] + p["b_enc"], p["threshold"], s["bandwidth"]
        on = (z > theta).to(x.dtype).detach()
        kernel = (((z - theta) / width).abs() < 0.5).to(x.dtype).detach()
        step = theta - theta.detach()
        f = z * on - theta.detach() / width * kernel * step
        l0 = (on - 1 / width * kernel * step).sum(1).mean()
        error = (f @ p["W_dec"] + p["b_dec"] - x).pow(2).sum(1).mean()
        return error + s["weight"] * (l0 if s["target_l0"] is None else (l0 / s["target_l0"] - 1) ** 2)
    b = p["bias" if architecture == "standard" else "b_dec"]
    pre = (x - b) @ p["encoder.weight"].T + p["encoder.bias"]
    acts = torch.clamp(pre, min=0)
    if architecture == "standard":
        error = (acts @ p["decoder.weight"].T + b - x).pow(2).sum(1).mean()
        return error + s["weight"] * acts.abs().sum(1).mean()
    kth = pre.detach().sort(dim=1, descending=True).values[:, [s["k"] - 1]]
    f = acts * (pre.detach() >= kth)
    residual = x - f @ p["decoder.weight"].T - b
    loss = residual.pow(2).sum(1).mean()
    if s.get("dead") is not None and s["dead"].any():
        residual, dead = residual.detach(), s["dead"]
        number = int(min(s["auxk_size"], dead.sum()))
        dead_pre = torch.where(dead, pre.detach(), -torch.inf)
        kth = dead_pre.sort(dim=1, descending=True).values[:, [number - 1]]
        aux = (acts * dead * (dead_pre >= kth)) @ p["decoder.weight"].T
        fraction = (residual - aux).pow(2).sum(1).mean() / (residual - residual.mean(0)).pow(2).sum(1).mean()
        of_data = (x - x.mean(0)).pow(2).sum(1).mean()
        loss = loss + s["auxk_alpha"] * of_data * min(1.0, number / s["auxk_size"]) * fraction
    return loss
