"""The TopK SAE's loss: squared error, and AuxK, which lets dead latents model what the others leave over.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093), sections 2.3 and 2.4 and
appendix A.2. The encoder is the only dense product of a step: decoding and all gradients go through the k active
latents (see `kernels`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.dictionary import AutoEncoderTopK, Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.kernels import kernels_for
from dictionary_learning.trainers.trainer import LossOutput, SAETrainer

__all__ = ["AutoEncoderTopK", "TopKTrainer"]

DEAD_COUNT_INTERVAL = 16  # steps between looks at the number of dead latents


class TopKTrainer(SAETrainer, architecture="top_k"):
    """loss = mean |x - x_hat|^2 + auxk_alpha * auxk, both in units of the data's variance.

    Args:
        k: active latents an input.
        auxk_alpha: weight of AuxK.
        dead_after_tokens: tokens without firing after which a latent counts as dead; None takes a tenth of the run,
            at most the paper's 10 million.
        threshold_beta: memory of the running mean of the smallest kept activation, `ae.threshold`.
        threshold_start_step: first step that enters it; None takes half of the run, at most 1,000 steps.
    """

    ae: AutoEncoderTopK

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary] = AutoEncoderTopK,
        lr: float | None = None,
        auxk_alpha: float = 1 / 32,
        warmup_steps: int | None = None,
        decay_start: int | None = None,
        threshold_beta: float = 0.999,
        threshold_start_step: int | None = None,
        dead_after_tokens: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "AutoEncoderTopK",
        submodule_name: str | None = None,
    ) -> None:
        if not 0 <= auxk_alpha < float("inf"):
            raise UserError(f"auxk_alpha must not be negative, got {auxk_alpha!r}.")
        if not 0 <= threshold_beta < 1:
            raise UserError(f"threshold_beta must be at least 0 and below 1, got {threshold_beta!r}.")
        if dead_after_tokens is not None and dead_after_tokens < 1:
            raise UserError(f"dead_after_tokens must be positive, got {dead_after_tokens!r}.")
        super().__init__(
            steps=steps,
            activation_dim=activation_dim,
            dict_size=dict_size,
            layer=layer,
            lm_name=lm_name,
            dict_class=dict_class,
            dict_kwargs={"k": k},
            lr=lr,
            warmup_steps=warmup_steps,
            decay_start=decay_start,
            seed=seed,
            device=device,
            wandb_name=wandb_name,
            submodule_name=submodule_name,
        )
        self.k, self.auxk_alpha, self.dead_after_tokens = k, auxk_alpha, dead_after_tokens
        self.threshold_beta = threshold_beta
        self.threshold_start_step = min(1000, steps // 2) if threshold_start_step is None else threshold_start_step
        self.auxk_size = min(max(activation_dim // 2, 1), dict_size)  # the paper's k_aux, "a power of two close to d/2"
        self.kernels = kernels_for(self.device)
        self.some_dead = False
        self._dead_count: Tensor | None = None  # on its way from the device; read one interval later
        self._dead_count_arrived: torch.cuda.Event | None = None

    def compute_loss(self, x_BD: Tensor, step: int) -> LossOutput:
        encoder = (self.ae.encoder_rows, self.ae.encoder.bias, self.ae.decoder_bias)
        pre_BF = self.kernels.preactivations(x_BD, *encoder)
        top_Bk = pre_BF.detach().topk(self.k, dim=-1, sorted=False).indices
        values_Bk = torch.relu(self.kernels.select(pre_BF, top_Bk, x_BD, *encoder))
        x_hat_BD = self.kernels.decode(values_Bk, top_Bk, self.ae.decoder_rows) + self.ae.decoder_bias
        residual_BD = x_BD - x_hat_BD
        l2 = residual_BD.pow(2).sum(-1).mean()

        positive_Bk = values_Bk.detach() > 0  # a zero that topk had to take has not fired
        counts_F = x_BD.new_zeros(self.ae.dict_size).scatter_add_(0, top_Bk.flatten(), positive_Bk.flatten().to(x_BD))
        loss, terms = l2, {"l2_loss": l2}
        if self.some_dead and self.auxk_alpha:
            terms["auxk_loss"] = self._auxk(pre_BF, x_BD, residual_BD.detach(), encoder)
            loss = l2 + self.auxk_alpha * x_BD.var(dim=0, correction=0).sum() * terms["auxk_loss"]
        smallest = _mean_smallest_positive(values_Bk.detach(), positive_Bk)
        return LossOutput(
            loss, x_hat_BD, counts_F > 0, positive_Bk.sum() / len(x_BD), terms | {"smallest_active": smallest}
        )

    def _auxk(self, pre_BF: Tensor, x_BD: Tensor, residual_BD: Tensor, encoder: tuple[Tensor, ...]) -> Tensor:
        """AuxK: squared error of the residual's reconstruction from the most active dead latents, relative to the
        residual's variance; without a bias, which the residual already lacks. Fades out with the last dead latents."""
        dead_F = self._dead()
        size = self.auxk_size
        masked_BF = pre_BF.detach().masked_fill(~dead_F, float("-inf"))
        indices_Bk = masked_BF.topk(size, dim=-1, sorted=False).indices
        values_Bk = torch.relu(self.kernels.select(pre_BF, indices_Bk, x_BD, *encoder))
        values_Bk = values_Bk * dead_F[indices_Bk]  # where fewer than `size` are dead, topk had to take living ones
        error = (residual_BD - self.kernels.decode(values_Bk, indices_Bk, self.ae.decoder_rows)).pow(2).sum(-1).mean()
        variance = residual_BD.var(dim=0, correction=0).sum()
        fade = (dead_F.sum() / size).clamp(max=1.0)
        return fade * torch.where(variance > 0, error, 0.0) / torch.where(variance > 0, variance, 1.0)

    def _dead(self) -> Tensor:
        """[F] latents that have not fired for `dead_after_tokens` tokens."""
        assert self.dead_after_tokens is not None  # since the first update
        return self.tokens_since_fired_F >= self.dead_after_tokens

    @torch.no_grad()
    def after_update(self, x_BD: Tensor, step: int, out: LossOutput) -> None:
        if self.dead_after_tokens is None:
            self.dead_after_tokens = min(10_000_000, max(1, self.steps // 10) * len(x_BD))
        if step % DEAD_COUNT_INTERVAL == 0:  # reads the count of one interval ago, so that the device is not waited for
            self.some_dead = (self._read_dead_count() or 0) > 0
            self._dead_count = self._dead().sum().to("cpu", non_blocking=True)
            if self.device.type == "cuda":
                self._dead_count_arrived = torch.cuda.Event()
                self._dead_count_arrived.record()
        if step >= self.threshold_start_step:
            smallest, threshold = out.terms["smallest_active"], self.ae.threshold
            blend = self.threshold_beta * threshold + (1 - self.threshold_beta) * smallest
            measured = torch.where(threshold < 0, smallest, blend)
            threshold.copy_(torch.where(smallest.isnan(), threshold, measured))

    def _read_dead_count(self) -> int | None:
        if self._dead_count_arrived is not None:
            self._dead_count_arrived.synchronize()
        return None if self._dead_count is None else int(self._dead_count)

    def logged_tensors(self) -> dict[str, Tensor]:
        return {"dead_latents": self._dead().sum()} if self.dead_after_tokens else {}

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {
            "k": self.k,
            "auxk_alpha": self.auxk_alpha,
            "dead_after_tokens": self.dead_after_tokens,
            "threshold_beta": self.threshold_beta,
            "threshold_start_step": self.threshold_start_step,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "dead_after_tokens": self.dead_after_tokens,
            "some_dead": self.some_dead,
            "dead_count": self._read_dead_count(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.dead_after_tokens, self.some_dead = state["dead_after_tokens"], state["some_dead"]
        self._dead_count = None if state["dead_count"] is None else torch.tensor(state["dead_count"])
        self._dead_count_arrived = None


def _mean_smallest_positive(values_Bk: Tensor, positive_Bk: Tensor) -> Tensor:
    """Mean over rows of the smallest positive value; rows without one don't count; NaN when no row has one."""
    smallest_B = values_Bk.masked_fill(~positive_Bk, float("inf")).amin(dim=-1)
    return torch.where(smallest_B.isinf(), torch.nan, smallest_B).nanmean()
