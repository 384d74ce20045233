"""The p-annealed gated SAE's loss: the gated SAE's, with an Lp penalty on the gate whose p falls. See `annealing`."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from dictionary_learning.dictionary import Dictionary, GatedAutoEncoder
from dictionary_learning.kernels.codes import Codes
from dictionary_learning.trainers.annealing import Annealing, SparsityFunction
from dictionary_learning.trainers.gdm import _GatedTrainer
from dictionary_learning.trainers.resampling import Resampling
from dictionary_learning.trainers.trainer import Shared


class GatedAnnealTrainer(Resampling, Annealing, _GatedTrainer, architecture="gated_anneal"):
    """loss = mean |x - x_hat|^2 + coefficient * Lp(ReLU(gate)) + mean |x - x_hat of the gate|^2. Settings: see
    `Annealing`."""

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary] = GatedAutoEncoder,
        lr: float | None = None,
        warmup_steps: int | None = None,
        sparsity_warmup_steps: int | None = None,
        decay_start: int | None = None,
        sparsity_function: SparsityFunction = "Lp^p",
        initial_sparsity_penalty: float = 1e-1,
        anneal_start: int | None = None,
        anneal_end: int | None = None,
        p_start: float = 1,
        p_end: float = 0,
        n_sparsity_updates: int | Literal["continuous"] = 10,
        sparsity_queue_length: int = 10,
        resample_steps: int | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
        wandb_name: str | None = "GatedAnnealTrainer",
        submodule_name: str | None = None,
        **shared: Unpack[Shared],
    ) -> None:
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
            **shared,
        )
        self._anneal(
            sparsity_function,
            initial_sparsity_penalty,
            anneal_start,
            anneal_end,
            p_start,
            p_end,
            n_sparsity_updates,
            sparsity_queue_length,
        )
        self._set_up()
        self._resample_every(resample_steps)

    def penalty(self, gate: Tensor, l1: Tensor, codes: Codes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.lp_penalty(gate, codes, step)
