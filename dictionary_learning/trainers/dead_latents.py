"""Dead latents: counting them without waiting for the device, and AuxK, which lets them model what the others leave.

Source of AuxK: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093), appendix A.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.kernels.codes import Preactivations
from dictionary_learning.kernels.select import places
from dictionary_learning.streams import OnHost

if TYPE_CHECKING:
    from dictionary_learning.trainers.trainer import SAETrainer

COUNT_INTERVAL = 16  # steps between looks at a number on the device


class Delayed:
    """A number on its way from the device: sent at one look, read at the next, so that nothing waits for it."""

    def __init__(self) -> None:
        self._sent: OnHost | None = None

    def send(self, number: Tensor) -> None:
        self._sent = OnHost(number)

    def read(self) -> float | None:
        """The number sent last, None before the first."""
        return None if self._sent is None else float(self._sent.get())

    def restore(self, number: float | None) -> None:
        self._sent = None if number is None else OnHost(torch.tensor(number))


class AuxK:
    """The squared error of the residual's reconstruction from the most active dead latents.

    Args:
        alpha: weight in the loss, relative to the data's variance; 0 switches it off.
        size: dead latents that an input may use (the paper's k_aux).
        dead_after_tokens: tokens without firing after which a latent counts as dead; None takes a thirtieth of the run,
            at least ten steps, at most the paper's 10 million tokens.
    """

    def __init__(self, trainer: SAETrainer, alpha: float, size: int, dead_after_tokens: int | None) -> None:
        if not 0 <= alpha < float("inf"):
            raise UserError(f"auxk_alpha must not be negative, got {alpha!r}.")
        if dead_after_tokens is not None and dead_after_tokens < 1:
            raise UserError(f"dead_after_tokens must be positive, got {dead_after_tokens!r}.")
        self.trainer, self.alpha, self.size = trainer, alpha, min(size, trainer.ae.dict_size)
        self.dead_after_tokens = dead_after_tokens
        self.some_dead = False
        # Dead latents that a step on CUDA provides for: asking how many there are would wait for the device.
        self.room = 1 if trainer.device.type == "cuda" else None
        self._count = Delayed()

    def dead(self) -> Tensor:
        """[F] latents that have not fired for `dead_after_tokens` tokens."""
        assert self.dead_after_tokens is not None  # since the first update
        return self.trainer.tokens_since_fired_F >= self.dead_after_tokens

    def add_to(
        self, loss: Tensor, terms: dict[str, Tensor], pre: Preactivations, y_BD: Tensor, residual_BD: Tensor
    ) -> Tensor:
        """The loss with AuxK where there are dead latents; enters it into `terms`."""
        if not (self.some_dead and self.alpha):
            return loss
        terms["auxk_loss"] = self._loss(pre, residual_BD.detach())
        return loss + self.alpha * y_BD.var(dim=0, correction=0).sum() * terms["auxk_loss"]

    def _loss(self, pre: Preactivations, residual_BD: Tensor) -> Tensor:
        """Relative to the residual's variance; without a bias, which the residual already lacks. Fades out with the
        last dead latents."""
        dead_F = self.dead()
        x_hat_BD = self._explained(pre, dead_F)
        error = (residual_BD - x_hat_BD).pow(2).sum(-1).mean()
        variance = residual_BD.var(dim=0, correction=0).sum()
        fade = (dead_F.sum() / self.size).clamp(max=1.0)
        return fade * torch.where(variance > 0, error, 0.0) / torch.where(variance > 0, variance, 1.0)

    def _explained(self, pre: Preactivations, dead_F: Tensor) -> Tensor:
        """[B, D] through the dead latents' own rows of weights, dense: they are few, and many inputs use each."""
        dead_N, real_N = places(dead_F, self.room)
        W_FD, bias_F, pre_bias_D = pre.encoder
        x_BD = pre.x_BD if pre_bias_D is None else pre.x_BD - pre_bias_D
        bias_N = None if bias_F is None else bias_F.index_select(0, dead_N)
        acts_BN = torch.relu(torch.nn.functional.linear(x_BD, W_FD.index_select(0, dead_N), bias_N))
        if real_N is not None:
            acts_BN = acts_BN * real_N
        if len(dead_N) > self.size:
            top_Bk = acts_BN.detach().topk(self.size, dim=-1, sorted=False).indices
            acts_BN = acts_BN * torch.zeros_like(acts_BN).scatter_(1, top_Bk, 1.0)
        return acts_BN @ self.trainer.ae.decoder_rows.index_select(0, dead_N)

    def after_update(self, step: int, rows: int) -> None:
        if self.dead_after_tokens is None:
            self.dead_after_tokens = min(10_000_000, max(10, self.trainer.steps // 30) * rows)
        if step % COUNT_INTERVAL == 0:
            number = int(self._count.read() or 0)
            self.some_dead = number > 0
            if self.room is not None:
                self.room = max(1, min(2 * number, self.trainer.ae.dict_size))
            self._count.send(self.dead().sum())

    def logged_tensors(self) -> dict[str, Tensor]:
        return {"dead_latents": self.dead().sum()} if self.dead_after_tokens else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "dead_after_tokens": self.dead_after_tokens,
            "some_dead": self.some_dead,
            "room": self.room,
            "dead_count": self._count.read(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dead_after_tokens, self.some_dead = state["dead_after_tokens"], state["some_dead"]
        if self.room is not None:  # in states of CUDA only
            self.room = state.get("room") or self.trainer.ae.dict_size
        self._count.restore(state["dead_count"])
