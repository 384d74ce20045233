"""The JumpReLU SAE's loss: squared error plus a penalty on L0, with straight-through gradients to the thresholds.

Source: Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders"
(arXiv:2407.14435), equations 9 to 12. The derivative of the step is taken as a rectangle of width `bandwidth` around
the threshold, and looks at pre-activations: seen through the codes, its lower half would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictionary_learning.dictionary import Dictionary, JumpReluAutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.trainers.trainer import LossOutput, SAETrainer

SMALLEST_THRESHOLD = 1e-6  # relative to the norm of the activations; a threshold must stay positive


class JumpReLU(torch.autograd.Function):
    """f = z where z > threshold, else 0. Gradient to the threshold: -threshold / bandwidth inside the window."""

    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return pre_BF * (pre_BF > threshold_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor | None, ...]:
        pre_BF, threshold_F = ctx.saved_tensors
        d_pre = grad_BF * (pre_BF > threshold_F)
        d_threshold = -(threshold_F / ctx.bandwidth) * (grad_BF * in_window(pre_BF, threshold_F, ctx.bandwidth)).sum(0)
        return d_pre, d_threshold, None


class Step(torch.autograd.Function):
    """1 where z > threshold, else 0. Gradient to the threshold: -1 / bandwidth inside the window; none to z."""

    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return (pre_BF > threshold_F).to(pre_BF.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor | None, ...]:
        pre_BF, threshold_F = ctx.saved_tensors
        d_threshold = -(grad_BF * in_window(pre_BF, threshold_F, ctx.bandwidth)).sum(0) / ctx.bandwidth
        return None, d_threshold, None


def in_window(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """Where the rectangle kernel of the straight-through estimator is 1: |z - threshold| < bandwidth / 2."""
    return (pre_BF - threshold_F).abs() < bandwidth / 2


class JumpReluTrainer(SAETrainer, architecture="jump_relu"):
    """loss = mean |x - x_hat|^2 + penalty, with L0 the mean number of active latents:

    - `target_l0` given: penalty = sparsity_penalty * (L0 / target_l0 - 1)^2, which settles at that L0;
    - `target_l0=None`: penalty = sparsity_penalty * L0, the paper's equation 9.

    `bandwidth`, the first threshold and `sparsity_penalty` are relative to the norm of the activations (for
    activations of unit mean squared norm they are the paper's). `sparsity_warmup_steps` None takes a tenth of the
    run, at most 2,000 steps.
    """

    ae: JumpReluAutoEncoder

    learning_rate_factor = 0.6  # at TopK's rate a third of the latents dies, for the same explained variance

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary] = JumpReluAutoEncoder,
        seed: int | None = None,
        lr: float | None = None,
        bandwidth: float = 0.001,
        sparsity_penalty: float = 1.0,
        warmup_steps: int | None = None,
        sparsity_warmup_steps: int | None = None,
        decay_start: int | None = None,
        target_l0: float | None = 20.0,
        device: torch.device | str | None = None,
        wandb_name: str | None = "JumpRelu",
        submodule_name: str | None = None,
    ) -> None:
        if not 0 < bandwidth < float("inf"):
            raise UserError(f"bandwidth must be positive, got {bandwidth!r}.")
        if not 0 <= sparsity_penalty < float("inf"):
            raise UserError(f"sparsity_penalty must not be negative, got {sparsity_penalty!r}.")
        self.bandwidth, self.sparsity_penalty, self.target_l0 = bandwidth, sparsity_penalty, target_l0
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
        if target_l0 is not None and not 0 < target_l0 <= dict_size:
            raise UserError(f"target_l0 must be positive and at most the width {dict_size}, got {target_l0!r}.")

    @torch.no_grad()
    def initialize(self, x_BD: Tensor) -> None:
        super().initialize(x_BD)
        self.ae.threshold.mul_(self.input_scale)
        # Without a pre-bias the encoder starts where one would put it: at the deviation from the median.
        self.ae.b_enc.copy_(-(self.ae.encoder_rows @ self.ae.b_dec))

    def compute_loss(self, x_BD: Tensor, step: int) -> LossOutput:
        bandwidth = self.bandwidth * self.input_scale
        pre_BF = self.ae.preactivations(x_BD)
        acts_BF = JumpReLU.apply(pre_BF, self.ae.threshold, bandwidth)
        x_hat_BD = self.ae.decode(acts_BF)
        l2 = (x_BD - x_hat_BD).pow(2).sum(-1).mean()
        l0 = Step.apply(pre_BF, self.ae.threshold, bandwidth).sum(-1).mean()
        sparsity = l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).pow(2)
        weight = self.sparsity_penalty * self.input_scale**2 * self._sparsity_scale(step)
        fired_F = (acts_BF.detach() > 0).any(0)
        return LossOutput(l2 + weight * sparsity, x_hat_BD, fired_F, l0, {"l2_loss": l2, "sparsity_loss": sparsity})

    @torch.no_grad()
    def after_update(self, x_BD: Tensor, step: int, out: LossOutput) -> None:
        self.ae.threshold.clamp_min_(SMALLEST_THRESHOLD * self.input_scale)

    def logged_tensors(self) -> dict[str, Tensor]:
        return {"mean_threshold": self.ae.threshold.mean()}

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {
            "bandwidth": self.bandwidth,
            "sparsity_penalty": self.sparsity_penalty,
            "target_l0": self.target_l0,
        }
