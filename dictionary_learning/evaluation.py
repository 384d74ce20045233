"""How good is a dictionary to the model that reads through it? And the field's `evaluate` and `loss_recovered`.

One clean forward of the model gives the activations at every hook point and the original logits; each dictionary then
costs one forward with its reconstruction in place, and each hook point one with zeros. Metrics and losses are pooled
over all tokens (see `metrics.py`).

Special tokens (BOS, separators), padding and activations of extreme norm, which dictionaries do not train on, keep
their activation in those forwards and do not enter the metrics. The loss is taken where a reconstructed token predicts
an ordinary one.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.metrics import EvalResult, PooledMetrics
from dictionary_learning.summary import best_of, read_summary, sorted_along_front, write_summary

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.packing import TokenBatch

__all__ = [
    "EvalResult",
    "PooledMetrics",
    "best_of",
    "evaluate",
    "evaluate_dictionaries",
    "loss_recovered",
    "read_summary",
    "sorted_along_front",
    "write_summary",
]

TRACER_ARGS = {"use_cache": False, "output_attentions": False}
UNLIMITED = 1 << 20  # tokens of a context, of a model that says no longest one

Site: TypeAlias = "str | tuple[str, str]"  # a hook point, or the input and the output of a transcoder


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    activations: Iterable[Any],
    max_len: int = 128,
    batch_size: int = 128,
    io: str | None = None,
    normalize_batch: bool = False,
    tracer_args: Mapping[str, Any] = TRACER_ARGS,
    device: torch.device | str | None = None,
    n_batches: int | None = 1,
) -> dict[str, Any]:
    """Pooled metrics of a dictionary on batches of activations [B, D], as a dict with the names of `EvalResult`.

    Of an `ActivationBuffer` over a language model also the losses, on as many further texts of its stream, with the
    rows that the buffer keeps replaced.

    Args:
        activations: batches [..., D]; for a transcoder [B, 2, D].
        max_len: tokens of a text, for the losses. batch_size: texts in a forward, and per batch of activations.
        io: "out", "in" or "in_and_out"; by default the buffer's, "out" without one.
        normalize_batch: scale each batch to a mean norm of sqrt(D) before the dictionary sees it.
        tracer_args: of the model's forward; only `TRACER_ARGS`, which always hold.
        device: where to evaluate; by default where the dictionary is.
        n_batches: batches to read; None reads all there are.

    Raises:
        UserError: no activations, another io than the buffer's, several hook points, other tracer_args.
    """
    _check_tracer_args(tracer_args)
    buffer_io = getattr(activations, "io", "out" if io is None else io)
    if io not in (None, buffer_io):
        raise UserError(f"io is '{io}', but the buffer delivers '{buffer_io}'.")
    if device is not None and str(device) not in (str(here := dictionary.decoder_rows.device), here.type):
        dictionary = copy.deepcopy(dictionary).to(device)
    pooled, read = PooledMetrics(dictionary), 0
    for batch in itertools.islice(activations, n_batches):
        x, target = _sides(batch, buffer_io)
        scale = _scale(x) if normalize_batch else 1.0
        pooled.update(x * scale, None if target is None else target * scale)
        read += 1
    result = pooled.result()
    lm = getattr(getattr(activations, "source", None), "lm", None)
    if lm is not None:
        result = _with_losses(result, dictionary, activations, lm, max_len, batch_size, read, normalize_batch)
    return {name: value for name, value in dataclasses.asdict(result).items() if value is not None}


def _with_losses(
    result: EvalResult,
    dictionary: Dictionary,
    buffer: Any,
    lm: TracedLM,
    max_len: int,
    batch_size: int,
    batches: int,
    normalize_batch: bool,
) -> EvalResult:
    """The metrics, with the losses on the next `batches` x `batch_size` texts of the buffer's stream."""
    texts: list[Any] = []
    try:
        while len(texts) < batches * batch_size:
            texts.extend(buffer.text_batch(1))
    except StopIteration:
        if not texts:
            warnings.warn("The texts of the buffer are used up: its losses were not measured.", stacklevel=3)
            return result
    contexts = _contexts(texts, lm, max_len, batch_size, getattr(buffer, "add_special_tokens", True))
    points = buffer.hook_points
    losses = evaluate_dictionaries(
        lm,
        contexts,
        [((points[0], points[1]) if buffer.io == "in_and_out" else points[0], dictionary)],
        remove_special=getattr(buffer, "remove_bos", False),
        max_activation_norm_multiple=getattr(buffer, "max_activation_norm_multiple", None),
        normalize_batch=normalize_batch,
    )[0]
    names = ("loss_original", "loss_reconstructed", "loss_zero", "frac_recovered", "kl")
    return dataclasses.replace(result, **{name: getattr(losses, name) for name in names})


