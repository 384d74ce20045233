"""How good is a dictionary, from activations alone? Metrics pooled over any number of batches.

In: batches of activations (of a transcoder, with their targets). Out: an `EvalResult`. Pooled means: sums run over all
tokens and are divided once, in float64. An average of per-batch ratios would depend on the batch size.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError


@dataclass(frozen=True)
class EvalResult:
    """Pooled metrics of one dictionary, whose output x_hat is meant to be y: its input, or of a transcoder the target.

    l0: mean number of active latents. frac_variance_explained: 1 - sum |y - x_hat|^2 / sum |y - mean y|^2.
    mse: mean squared error an element. l2_loss: mean |y - x_hat|. l1_loss: mean sum of the codes' magnitudes.
    cossim: mean cosine of y and x_hat. l2_ratio: mean |x_hat| / |y| (both over y other than 0).
    relative_reconstruction_bias: E|x_hat|^2 / E[y . x_hat], equation 10 of arXiv:2404.16014; 1 is unbiased.
    frac_alive: share of latents that fired at all. tokens: activations measured. What is 0 / 0, as the variance
    explained of activations that don't vary, is NaN.

    With a language model: loss_original / _reconstructed / _zero: cross-entropy in nats a token with the activation
    left, replaced by x_hat, set to zero. frac_recovered: (zero - reconstructed) / (zero - original). kl: mean
    KL(original || reconstructed) of the next-token distributions, in nats. Without one they are None.
    """

    l0: float
    frac_variance_explained: float
    mse: float
    l2_loss: float
    l1_loss: float
    cossim: float
    l2_ratio: float
    relative_reconstruction_bias: float
    frac_alive: float
    tokens: int
    loss_original: float | None = None
    loss_reconstructed: float | None = None
    loss_zero: float | None = None
    frac_recovered: float | None = None
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with None for what is not finite (JSON has no NaN)."""
        values = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class PooledMetrics:
    """Sums of what `EvalResult` needs, over any number of batches."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.tokens = 0
        self.device = dictionary.decoder_rows.device
        home = "cpu" if self.device.type == "mps" else self.device  # MPS has no float64
        # The first batch gives them their widths, which an identity need not know.
        self.fired_F = torch.zeros(1, dtype=torch.bool, device=home)
        self.sum_D = torch.zeros(1, dtype=torch.float64, device=home)
        self.sums = torch.zeros(10, dtype=torch.float64, device=home)

    @torch.no_grad()
    def update(self, x_BD: Tensor, target_BD: Tensor | None = None) -> Tensor:
        """Take in activations [..., D], and of a transcoder its targets; the reconstructions [B, D_out]."""
        home = self.sums.device
        x_BD = x_BD.to(self.device, self.dictionary.decoder_rows.dtype).flatten(0, -2)
        x_hat_BD, acts_BF = self.dictionary(x_BD, output_features=True)
        active_BF = (acts_BF != 0).to(home)
        y, x_hat = (
            (x_BD if target_BD is None else target_BD.flatten(0, -2)).to(home).double(),
            x_hat_BD.to(home).double(),
        )
        error_B = (y - x_hat).pow(2).sum(1)
        y_norm_B, x_hat_norm_B, dot_B = y.norm(dim=1), x_hat.norm(dim=1), (y * x_hat).sum(1)
        somewhere_B = y_norm_B != 0
        self.tokens += len(y)
        self.fired_F = self.fired_F | active_BF.any(0)
        self.sum_D = self.sum_D + y.sum(0)
        self.sums += torch.stack(
            [
                active_BF.sum().double(),
                error_B.sum(),
                y.pow(2).sum(),
                x_hat.pow(2).sum(),
                dot_B.sum(),
                (dot_B / (y_norm_B * x_hat_norm_B).clamp_min(1e-30)).sum(),
                (x_hat_norm_B / y_norm_B)[somewhere_B].sum(),
                somewhere_B.sum().double(),
                error_B.sqrt().sum(),
                acts_BF.abs().sum(-1).to(home).double().sum(),
            ]
        )
        return x_hat_BD

    def result(self, **losses: float) -> EvalResult:
        """The metrics so far.

        Raises:
            UserError: no activations were seen.
        """
        n = self.tokens
        if n == 0:
            raise UserError("There is nothing to evaluate on: no activations were given.")
        active, error, square, square_hat, dot, cosines, ratios, somewhere, distance, magnitude = self.sums.tolist()
        variance = square - self.sum_D.pow(2).sum().item() / n
        varies = not variance <= 1e-12 * square  # less is rounding, and NaN stays NaN
        return EvalResult(
            l0=active / n,
            frac_variance_explained=1 - error / variance if varies else math.nan,
            mse=error / (n * len(self.sum_D)),
            l2_loss=distance / n,
            l1_loss=magnitude / n,
            cossim=cosines / somewhere if somewhere else math.nan,
            l2_ratio=ratios / somewhere if somewhere else math.nan,
            relative_reconstruction_bias=square_hat / dot if dot else math.nan,
            frac_alive=self.fired_F.double().mean().item(),
            tokens=n,
            **losses,
        )
