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

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from dictionary_learning.devices import resolve_device
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.kernels import kernels_for
from dictionary_learning.kernels.codes import Encoder, EncoderDtype, Preactivations
from dictionary_learning.kernels.matmul import fast_matmul
from dictionary_learning.kernels.products import own_memory
from dictionary_learning.profiling import span
from dictionary_learning.trainers.functions import argument_names, geometric_median, seeded
from dictionary_learning.trainers.health import Stopped
from dictionary_learning.trainers.optimizer import (
    ConstrainedAdam,
    DictionaryOptimizer,
    remove_gradient_parallel_to_decoder_directions,
    set_decoder_norm_to_unit_norm,
)
from dictionary_learning.trainers.schedules import (
    DECAY_FRACTION,
    WARMUP_FRACTION,
    Plateau,
    Scheduler,
    automatic_learning_rate,
    get_lr_schedule,
    get_scheduler,
    get_sparsity_warmup_fn,
)

__all__ = [
    "TRAINERS",
    "ConstrainedAdam",
    "LossLog",
    "LossOutput",
    "SAETrainer",
    "geometric_median",
    "get_lr_schedule",
    "get_sparsity_warmup_fn",
    "remove_gradient_parallel_to_decoder_directions",
    "set_decoder_norm_to_unit_norm",
    "trainer_class",
]

GRADIENT_CLIP = 1.0

TRAINERS: dict[str, type[SAETrainer]] = {}  # architecture name -> trainer class


class LossOutput(NamedTuple):
    """What a loss computed: scalars on the device, the reconstruction [B, D_out], and in how many rows each latent
    fired [F]."""

    loss: Tensor
    x_hat_BD: Tensor
    firings_F: Tensor
    terms: dict[str, Tensor]

    @property
    def l0(self) -> Tensor:
        """Mean number of active latents an input."""
        return self.firings_F.sum() / len(self.x_hat_BD)

    @property
    def fired_F(self) -> Tensor:
        """[F] whether a latent fired (bool)."""
        return self.firings_F > 0

    def detach(self) -> LossOutput:
        terms = {name: term.detach() for name, term in self.terms.items()}
        return LossOutput(self.loss.detach(), self.x_hat_BD.detach(), self.firings_F, terms)


