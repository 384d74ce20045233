"""The TopK SAE's loss: squared error, and AuxK, which lets dead latents model what the others leave over.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093), sections 2.3 and 2.4 and
appendix A.2. The encoder is the only dense product of a step: decoding and all gradients go through the k active
latents (see `kernels.codes`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Unpack

import torch
from torch import Tensor

from dictionary_learning.dictionaries.top_k import _ByK
from dictionary_learning.dictionary import AutoEncoderGroupMax, AutoEncoderTopK, Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.kernels.codes import Preactivations, SparseCodes
from dictionary_learning.trainers.dead_latents import AuxK
from dictionary_learning.trainers.functions import geometric_median, row_squares
from dictionary_learning.trainers.trainer import LossOutput, SAETrainer, Shared

__all__ = ["AutoEncoderTopK", "GroupMaxTrainer", "TopKTrainer", "geometric_median"]


class SharedTopK(Shared, total=False):
    """Settings of every trainer that fires a number of latents, see `_ByKTrainer`."""

    dead_after_tokens: int | None
    k_anneal_steps: int | None


class _ByKTrainer(SAETrainer):
    """loss = mean |y - y_hat|^2 + auxk_alpha * auxk, both in units of the data's variance.

    Args:
        auxk_alpha: weight of AuxK.
        threshold_beta: memory of the running mean of the smallest kept activation, `ae.threshold`.
        threshold_start_step: first step that enters it; None takes half of the run, at most 1,000 steps.
        dead_after_tokens: tokens without firing after which a latent counts as dead; None takes a thirtieth of the
            run, at least ten steps, at most the paper's 10 million tokens.
        k_anneal_steps: over so many steps k falls linearly from activation_dim (at most the width) to what was asked
            for; None begins there.
    """

    ae: _ByK
    threshold_beta: float

    def _set_up(
        self,
        auxk_alpha: float,
        threshold_beta: float,
        threshold_start_step: int | None,
        dead_after_tokens: int | None,
        k_anneal_steps: int | None,
    ) -> None:
        if k_anneal_steps is not None and (not isinstance(k_anneal_steps, int) or not 0 < k_anneal_steps < self.steps):
            raise UserError(
                f"k_anneal_steps must be positive and below the {self.steps} steps of the run, got {k_anneal_steps!r}."
            )
        self.k_anneal_steps = k_anneal_steps
        if not 0 <= threshold_beta < 1:
            raise UserError(f"threshold_beta must be at least 0 and below 1, got {threshold_beta!r}.")
        self.k, self.auxk_alpha = int(self.ae.k), auxk_alpha
        self.top_k_aux = min(max(1, self.ae.output_dim // 2), self.ae.dict_size)  # Gao et al., appendix A.2
        self.auxk = AuxK(self, auxk_alpha, self.top_k_aux, dead_after_tokens)
        self.threshold_beta = threshold_beta
        self.threshold_start_step = min(1000, self.steps // 2) if threshold_start_step is None else threshold_start_step

    def k_at(self, step: int) -> int:
        """k in a step."""
        first = min(self.ae.activation_dim, self.ae.dict_size)
        if self.k_anneal_steps is None or step >= self.k_anneal_steps or first <= self.k:
            return self.k
        return self.k + round((first - self.k) * (1 - step / self.k_anneal_steps))

    @abstractmethod
    def select(self, pre: Preactivations, k: int) -> SparseCodes:
        """The codes that are active in a batch, k an input."""

    @abstractmethod
    def smallest_active(self, values_N: Tensor, positive_N: Tensor, codes: SparseCodes) -> Tensor:
        """What the threshold follows: of the active values (those that are positive), the smallest; NaN without any."""

    def reconstruction_loss(
        self, codes: SparseCodes, values_N: Tensor, x_BD: Tensor, y_BD: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(x_hat [B, D_out], its squared error, further terms)."""
        x_hat_BD = self.reconstruction(codes.decode(values_N, self.ae.decoder_rows)[0], x_BD)
        return x_hat_BD, row_squares(y_BD, x_hat_BD).mean(), {}

    def compute_loss(self, x_BD: Tensor, y_BD: Tensor, step: int) -> LossOutput:
        pre = self.preactivations(x_BD)
        codes = self.select(pre, self.k_at(step))
        values_N = codes.relu()
        x_hat_BD, l2, terms = self.reconstruction_loss(codes, values_N, x_BD, y_BD)
        terms = {"l2_loss": l2, **terms}
        loss = self.auxk.add_to(l2, terms, pre, y_BD, y_BD - x_hat_BD.detach())
        values_N = values_N.detach()
        positive_N = values_N > 0  # a zero that had to be taken has not fired
        terms["smallest_active"] = self.smallest_active(values_N, positive_N, codes)
        return LossOutput(loss, x_hat_BD, codes.firings(values_N), terms)

    @torch.no_grad()
    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: LossOutput) -> None:
        self.auxk.after_update(step, len(x_BD))
        if self.ae.measures_threshold and step >= max(self.threshold_start_step, self.k_anneal_steps or 0):
            smallest, threshold = out.terms["smallest_active"], self.ae.threshold
            blend = self.threshold_beta * threshold + (1 - self.threshold_beta) * smallest
            measured = torch.where(threshold < 0, smallest, blend)
            threshold.copy_(torch.where(smallest.isnan(), threshold, measured))

    @property
    def dead_feature_threshold(self) -> int | None:
        """Tokens without firing after which a latent counts as dead; None before the first step."""
        return self.auxk.dead_after_tokens

    def logged_tensors(self) -> dict[str, Tensor]:
        return self.auxk.logged_tensors()

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {
            "k": self.k,
            "auxk_alpha": self.auxk_alpha,
            "top_k_aux": self.top_k_aux,
            "dead_after_tokens": self.auxk.dead_after_tokens,
            "threshold_beta": self.threshold_beta,
            "threshold_start_step": self.threshold_start_step,
            "k_anneal_steps": self.k_anneal_steps,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"auxk": self.auxk.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.auxk.load_state_dict(state["auxk"])


class TopKTrainer(_ByKTrainer, architecture="top_k"):
    """The k largest pre-activations of each input are active. For the other settings see `_ByKTrainer`."""

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
        auxk_alpha: float = 1 / 8,
        warmup_steps: int | None = None,
        decay_start: int | None = None,
        threshold_beta: float = 0.999,
        threshold_start_step: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "AutoEncoderTopK",
        submodule_name: str | None = None,
        *,
        dead_after_tokens: int | None = None,
        k_anneal_steps: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            steps=steps,
            activation_dim=activation_dim,
            dict_size=dict_size,
            layer=layer,
            lm_name=lm_name,
            dict_class=dict_class,
            dict_kwargs={"k": k, **self._dictionary_settings()},
            lr=lr,
            warmup_steps=warmup_steps,
            decay_start=decay_start,
            seed=seed,
            device=device,
            wandb_name=wandb_name,
            submodule_name=submodule_name,
            **shared,
        )
        self._set_up(auxk_alpha, threshold_beta, threshold_start_step, dead_after_tokens, k_anneal_steps)

    def _dictionary_settings(self) -> dict[str, Any]:
        """What `dict_class` takes besides its sizes and k."""
        return {}

    def select(self, pre: Preactivations, k: int) -> SparseCodes:
        return pre.top_k(k)

    def smallest_active(self, values_N: Tensor, positive_N: Tensor, codes: SparseCodes) -> Tensor:
        """Mean over rows of the smallest positive value; rows without one don't count."""
        smallest_B = values_N.masked_fill(~positive_N, torch.inf).view(codes.n_rows, -1).amin(dim=-1)
        return torch.where(smallest_B.isinf(), torch.nan, smallest_B).nanmean()


class GroupMaxTrainer(TopKTrainer, architecture="group_max"):
    """The latents are k groups of neighbours; the largest of each group is active."""

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary] = AutoEncoderGroupMax,
        wandb_name: str | None = "AutoEncoderGroupMax",
        **settings: Any,
    ) -> None:
        if settings.get("k_anneal_steps") is not None:
            raise UserError("k of a group-max dictionary is its number of groups and can't be annealed.")
        super().__init__(
            steps, activation_dim, dict_size, k, layer, lm_name, dict_class, wandb_name=wandb_name, **settings
        )

    def select(self, pre: Preactivations, k: int) -> SparseCodes:
        return pre.group_max(k)
