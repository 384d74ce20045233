"""The one loop body that every architecture learns by.

A batch of activations [B, D] comes in, one optimiser step goes out. An architecture supplies its loss and its sparsity
(`compute_loss`); everything else is here, once: initialisation of the biases, Adam, warm-up and decay, gradient
clipping, the unit norm of decoder rows and the projection of their gradient, tracking of dead latents, metrics, state.

Two choices shape it. The loss has no side effects and every `update` leaves its outputs behind in `last`, so that
logging reads what the step computed and can't change training. And training is equivariant in the units of the data:
the loss is taken relative to the mean squared norm of the first batch, and what has the data's units (biases,
thresholds) learns in those units, so that the same settings fit a layer with norms of 1 and one with norms of 300.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.trainers.schedules import (
    DECAY_FRACTION,
    WARMUP_FRACTION,
    automatic_learning_rate,
    get_lr_schedule,
    get_sparsity_warmup_fn,
)

GRADIENT_CLIP = 1.0

TRAINERS: dict[str, type[SAETrainer]] = {}  # architecture name -> trainer class


class LossOutput(NamedTuple):
    """What a loss computed: scalars on the device, the reconstruction [B, D], and which latents fired [F] (bool)."""

    loss: Tensor
    x_hat_BD: Tensor
    fired_F: Tensor
    l0: Tensor
    terms: dict[str, Tensor]

    def detach(self) -> LossOutput:
        terms = {name: term.detach() for name, term in self.terms.items()}
        return LossOutput(self.loss.detach(), self.x_hat_BD.detach(), self.fired_F, self.l0.detach(), terms)


class LossLog(NamedTuple):
    """`loss(..., logging=True)`, in the field's layout: input, reconstruction, codes, named terms."""

    x: Tensor
    x_hat: Tensor
    f: Tensor
    losses: dict[str, float]


