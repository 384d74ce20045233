"""The products of a step by plain dense matrices: slow, obvious, and what every other kernel must agree with."""

from __future__ import annotations

from torch import Tensor

from dictionary_learning.kernels import Entries


def _dense(values_N: Tensor, entries: Entries) -> Tensor:
    """[B, F] the matrix of codes itself."""
    codes_BF = values_N.new_zeros(entries.n_rows, entries.n_latents)
    return codes_BF.index_put_((entries.rows_N, entries.latents_N), values_N, accumulate=True)


def bags(values_N: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
    return _dense(values_N, entries) @ W_FD


def dots(rows_BD: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
    return (rows_BD @ W_FD.t())[entries.rows_N, entries.latents_N]


def weight_gradient(values_N: Tensor, entries: Entries, rows_BD: Tensor) -> Tensor:
    return _dense(values_N, entries).t() @ rows_BD


def latent_sums(values_N: Tensor, entries: Entries) -> Tensor:
    return _dense(values_N, entries).sum(0)
