"""The gated SAE's loss: squared error, a penalty on what the gate lets through, and the gate's own reconstruction.

Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv:2404.16014),
equation 8.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictionary_learning.dictionary import Dictionary, GatedAutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.kernels.codes import Codes
from dictionary_learning.kernels.products import scratch, where_positive
from dictionary_learning.trainers.functions import row_squares
from dictionary_learning.trainers.l0_controller import L0Controller
from dictionary_learning.trainers.sparse_switch import FiresByThreshold, SparseSwitch
from dictionary_learning.trainers.trainer import LossOutput, Shared


class _Gated(torch.autograd.Function):
    """Where the gate's pre-activation is positive, ReLU(scale * it + shift). Both are broadcast against it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        acts = torch.addcmul(shift, pre, scale, out=scratch("codes", pre.shape, pre.dtype, pre.device)).relu_()
        acts.mul_(torch.gt(pre, 0, out=scratch("positive", pre.shape, pre.dtype, pre.device)))
        ctx.save_for_backward(pre, scale, acts)
        return acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        pre, scale, acts = ctx.saved_tensors
        grad = where_positive(grad, acts)
        product = torch.mul(grad, pre, out=scratch("product", pre.shape, pre.dtype, pre.device))
        d_scale, d_shift = product.sum_to_size(scale.shape), grad.sum_to_size(scale.shape)
        return grad * scale, d_scale.clone() if d_scale is product else d_scale, d_shift


class _GatedTrainer(FiresByThreshold):
    """loss = mean |y - y_hat|^2 + penalty + mean |y - y_hat of the gate|^2. The gate reconstructs through the decoder
    as it is: this term trains the gate alone."""

    ae: GatedAutoEncoder

    def _set_up(self) -> None:
        self.switch = SparseSwitch(self.device.type)

    @torch.no_grad()
    def initialize(self, x_BD: Tensor, y_BD: Tensor) -> None:
        super().initialize(x_BD, y_BD)
        if self.ae.pre_bias is None:
            self.ae.mag_bias.copy_(self.ae.gate_bias)  # which now stands for one: both paths begin alike

    @abstractmethod
    def penalty(self, gate: Tensor, l1: Tensor, codes: Codes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(the penalty, further terms) from the gate's positive pre-activations and their summed L1 norm."""

    def compute_loss(self, x_BD: Tensor, y_BD: Tensor, step: int) -> LossOutput:
        codes = self.switch.codes(self.preactivations(x_BD), 0.0)
        scale_F = self.ae.r_mag.exp()
        shift_F = self.ae.mag_bias - scale_F * self.ae.gate_bias
        acts = _Gated.apply(codes.pre, codes.per_latent(scale_F), codes.per_latent(shift_F))
        gate = torch.relu(codes.pre)
        x_hat_BD = self.reconstruction(codes.decode(acts, self.ae.decoder_rows)[0], x_BD)
        gate_BD, l1 = codes.decode(gate, self.ae.decoder_rows.detach())
        skip = 0.0 if self.ae.W_skip is None else torch.nn.functional.linear(x_BD, self.ae.W_skip.detach())
        mse = row_squares(y_BD, x_hat_BD).mean()
        aux = row_squares(y_BD, gate_BD + self.ae.decoder_bias.detach() + skip).mean()
        penalty, terms = self.penalty(gate, l1, codes, step)
        gate_l0 = codes.firings(gate.detach()).sum() / len(x_BD)
        terms = {"mse_loss": mse, "aux_loss": aux, **terms, "gate_l0": gate_l0}
        return LossOutput(mse + penalty + aux, x_hat_BD, codes.firings(acts.detach()), terms)

    def active_entries(self, out: LossOutput) -> Tensor:
        return out.terms["gate_l0"]


class GatedSAETrainer(_GatedTrainer, architecture="gated"):
    """Penalty: l1_penalty * mean sum_i ReLU(gate_i). Decoder rows keep unit norm.

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
        dict_class: type[Dictionary] = GatedAutoEncoder,
        lr: float | None = None,
        l1_penalty: float = 1e-1,
        warmup_steps: int | None = None,
        sparsity_warmup_steps: int | None = None,
        decay_start: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "GatedSAETrainer",
        submodule_name: str | None = None,
        *,
        target_l0: float | None = None,
        **shared: Unpack[Shared],
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
            **shared,
        )
        self._set_up()
        self.controller = L0Controller(target_l0, l1_penalty, self.steps, self.ae.dict_size, self.device)

    def penalty(self, gate: Tensor, l1: Tensor, codes: Codes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        l1 = l1 / codes.n_rows
        return self.controller.penalty * self._sparsity_scale(step) * l1, {"sparsity_loss": l1}

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
