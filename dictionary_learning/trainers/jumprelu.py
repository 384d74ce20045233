"""The JumpReLU SAE's loss: squared error plus a penalty on L0, with straight-through gradients to the thresholds.

Source: Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders"
(arXiv:2407.14435), equations 9 to 12. The derivative of the step is taken as a rectangle of width `bandwidth` around
the threshold, and looks at pre-activations: seen through the codes, its lower half would be lost.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictionary_learning.dictionary import Dictionary, JumpReluAutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.kernels.products import scratch, where_positive
from dictionary_learning.kernels.select import places
from dictionary_learning.trainers.functions import row_squares
from dictionary_learning.trainers.sparse_switch import FiresByThreshold, SparseSwitch
from dictionary_learning.trainers.trainer import LossOutput, Shared

SMALLEST_THRESHOLD = 1e-6  # relative to the norm of the activations; a threshold must stay positive


class JumpReLUFunction(torch.autograd.Function):
    """(f, L0) with f = z where z > threshold and 0 elsewhere, and L0 the number of active entries (a scalar).

    Gradients to the threshold: of f -threshold / bandwidth inside the window, of L0 -1 / bandwidth. Takes all codes or
    any entries of them: `threshold` is broadcast against z.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        # As numbers, into memory for all steps: a dense step's passes over [B, F] are what it costs beside its products
        active = torch.gt(x, threshold, out=scratch("positive", x.shape, x.dtype, x.device))
        acts = torch.mul(x, active, out=scratch("codes", x.shape, x.dtype, x.device))
        ctx.save_for_backward(x, threshold, acts)
        ctx.bandwidth = bandwidth
        return acts, active.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_l0: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold, acts = ctx.saved_tensors
        window = in_window(x, threshold, ctx.bandwidth)
        through = (
            window * (grad * threshold + grad_l0) if x.ndim == 1 else _window_sum(window, grad, threshold, grad_l0)
        )
        return where_positive(grad, acts), -through / ctx.bandwidth, None


def in_window(x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Where the rectangle kernel of the straight-through estimator is 1: |z - threshold| < bandwidth / 2."""
    distance = torch.sub(x, threshold, out=scratch("distance", x.shape, x.dtype, x.device)).abs_()
    return distance < bandwidth / 2


def _window_sum(window_BF: Tensor, grad_BF: Tensor, threshold_F: Tensor, grad_l0: Tensor) -> Tensor:
    """[F] sum over the batch of the window's (grad * threshold + grad_l0); on CPU of its few entries only."""
    if window_BF.device.type != "cpu":
        return threshold_F * (grad_BF * window_BF).sum(0) + grad_l0 * window_BF.sum(0)
    flat_N, _ = places(window_BF, None)
    latents_N = flat_N % len(threshold_F)
    through_N = grad_BF.reshape(-1)[flat_N] * threshold_F[latents_N] + grad_l0
    return torch.zeros_like(threshold_F).index_add_(0, latents_N, through_N)


class JumpReluTrainer(FiresByThreshold, architecture="jump_relu"):
    """loss = mean |x - x_hat|^2 + penalty, with L0 the mean number of active latents:

    - `target_l0` given: penalty = sparsity_penalty * (L0 / target_l0 - 1)^2, which settles at that L0;
    - `target_l0=None`: penalty = sparsity_penalty * L0, the paper's equation 9.

    `bandwidth`, the first threshold and `sparsity_penalty` are relative to the norm of the activations (for
    activations of unit mean squared norm they are the paper's). `sparsity_warmup_steps` None takes a tenth of the
    run, at most 2,000 steps.
    """

    ae: JumpReluAutoEncoder

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
        **shared: Unpack[Shared],
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
            **shared,
        )
        self.switch = SparseSwitch(self.device.type)
        if target_l0 is not None and not 0 < target_l0 <= dict_size:
            raise UserError(f"target_l0 must be positive and at most the width {dict_size}, got {target_l0!r}.")

    @torch.no_grad()
    def initialize(self, x_BD: Tensor, y_BD: Tensor) -> None:
        super().initialize(x_BD, y_BD)
        self.ae.threshold.mul_(self.input_scale)

    def compute_loss(self, x_BD: Tensor, y_BD: Tensor, step: int) -> LossOutput:
        bandwidth = self.bandwidth * self.input_scale
        threshold_F = self.ae.threshold
        codes = self.switch.codes(self.preactivations(x_BD), threshold_F.detach() - bandwidth / 2)
        acts, active = JumpReLUFunction.apply(codes.pre, codes.per_latent(threshold_F), bandwidth)
        l0 = active / len(x_BD)
        x_hat_BD = self.reconstruction(codes.decode(acts, self.ae.decoder_rows)[0], x_BD)
        l2 = row_squares(y_BD, x_hat_BD).mean()
        sparsity = l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).pow(2)
        weight = self.sparsity_penalty * self.input_scale**2 * self._sparsity_scale(step)
        terms = {"l2_loss": l2, "sparsity_loss": sparsity}
        return LossOutput(l2 + weight * sparsity, x_hat_BD, codes.firings(acts.detach()), terms)

    @torch.no_grad()
    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: LossOutput) -> None:
        self.ae.threshold.clamp_min_(SMALLEST_THRESHOLD * self.input_scale)
        super().after_update(x_BD, y_BD, step, out)

    def logged_tensors(self) -> dict[str, Tensor]:
        return {"mean_threshold": self.ae.threshold.mean()}

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {
            "bandwidth": self.bandwidth,
            "sparsity_penalty": self.sparsity_penalty,
            "target_l0": self.target_l0,
        }
