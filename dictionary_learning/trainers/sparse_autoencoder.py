"""How a `SparseAutoencoder` learns: with `k` by TopK's loss, with `beta_l1` by the standard SAE's.

Its options (SiLU, an input LayerNorm, tied weights) leave no common way through the sparse kernels, so a step is plain
dense autograd through the dictionary itself. Where the options are those of TopK or of the standard SAE, it learns what
their trainers do.

With an input LayerNorm the loss is taken of the normalised activations, where every input weighs the same.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from dictionary_learning.dictionaries.configurable import Activation, SparseAutoencoder
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.kernels import kernels_for
from dictionary_learning.kernels.codes import Encoder, Preactivations
from dictionary_learning.trainers.dead_latents import AuxK
from dictionary_learning.trainers.trainer import LossOutput, SAETrainer, Shared


class SparseAutoencoderTrainer(SAETrainer):
    """loss = mean |x - x_hat|^2 + auxk_alpha * auxk with `k`, or + beta_l1 * s * mean sum_i |f_i| |d_i| with `beta_l1`.

    s is the root mean squared norm of the first batch: `beta_l1` is `l1_penalty` for activations of unit norm, whatever
    the units are. Of the shared settings, `encoder_dtype` "bf16" runs encoder and decoder under autocast.

    Args:
        activation, input_norm, k, beta_l1, tie_weights, unit_norm_decoder: see `SparseAutoencoder`.
        sparsity_warmup_steps: of `beta_l1`; None takes a tenth of the run, at most 2,000 steps.
        auxk_alpha, dead_after_tokens: of `k`, see `TopKTrainer`.

    Raises:
        UserError: neither k nor beta_l1, or both; see `SparseAutoencoder` and `SAETrainer`.
    """

    architecture = "sparse_autoencoder"
    ae: SparseAutoencoder

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        layer: int | None = None,
        lm_name: str | None = None,
        dict_class: type[Dictionary] = SparseAutoencoder,
        *,
        activation: Activation = "relu",
        input_norm: bool = True,
        k: int | None = None,
        beta_l1: float | None = None,
        tie_weights: bool = False,
        unit_norm_decoder: bool = True,
        lr: float | None = None,
        auxk_alpha: float = 1 / 8,
        dead_after_tokens: int | None = None,
        warmup_steps: int | None = None,
        sparsity_warmup_steps: int | None = None,
        decay_start: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        wandb_name: str | None = "SparseAutoencoder",
        submodule_name: str | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        if k is None and beta_l1 is None:
            raise UserError("What is to make the codes sparse? Give k (TopK) or beta_l1 (an L1 penalty).")
        if shared.get("encoder_dtype") == "tf32":
            raise UserError("encoder_dtype of a SparseAutoencoder is fp32 or bf16, got 'tf32'.")
        options = {
            "activation": activation,
            "input_norm": input_norm,
            "k": k,
            "beta_l1": beta_l1,
            "tie_weights": tie_weights,
            "unit_norm_decoder": unit_norm_decoder,
        }
        if beta_l1 is not None and sparsity_warmup_steps is None:
            sparsity_warmup_steps = min(2000, steps // 10)
        super().__init__(
            steps=steps,
            activation_dim=activation_dim,
            dict_size=dict_size,
            layer=layer,
            lm_name=lm_name,
            dict_class=dict_class,
            dict_kwargs=options,
            lr=lr,
            warmup_steps=warmup_steps,
            sparsity_warmup_steps=sparsity_warmup_steps,
            decay_start=decay_start,
            seed=seed,
            device=device,
            wandb_name=wandb_name,
            submodule_name=submodule_name,
            **shared,
        )
        self.options, self.auxk_alpha = options, auxk_alpha
        size = min(max(1, activation_dim // 2), dict_size)  # Gao et al. 2024, appendix A.2
        self.auxk = AuxK(self, 0.0 if k is None else auxk_alpha, size, dead_after_tokens)

    def _batch(self, activations: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        x_BD, y_BD = super()._batch(activations, target)
        if self.ae.input_norm:  # to normalise twice changes nothing
            x_BD = y_BD = self.ae.normalize(x_BD)[0]
        return x_BD, y_BD

    @torch.no_grad()
    def initialize(self, x_BD: Tensor, y_BD: Tensor) -> None:
        super().initialize(x_BD, y_BD)
        if self.ae.input_scale is not None and not self.ae.input_norm:  # SiLU is meant for values of order 1
            self.ae.input_scale.fill_(self.input_scale / x_BD.shape[1] ** 0.5)
            self.ae.decoder_bias.div_(self.ae.input_scale)

    def compute_loss(self, x_BD: Tensor, y_BD: Tensor, step: int) -> LossOutput:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.encoder_dtype == "bf16"):
            codes_BF = self.ae.encode(x_BD)
            x_hat_BD = self.ae.reconstruct(codes_BF, x_BD)
        codes_BF, x_hat_BD = codes_BF.to(x_BD.dtype), x_hat_BD.to(x_BD.dtype)
        l2 = (y_BD - x_hat_BD).pow(2).sum(-1).mean()
        terms = {"l2_loss": l2}
        if self.ae.beta_l1 is None:
            residual_BD = (y_BD - x_hat_BD.detach()) / self._code_unit()
            loss = self.auxk.add_to(l2, terms, self._encoder_product(x_BD), y_BD, residual_BD)
        else:
            magnitudes_F = codes_BF.abs().mean(0)
            if not self.ae.unit_norm_decoder:
                magnitudes_F = magnitudes_F * self.ae.decoder_rows.norm(dim=1)
            terms["sparsity_loss"] = l1 = magnitudes_F.sum() * self._code_unit()
            loss = l2 + self.ae.beta_l1 * self.input_scale * self._sparsity_scale(step) * l1
        return LossOutput(loss, x_hat_BD, (codes_BF.detach() != 0).sum(0).to(l2.dtype), terms)

    def _code_unit(self) -> float | Tensor:
        """What a code is measured in, in units of the activations."""
        return 1.0 if self.ae.input_scale is None else self.ae.input_scale

    def _encoder_product(self, x_BD: Tensor) -> Preactivations:
        """The encoder's input and weights, for AuxK; in the codes' units."""
        encoder = Encoder(self.ae.encoder_rows, self.ae.encoder_bias, self.ae.pre_bias)
        return Preactivations(x_BD / self._code_unit(), encoder, kernels_for(x_BD.device))

    def after_update(self, x_BD: Tensor, y_BD: Tensor, step: int, out: LossOutput) -> None:
        self.auxk.after_update(step, len(x_BD))

    def logged_tensors(self) -> dict[str, Tensor]:
        return self.auxk.logged_tensors()

    @property
    def config(self) -> dict[str, Any]:
        of_k = {"auxk_alpha": self.auxk_alpha, "dead_after_tokens": self.auxk.dead_after_tokens}
        return super().config | self.options | (of_k if self.ae.beta_l1 is None else {})

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"auxk": self.auxk.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.auxk.load_state_dict(state["auxk"])
