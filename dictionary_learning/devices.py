"""Which device to work on: a name, or "auto" for the best one that this machine has.

In: what a user wrote. Out: a `torch.device` that is there. An absent device is refused here, in one sentence, and not
by the first tensor that goes to it in the middle of a run.
"""

from __future__ import annotations

import torch

from dictionary_learning.errors import UserError, did_you_mean

AUTO = "auto"
NAMES = (AUTO, "cuda", "mps", "cpu")


def best_device() -> torch.device:
    """What "auto" means here: CUDA's current device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto", the name of a device or a device -> a device that this machine has.

    Raises:
        UserError: not the name of a device, or absent here.
    """
    if device == AUTO:
        return best_device()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(
            f"'{device}' is not a device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.{did_you_mean(device, NAMES)}"
        ) from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            have = f"'cuda:0' to 'cuda:{count - 1}' or 'cpu'" if count else "'cpu'"
            raise UserError(f"Device '{device}' is not available on this machine; use {have}.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("Device 'mps' is not available here; use 'cpu'.")
    return found
