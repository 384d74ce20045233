"""The standard SAE's loss: squared error plus an L1 penalty on the codes, decoder rows of unit norm.

Source: Bricken et al. 2023, "Towards Monosemanticity", section "Sparse autoencoder setup".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.dictionary import AutoEncoder, Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.trainers.trainer import LossOutput, SAETrainer


class StandardTrainer(SAETrainer, architecture="standard"):
    """loss = mean |x - x_hat|^2 + l1_penalty * mean sum_i f_i.

    `l1_penalty` has the units of the data: it is meant for activations of unit mean squared norm
    (`normalize_activations=True`). `sparsity_warmup_steps` None takes a tenth of the run, at most 2,000 steps.
    """

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary] = AutoEncoder,
        lr: float | None = None,
        l1_penalty: float = 1e-1,
        warmup_steps: int | None = None,
        sparsity_warmup_steps: int | None = None,
        decay_start: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "StandardTrainer",
        submodule_name: str | None = None,
    ) -> None:
        if not 0 <= l1_penalty < float("inf"):
            raise UserError(f"l1_penalty must not be negative, got {l1_penalty!r}.")
        self.l1_penalty = l1_penalty
        super().__init__(
            steps=steps,
            activation_dim=activation_dim,
            dict_size=dict_size,
            layer=layer,
            lm_name=lm_name,
            dict_class=dict_class,
            lr=lr,
            warmup_steps=warmup_steps,
            decay_start=decay_start,
            seed=seed,
            device=device,
            sparsity_warmup_steps=min(2000, steps // 10) if sparsity_warmup_steps is None else sparsity_warmup_steps,
            wandb_name=wandb_name,
            submodule_name=submodule_name,
        )

    def compute_loss(self, x_BD: Tensor, step: int) -> LossOutput:
        x_hat_BD, acts_BF = self.ae(x_BD, output_features=True)
        l2 = (x_BD - x_hat_BD).pow(2).sum(-1).mean()
        l1 = acts_BF.sum(-1).mean()
        loss = l2 + self.l1_penalty * self._sparsity_scale(step) * l1
        active_BF = acts_BF.detach() > 0
        return LossOutput(loss, x_hat_BD, active_BF.any(0), active_BF.sum() / len(x_BD), {"l2_loss": l2, "l1_loss": l1})

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"l1_penalty": self.l1_penalty}
