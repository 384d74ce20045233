"""How good is a dictionary? Metrics pooled over held-out activations, and the loss of the model that reads through it.

Pooled means: sums run over all tokens and are divided once, in float64. An average of per-batch ratios would depend on
the batch size. One clean forward of the model gives the activations at every hook point and the original logits; each
dictionary then costs one forward with its reconstruction in place, and each hook point one with zeros.

Special tokens (BOS, separators), padding and activations of extreme norm, which dictionaries do not train on, keep
their activation in those forwards and do not enter the metrics. The loss is taken where a reconstructed token predicts
an ordinary one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.storage import atomic_file

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.packing import TokenBatch


@dataclass(frozen=True)
class EvalResult:
    """Pooled metrics of one dictionary.

    l0: mean number of active latents. frac_variance_explained: 1 - sum |x - x_hat|^2 / sum |x - mean x|^2.
    mse: mean squared error an element. cossim: mean cosine of x and x_hat. l2_ratio: mean |x_hat| / |x| (both over
    x other than 0). relative_reconstruction_bias: E|x_hat|^2 / E[x . x_hat], equation 10 of arXiv:2404.16014; 1 is
    unbiased. frac_alive: share of latents that fired at all. tokens: activations measured. What is 0 / 0, as the
    variance explained of activations that don't vary, is NaN.

    With a language model: loss_original / _reconstructed / _zero: cross-entropy in nats a token with the activation
    left, replaced by x_hat, set to zero. frac_recovered: (zero - reconstructed) / (zero - original). kl: mean
    KL(original || reconstructed) of the next-token distributions, in nats. Without one they are None.
    """

    l0: float
    frac_variance_explained: float
    mse: float
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
        self.fired_F = torch.zeros(dictionary.dict_size, dtype=torch.bool, device=home)
        self.sum_D = torch.zeros(dictionary.activation_dim, dtype=torch.float64, device=home)
        self.sums = torch.zeros(8, dtype=torch.float64, device=home)

    @torch.no_grad()
    def update(self, x_BD: Tensor) -> Tensor:
        """Take in activations [B, D]; the reconstructions [B, D]."""
        home = self.sums.device
        x_BD = x_BD.to(self.device, self.dictionary.decoder_rows.dtype)
        x_hat_BD, acts_BF = self.dictionary(x_BD, output_features=True)
        active_BF = (acts_BF != 0).to(home)
        x, x_hat = x_BD.to(home).double(), x_hat_BD.to(home).double()
        x_norm_B, x_hat_norm_B, dot_B = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        somewhere_B = x_norm_B != 0
        self.tokens += len(x)
        self.fired_F |= active_BF.any(0)
        self.sum_D += x.sum(0)
        self.sums += torch.stack(
            [
                active_BF.sum().double(),
                (x - x_hat).pow(2).sum(),
                x.pow(2).sum(),
                x_hat.pow(2).sum(),
                dot_B.sum(),
                (dot_B / (x_norm_B * x_hat_norm_B).clamp_min(1e-30)).sum(),
                (x_hat_norm_B / x_norm_B)[somewhere_B].sum(),
                somewhere_B.sum().double(),
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
        active, error, square, square_hat, dot, cosines, ratios, somewhere = self.sums.tolist()
        variance = square - self.sum_D.pow(2).sum().item() / n
        varies = not variance <= 1e-12 * square  # less is rounding, and NaN stays NaN
        return EvalResult(
            l0=active / n,
            frac_variance_explained=1 - error / variance if varies else math.nan,
            mse=error / (n * len(self.sum_D)),
            cossim=cosines / somewhere if somewhere else math.nan,
            l2_ratio=ratios / somewhere if somewhere else math.nan,
            relative_reconstruction_bias=square_hat / dot if dot else math.nan,
            frac_alive=self.fired_F.double().mean().item(),
            tokens=n,
            **losses,
        )


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    activations: Iterable[Tensor],
    *,
    n_batches: int | None = None,
) -> dict[str, Any]:
    """Pooled metrics of a dictionary on batches of activations [B, D], as a dict with the names of `EvalResult`.

    Raises:
        UserError: no activations.
    """
    pooled = PooledMetrics(dictionary)
    for x_BD in itertools.islice(activations, n_batches):
        pooled.update(x_BD)
    return {name: value for name, value in dataclasses.asdict(pooled.result()).items() if value is not None}


@torch.no_grad()
def evaluate_dictionaries(
    lm: TracedLM,
    contexts: Iterable[TokenBatch],
    dictionaries: Sequence[tuple[str, Dictionary]],
    *,
    max_tokens: int | None = None,
    remove_special: bool = True,
    max_activation_norm_multiple: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[EvalResult]:
    """Evaluate dictionaries at their hook points on token contexts.

    Args:
        dictionaries: (hook point, dictionary that takes raw activations).
        max_tokens: stop behind the batch that reaches this many activations.
        remove_special, max_activation_norm_multiple: which activations count, as in `LanguageModelActivations`.
        progress: called with the activations measured so far.

    Raises:
        UserError: no contexts.
    """
    from dictionary_learning.activations.language_model import LanguageModelActivations

    if not dictionaries:
        return []
    hook_points = list(dict.fromkeys(name for name, _ in dictionaries))
    pooled = [PooledMetrics(dictionary) for _, dictionary in dictionaries]
    losses = [_LossSums() for _ in dictionaries]
    zeros = {name: _LossSums() for name in hook_points}
    for batch in contexts:
        logits_CLV, acts = lm.logits(batch.tokens_CL, capture=hook_points)
        keep_CL = (batch.keep_CL if remove_special else batch.real_CL).to(lm.device)
        if max_activation_norm_multiple is not None:
            flat = {name: x[keep_CL] for name, x in acts.items()}
            usual = LanguageModelActivations._usual_rows(flat, max_activation_norm_multiple)
            keep_CL = (
                torch.zeros_like(keep_CL)
                .flatten()
                .index_fill_(0, keep_CL.flatten().nonzero().flatten()[usual], True)
                .view_as(keep_CL)
            )
        measure = _LossMeter(batch.tokens_CL.to(lm.device), keep_CL, batch.keep_CL.to(lm.device), logits_CLV)
        for name in hook_points:
            blank = acts[name].masked_fill(keep_CL[..., None], 0.0)
            zeros[name].add(*measure(lm.logits(batch.tokens_CL, replace={name: blank})[0]))
        for (name, _), metrics, sums in zip(dictionaries, pooled, losses, strict=True):
            x_hat_BD = metrics.update(acts[name][keep_CL].float())
            patched = acts[name].clone()
            patched[keep_CL] = x_hat_BD.to(patched)
            sums.add(*measure(lm.logits(batch.tokens_CL, replace={name: patched})[0]))
        if progress is not None:
            progress(pooled[0].tokens)
        if max_tokens is not None and pooled[0].tokens >= max_tokens:
            break
    results = []
    for (name, _), metrics, sums in zip(dictionaries, pooled, losses, strict=True):
        original, reconstructed, kl = sums.means()
        zero = zeros[name].means()[1]
        gap = zero - original
        results.append(
            metrics.result(
                loss_original=original,
                loss_reconstructed=reconstructed,
                loss_zero=zero,
                frac_recovered=(zero - reconstructed) / gap if gap else math.nan,
                kl=kl,
            )
        )
    return results


class _LossMeter:
    """Sums of the loss and the KL divergence against one batch's original logits."""

    def __init__(self, tokens_CL: Tensor, replaced_CL: Tensor, ordinary_CL: Tensor, logits_CLV: Tensor) -> None:
        self.where = replaced_CL[:, :-1] & ordinary_CL[:, 1:]
        self.targets_N = tokens_CL[:, 1:][self.where]
        self.log_p_NV = logits_CLV[:, :-1][self.where].float().log_softmax(-1)
        self.original = self._loss(self.log_p_NV)

    def _loss(self, log_p_NV: Tensor) -> float:
        return -log_p_NV.gather(1, self.targets_N[:, None]).cpu().double().sum().item()

    def __call__(self, logits_CLV: Tensor) -> tuple[int, float, float, float]:
        """(predictions, summed original loss, summed loss under `logits_CLV`, summed KL)."""
        log_q_NV = logits_CLV[:, :-1][self.where].float().log_softmax(-1)
        kl = (self.log_p_NV.exp() * (self.log_p_NV - log_q_NV)).sum(-1).cpu().double().sum().item()
        return len(self.targets_N), self.original, self._loss(log_q_NV), kl