@torch.no_grad()
def loss_recovered(
    text: Any,
    model: Any,
    submodule: Any,
    dictionary: Dictionary,
    max_len: int | None = None,
    normalize_batch: bool = False,
    io: str = "out",
    tracer_args: Mapping[str, Any] = TRACER_ARGS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The model's loss as it is, with a dictionary's reconstructions in place, and with zeros in place.

    Args:
        text: a text, a list of texts, or token ids [contexts, tokens].
        model: whatever `TracedLM.load` takes. submodule: a hook point of it, as `TracedLM.resolve` takes it.
        max_len: tokens of a text; by default as many as the model takes.
        (others: see `evaluate`)

    Returns:
        (original, reconstructed, zero): scalars, in nats a token.

    Raises:
        UserError: see `TracedLM.load` and `TracedLM.resolve`; nothing to predict.
    """
    from dictionary_learning.activations.language_model import TracedLM

    _check_tracer_args(tracer_args)
    if io not in ("in", "out", "in_and_out"):
        raise UserError(f"io must be 'in', 'out' or 'in_and_out', got {io!r}.")
    lm = TracedLM.load(model)
    names = [lm.resolve(submodule, io=end)[0].name for end in ("in", "out") if end in io.split("_")]
    texts = [text] if isinstance(text, str) else text
    length = max_len or lm.max_positions or UNLIMITED
    result = evaluate_dictionaries(
        lm,
        _contexts(texts, lm, length, len(texts)),
        [(names[0] if len(names) == 1 else (names[0], names[1]), dictionary)],
        remove_special=False,
        normalize_batch=normalize_batch,
    )[0]
    values = (result.loss_original, result.loss_reconstructed, result.loss_zero)
    return tuple(torch.tensor(value) for value in values)  # type: ignore[return-value]


def _check_tracer_args(tracer_args: Mapping[str, Any]) -> None:
    for name, value in tracer_args.items():
        if name not in TRACER_ARGS or value != TRACER_ARGS[name]:
            raise UserError(f"tracer_args can only be {TRACER_ARGS}, which always hold here, got {name}={value!r}.")


def _sides(batch: Any, io: str) -> tuple[Tensor, Tensor | None]:
    """The input of a dictionary in a batch, and of a transcoder its target."""
    if io == "in_and_out":
        return batch[:, 0], batch[:, 1]
    if isinstance(batch, Mapping):
        raise UserError(
            f"The activations have several hook points ({', '.join(map(str, batch))}): evaluate each dictionary on its "
            "own, or all at once with evaluate_dictionaries."
        )
    return batch, None


def _scale(x: Tensor) -> Tensor:
    """What brings the mean norm of rows [..., D] to sqrt(D)."""
    return x.shape[-1] ** 0.5 / x.norm(dim=-1).mean()


def _contexts(
    texts: Any, lm: TracedLM, max_len: int, batch_size: int, add_special_tokens: bool = True
) -> Iterator[TokenBatch]:
    """Token contexts, one a text, cut at `max_len`; of token ids [C, L] those."""
    from dictionary_learning.packing import ContextPacker, TokenBatch

    if not isinstance(texts, Tensor) and len(texts) and not isinstance(texts[0], str):
        texts = torch.stack([torch.as_tensor(row) for row in texts])
    if not isinstance(texts, Tensor):
        options: dict[str, Any] = {"packing": False, "add_special_tokens": add_special_tokens}
        yield from ContextPacker(texts, lm.tokenizer, ctx_len=max_len, batch_contexts=batch_size, **options)
        return
    special = torch.tensor([] if lm._tokenizer is None else lm.tokenizer.all_special_ids)
    for start in range(0, len(texts), batch_size):
        tokens_CL = texts[start : start + batch_size, :max_len].cpu()
        real_CL, unknown_CL = torch.ones_like(tokens_CL, dtype=torch.bool), torch.zeros_like(tokens_CL)
        keep_CL = ~torch.isin(tokens_CL, special)
        yield TokenBatch(tokens_CL, keep_CL, real_CL, unknown_CL, unknown_CL, unknown_CL, start)


@torch.no_grad()
def evaluate_dictionaries(
    lm: TracedLM,
    contexts: Iterable[TokenBatch],
    dictionaries: Sequence[tuple[Site, Dictionary]],
    *,
    max_tokens: int | None = None,
    remove_special: bool = True,
    max_activation_norm_multiple: float | None = None,
    normalize_batch: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[EvalResult]:
    """Evaluate dictionaries at their hook points on token contexts.

    Args:
        dictionaries: (hook point, dictionary that takes raw activations), or ((input, output), transcoder).
        max_tokens: stop behind the batch that reaches this many activations.
        remove_special, max_activation_norm_multiple: which activations count, as in `LanguageModelActivations`.
        normalize_batch: scale activations to a mean norm of sqrt(D) for the dictionary, and its output back.
        progress: called with the activations measured so far.

    Raises:
        UserError: no contexts.
    """
    from dictionary_learning.activations.language_model import LanguageModelActivations

    if not dictionaries:
        return []
    sites = [site if isinstance(site, tuple) else (site, site) for site, _ in dictionaries]
    hook_points = list(dict.fromkeys(name for site in sites for name in site))
    pooled = [PooledMetrics(dictionary) for _, dictionary in dictionaries]
    losses = [_LossSums() for _ in dictionaries]
    zeros = {replaced: _LossSums() for _, replaced in sites}
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
        for name in zeros:
            blank = acts[name].masked_fill(keep_CL[..., None], 0.0)
            zeros[name].add(*measure(lm.logits(batch.tokens_CL, replace={name: blank})[0]))
        for (read, replaced), metrics, sums in zip(sites, pooled, losses, strict=True):
            x_BD, target_BD = acts[read][keep_CL].float(), acts[replaced][keep_CL].float()
            scale = _scale(x_BD) if normalize_batch else 1.0
            x_hat_BD = metrics.update(x_BD * scale, None if read == replaced else target_BD * scale) / scale
            patched = acts[replaced].clone()
            patched[keep_CL] = x_hat_BD.to(patched)
            sums.add(*measure(lm.logits(batch.tokens_CL, replace={replaced: patched})[0]))
        if progress is not None:
            progress(pooled[0].tokens)
        if max_tokens is not None and pooled[0].tokens >= max_tokens:
            break
    results = []
    for (_, name), metrics, sums in zip(sites, pooled, losses, strict=True):
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
