"""The products of a step on PyTorch's embedding-bag primitives; they run on every device.

A bag is a row of the batch when decoding, and a latent when forming a weight gradient: there the entries are taken in
the order of their latents, so that each latent sums the batch rows it fired on. No [N, D] tensor is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dictionary_learning.kernels import Entries


def bags(values_N: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
    return embedding_bag(entries.latents_N, W_FD, entries.offsets_B, per_sample_weights=values_N, mode="sum")


def dots(rows_BD: Tensor, entries: Entries, W_FD: Tensor) -> Tensor:
    if not len(entries.latents_N):
        return rows_BD.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_BD.contiguous(), W_FD, entries.latents_N, entries.offsets_B, entries.rows_N, 0
    )


def weight_gradient(values_N: Tensor, entries: Entries, rows_BD: Tensor) -> Tensor:
    order_N, rows_N, firsts_F = entries.by_latent
    return embedding_bag(rows_N, rows_BD.contiguous(), firsts_F, per_sample_weights=values_N[order_N], mode="sum")


def latent_sums(values_N: Tensor, entries: Entries) -> Tensor:
    return values_N.new_zeros(entries.n_latents).index_add_(0, entries.latents_N, values_N)
