"""p-annealing: an Lp penalty whose p falls during training, from the convex L1 towards L0.

Source: Karvonen et al. 2024, "Measuring progress in dictionary learning for language model interpretability with board
game models" (arXiv:2408.00113), section 3.2 and appendix. Whenever p steps down, the coefficient is multiplied by the
ratio of the old to the new penalty over the last steps, so that the pressure stays.
"""

from __future__ import annotations

import bisect
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.kernels.codes import Codes
from dictionary_learning.trainers.trainer import SAETrainer

SparsityFunction = Literal["Lp", "Lp^p"]
SMALLEST_P = 0.1  # of "Lp": below, the norm of a hundred active latents, 100^(1/p), nears what a float can hold


class Annealing(SAETrainer):
    """Mixed in before a trainer's own class.

    Args:
        sparsity_function: "Lp^p", mean over inputs of sum_i f_i^p; or "Lp", mean of (sum_i f_i^p)^(1/p).
        initial_sparsity_penalty: coefficient of the penalty at p_start.
        anneal_start, anneal_end: steps of the first and the last change of p; None: half and nine tenths of the
            run.
        p_start, p_end: p falls between them, linearly. "Lp" stops at 0.1, since it has no value at 0.
        n_sparsity_updates: number of changes (at most one a step), or "continuous": at every step in between.
        sparsity_queue_length: steps that enter the ratio of old to new penalty.
    """

    def _anneal(
        self,
        sparsity_function: SparsityFunction,
        initial_sparsity_penalty: float,
        anneal_start: int | None,
        anneal_end: int | None,
        p_start: float,
        p_end: float,
        n_sparsity_updates: int | Literal["continuous"],
        sparsity_queue_length: int,
    ) -> None:
        start = self.steps // 2 if anneal_start is None else anneal_start
        end = max(start + 1, self.steps * 9 // 10) if anneal_end is None else anneal_end
        if sparsity_function not in get_args(SparsityFunction):
            raise UserError(f"sparsity_function must be 'Lp' or 'Lp^p', got {sparsity_function!r}.")
        if not 0 <= initial_sparsity_penalty < float("inf"):
            raise UserError(f"initial_sparsity_penalty must not be negative, got {initial_sparsity_penalty!r}.")
        if not 0 <= start < end <= self.steps:
            raise UserError(
                f"p is annealed from step {start} to step {end}, which is not within the run's {self.steps} steps: "
                "set anneal_start and anneal_end."
            )
        if not 0 <= p_end <= p_start <= 2:
            raise UserError(f"p must fall from p_start to p_end within 2 and 0, got {p_start!r} and {p_end!r}.")
        span = end - start + 1
        wanted = span if n_sparsity_updates == "continuous" else n_sparsity_updates
        if not isinstance(wanted, int) or wanted < 1 or sparsity_queue_length < 1:
            raise UserError(
                f"n_sparsity_updates must be positive or 'continuous', and sparsity_queue_length positive, got "
                f"{n_sparsity_updates!r} and {sparsity_queue_length!r}."
            )
        number = min(wanted, span)
        self.sparsity_function, self.initial_sparsity_penalty = sparsity_function, initial_sparsity_penalty
        self.anneal_start, self.anneal_end, self.p_start, self.p_end = start, end, p_start, p_end
        self.n_sparsity_updates, self.sparsity_queue_length = number, sparsity_queue_length
        self.sparsity_update_steps: list[int] = torch.linspace(start, end, number).long().tolist()
        floor = SMALLEST_P if sparsity_function == "Lp" else 0.0
        self.p_values: list[float] = torch.linspace(p_start, p_end, number).clamp(min=floor).tolist()
        self._coefficient = torch.tensor(float(initial_sparsity_penalty), device=self.device)
        self._queue_L2 = torch.full((sparsity_queue_length, 2), torch.nan, device=self.device)

    def p_step_count(self, step: int) -> int:
        """How often p has been set before a step."""
        return bisect.bisect_left(self.sparsity_update_steps, step)

    def p(self, step: int) -> float:
        """p in a step."""
        done = self.p_step_count(step)
        return self.p_values[done - 1] if done else self.p_start

    def next_p(self, step: int) -> float | None:
        """What p will be set to next; None before annealing has begun."""
        done = self.p_step_count(step)
        return self.p_values[min(done, len(self.p_values) - 1)] if done else None

    def lp_norm(self, f: Tensor, p: float, codes: Codes | None = None) -> Tensor:
        """The penalty of non-negative codes f [B, F] (or as `codes` holds them) without its coefficient."""
        active = f > 0
        # f^p only where f > 0: elsewhere it would be 1 at p = 0, and have an infinite slope below p = 1
        powers = f if p == 1 else torch.where(active, torch.where(active, f, 1.0).pow(p), 0.0)
        sums_B = powers.sum(-1) if codes is None else codes.row_sums(powers)
        if self.sparsity_function == "Lp^p":
            return sums_B.mean()
        return torch.where(sums_B > 0, torch.where(sums_B > 0, sums_B, 1.0).pow(1 / p), 0.0).mean()

    def lp_penalty(self, f: Tensor, codes: Codes, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(the penalty, further terms)."""
        lp = self.lp_norm(f, self.p(step), codes)
        scaled = lp * self._coefficient * self._sparsity_scale(step)
        terms = {"lp_loss": lp, "scaled_lp_loss": scaled}
        if (next_p := self.next_p(step)) is not None:
            with torch.no_grad():
                terms["next_lp_loss"] = self.lp_norm(f.detach(), next_p, codes)
        return scaled, terms

    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: Any) -> None:
        super().after_update(x_BD, y_BD, step, out)
        if "next_lp_loss" in out.terms:
            self._queue_L2 = self._queue_L2.roll(-1, 0)
            self._queue_L2[-1, 0], self._queue_L2[-1, 1] = out.terms["lp_loss"], out.terms["next_lp_loss"]
            if self.p_step_count(step + 1) > self.p_step_count(step):
                old, new = self._queue_L2.nanmean(0)
                self._coefficient = torch.where(new > 0, self._coefficient * old / new, self._coefficient)

    def logged_tensors(self) -> dict[str, Tensor]:
        return super().logged_tensors() | {"sparsity_coeff": self._coefficient}

    @property
    def moves_its_loss(self) -> bool:
        return True

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {
            "sparsity_function": self.sparsity_function,
            "initial_sparsity_penalty": self.initial_sparsity_penalty,
            "sparsity_penalty": float(self._coefficient),
            "anneal_start": self.anneal_start,
            "anneal_end": self.anneal_end,
            "p_start": self.p_start,
            "p_end": self.p_end,
            "n_sparsity_updates": self.n_sparsity_updates,
            "sparsity_queue_length": self.sparsity_queue_length,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sparsity_coefficient": self._coefficient, "sparsity_queue": self._queue_L2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._coefficient = state["sparsity_coefficient"].to(self.device)
        self._queue_L2 = state["sparsity_queue"].to(self.device)
