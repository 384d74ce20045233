"""How often do latents fire? The histogram of log10 densities, and which latents are dead or dense.

In: densities [F] (`FeatureStatistics.density_F`), shares of rows between 0 and 1. Out: what a plot and a table need.
Latents that never fired stand at -10, those that always fire at 0.
"""

from __future__ import annotations

import numpy as np

LOG10_OF_DEAD = -10.0
DENSE = 0.1  # above this density a latent is called dense
DEAD_STATUS, DENSE_STATUS = "dead", "dense"


def log10_density(density_F: np.ndarray) -> np.ndarray:
    """[F] float64, log10 of the densities, `LOG10_OF_DEAD` where they are 0."""
    return np.log10(np.maximum(np.asarray(density_F, dtype=np.float64), 10.0**LOG10_OF_DEAD))


def density_histogram(density_F: np.ndarray, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """(latents in each bin [B] int64, edges [B + 1] in log10 from -10 to 0)."""
    return np.histogram(log10_density(density_F), bins=bins, range=(LOG10_OF_DEAD, 0.0))


def dead_latents(density_F: np.ndarray) -> np.ndarray:
    """Numbers of the latents that never fired."""
    return np.flatnonzero(np.asarray(density_F) == 0)


def dense_latents(density_F: np.ndarray, threshold: float = DENSE) -> np.ndarray:
    """Numbers of the latents whose density is above `threshold`, the densest first."""
    order = np.argsort(-np.asarray(density_F), kind="stable")
    return order[np.asarray(density_F)[order] > threshold]


def status(density_F: np.ndarray) -> np.ndarray:
    """[F] str: "dead", "dense", or "" for those in between."""
    density_F = np.asarray(density_F)
    return np.where(density_F == 0, DEAD_STATUS, np.where(density_F > DENSE, DENSE_STATUS, ""))