class SAETrainer(ABC):
    """A dictionary, its optimiser and its schedules.

    Subclasses name themselves (`class TopKTrainer(SAETrainer, architecture="top_k")`), pass their dictionary to
    `__init__`, and define `compute_loss`.

    Args:
        steps: length of the run in optimiser steps.
        lr: Adam's peak learning rate; None takes `automatic_learning_rate`.
        warmup_steps: linear warm-up; None takes a twentieth of the run, at most 1,000 steps.
        decay_start: step at which the learning rate begins to fall to 0; None takes the last third of the run.
        sparsity_warmup_steps: linear warm-up of the sparsity penalty.
        seed: fixes the initial weights.
        submodule_name: the hook point to train on, when the buffer delivers several.

    Raises:
        UserError: a size, rate or schedule that can't be.
    """

    architecture: ClassVar[str]
    unit_norm_decoder: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 1.0  # of the automatic rate

    def __init_subclass__(cls, architecture: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if architecture is not None:
            if architecture in TRAINERS:
                raise TypeError(
                    f"two trainers are named '{architecture}': {TRAINERS[architecture].__name__} and {cls.__name__}"
                )
            cls.architecture = architecture
            TRAINERS[architecture] = cls

    def __init__(
        self,
        *,
        steps: int,
        activation_dim: int,
        dict_size: int,
        layer: int | None,
        lm_name: str | None,
        dict_class: type[Dictionary],
        dict_kwargs: dict[str, Any] | None = None,
        lr: float | None = None,
        warmup_steps: int | None = None,
        sparsity_warmup_steps: int | None = None,
        decay_start: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = None,
        submodule_name: str | None = None,
    ) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps must be a positive integer, got {steps!r}.")
        if lr is not None and not 0 < lr < float("inf"):
            raise UserError(f"The learning rate must be positive, got {lr!r}.")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.steps, self.layer, self.lm_name, self.seed = steps, layer, lm_name, seed
        self.device = torch.device(device)
        self.wandb_name = wandb_name or type(self).__name__
        self.submodule_name = submodule_name
        with _seeded(seed):
            self.ae = dict_class(activation_dim, dict_size, **(dict_kwargs or {})).to(self.device)

        rule = self.learning_rate_factor * automatic_learning_rate(dict_size, activation_dim, steps)
        self.lr = rule if lr is None else lr
        self.warmup_steps = min(1000, int(steps * WARMUP_FRACTION)) if warmup_steps is None else warmup_steps
        default_decay = max(self.warmup_steps, int(steps * (1 - DECAY_FRACTION)))
        self.decay_start = default_decay if decay_start is None else decay_start
        self.sparsity_warmup_steps = sparsity_warmup_steps
        self._lr_scale = get_lr_schedule(steps, self.warmup_steps, self.decay_start)
        self._sparsity_scale = get_sparsity_warmup_fn(steps, sparsity_warmup_steps)

        # The optimiser holds weights by their contiguous rows, also where the parameter is the transpose: fused Adam
        # copies other layouts, and silently mixes up elements once a file gives its moments back in another layout.
        self._leaves = self._parameters_by_rows()
        rows_FD = self.ae.decoder_rows
        decoder = [leaf for leaf in self._leaves.values() if leaf.data_ptr() == rows_FD.data_ptr()]
        if len(decoder) != 1 or not rows_FD.is_contiguous():
            raise TypeError(f"{type(self.ae).__name__}.decoder_rows is not a contiguous view of a parameter")
        self._decoder_leaf_FD = decoder[0]
        units = set(self.ae.scaled_with_data)
        groups = [
            {
                "params": [leaf for name, leaf in self._leaves.items() if (name in units) == in_units],
                "in_units": in_units,
            }
            for in_units in (False, True)
        ]
        self.optimizer = torch.optim.Adam(groups, lr=self.lr, fused=self.device.type in ("cpu", "cuda"))
        self.input_scale = 1.0  # root mean squared norm of the first batch, in the data's units
        self.tokens_since_fired_F = torch.zeros(dict_size, dtype=torch.long, device=self.device)
        self.last: LossOutput | None = None

    @abstractmethod
    def compute_loss(self, x_BD: Tensor, step: int) -> LossOutput:
        """The loss of a batch at a step. Reads the trainer, changes nothing."""

    def update(self, step: int, activations: Tensor) -> Tensor:
        """One optimiser step on a batch [B, D]; the loss as a tensor on the device (nothing waits for it)."""
        x_BD = activations.to(self.device, torch.float32)
        if step == 0:
            self.initialize(x_BD)
        out = self.compute_loss(x_BD, step)
        self.ae.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)  # its leaves hold the same gradients
        (out.loss / self.input_scale**2).backward()
        self._collect_gradients()
        if self.unit_norm_decoder:
            self._remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(self._leaves.values(), GRADIENT_CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self._lr_scale(step) * (self.input_scale if group["in_units"] else 1.0)
        self.optimizer.step()
        if self.unit_norm_decoder:
            self._normalize_decoder()
        self.last = out.detach()
        self.tokens_since_fired_F += len(x_BD)
        self.tokens_since_fired_F.masked_fill_(out.fired_F, 0)
        self.after_update(x_BD, step, self.last)
        return self.last.loss

    @torch.no_grad()
    def initialize(self, x_BD: Tensor) -> None:
        """Before the first step: the scale of the data, and the decoder bias at the batch's geometric median."""
        self.input_scale = float(x_BD.pow(2).sum(-1).mean().sqrt()) or 1.0
        self.ae.decoder_bias.copy_(geometric_median(x_BD))

    def after_update(self, x_BD: Tensor, step: int, out: LossOutput) -> None:  # noqa: B027 (most have nothing to do)
        """Called behind every optimiser step, for what an architecture tracks or projects."""

    def _parameters_by_rows(self) -> dict[str, Tensor]:
        """Name -> the parameter's memory, the encoder's and the decoder's as [F, D]."""
        rows = {rows_FD.data_ptr(): rows_FD for rows_FD in (self.ae.encoder_rows, self.ae.decoder_rows)}
        return {name: rows.get(p.data_ptr(), p).detach() for name, p in self.ae.named_parameters()}

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        """Hand the parameters and their gradients to the optimiser; what is in the data's units gets its gradient per
        `input_scale`, so that clipping and Adam see the same numbers whatever the units."""
        memory = self._parameters_by_rows()  # anew, since the dictionary may have been moved
        for name, parameter in self.ae.named_parameters():
            leaf, grad = self._leaves[name], parameter.grad
            leaf.data = memory[name]
            if grad is not None:
                as_it_is = (leaf.shape, leaf.stride()) == (parameter.shape, parameter.stride())
                grad = grad if as_it_is else grad.t()
                if name in self.ae.scaled_with_data:
                    grad.mul_(self.input_scale)
            leaf.grad = grad

    def _remove_parallel_gradient(self) -> None:
        """Drop the part of the decoder gradient along the decoder rows, which the normalisation would undo."""
        rows_FD, grad_FD = self._decoder_leaf_FD, self._decoder_leaf_FD.grad
        assert grad_FD is not None
        grad_FD.addcmul_((grad_FD * rows_FD).sum(dim=1, keepdim=True), rows_FD, value=-1.0)

    def _normalize_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        rows_FD = self._decoder_leaf_FD
        rows_FD.div_(rows_FD.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows_FD.dtype).tiny))

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Tensor | LossLog:
        """The loss of a batch [B, D] as a scalar, or with `logging` its parts in the field's layout."""
        x_BD = x.to(self.device, torch.float32)
        out = self.compute_loss(x_BD, self.steps if step is None else step)
        if not logging:
            return out.loss
        losses = {"loss": out.loss.item()} | {name: term.item() for name, term in out.terms.items()}
        return LossLog(x_BD, out.x_hat_BD, self.ae.encode(x_BD), losses)

    @torch.no_grad()
    def metrics(self, x_BD: Tensor) -> dict[str, float]:
        """Metrics of the last update, whose batch was `x_BD`; reads the device once. `nz_frac` is the fraction of
        latents that fired in the batch."""
        if self.last is None:
            raise RuntimeError("metrics() before the first update()")
        out = self.last
        x_BD = x_BD.to(self.device, torch.float32)
        unexplained = (x_BD - out.x_hat_BD).var(dim=0).sum() / x_BD.var(dim=0).sum()
        values = {
            "loss": out.loss,
            "l0": out.l0,
            "frac_variance_explained": 1 - unexplained,
            "nz_frac": out.fired_F.float().mean(),
            **out.terms,
            **self.logged_tensors(),
        }
        read = torch.stack([value.float() for value in values.values()]).tolist()
        return dict(zip(values, read, strict=True)) | {"lr": self.optimizer.param_groups[0]["lr"]}

    def logged_tensors(self) -> dict[str, Tensor]:
        """Further scalars for the log (device tensors)."""
        return {}

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` says under "trainer": every setting, with the rules' results in place of None."""
        return {
            "trainer_class": type(self).__name__,
            "architecture": self.architecture,
            "dict_class": type(self.ae).__name__,
            "activation_dim": self.ae.activation_dim,
            "dict_size": self.ae.dict_size,
            "steps": self.steps,
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "decay_start": self.decay_start,
            "sparsity_warmup_steps": self.sparsity_warmup_steps,
            "seed": self.seed,
            "device": str(self.device),
            "layer": self.layer,
            "lm_name": self.lm_name,
            "wandb_name": self.wandb_name,
            "submodule_name": self.submodule_name,
        }

    def get_logging_parameters(self) -> dict[str, Any]:
        """Further scalars for the log, read from the device (the field's name for `logged_tensors`)."""
        return {name: value.item() for name, value in self.logged_tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `update` depends on: the live tensors, so save or copy it before that."""
        return {
            "ae": self.ae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired_F,
            "input_scale": self.input_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ae.load_state_dict(state["ae"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would keep the given tensors
        self.tokens_since_fired_F.copy_(state["tokens_since_fired"])
        self.input_scale = float(state["input_scale"])


def trainer_class(architecture: str) -> type[SAETrainer]:
    """The trainer of an architecture name.

    Raises:
        UserError: no such architecture; says which there are.
    """
    import dictionary_learning.trainers  # noqa: F401  (fills the registry)

    if architecture not in TRAINERS:
        raise UserError(
            f"Unknown architecture '{architecture}': use one of {', '.join(TRAINERS)}."
            f"{did_you_mean(architecture, TRAINERS)}"
        )
    return TRAINERS[architecture]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's default generator inside the block and give it back as it was. None leaves it alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def geometric_median(points_BD: Tensor, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """[D] point of least summed distance to `points_BD`, by Weiszfeld's iteration; `tol` is relative."""
    guess_D = points_BD.mean(dim=0)
    for _ in range(max_iter):
        weights_B = 1 / (points_BD - guess_D).norm(dim=1).clamp_min(1e-8)
        previous_D, guess_D = guess_D, weights_B @ points_BD / weights_B.sum()
        if (guess_D - previous_D).norm() < tol * guess_D.norm():
            break
    return guess_D
