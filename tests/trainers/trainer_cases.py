"""Trainers to test and data to train them on. Every architecture of the registry must have its SETTINGS here and its
equation in `trainer_formulas`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.trainers import TRAINERS, MatryoshkaBatchTopKTrainer, SAETrainer
from dictionary_learning.trainers.annealing import Annealing
from dictionary_learning.trainers.dead_latents import AuxK
from dictionary_learning.trainers.sparse_switch import SparseSwitch

D, F, B, STEPS = 8, 24, 32, 40
GROUPS = {"group_fractions": [1 / 6, 1 / 3, 1 / 2]}
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_penalty": 0.05},
    "standard_april_update": {"l1_penalty": 0.05},
    "top_k": {"k": 4},
    "group_max": {"k": 4},
    "batch_top_k": {"k": 4},
    "matryoshka_batch_top_k": {"k": 4, **GROUPS},
    "jump_relu": {"target_l0": 4.0, "bandwidth": 0.2},
    "gated": {"l1_penalty": 0.05},
    "p_anneal": {"initial_sparsity_penalty": 0.05, "anneal_start": 8, "n_sparsity_updates": 4},
    "gated_anneal": {"initial_sparsity_penalty": 0.05, "anneal_start": 8, "n_sparsity_updates": 4},
}
ARCHITECTURES = list(TRAINERS)
SWITCHING = [
    name for name in ARCHITECTURES if name not in ("top_k", "group_max", "batch_top_k", "matryoshka_batch_top_k")
]
BY_K = [name for name in ARCHITECTURES if name not in SWITCHING]
UNIT_NORM = [name for name in ARCHITECTURES if name != "standard_april_update"]
RESAMPLING = ["standard", "p_anneal", "gated_anneal"]
TRANSCODERS: dict[str, dict[str, Any]] = {
    "sae": {},
    "transcoder": {"output_dim": 5},
    "skip": {"output_dim": 5, "skip": True},
}


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


def targets(data: list[Tensor], width: int = 5) -> list[Tensor]:
    """For a transcoder: a fixed nonlinear function of each row, of another width and in other units."""
    M = torch.randn(data[0].shape[1], width, generator=torch.Generator().manual_seed(98)).to(data[0].dtype)
    return [3 * torch.tanh(2 * x @ M) + 0.5 for x in data]


def synthetic(
    steps: int, rows: int = 128, width: int = 24, features: int = 40, seed: int = 5
) -> tuple[list[Tensor], Tensor]:
    """Rows with each of 40 unit directions present one time in ten."""
    g = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(features, width, generator=g), dim=1)
    g = g if seed == 5 else torch.Generator().manual_seed(seed)
    codes = (torch.rand(steps, rows, features, generator=g) < 0.1) * (
        0.5 + torch.rand(steps, rows, features, generator=g)
    )
    return list(codes @ directions), directions


def train(trainer: SAETrainer, data: list[Tensor], start: int = 0, target: list[Tensor] | None = None) -> SAETrainer:
    for step, x in enumerate(data, start=start):
        trainer.update(step, x, None if target is None else target[step - start])
    return trainer


def weights(trainer: SAETrainer) -> dict[str, Tensor]:
    """A copy of everything in the trainer's dictionary."""
    return {name: tensor.detach().clone() for name, tensor in trainer.ae.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def explained(trainer: SAETrainer, x: Tensor, y: Tensor | None = None) -> float:
    """Fraction of the variance that the dictionary explains."""
    y = x if y is None else y
    return 1 - ((y - trainer.ae(x)).var(0).sum() / y.var(0).sum()).item()


def switch_of(trainer: SAETrainer) -> SparseSwitch:
    switch = trainer.switch  # type: ignore[attr-defined]
    assert isinstance(switch, SparseSwitch)
    return switch


def auxk_of(trainer: SAETrainer) -> AuxK:
    auxk = trainer.auxk  # type: ignore[attr-defined]
    assert isinstance(auxk, AuxK)
    return auxk


def forced(trainer: SAETrainer, sparse: bool) -> SAETrainer:
    """The trainer with every step sparse, or every step dense."""
    switch = switch_of(trainer)
    switch.sparse, switch.densities = sparse, type(switch.densities)(*((2.0, 2.0) if sparse else (-1.0, -1.0)))
    return trainer


def declare_dead(trainer: SAETrainer, dead_F: Tensor) -> SAETrainer:
    """The trainer as if it had noticed that these latents [F] (bool) are dead."""
    auxk = auxk_of(trainer)
    auxk.dead_after_tokens, auxk.some_dead = 100, True
    trainer.tokens_since_fired_F.copy_(torch.where(dead_F, 100, 99))
    return trainer


def in_float64(trainer: SAETrainer) -> SAETrainer:
    """The trainer with all its arithmetic in float64, for comparisons to ten digits. (Fused Adam takes a float32
    factor for clipping: here the plain one.)"""
    trainer.ae.double()
    for options in (trainer._optimizer.adam.defaults, *trainer._optimizer.adam.param_groups):
        options["fused"] = False
    if hasattr(trainer, "controller"):
        trainer.controller.penalty = torch.tensor(trainer.l1_penalty, dtype=torch.float64)  # type: ignore[attr-defined]
    if isinstance(trainer, Annealing):
        trainer._coefficient = torch.tensor(trainer.initial_sparsity_penalty, dtype=torch.float64)
        trainer._queue_L2 = trainer._queue_L2.double()
    if isinstance(trainer, MatryoshkaBatchTopKTrainer):
        trainer._weight_G = torch.tensor(trainer.group_weights, dtype=torch.float64)
    trainer._batch = lambda x, y: (x.double(), x.double() if y is None else y.double())  # type: ignore[method-assign]
    return trainer
