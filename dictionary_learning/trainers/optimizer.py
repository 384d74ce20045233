"""Adam for a dictionary: weights by rows, gradients in the data's units, clipping, decoder rows of unit norm.

The drop-in helpers of the `dictionary-learning` package for the same things stand at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.kernels import fused_adam_for
from dictionary_learning.kernels.products import scratch
from dictionary_learning.trainers.health import Health

ROWS_AT_ONCE = 512


class DictionaryOptimizer:
    """One optimiser step after a backward pass, on the device throughout.

    `adam` holds weights by their contiguous rows, also where the parameter is the transpose: fused Adam copies other
    layouts, and silently mixes up elements once a file gives its moments back in another layout.
    """

    def __init__(self, ae: Dictionary, lr: float) -> None:
        self.ae = ae
        self.leaves = self._parameters_by_rows()
        rows_FD = ae.decoder_rows
        decoder = [leaf for leaf in self.leaves.values() if leaf.data_ptr() == rows_FD.data_ptr()]
        if len(decoder) != 1 or not rows_FD.is_contiguous():
            raise TypeError(f"{type(ae).__name__}.decoder_rows is not a contiguous view of a parameter")
        self._decoder_FD = decoder[0]
        units = set(ae.scaled_with_data)
        groups = [
            {
                "params": [leaf for name, leaf in self.leaves.items() if (name in units) == in_units],
                "in_units": in_units,
            }
            for in_units in (False, True)
        ]
        self.adam = torch.optim.Adam(groups, lr=lr, fused=rows_FD.device.type in ("cpu", "cuda"))
        self.health = Health(rows_FD.device)

    def zero_grad(self) -> None:
        self.ae.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)  # its leaves hold the same gradients

    @torch.no_grad()
    def step(self, lr: float, unit: float, clip: float | None, loss: Tensor) -> bool | None:
        """Move the parameters, unless a loss or gradient of this step or an earlier one is not finite: whether they
        moved; None on CUDA, where the device decides it and nothing waits.

        Args:
            loss: what the gradients are of, a scalar.
            unit: what the data is measured in. Parameters in units of the data take gradients per unit and steps in
                units, so that clipping and Adam see the same numbers whatever it is.
            clip: largest norm of all gradients together; None doesn't clip.
        """
        self._collect_gradients(unit)
        for group in self.adam.param_groups:
            group["lr"] = lr * (unit if group["in_units"] else 1.0)
        fused = fused_adam_for(self._decoder_FD.device)
        if fused is None:
            return self._step_in_passes(clip, loss)
        self._step_fused(fused, lr, clip, loss)
        return None

    def _step_in_passes(self, clip: float | None, loss: Tensor) -> bool | None:
        unit_norm, rows_FD = self.ae.unit_norm_decoder, self._decoder_FD
        if unit_norm:
            self._remove_parallel_gradient()
        square = torch.stack([self._squares(leaf) for leaf in self._moving()]).sum()
        refused = self.health.refuses(loss, square)
        if not refused.is_cuda and refused:  # looking costs nothing there
            return False
        self._divide_gradients(self._excess(square, clip))
        if refused.is_cuda:
            self.adam.found_inf = refused  # type: ignore[attr-defined]  # at 1, Adam changes nothing
        self.adam.step()
        if unit_norm:
            rows_FD.div_(rows_FD.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows_FD.dtype).tiny))
        return None if refused.is_cuda else True

    def _step_fused(self, fused: Any, lr: float, clip: float | None, loss: Tensor) -> None:
        """The same, with the weights' projection, clipping, Adam and normalisation in one pass over each."""
        weights = {id(leaf): leaf for leaf in self._moving() if leaf.ndim == 2 and len(leaf) == self.ae.dict_size}
        projected = {key: leaf is self._decoder_FD and self.ae.unit_norm_decoder for key, leaf in weights.items()}
        squares = [
            fused.gradient_squares(leaf, leaf.grad, projected[id(leaf)]) if id(leaf) in weights else self._squares(leaf)
            for leaf in self._moving()
        ]
        square = torch.stack(squares).sum()
        refused = self.health.refuses(loss, square)
        refuse = refused.bool()
        excess = self._excess(square, clip)
        scale = self._decoder_FD.new_ones(()) if excess is None else 1 / excess
        scale = scale.masked_fill(refuse, 0.0)
        rate = torch.full((), lr, dtype=torch.float64, device=refuse.device).masked_fill_(refuse, 0.0)
        for key, leaf in weights.items():
            state = self.adam.state[leaf]
            if not state:
                state["step"] = torch.zeros((), device=leaf.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(leaf), torch.zeros_like(leaf)
            state["step"] += 1 - refused
            assert leaf.grad is not None
            moments, grad = (state["exp_avg"], state["exp_avg_sq"]), leaf.grad.masked_fill_(refuse, 0.0)
            step = state["step"].clamp_min(1.0)
            fused.adam_step(leaf, grad, *moments, step=step, lr=rate, scale=scale, project=projected[key])
            leaf.grad = None  # so that Adam leaves it alone
        self._divide_gradients(excess)
        if self.adam.defaults["fused"]:
            self.adam.found_inf = refused  # type: ignore[attr-defined]
        self.adam.step()

    def _moving(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves.values() if leaf.grad is not None]

    @staticmethod
    def _squares(leaf: Tensor) -> Tensor:
        assert leaf.grad is not None
        return torch.linalg.vector_norm(leaf.grad).square()

    @staticmethod
    def _excess(square: Tensor, clip: float | None) -> Tensor | None:
        """How many times the gradients' norm (its square is given) is as large as it may be, at least 1."""
        return None if clip is None else (square.sqrt() / clip).clamp_min_(1.0)

    def _divide_gradients(self, excess: Tensor | None) -> None:
        if excess is not None and self.adam.defaults["fused"]:
            self.adam.grad_scale = excess  # type: ignore[attr-defined]  # Adam divides by it as it reads
        elif excess is not None:
            torch._foreach_div_([leaf.grad for leaf in self.leaves.values() if leaf.grad is not None], excess)

    def forget(self, latents_N: Tensor) -> None:
        """Set the moments of some latents to zero."""
        not_per_latent = (self.ae.decoder_bias_name, "W_skip")
        for name, leaf in self.leaves.items():
            if name not in not_per_latent and leaf in self.adam.state:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.adam.state[leaf][moment][latents_N] = 0.0

    def steps_taken(self) -> int:
        """Steps that moved the parameters. Waits for the device."""
        steps = [int(self.adam.state[leaf]["step"]) for leaf in self.leaves.values() if leaf in self.adam.state]
        return max(steps, default=0)

    def state_dict(self) -> dict[str, Any]:
        return {**self.adam.state_dict(), "health": self.health.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {name: value for name, value in state.items() if name != "health"}
        self.adam.load_state_dict(copy.deepcopy(own))  # it would keep the given tensors
        self.health.load_state_dict(state["health"])

    def _parameters_by_rows(self) -> dict[str, Tensor]:
        """Name -> the parameter's memory, the encoder's and the decoder's as [F, D]."""
        rows = {rows_FD.data_ptr(): rows_FD for rows_FD in (self.ae.encoder_rows, self.ae.decoder_rows)}
        return {name: rows.get(p.data_ptr(), p).detach() for name, p in self.ae.named_parameters()}

    def _collect_gradients(self, unit: float) -> None:
        """Hand the parameters and their gradients to Adam."""
        memory = self._parameters_by_rows()  # anew, since the dictionary may have been moved
        for name, parameter in self.ae.named_parameters():
            leaf, grad = self.leaves[name], parameter.grad
            leaf.data = memory[name]
            if grad is not None:
                as_it_is = (leaf.shape, leaf.stride()) == (parameter.shape, parameter.stride())
                grad = grad if as_it_is else grad.t()
                if name in self.ae.scaled_with_data:
                    grad.mul_(unit)
            leaf.grad = grad

    def _remove_parallel_gradient(self) -> None:
        """Drop the part of the decoder's gradient along its rows, which the normalisation would undo."""
        rows_FD, grad_FD = self._decoder_FD, self._decoder_FD.grad
        assert grad_FD is not None
        some = ROWS_AT_ONCE if rows_FD.device.type == "cpu" else len(rows_FD)  # as many as the cache holds
        product_FD = scratch("projection", (min(some, len(rows_FD)), rows_FD.shape[1]), rows_FD.dtype, rows_FD.device)
        for rows, grad in zip(rows_FD.split(some), grad_FD.split(some), strict=True):
            along = torch.mul(grad, rows, out=product_FD[: len(rows)]).sum(dim=1, keepdim=True)
            grad.addcmul_(along, rows, value=-1.0)


class ConstrainedAdam(torch.optim.Adam):
    """Adam under which the columns of some parameters keep unit norm (over dimension 0), as in the package."""

    def __init__(
        self,
        params: Iterable[Tensor],
        constrained_params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(params, lr=lr, betas=betas)
        self.constrained_params = list(constrained_params)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Remove what would change the norms from the gradients, step, and give the columns unit norm."""
        for p in self.constrained_params:
            columns = p / p.norm(dim=0, keepdim=True)
            if p.grad is not None:
                p.grad -= (p.grad * columns).sum(dim=0, keepdim=True) * columns
        result = super().step(closure)
        for p in self.constrained_params:
            p /= p.norm(dim=0, keepdim=True)
        return result


@torch.no_grad()
def set_decoder_norm_to_unit_norm(W_dec_DF: Tensor, activation_dim: int, d_sae: int) -> Tensor:
    """The decoder [D, F] with columns of unit norm; changed in place, and returned."""
    _check_shape(W_dec_DF, activation_dim, d_sae)
    return W_dec_DF.div_(W_dec_DF.norm(dim=0, keepdim=True).clamp_min(torch.finfo(W_dec_DF.dtype).eps))


@torch.no_grad()
def remove_gradient_parallel_to_decoder_directions(
    W_dec_DF: Tensor, W_dec_DF_grad: Tensor, activation_dim: int, d_sae: int
) -> Tensor:
    """The gradient of a decoder [D, F] without its part along the columns."""
    _check_shape(W_dec_DF, activation_dim, d_sae)
    columns = W_dec_DF / W_dec_DF.norm(dim=0, keepdim=True).clamp_min(torch.finfo(W_dec_DF.dtype).eps)
    return W_dec_DF_grad - (W_dec_DF_grad * columns).sum(dim=0, keepdim=True) * columns


def _check_shape(W_dec_DF: Tensor, activation_dim: int, d_sae: int) -> None:
    if W_dec_DF.shape != (activation_dim, d_sae):
        raise ValueError(f"the decoder is {list(W_dec_DF.shape)}, expected [{activation_dim}, {d_sae}]")
