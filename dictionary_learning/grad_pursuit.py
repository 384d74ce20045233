"""Gradient pursuit: sparse codes of activations in a given dictionary, found without an encoder.

In: activations and the decoder's directions. Out: non-negative codes with at most so many latents an input, each step
adding the latent that fits the residual best and moving all chosen codes along the gradient of the squared error.

Source: Blumensath & Davies 2008, "Gradient pursuits"; as inference-time optimisation of SAEs in Smith et al. 2024,
"Full post: progress update #1 from the GDM mech interp team", which clips the codes at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dictionary_learning.errors import UserError


@torch.no_grad()
def grad_pursuit(
    signal: Tensor, dictionary: Tensor, target_l0: int = 20, device: torch.device | str | None = None
) -> Tensor:
    """Codes [B, F] >= 0 with at most `target_l0` active latents, so that codes @ dictionary.T is close to `signal`.

    Args:
        signal: activations [B, D] (without the decoder's bias).
        dictionary: [D, F], one latent's direction a column, as `ae.decoder.weight` is.
        device: where to compute; by default where `signal` is.

    Raises:
        UserError: shapes that don't fit, or `target_l0` below 0.
    """
    if signal.ndim != 2 or dictionary.ndim != 2 or signal.shape[1] != dictionary.shape[0]:
        raise UserError(
            f"Gradient pursuit takes a signal [B, D] and a dictionary [D, F], got {list(signal.shape)} and "
            f"{list(dictionary.shape)}."
        )
    if target_l0 < 0:
        raise UserError(f"target_l0 must be at least 0, got {target_l0}.")
    device = signal.device if device is None else device
    signal_BD, directions_DF = signal.to(device), dictionary.to(device, signal.dtype)
    codes_BF = signal_BD.new_zeros(len(signal_BD), directions_DF.shape[1])
    chosen_BF = torch.zeros_like(codes_BF, dtype=torch.bool)
    for _ in range(target_l0):
        residual_BD = signal_BD - codes_BF @ directions_DF.t()
        fit_BF = residual_BD @ directions_DF
        chosen_BF.scatter_(1, fit_BF.argmax(dim=1, keepdim=True), True)
        gradient_BF = fit_BF * chosen_BF
        step_BD = gradient_BF @ directions_DF.t()
        length_B = (step_BD * residual_BD).sum(1) / step_BD.pow(2).sum(1).clamp_min(torch.finfo(signal.dtype).tiny)
        codes_BF = (codes_BF + length_B[:, None] * gradient_BF).clamp_min_(0)
    return codes_BF
