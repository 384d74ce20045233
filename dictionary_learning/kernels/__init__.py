"""The products of a training step through the active latents only. One place chooses how: `kernels_for`.

A [B, F] matrix of codes with N non-zero entries is held as `Entries` (where) and a tensor [N] (how much). Four
functions are all that a step does with it besides the encoder's dense product:

    bags              sum of the decoder rows of a row's entries             decode
    dots              a row dotted with the weights of each of its entries   gradient of the codes
    weight_gradient   sum of the rows that each latent has entries in        gradient of the encoder and the decoder
    latent_sums       sum of each latent's entries                           gradient of what there is once a latent

`reference` computes them through dense [B, F] matrices and is the truth the others are tested against; `cpu` (which
runs on any device) is built on PyTorch's embedding bags; `triton` on kernels of our own for CUDA. What is
differentiable and written once for all of them is in `codes`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dictionary_learning.errors import UserError, did_you_mean

ENVIRONMENT = "SAE_FACTORY_KERNELS"
CHOICES = ("reference", "cpu", "triton")


@dataclass(frozen=True)
class Entries:
    """Where N entries of a [B, F] matrix are, sorted by row. A place may occur twice (its values add up)."""

    latents_N: Tensor  # int64
    rows_N: Tensor  # int64, ascending
    offsets_B: Tensor  # int64, where each row's entries begin
    n_latents: int  # F

    @classmethod
    def of_rows(cls, indices_Bk: Tensor, n_latents: int) -> Entries:
        """k entries in each row."""
        rows, k = indices_Bk.shape
        offsets_B = torch.arange(0, rows * k, k, device=indices_Bk.device)
        rows_N = torch.arange(rows, device=indices_Bk.device).repeat_interleave(k, output_size=rows * k)
        return cls(indices_Bk.reshape(-1), rows_N, offsets_B, n_latents)

    @classmethod
    def of_flat(cls, flat_N: Tensor, n_rows: int, n_latents: int) -> Entries:
        """The places row * F + latent, ascending."""
        rows_N = flat_N.div(n_latents, rounding_mode="floor")
        return cls.of_pairs(flat_N - rows_N * n_latents, rows_N, n_rows, n_latents)

    @classmethod
    def of_pairs(cls, latents_N: Tensor, rows_N: Tensor, n_rows: int, n_latents: int) -> Entries:
        """Latents and ascending rows."""
        offsets_B = torch.searchsorted(rows_N, torch.arange(n_rows, device=rows_N.device))
        return cls(latents_N, rows_N, offsets_B, n_latents)

    @property
    def n_rows(self) -> int:
        return len(self.offsets_B)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries in the order of their latents, rows ascending in each: ([N] which entries, [N] their rows, [F]
        where each latent's begin)."""
        latents, order_N = self.latents_N.int().sort(stable=True)  # 32-bit keys: twice as fast on CPU
        each_F = torch.arange(self.n_latents, device=latents.device, dtype=torch.int)
        return order_N, self.rows_N[order_N], torch.searchsorted(latents, each_F)


class Kernels(Protocol):
    """What a set of kernels offers. Sums run in a fixed order: the same input gives the same bits."""

    def bags(self, values_N: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
        """[B, D], for each row the sum over its entries of value * W[latent]."""

    def dots(self, rows_BD: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
        """[N], for each entry rows[row] . W[latent]."""

    def weight_gradient(self, values_N: Tensor, entries: Entries, rows_BD: Tensor) -> Tensor:
        """[F, D], for each latent the sum over its entries of value * rows[row]."""

    def latent_sums(self, values_N: Tensor, entries: Entries) -> Tensor:
        """[F], for each latent the sum of its entries' values."""


def kernels_for(device: torch.device | str) -> Kernels:
    """The fastest exact kernels for a device, or those that the environment setting SAE_FACTORY_KERNELS names.

    Raises:
        UserError: the environment names kernels that do not exist, or that can't run here.
    """
    return cast(Kernels, import_module(f"dictionary_learning.kernels.{_chosen(device)}"))


def fused_adam_for(device: torch.device | str) -> Any:
    """The module of the optimiser's kernels (`triton_adam`) where the kernels chosen for a device have one."""
    return import_module("dictionary_learning.kernels.triton_adam") if _chosen(device) == "triton" else None


def _chosen(device: torch.device | str) -> str:
    forced = os.environ.get(ENVIRONMENT)
    if forced and forced not in CHOICES:
        raise UserError(f"{ENVIRONMENT}={forced} is unknown: use {', '.join(CHOICES)}.{did_you_mean(forced, CHOICES)}")
    name = forced or ("triton" if torch.device(device).type == "cuda" and _has_triton() else "cpu")
    if name == "triton" and not _has_triton():
        raise UserError(f"{ENVIRONMENT}=triton needs the package triton, which is not installed: pip install triton.")
    if name == "triton" and torch.device(device).type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"{ENVIRONMENT}=triton needs a CUDA device, and the run is on {device}: use cpu, or TRITON_INTERPRET=1 to "
            "check the kernels."
        )
    return name


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