class Shared(TypedDict, total=False):
    """Settings that every trainer passes on to `SAETrainer`, which explains them."""

    encoder_dtype: EncoderDtype
    grad_clip_norm: float | None
    output_dim: int | None
    skip: bool
    scheduler: Scheduler


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
        scheduler: how the learning rate goes on after the warm-up: "wsd" (constant, then linearly to 0), "linear",
            "cosine", "constant" or "plateau" (halved when the held-out loss stops falling), see `schedules`.
        decay_start: of "wsd", the step at which the rate begins to fall; None takes the last third of the run.
        sparsity_warmup_steps: linear warm-up of the sparsity penalty.
        seed: fixes the initial weights.
        submodule_name: the hook point to train on, when the buffer delivers several.
        encoder_dtype: precision of the encoder's product in sparse steps, with weights in fp32 all the same.
        grad_clip_norm: largest norm of all gradients together; None doesn't clip.
        output_dim: width of a transcoder's output (None: an autoencoder); `skip` gives it a skip connection.

    Raises:
        UserError: a size, rate or schedule that can't be.
    """

    architecture: ClassVar[str]

    @property
    def moves_its_loss(self) -> bool:
        """Whether the loss changes during the run beyond a warm-up, so that two looks at it can't be compared."""
        return False

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
        encoder_dtype: EncoderDtype = "fp32",
        grad_clip_norm: float | None = GRADIENT_CLIP,
        output_dim: int | None = None,
        skip: bool = False,
        scheduler: Scheduler = "wsd",
    ) -> None:
        if encoder_dtype not in (known := get_args(EncoderDtype)):
            raise UserError(f"encoder_dtype must be one of {', '.join(known)}, got {encoder_dtype!r}.")
        if grad_clip_norm is not None and not 0 < grad_clip_norm < float("inf"):
            raise UserError(f"grad_clip_norm must be positive, or None for no clipping, got {grad_clip_norm!r}.")
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps must be a positive integer, got {steps!r}.")
        if lr is not None and not 0 < lr < float("inf"):
            raise UserError(f"The learning rate must be positive, got {lr!r}.")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.steps, self.layer, self.lm_name, self.seed = steps, layer, lm_name, seed
        self.device = resolve_device(device)
        kernels_for(self.device)  # a wrong SAE_FACTORY_KERNELS is refused here, before any file
        self.wandb_name = wandb_name or type(self).__name__
        self.submodule_name, self.encoder_dtype, self.grad_clip_norm = submodule_name, encoder_dtype, grad_clip_norm
        options = (dict_kwargs or {}) | (
            {} if output_dim is None and not skip else {"output_dim": output_dim, "skip": skip}
        )
        with seeded(seed):
            self.ae = dict_class(activation_dim, dict_size, **options).to(self.device)

        self.lr = automatic_learning_rate(dict_size, activation_dim, steps) if lr is None else lr
        self.warmup_steps = min(1000, int(steps * WARMUP_FRACTION)) if warmup_steps is None else warmup_steps
        self.scheduler, self.decay_start = scheduler, decay_start
        if scheduler == "wsd" and decay_start is None:
            self.decay_start = max(self.warmup_steps, int(steps * (1 - DECAY_FRACTION)))
        self.sparsity_warmup_steps = sparsity_warmup_steps
        self._lr_scale = get_scheduler(scheduler, steps, self.warmup_steps, self.decay_start)
        self.plateau = Plateau() if scheduler == "plateau" else None
        self._sparsity_scale = get_sparsity_warmup_fn(steps, sparsity_warmup_steps)

        self._optimizer = DictionaryOptimizer(self.ae, self.lr)
        self.input_scale = 1.0  # root mean squared norm of the first batch, in the data's units
        self.tokens_since_fired_F = torch.zeros(dict_size, dtype=torch.long, device=self.device)
        self.last: LossOutput | None = None

    @classmethod
    def argument_names(cls) -> set[str]:
        """What the constructor takes, with what it passes on to those of its bases by `**`."""
        return argument_names(cls, SAETrainer) - {"dict_kwargs"}

    @abstractmethod
    def compute_loss(self, x_BD: Tensor, y_BD: Tensor, step: int) -> LossOutput:
        """The loss of a batch at a step: of reconstructing y (of an autoencoder x itself) from x. Reads the trainer,
        changes nothing."""

    def preactivations(self, x_BD: Tensor) -> Preactivations:
        """The encoder's product of a batch, from which an architecture takes its codes."""
        encoder = Encoder(self.ae.encoder_rows, self.ae.encoder_bias, self.ae.pre_bias)
        return Preactivations(x_BD, encoder, kernels_for(x_BD.device), self.encoder_dtype)

    def update(self, step: int, activations: Tensor, target: Tensor | None = None) -> Tensor:
        """One optimiser step on a batch [B, D]; the loss as a tensor on the device (nothing waits for it).

        Args:
            target: [B, D_out] what a transcoder is to predict from the activations.
        """
        with fast_matmul():
            return self._update(step, activations, target)

    def _update(self, step: int, activations: Tensor, target: Tensor | None) -> Tensor:
        x_BD, y_BD = self._batch(activations, target)
        if step == 0:
            self.initialize(x_BD, y_BD)
        with span("loss"):
            out = self.compute_loss(x_BD, y_BD, step)
        self._optimizer.zero_grad()
        with span("backward"):
            (out.loss / self.unit**2).backward()
        lr = self.lr * self._lr_scale(step) * (1.0 if self.plateau is None else self.plateau.factor)
        with span("optimiser"):
            moved = self._optimizer.step(lr, self.unit, self.grad_clip_norm, out.loss.detach())
        if self._optimizer.health.look(step, moved, self._optimizer.steps_taken):
            return out.loss.detach()
        self.last = out.detach()
        self.tokens_since_fired_F += len(x_BD)
        self.tokens_since_fired_F.masked_fill_(out.fired_F, 0)
        self.after_update(x_BD, y_BD, step, self.last)
        return self.last.loss

    @property
    def stopped(self) -> Stopped | None:
        """Why this dictionary no longer learns, once a loss or a gradient was not finite. Updates then do nothing."""
        return self._optimizer.health.stopped

    @property
    def unit(self) -> float:
        """The root mean square of a coordinate of the data. Measured in it, the data has a mean squared norm of D, as
        the field scales it; so are the loss, whose gradient is clipped, and the steps of biases and thresholds."""
        return self.input_scale / self.ae.output_dim**0.5

    def _batch(self, activations: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        x_BD = activations.to(self.device, torch.float32)
        if (target is None) == self.ae.is_transcoder:
            kind = "needs the output that belongs to its input" if self.ae.is_transcoder else "has no target"
            raise UserError(
                f"{self.wandb_name}: {'a transcoder' if self.ae.is_transcoder else 'an autoencoder'} {kind}."
            )
        return x_BD, x_BD if target is None else target.to(self.device, torch.float32)

    @torch.no_grad()
    def initialize(self, x_BD: Tensor, y_BD: Tensor) -> None:
        """Before the first step: the scale of the data, and the decoder bias at the batch's geometric median. Without a
        pre-bias the encoder starts where one would put it: at the deviation from the input's median."""
        self.input_scale = float(y_BD.pow(2).sum(-1).mean().sqrt()) or 1.0
        self.ae.decoder_bias.copy_(geometric_median(y_BD))
        if self.ae.is_transcoder:  # codes are in units of the output
            self.ae.encoder_rows.mul_(self.input_scale / (float(x_BD.pow(2).sum(-1).mean().sqrt()) or 1.0))
        if self.ae.pre_bias is None:
            self.ae.encoder_bias.sub_(self.ae.encoder_rows @ geometric_median(x_BD))

    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: LossOutput) -> None:  # noqa: B027
        """Called behind every optimiser step, for what an architecture tracks or projects."""

    def reconstruction(self, decoded_BD: Tensor, x_BD: Tensor) -> Tensor:
        """[B, D_out] from the decoded codes: with the decoder bias, and a transcoder's skip connection."""
        x_hat_BD = decoded_BD + self.ae.decoder_bias
        return x_hat_BD if self.ae.W_skip is None else x_hat_BD + torch.nn.functional.linear(x_BD, self.ae.W_skip)

    @property
    def optimizer(self) -> torch.optim.Adam:
        """Adam, over the weights by their rows."""
        return self._optimizer.adam

    def loss(
        self, x: Tensor, step: int | None = None, logging: bool = False, target: Tensor | None = None
    ) -> Tensor | LossLog:
        """The loss of a batch [B, D] as a scalar, or with `logging` its parts in the field's layout."""
        x_BD, y_BD = self._batch(x, target)
        with own_memory():  # several losses may be added up before one backward pass
            out = self.compute_loss(x_BD, y_BD, self.steps if step is None else step)
        if not logging:
            return out.loss
        losses = {"loss": out.loss.item()} | {name: term.item() for name, term in out.terms.items()}
        return LossLog(x_BD, out.x_hat_BD, self.ae.encode(x_BD), losses)

    @torch.no_grad()
    def metrics(self, x: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """Metrics of the last update, whose batch is given; reads the device once. `nz_frac` is the fraction of
        latents that fired in the batch."""
        if self.last is None:
            raise RuntimeError("metrics() before the first update()")
        out = self.last
        y_BD = self._batch(x, target)[1]
        error, variation = (y_BD - out.x_hat_BD).pow(2).sum(), (y_BD - y_BD.mean(0)).pow(2).sum()  # as in `EvalResult`
        values = {
            "loss": out.loss,
            "l0": out.l0,
            "frac_variance_explained": 1 - error / torch.where(variation > 0, variation, torch.nan),
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
            "scheduler": self.scheduler,
            "sparsity_warmup_steps": self.sparsity_warmup_steps,
            "seed": self.seed,
            "device": str(self.device),
            "layer": self.layer,
            "lm_name": self.lm_name,
            "wandb_name": self.wandb_name,
            "submodule_name": self.submodule_name,
            "encoder_dtype": self.encoder_dtype,
            "grad_clip_norm": self.grad_clip_norm,
        } | ({"output_dim": self.ae.output_dim, "skip": self.ae.W_skip is not None} if self.ae.is_transcoder else {})

    def get_logging_parameters(self) -> dict[str, Any]:
        """Further scalars for the log, read from the device (the field's name for `logged_tensors`)."""
        return {name: value.item() for name, value in self.logged_tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `update` depends on: the live tensors, so save or copy it before that."""
        return {
            "ae": self.ae.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired_F,
            "input_scale": self.input_scale,
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ae.load_state_dict(state["ae"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.tokens_since_fired_F.copy_(state["tokens_since_fired"])
        self.input_scale = float(state["input_scale"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])


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
