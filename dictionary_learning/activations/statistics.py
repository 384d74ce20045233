"""Mean and variance of activations in one pass, and the z-score made of them.

In: blocks of rows [N, D]. Out: `RunningMoments` (count, mean, variance, what was wrong with the rows) and `ZScore`,
which maps rows to zero mean and unit variance a dimension, and back.

Blocks are merged by the rule of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979, eq. 2.1), Welford's for blocks, in float64: sums of squares would lose the variance of a
dimension whose mean is large, as those of a residual stream are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.untrusted import listed, shown

NAMED = 10  # dimensions that a report names


class ZScore(NamedTuple):
    """`(x - mean_D) / scale_D`, two float64 tensors [D] on the CPU."""

    mean_D: Tensor
    scale_D: Tensor

    def apply(self, x_ND: Tensor) -> Tensor:
        """Rows [N, D] -> z-scores, computed in float64 and rounded to the rows' dtype."""
        mean_D, scale_D = self._beside(x_ND)
        return ((x_ND.double() - mean_D) / scale_D).to(x_ND.dtype)

    def invert(self, z_ND: Tensor) -> Tensor:
        """Z-scores (or their reconstructions) -> rows in the units of the model."""
        mean_D, scale_D = self._beside(z_ND)
        return (z_ND.double() * scale_D + mean_D).to(z_ND.dtype)

    def _beside(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        if x_ND.shape[-1] != len(self.mean_D):
            raise UserError(f"The z-score is of width {len(self.mean_D)}, the activations of {x_ND.shape[-1]}.")
        return self.mean_D.to(x_ND.device), self.scale_D.to(x_ND.device)


class RunningMoments:
    """Mean and (population) variance of every dimension, from blocks of rows.

    Attributes:
        count: finite rows. rows_not_finite: rows with a NaN or an infinity, which are left out.
        mean_D, min_D, max_D: float64 [D].
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.rows_not_finite = 0
        self.mean_D = torch.zeros(width, dtype=torch.float64)
        self.min_D = torch.full((width,), torch.inf, dtype=torch.float64)
        self.max_D = torch.full((width,), -torch.inf, dtype=torch.float64)
        self._squares_D = torch.zeros(width, dtype=torch.float64)  # sum of squared deviations from the mean

    @torch.no_grad()
    def update(self, x_ND: Tensor) -> None:
        """Add rows. Raises UserError where they are not [N, D]."""
        if x_ND.ndim != 2 or x_ND.shape[1] != len(self.mean_D):
            raise UserError(f"Rows of width {len(self.mean_D)} are expected, got shape {tuple(x_ND.shape)}.")
        finite_N = torch.isfinite(x_ND).all(dim=1)
        x_ND = x_ND[finite_N].double().cpu()
        block = RunningMoments(len(self.mean_D))
        block.count, block.rows_not_finite = len(x_ND), len(finite_N) - len(x_ND)
        if block.count:
            block.mean_D = x_ND.mean(dim=0)
            block.min_D, block.max_D = x_ND.amin(dim=0), x_ND.amax(dim=0)
            block._squares_D = (x_ND - block.mean_D).pow(2).sum(dim=0)
        self.merge(block)

    def merge(self, other: RunningMoments) -> None:
        """Add the rows that another one saw."""
        self.rows_not_finite += other.rows_not_finite
        total = self.count + other.count
        if not other.count:
            return
        delta_D = other.mean_D - self.mean_D
        self.mean_D = self.mean_D + delta_D * (other.count / total)
        self._squares_D = self._squares_D + other._squares_D + delta_D.pow(2) * (self.count * other.count / total)
        self.min_D, self.max_D = torch.minimum(self.min_D, other.min_D), torch.maximum(self.max_D, other.max_D)
        self.count = total

    @property
    def variance_D(self) -> Tensor:
        """Mean squared deviation from the mean [D]."""
        return self._squares_D / max(self.count, 1)

    @property
    def constant_dimensions(self) -> list[int]:
        """Dimensions that have one value in every row (compared exactly; a variance would have rounding in it)."""
        return (self.min_D == self.max_D).nonzero().flatten().tolist()

    def zscore(self) -> ZScore:
        """The z-score of these rows; constant dimensions keep scale 1. Raises UserError where no row was finite."""
        if not self.count:
            raise UserError("There is no finite row of activations to take a mean of.")
        std_D = self.variance_D.sqrt()
        keeps_D = (self.min_D == self.max_D) | (std_D == 0)
        return ZScore(self.mean_D.clone(), torch.where(keeps_D, 1.0, std_D))

    def report(self, name: str) -> str:
        """What was wrong with the rows of a hook point, in words; empty where nothing was."""
        said = []
        if self.rows_not_finite:
            total = self.count + self.rows_not_finite
            said.append(f"{self.rows_not_finite:,} of {total:,} rows hold a NaN or an infinity and are left out")
        if constant := self.constant_dimensions:
            named = ", ".join(map(str, constant[:NAMED])) + (", ..." if len(constant) > NAMED else "")
            plural = "s" if len(constant) > 1 else ""
            said.append(f"{len(constant):,} constant dimension{plural} ({named}) keep{'' if plural else 's'} scale 1")
        return f"'{name}': " + "; ".join(said) + "." if said else ""


def save_zscores(path: Path, zscores: Mapping[str, ZScore]) -> None:
    """Write the z-scores of hook points as one safetensors file."""
    from dictionary_learning.storage import write_tensors

    write_tensors(path, {f"{name}.{f}": getattr(z, f).clone() for name, z in zscores.items() for f in ZScore._fields})


def load_zscores(path: Path) -> dict[str, ZScore]:
    """Read what `save_zscores` wrote. Raises UserError where it is absent, damaged or something else."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        names = [key.removesuffix(".mean_D") for key in tensors if key.endswith(".mean_D")]
        zscores = {name: ZScore(*(tensors[f"{name}.{field}"] for field in ZScore._fields)) for name in names}
    except Exception as error:  # safetensors lets through whatever torch says to a header that can't be
        raise UserError(f"'{path}' is not a readable file of z-scores: {shown(error, 200)}.") from error
    if not zscores or len(tensors) != 2 * len(zscores):
        raise UserError(f"'{path}' holds no z-scores: its tensors are {listed(list(tensors))}.")
    for name, (mean_D, scale_D) in zscores.items():
        same = (mean_D.shape, mean_D.dtype) == (scale_D.shape, scale_D.dtype)
        if mean_D.ndim != 1 or not same or not mean_D.is_floating_point():
            raise UserError(f"'{path}' is damaged: mean and scale of '{shown(name)}' are no two vectors of one length.")
    return zscores
