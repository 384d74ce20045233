"""Which entries of the pre-activations are active: the k largest of a row or of a batch, and those above a cutoff."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.profiling import span

GROUP = 16  # latents whose maximum stands for them in the first round of a two-round top-k
TWO_ROUNDS_FROM = 4096  # values of a row


def top_k(values_RC: Tensor, k: int) -> Tensor:
    """[R, k] indices of the k largest of each row, in no particular order; ties fall either way.

    In two rounds where `torch.topk` is slow: the k largest lie in the k groups of the largest maxima, so that it sees a
    twelfth of its input. On CPU it copies that to pairs of value and index; on CUDA it sorts the whole of one long row,
    of at most 2^31 values.
    """
    with span("top-k"):
        return _top_k(values_RC, k)


def _top_k(values_RC: Tensor, k: int) -> Tensor:
    rows, columns = values_RC.shape
    groups = columns // GROUP
    slow = values_RC.device.type == "cpu" or rows == 1
    if not slow or columns < TWO_ROUNDS_FROM or columns % GROUP or 4 * k > groups:
        return values_RC.topk(k, dim=-1, sorted=False).indices
    grouped_RGH = values_RC.view(rows, GROUP, groups)  # a group is every `groups`-th latent: maxima by whole vectors
    best_Rk = grouped_RGH.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates_RGk = grouped_RGH.gather(2, best_Rk[:, None, :].expand(rows, GROUP, k))
    picked_Rk = candidates_RGk.view(rows, -1).topk(k, dim=-1, sorted=False).indices
    member_Rk = picked_Rk.div(k, rounding_mode="floor")
    return member_Rk * groups + best_Rk.gather(1, picked_Rk - member_Rk * k)


def batch_top_k(values_BF: Tensor, number: int) -> Tensor:
    """[number] ascending flat places of the largest values of the whole batch."""
    return top_k(values_BF.reshape(1, -1), number)[0].sort().values


def places(mask_BF: Tensor, capacity: int | None) -> tuple[Tensor, Tensor | None]:
    """Ascending flat places of the true elements.

    With a `capacity` there are exactly that many, since finding out how many there really are would wait for the
    device: missing ones are filled up with the last place, and the [capacity] mask that is returned tells them apart.
    """
    if capacity is None and mask_BF.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask_BF.numpy())), None  # twice as fast as torch.nonzero
    if capacity is None:
        return mask_BF.reshape(-1).nonzero()[:, 0], None
    flat_N = mask_BF.reshape(-1).nonzero_static(size=capacity, fill_value=mask_BF.numel())[:, 0]
    real_N = flat_N < mask_BF.numel()
    return flat_N.clamp(max=mask_BF.numel() - 1), real_N
