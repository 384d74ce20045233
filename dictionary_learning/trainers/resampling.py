"""Neuron resampling: every so often, latents that no longer fire start anew from inputs that are explained badly.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.trainers.schedules import get_scheduler
from dictionary_learning.trainers.trainer import LossOutput, SAETrainer

FRESH_NORM = 0.2  # of a new encoder row, relative to the mean of the living: it should disturb little at first


class Resampling(SAETrainer):
    """Mixed in before a trainer's own class. The learning rate warms up again after each resampling."""

    resample_steps: int | None = None

    def _resample_every(self, steps: int | None) -> None:
        if steps is not None and (not isinstance(steps, int) or not self.warmup_steps < steps):
            raise UserError(
                f"resample_steps must be longer than the warm-up of {self.warmup_steps} steps, got {steps!r}."
            )
        self.resample_steps = steps
        self._lr_scale = get_scheduler(self.scheduler, self.steps, self.warmup_steps, self.decay_start, steps)
        self.steps_since_active = (
            None if steps is None else torch.zeros(self.ae.dict_size, dtype=torch.long, device=self.device)
        )
        self._generator = torch.Generator().manual_seed(0 if self.seed is None else self.seed)

    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: LossOutput) -> None:
        super().after_update(x_BD, y_BD, step, out)
        if self.resample_steps is None or self.steps_since_active is None:
            return
        self.steps_since_active += 1
        self.steps_since_active.masked_fill_(out.fired_F, 0)
        # Not where fewer steps are left than the new ones need to warm up: they would be worse than none.
        left = self.steps - 1 - step
        due = step % self.resample_steps == self.resample_steps - 1 and left > self.warmup_steps
        if due and not self._optimizer.health.refusing:  # on CUDA, where that is not known yet otherwise
            self.resample_neurons(self.steps_since_active > self.resample_steps / 2, x_BD, y_BD)

    @torch.no_grad()
    def resample_neurons(self, deads: Tensor, activations: Tensor, target: Tensor | None = None) -> None:
        """Restart latents from inputs of the batch, drawn with probability proportional to their squared loss.

        Args:
            deads: [F] which latents (bool); with more of them than inputs, the first ones.
            activations, target: the batch, [B, D] and (of a transcoder) [B, D_out].
        """
        x_BD, y_BD = activations, activations if target is None else target
        dead_N = deads.nonzero()[: len(x_BD), 0]
        if not len(dead_N) or bool(deads.all()):
            return
        error_BD = y_BD - self.ae(x_BD)
        chances_B = error_BD.pow(2).sum(-1).pow(2).cpu()
        if not 0 < float(chances_B.sum()) < float("inf"):
            return
        number = min(len(dead_N), int(chances_B.count_nonzero()))
        dead_N = dead_N[:number]
        drawn_N = torch.multinomial(chances_B, number, generator=self._generator).to(x_BD.device)
        center_D = x_BD.mean(0) if self.ae.pre_bias is None else self.ae.pre_bias
        alive_norm = self.ae.encoder_rows[~deads].norm(dim=1).mean()
        rows_ND = FRESH_NORM * alive_norm * torch.nn.functional.normalize(x_BD[drawn_N] - center_D)
        self.ae.encoder_rows[dead_N] = rows_ND
        self.ae.decoder_rows[dead_N] = torch.nn.functional.normalize(y_BD[drawn_N] - self.ae.decoder_bias)
        for name, parameter in self.ae.named_parameters():
            if parameter.shape == (self.ae.dict_size,) and name != self.ae.decoder_bias_name:
                parameter[dead_N] = 0.0  # biases, and r_mag: as at the start
                if self.ae.pre_bias is None and name in self.ae.scaled_with_data:
                    parameter[dead_N] = -(rows_ND @ center_D)
        self._optimizer.forget(dead_N)

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"resample_steps": self.resample_steps}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "steps_since_active": self.steps_since_active,
            "resampling_generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.steps_since_active is not None:
            self.steps_since_active.copy_(state["steps_since_active"])
        self._generator.set_state(state["resampling_generator"].cpu())
