"""A sparsity penalty that moves until as many latents fire as were asked for.

The logarithm of the coefficient integrates the logarithm of the ratio of the measured to the wanted L0, on the device.
It moves slowly beside the dictionary, which follows a change of the penalty within some hundred steps, and for long
enough to change it by several orders of magnitude within a run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.errors import UserError

EFOLDS = 8.0  # by which the coefficient can change in a whole run
FASTEST = 0.02  # change of its logarithm in a step


class L0Controller:
    """Args:
    target_l0: wanted mean number of active latents an input; None leaves the penalty where it is.
    penalty: the coefficient to begin with.
    """

    def __init__(
        self, target_l0: float | None, penalty: float, steps: int, dict_size: int, device: torch.device
    ) -> None:
        if target_l0 is not None and not 0 < target_l0 <= dict_size:
            raise UserError(f"target_l0 must be positive and at most the width {dict_size}, got {target_l0!r}.")
        if target_l0 is not None and not penalty > 0:
            raise UserError("target_l0 moves l1_penalty, which has to begin above 0.")
        self.target_l0 = target_l0
        self._gain = min(FASTEST, EFOLDS / steps)
        self.penalty = torch.tensor(float(penalty), device=device)

    def after_update(self, l0: Tensor) -> None:
        """`l0` of the last step, on the device. To be called once the penalty is in full force."""
        if self.target_l0 is not None:
            error = ((l0 + 0.1) / (self.target_l0 + 0.1)).log().clamp_(-1.0, 1.0)
            self.penalty = self.penalty * (self._gain * error).exp()

    def state_dict(self) -> dict[str, Any]:
        return {"penalty": self.penalty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.penalty = state["penalty"].to(self.penalty.device)
