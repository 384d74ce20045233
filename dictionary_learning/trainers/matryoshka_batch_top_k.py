"""The Matryoshka BatchTopK SAE's loss: every prefix of groups of latents reconstructs the input on its own.

Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv:2503.17547),
section 3. Which latents are active is decided over all of them, as in BatchTopK.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictionary_learning.dictionary import Dictionary, MatryoshkaBatchTopKSAE
from dictionary_learning.errors import UserError
from dictionary_learning.kernels.codes import SparseCodes
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import SharedTopK

__all__ = ["MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", "apply_temperature"]


class MatryoshkaBatchTopKTrainer(BatchTopKTrainer, architecture="matryoshka_batch_top_k"):
    """loss = sum over prefixes of group_weights * mean |x - x_hat of the prefix|^2, plus AuxK.

    Args:
        group_fractions: of the width, one a group, adding up to 1; the last group takes what rounding leaves.
        group_weights: of the prefixes' errors; None weighs them equally, with a sum of 1.
    """

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int | None,
        lm_name: str | None,
        group_fractions: Sequence[float],
        group_weights: Sequence[float] | None = None,
        dict_class: type[Dictionary] = MatryoshkaBatchTopKSAE,
        lr: float | None = None,
        auxk_alpha: float = 1 / 8,
        warmup_steps: int | None = None,
        decay_start: int | None = None,
        threshold_beta: float | None = None,
        threshold_start_step: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "BatchTopKSAE",
        submodule_name: str | None = None,
        **shared: Unpack[SharedTopK],
    ) -> None:
        fractions = [float(fraction) for fraction in group_fractions]
        if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0, rel_tol=1e-6):
            raise UserError(f"group_fractions must be positive and add up to 1, got {fractions}.")
        sizes = [int(fraction * dict_size) for fraction in fractions[:-1]]
        sizes.append(dict_size - sum(sizes))
        if min(sizes) < 1 <= dict_size:
            raise UserError(f"group_fractions {fractions} leave a group of {dict_size} latents without any.")
        weights = [1 / len(sizes)] * len(sizes) if group_weights is None else [float(w) for w in group_weights]
        if len(weights) != len(sizes) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise UserError(f"group_weights must be {len(sizes)} non-negative numbers, one a group, got {weights}.")
        self.group_fractions, self.group_sizes, self.group_weights = fractions, sizes, weights
        super().__init__(
            steps,
            activation_dim,
            dict_size,
            k,
            layer,
            lm_name,
            dict_class,
            lr,
            auxk_alpha,
            warmup_steps,
            decay_start,
            threshold_beta,
            threshold_start_step,
            seed,
            device,
            wandb_name,
            submodule_name,
            **shared,
        )
        groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self._group_F = groups.to(self.device)
        self._weight_G = torch.tensor(weights, device=self.device)

    def _dictionary_settings(self) -> dict[str, Any]:
        return {"group_sizes": self.group_sizes}

    def reconstruction_loss(
        self, codes: SparseCodes, values_N: Tensor, x_BD: Tensor, y_BD: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        groups = len(self.group_sizes)
        parts_BGD = codes.decode_parts(values_N, self.ae.decoder_rows, self._group_F, groups)
        base_BD = self.reconstruction(torch.zeros_like(y_BD), x_BD)
        loss, losses_G, error_BD = _PrefixLoss.apply(parts_BGD, base_BD, y_BD, self._weight_G)
        terms = {"min_l2_loss": losses_G.amin(), "max_l2_loss": losses_G.amax()}
        return y_BD + error_BD, loss, terms

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {
            "group_fractions": self.group_fractions,
            "group_weights": self.group_weights,
            "group_sizes": self.group_sizes,
        }


class _PrefixLoss(torch.autograd.Function):
    """(weighted sum of the prefixes' mean squared errors, each of them [G], error of the whole [B, D]), from what each
    group adds to the base. A group's gradient is the sum of those of the prefixes it is in; it is formed in forward,
    where the errors are at hand."""

    @staticmethod
    def forward(ctx: Any, parts_BGD: Tensor, base_BD: Tensor, y_BD: Tensor, weight_G: Tensor) -> tuple[Tensor, ...]:
        rows, groups, _ = parts_BGD.shape
        errors_BGD = torch.empty_like(parts_BGD)
        before_BD = base_BD - y_BD
        for group in range(groups):
            before_BD = torch.add(before_BD, parts_BGD[:, group], out=errors_BGD[:, group])
        losses_G = torch.linalg.vector_norm(errors_BGD, dim=(0, 2)).square_() / rows
        error_BD = errors_BGD[:, -1].clone()
        later_BD = torch.zeros_like(base_BD)
        for group in reversed(range(groups)):
            later_BD.add_(errors_BGD[:, group] * (2 / rows * weight_G[group]))
            errors_BGD[:, group] = later_BD
        ctx.save_for_backward(errors_BGD)
        ctx.mark_non_differentiable(losses_G, error_BD)
        return losses_G @ weight_G, losses_G, error_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BGD,) = ctx.saved_tensors
        d_parts = grad * gradient_BGD
        return d_parts, d_parts[:, 0], -d_parts[:, 0] if ctx.needs_input_grad[2] else None, None


def apply_temperature(probabilities: Sequence[float], temperature: float) -> list[float]:
    """Probabilities sharpened (temperature below 1) or flattened (above), adding up to 1: softmax of log p / T."""
    powers = [probability ** (1 / temperature) for probability in probabilities]
    return [power / sum(powers) for power in powers]
