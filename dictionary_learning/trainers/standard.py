"""The standard SAE's loss: squared error plus an L1 penalty on the codes."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from dictionary_learning.dictionary import AutoEncoder, Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.trainers.functions import row_squares
from dictionary_learning.trainers.l0_controller import L0Controller
from dictionary_learning.trainers.resampling import Resampling
from dictionary_learning.trainers.sparse_switch import FiresByThreshold, SparseSwitch
from dictionary_learning.trainers.trainer import LossOutput, Shared


class _L1Trainer(FiresByThreshold):
    """loss = mean |y - y_hat|^2 + l1_penalty * mean sum_i f_i |d_i|, with d_i the decoder rows."""

    l1_penalty: float

    def _set_up(self, l1_penalty: float, target_l0: float | None) -> None:
        if not 0 <= l1_penalty < float("inf"):
            raise UserError(f"l1_penalty must not be negative, got {l1_penalty!r}.")
        self.l1_penalty, self.switch = l1_penalty, SparseSwitch(self.device.type)
        self.controller = L0Controller(target_l0, l1_penalty, self.steps, self.ae.dict_size, self.device)

    def compute_loss(self, x_BD: Tensor, y_BD: Tensor, step: int) -> LossOutput:
        codes = self.switch.codes(self.preactivations(x_BD), 0.0)
        acts = codes.relu()
        weights_F = None if self.ae.unit_norm_decoder else self.ae.decoder_rows.norm(dim=1)
        decoded_BD, l1 = codes.decode(acts, self.ae.decoder_rows, weights_F)
        x_hat_BD = self.reconstruction(decoded_BD, x_BD)
        l1 = l1 / len(x_BD)
        squares_B = row_squares(y_BD, x_hat_BD)
        mse = squares_B.mean()
        loss = mse + self.controller.penalty * self._sparsity_scale(step) * l1
        terms = {"mse_loss": mse, "sparsity_loss": l1, "l2_loss": squares_B.detach().sqrt().mean()}
        return LossOutput(loss, x_hat_BD, codes.firings(acts.detach()), terms)

    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: LossOutput) -> None:
        super().after_update(x_BD, y_BD, step, out)
        if self._sparsity_scale(step) == 1.0:
            self.controller.after_update(out.l0)

    def logged_tensors(self) -> dict[str, Tensor]:
        return super().logged_tensors() | {"l1_penalty": self.controller.penalty}

    @property
    def moves_its_loss(self) -> bool:
        return self.controller.target_l0 is not None

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"l1_penalty": self.l1_penalty, "target_l0": self.controller.target_l0}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])


class StandardTrainer(Resampling, _L1Trainer, architecture="standard"):
    """loss = mean |x - x_hat|^2 + l1_penalty * mean sum_i f_i, decoder rows of unit norm.

    Source: Bricken et al. 2023, "Towards Monosemanticity", sections "Sparse autoencoder setup" and, for
    `resample_steps`, "Neuron resampling".

    `l1_penalty` has the units of the data: it is meant for activations of unit mean squared norm
    (`normalize_activations=True`). With `target_l0` it is where the penalty begins, which then moves until that many
    latents fire. `sparsity_warmup_steps` None takes a tenth of the run, at most 2,000 steps.
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
        resample_steps: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "StandardTrainer",
        submodule_name: str | None = None,
        *,
        target_l0: float | None = None,
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
        self._set_up(l1_penalty, target_l0)
        self._resample_every(resample_steps)


class StandardTrainerAprilUpdate(_L1Trainer, architecture="standard_april_update"):
    """loss = mean |x - x_hat|^2 + l1_penalty * mean sum_i f_i |d_i|: decoder rows d_i have any norm and are penalised
    with their codes.

    Source: Conerly et al. 2024, "Update on how we train SAEs", Transformer Circuits Thread, April 2024.

    The dictionary is an `AutoEncoder` by default, which takes unit norms on when it is loaded (the same function).
    `target_l0` and `sparsity_warmup_steps` are as in `StandardTrainer`.
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
        wandb_name: str | None = "StandardTrainerAprilUpdate",
        submodule_name: str | None = None,
        *,
        target_l0: float | None = None,
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
        self.ae.unit_norm_decoder = False
        self._set_up(l1_penalty, target_l0)
