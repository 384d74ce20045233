"""The p-annealed SAE's loss: squared error plus an Lp penalty on the codes whose p falls. See `annealing`."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from dictionary_learning.dictionary import AutoEncoder, Dictionary
from dictionary_learning.trainers.annealing import Annealing, SparsityFunction
from dictionary_learning.trainers.functions import row_squares
from dictionary_learning.trainers.resampling import Resampling
from dictionary_learning.trainers.sparse_switch import FiresByThreshold, SparseSwitch
from dictionary_learning.trainers.trainer import LossOutput, Shared


class PAnnealTrainer(Resampling, Annealing, FiresByThreshold, architecture="p_anneal"):
    """loss = mean |x - x_hat|^2 + coefficient * Lp(f), decoder rows of unit norm. Settings: see `Annealing`."""

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary] = AutoEncoder,
        lr: float | None = None,
        warmup_steps: int | None = None,
        decay_start: int | None = None,
        sparsity_warmup_steps: int | None = None,
        sparsity_function: SparsityFunction = "Lp",
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
        wandb_name: str | None = "PAnnealTrainer",
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
        self.switch = SparseSwitch(self.device.type)
        self._resample_every(resample_steps)

    def compute_loss(self, x_BD: Tensor, y_BD: Tensor, step: int) -> LossOutput:
        codes = self.switch.codes(self.preactivations(x_BD), 0.0)
        acts = codes.relu()
        x_hat_BD = self.reconstruction(codes.decode(acts, self.ae.decoder_rows)[0], x_BD)
        penalty, terms = self.lp_penalty(acts, codes, step)
        mse = row_squares(y_BD, x_hat_BD).mean()
        return LossOutput(mse + penalty, x_hat_BD, codes.firings(acts.detach()), {"mse_loss": mse, **terms})