class _LossSums:
    def __init__(self) -> None:
        self.count, self.sums = 0, [0.0, 0.0, 0.0]

    def add(self, count: int, *values: float) -> None:
        self.count += count
        self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]

    def means(self) -> list[float]:
        return [total / self.count if self.count else math.nan for total in self.sums]


# ----------------------------------------------------------------------------------------------- summary of a sweep


def sorted_along_front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a summary by hook point and L0, with `front` True for the best trade-offs: where no other dictionary of
    that hook point has as low an L0 and recovers as much of the loss (or, without a loss, explains as much variance).
    """

    best: dict[Any, float] = {}
    out = []
    for row in sorted(rows, key=lambda row: (str(row.get("hook_point")), row["l0"], -_quality(row))):
        best_so_far = best.get(row.get("hook_point"), -math.inf)
        out.append({**row, "front": _quality(row) > best_so_far})
        best[row.get("hook_point")] = max(_quality(row), best_so_far)
    return out


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best dictionary: on the front, the one that recovers most of the loss (or, without a loss,
    explains most variance); of equals the sparsest."""
    return max((row for row in rows if row["front"]), key=lambda row: (_quality(row), -row["l0"]))


def _quality(row: dict[str, Any]) -> float:
    values = (row.get("frac_recovered"), row["frac_variance_explained"])
    return next((value for value in values if value is not None), -math.inf)


def write_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `summary.csv`, one line a dictionary."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as handle:
        handle.write(text.getvalue())


def read_summary(path: Path) -> list[dict[str, Any]]:
    """The rows of a `summary.csv` as they were written, along the front.

    Raises:
        UserError: not a summary of at least one dictionary.
    """
    numbers = {field.name for field in dataclasses.fields(EvalResult)} | {"lr"}
    whole = ("width", "seed", "tokens")
    words = ("trainer", "architecture", "hook_point", "sparsity")
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            rows: list[dict[str, Any]] = list(csv.DictReader(handle))
        for row in rows:
            for name in numbers & set(row):
                row[name] = float(row[name]) if row[name] else None
            row |= {name: int(float(row[name])) for name in whole} | {name: str(row[name]) for name in words}
            row["front"] = row["front"] == "True"
        if not any(row["front"] and row["l0"] is not None for row in rows):
            raise ValueError("no dictionary is on the front")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"'{path}' is not a run's summary ({type(error).__name__}: {error}).") from error
    return rows
