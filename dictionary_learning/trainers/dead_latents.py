"""Dead latents: counting them without waiting for the device, and AuxK, which lets them model what the others leave.

Source of AuxK: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093), appendix A.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.kernels.codes import Preactivations

if TYPE_CHECKING:
    from dictionary_learning.trainers.trainer import SAETrainer

COUNT_INTERVAL = 16  # steps between looks at a number on the device


class Delayed:
    """A number on its way from the device: sent at one look, read at the next, so that nothing waits for it."""

    def __init__(self) -> None:
        self._sent: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def send(self, number: Tensor) -> None:
        self._sent = number.to("cpu", non_blocking=number.device.type == "cuda")  # MPS has no event here to wait for
        if number.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> float | None:
        """The number sent last, None before the first."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return None if self._sent is None else float(self._sent)

    def restore(self, number: float | None) -> None:
        self._sent, self._arrived = None if number is None else torch.tensor(number), None


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
        x_hat_BD = (self._by_columns if residual_BD.device.type == "cpu" else self._by_entries)(pre, dead_F)
        error = (residual_BD - x_hat_BD).pow(2).sum(-1).mean()
        variance = residual_BD.var(dim=0, correction=0).sum()
        fade = (dead_F.sum() / self.size).clamp(max=1.0)
        return fade * torch.where(variance > 0, error, 0.0) / torch.where(variance > 0, variance, 1.0)

    def _by_columns(self, pre: Preactivations, dead_F: Tensor) -> Tensor:
        """[B, D] through the dead latents' own rows of weights, dense: they are few, and many inputs use each."""
        dead_N = dead_F.nonzero()[:, 0]
        W_FD, bias_F, pre_bias_D = pre.encoder
        x_BD = pre.x_BD if pre_bias_D is None else pre.x_BD - pre_bias_D
        acts_BN = torch.relu(torch.nn.functional.linear(x_BD, W_FD[dead_N], None if bias_F is None else bias_F[dead_N]))
        if len(dead_N) > self.size:
            top_Bk = acts_BN.detach().topk(self.size, dim=-1, sorted=False).indices
            acts_BN = acts_BN * torch.zeros_like(acts_BN).scatter_(1, top_Bk, 1.0)
        return acts_BN @ self.trainer.ae.decoder_rows[dead_N]

    def _by_entries(self, pre: Preactivations, dead_F: Tensor) -> Tensor:
        """The same without knowing how many are dead, which would wait for the device."""
        codes = pre.top_k(self.size, among_F=dead_F)
        values_N = torch.relu(codes.pre) * dead_F[codes.entries.latents_N]  # topk may have had to take living ones
        return codes.decode(values_N, self.trainer.ae.decoder_rows)[0]

    def after_update(self, step: int, rows: int) -> None:
        if self.dead_after_tokens is None:
            self.dead_after_tokens = min(10_000_000, max(10, self.trainer.steps // 30) * rows)
        if step % COUNT_INTERVAL == 0:
            self.some_dead = (self._count.read() or 0) > 0
            self._count.send(self.dead().sum())

    def logged_tensors(self) -> dict[str, Tensor]:
        return {"dead_latents": self.dead().sum()} if self.dead_after_tokens else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "dead_after_tokens": self.dead_after_tokens,
            "some_dead": self.some_dead,
            "dead_count": self._count.read(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dead_after_tokens, self.some_dead = state["dead_after_tokens"], state["some_dead"]
        self._count.restore(state["dead_count"])
