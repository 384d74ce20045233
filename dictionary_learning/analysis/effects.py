"""What does a latent do? Its direction read as tokens, the latents that point the same way, and what its loss costs.

In: a language model, a dictionary and the hook point that it belongs to (of a transcoder: the input and the output).
Out: numpy arrays over all latents at once, or over those asked for.

    logit_effects      decoder directions through the final norm and the unembedding: tokens promoted and suppressed
    nearest_features   the latents of most similar decoder direction
    ablation_losses    what a latent's absence does to the prediction of the next token, where it fires

All three are made in parts, so that memory is bounded by the constants below and not by latents x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dictionary_learning.activations.hook_points import ResolvedHookPoint
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.analysis.residual import from_residual, to_residual
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.kernels.matmul import fast_matmul

ELEMENTS = 1 << 25  # of the largest tensor of logits or cosines held at a time: 128 MiB in fp32
VOCABULARY_PART = 1 << 15  # tokens whose unembedding is held in fp32 at a time

Site: TypeAlias = "str | tuple[str, str]"  # a hook point, or the input and the output of a transcoder


class LogitEffects(NamedTuple):
    """Of F latents the k tokens whose logits the direction raises most, and the k it lowers most, strongest first.

    top_tokens_Fk, bottom_tokens_Fk: int64 token ids. top_logits_Fk, bottom_logits_Fk: float32, see `logit_effects`.
    """

    top_tokens_Fk: np.ndarray
    top_logits_Fk: np.ndarray
    bottom_tokens_Fk: np.ndarray
    bottom_logits_Fk: np.ndarray


class Neighbours(NamedTuple):
    """Of F latents the k others of largest decoder cosine, nearest first: int64 indices, float32 cosines."""

    indices_Fk: np.ndarray
    cosines_Fk: np.ndarray


# ---- logit effects -----------------------------------------------------------------------------------------------


@torch.no_grad()
def logit_effects(
    lm: TracedLM, dictionary: Dictionary, hook_point: Site, features: Sequence[int] | None = None, k: int = 10
) -> LogitEffects:
    """The tokens that a latent's direction promotes and suppresses by its direct path to the output.

    For a decoder direction d, scaled to a root mean square of 1, this is

        W_U (norm(d) - norm(0))

    with the unembedding W_U and the model's own final norm. A LayerNorm or RMSNorm is gain * (x - mean) / scale(x) +
    bias: the difference takes the bias out, and with the direction alone in the stream the scale is its own, a positive
    number. The norm's non-linearity is that scale; any other one (that of a real residual stream, say) changes all
    logits of a latent by one factor and no ranking. So the values compare tokens within a latent; they are no logits
    per unit of activation, and the length of d does not enter. What comes behind the unembedding and keeps the order
    (a bias aside: soft-capping, a scale) is left out. Later blocks, which read the direction too, are not in it.

    Where a family normalises a part's output before adding it to the stream (gemma-2's post_feedforward_layernorm
    behind mlp_out), the direction goes through that norm alone first, in the same way: x - norm(0).

    Source: the logit lens (nostalgebraist 2020) on decoder directions, direct logit attribution (Elhage et al. 2021,
    "A Mathematical Framework for Transformer Circuits").

    Args:
        hook_point: where the dictionary's output goes; of a pair (input, output) the second.
        features: latents to look at, in this order; all by default.
        k: tokens a side, at most the vocabulary.

    Raises:
        UserError: `why_no_logit_effects` has something to say; a latent that there is not; a bad k.
    """
    if reason := why_no_logit_effects(lm, dictionary, hook_point):
        raise UserError(reason)
    directions_FD = dictionary.decoder_rows.detach()[_indices(dictionary, features)].to(lm.device).float()
    *norms, unembedding = to_residual(lm, lm.resolve(_written(hook_point))[0])[0] + from_residual(lm)
    x_FD = torch.cat([_through(norms, part) for part in directions_FD.split(max(1, ELEMENTS // lm.d_model))])
    with fast_matmul():
        return _extremes(x_FD, unembedding.weight[: _known_tokens(lm)], _checked_k(k))


def why_no_logit_effects(lm: TracedLM, dictionary: Dictionary, hook_point: Site) -> str | None:
    """One sentence why directions at a hook point have no direct path to the logits; None where they have.

    They have one where the dictionary's output is added to the residual stream, or is the residual stream. The inside
    of an MLP, the heads before they are merged, and inputs of MLP and attention are read by weights of the model first.

    Raises:
        UserError: see `TracedLM.resolve`.
    """
    point = lm.resolve(_written(hook_point))[0]
    if point.width != dictionary.output_dim:
        return (
            f"A dictionary with outputs of width {dictionary.output_dim} does not fit the width {point.width} of "
            f"'{point.name}'."
        )
    if reason := to_residual(lm, point)[1]:
        return reason
    try:
        from_residual(lm)
    except UserError as error:
        return str(error)
    return None


def _written(hook_point: Site) -> str:
    return hook_point if isinstance(hook_point, str) else hook_point[1]


def _through(norms: Sequence[nn.Module], x_FD: Tensor) -> Tensor:
    """Directions behind each norm alone, in fp32: norm(x / rms(x)) - norm(0)."""
    for norm in norms:
        like = next((p for p in norm.parameters()), x_FD)
        x_FD = x_FD * (x_FD.shape[-1] ** 0.5 / x_FD.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        x_FD = norm(x_FD.to(like.dtype)).float() - norm(torch.zeros_like(x_FD[:1], dtype=like.dtype)).float()
    return x_FD


def _extremes(x_FD: Tensor, weight_VD: Tensor, k: int) -> LogitEffects:
    """The k largest and smallest of each row of x W^T [F, V], a block of latents and of tokens at a time."""
    k, sides = min(k, len(weight_VD)), (True, False)
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for rows_RD in x_FD.split(max(1, ELEMENTS // min(len(weight_VD), VOCABULARY_PART))):
        best = [(rows_RD.new_empty(len(rows_RD), 0), rows_RD.new_empty(len(rows_RD), 0, dtype=torch.long))] * 2
        for start in range(0, len(weight_VD), VOCABULARY_PART):
            logits_RV = rows_RD @ weight_VD[start : start + VOCABULARY_PART].detach().float().t()
            for side, largest in enumerate(sides):
                part_Rk = logits_RV.topk(min(k, logits_RV.shape[1]), largest=largest)
                logits = torch.cat([best[side][0], part_Rk.values], 1)
                tokens = torch.cat([best[side][1], part_Rk.indices + start], 1)
                best_Rk = logits.topk(min(k, logits.shape[1]), largest=largest)
                best[side] = (best_Rk.values, tokens.gather(1, best_Rk.indices))
        for side in range(2):
            found[side].append(best[side])
    top, bottom = ([torch.cat(column).cpu().numpy() for column in zip(*side, strict=True)] for side in found)
    return LogitEffects(top[1], top[0], bottom[1], bottom[0])


def _known_tokens(lm: TracedLM) -> int:
    """Rows of the unembedding that stand for a token; the padding behind them has arbitrary weights."""
    return lm.vocab_size if lm._tokenizer is None else min(lm.vocab_size, len(lm._tokenizer))


# ---- neighbours --------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_features(dictionary: Dictionary, k: int = 10) -> Neighbours:
    """The k latents of largest cosine between decoder directions, for every latent, itself left out.

    Direction, not its opposite: a latent that points the other way has a negative cosine and comes last. Directions of
    length zero have cosine 0 with all. With fewer than k others, all of them.

    Raises:
        UserError: a bad k.
    """
    directions_FD = torch.nn.functional.normalize(dictionary.decoder_rows.detach().float(), dim=1)
    k = min(_checked_k(k), dictionary.dict_size - 1)
    found = []
    for start in range(0, dictionary.dict_size, rows := max(1, ELEMENTS // dictionary.dict_size)):
        cosines_RF = directions_FD[start : start + rows] @ directions_FD.t()
        cosines_RF.diagonal(start).fill_(-torch.inf)
        found.append(cosines_RF.topk(k, dim=1))
    return Neighbours(
        torch.cat([top.indices for top in found]).cpu().numpy(), torch.cat([top.values for top in found]).cpu().numpy()
    )


# ---- ablation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def ablation_losses(
    lm: TracedLM,
    dictionary: Dictionary,
    hook_point: Site,
    tokens_FEW: np.ndarray | Tensor | Sequence[Any],
    features: Sequence[int] | None = None,
    *,
    logits_a_forward: int = ELEMENTS,
) -> np.ndarray:
    """Mean change of the next-token loss when a latent is taken out where it fires, in nats.

    Each window of tokens is a context of its own, with the tokenizer's BOS in front where there is one. Where the
    latent fires in it, its decoder term f d is subtracted at the hook point at all positions at once; everything else,
    the part that the dictionary does not reconstruct included, stays. The mean is over the positions at which the
    latent fires and whose next token is in the window. Positive: the model predicts worse without the latent.

    A row of a forward is a latent in one of its windows, so that a forward ablates as many latents as it has rows.

    Args:
        tokens_FEW: [F', E, W] token ids, E windows for each latent; -1 where there is no token, on either side.
        features: the F' latents; all by default.
        logits_a_forward: bounds the memory of a forward: rows x tokens x (vocabulary + latents).

    Returns:
        [F'] float64, NaN for a latent that never fires in its windows before a token.

    Raises:
        UserError: windows of another shape, a latent that there is not, a dictionary that does not fit.
    """
    index_F = _indices(dictionary, features)
    tokens_FEW = torch.as_tensor(np.asarray(tokens_FEW)).long()
    if tokens_FEW.ndim != 3 or len(tokens_FEW) != len(index_F):
        raise UserError(
            f"Windows should be token ids [latents, windows, tokens] of {len(index_F)} latents, got "
            f"{tuple(tokens_FEW.shape)}."
        )
    read, written = check_fit(lm, dictionary, hook_point)
    tokens_RW, real_RW, row_R = _rows(lm, tokens_FEW)
    sums_F = torch.zeros(len(index_F), dtype=torch.float64)  # on the CPU: MPS has no float64
    counts_F = torch.zeros_like(sums_F)
    at_once = max(1, logits_a_forward // (max(1, tokens_RW.shape[1]) * (lm.vocab_size + dictionary.dict_size)))
    for start in range(0, len(tokens_RW), at_once):
        tokens_BL, real_BL = tokens_RW[start : start + at_once], real_RW[start : start + at_once].to(lm.device)
        which_B = row_R[start : start + at_once]
        latent_B11 = index_F[which_B].to(lm.device)[:, None, None]
        logits_BLV, acts = lm.logits(tokens_BL, capture=read)
        x_BLD = as_the_dictionary(acts[read.name], dictionary)
        f_BLF = dictionary.encode(x_BLD).to(lm.device) * real_BL[..., None]
        index_BL1 = latent_B11.expand(-1, f_BLF.shape[1], 1)
        f_BL1 = f_BLF.gather(-1, index_BL1)
        alone_BLF = torch.zeros_like(f_BLF).scatter_(-1, index_BL1, f_BL1).to(x_BLD)
        term_BLD = decoder_terms(dictionary, alone_BLF, x_BLD)
        ablated_BLV = lm.logits(tokens_BL, replace={written: partial(plus, change=-term_BLD)})[0]
        where_BL = (f_BL1[:, :-1, 0] != 0) & real_BL[:, 1:]
        next_N = tokens_BL[:, 1:].to(lm.device)[where_BL]
        before_N, after_N = (_losses(logits[:, :-1][where_BL], next_N) for logits in (logits_BLV, ablated_BLV))
        latent_N = which_B[:, None].expand(where_BL.shape)[where_BL.cpu()]
        sums_F.index_add_(0, latent_N, (after_N - before_N).cpu().double())
        counts_F += latent_N.bincount(minlength=len(counts_F))
    return (sums_F / torch.where(counts_F > 0, counts_F, torch.nan)).numpy()


def _rows(lm: TracedLM, tokens_FEW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows as rows that begin with BOS and are filled on the right: tokens [R, L], which of them are the window's
    own [R, L], and the number of the latent [R]. Windows without a token are left out."""
    flat_RW = tokens_FEW.flatten(0, 1)
    row_R = torch.arange(len(tokens_FEW)).repeat_interleave(tokens_FEW.shape[1])
    there_R = (flat_RW >= 0).any(1)
    flat_RW, row_R = flat_RW[there_R], row_R[there_R]
    outside_RW = flat_RW < 0
    order_RW = outside_RW.int().argsort(dim=1, stable=True)  # the tokens first, in their order
    tokens_RW, real_RW = flat_RW.gather(1, order_RW), ~outside_RW.gather(1, order_RW)
    tokens_RW = tokens_RW.masked_fill(~real_RW, 0)
    bos = None if lm._tokenizer is None else lm._tokenizer.bos_token_id
    if bos is not None:
        first_R1 = torch.full((len(tokens_RW), 1), bos)
        tokens_RW = torch.cat([first_R1, tokens_RW], 1)
        real_RW = torch.cat([torch.zeros_like(first_R1, dtype=torch.bool), real_RW], 1)
    return tokens_RW, real_RW, row_R


def as_the_dictionary(x: Tensor, dictionary: Dictionary) -> Tensor:
    """Activations on the device and in the dtype of a dictionary."""
    return x.to(dictionary.decoder_rows)


def decoder_terms(dictionary: Dictionary, amounts_F: Tensor, x: Tensor) -> Tensor:
    """What amounts of latents [..., F] are in the activations [..., D_out]: W_dec amounts.

    For a dictionary that normalises its input x it is that in units of x, so it comes from the dictionary's own
    `reconstruct`, less its constant part.
    """
    return dictionary.reconstruct(amounts_F, x) - dictionary.reconstruct(torch.zeros_like(amounts_F), x)


def plus(x: Tensor, change: Tensor) -> Tensor:
    """x + change, added in no less than fp32 and rounded once to x's dtype; x itself where change is 0."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) + change.to(x.device)).to(x.dtype)


def _losses(logits_NV: Tensor, next_N: Tensor) -> Tensor:
    """[N] cross entropy of the next token, in nats, in fp32."""
    return nn.functional.cross_entropy(logits_NV.float(), next_N, reduction="none")


# ---- checks ------------------------------------------------------------------------------------------------------


def check_fit(lm: Any, dictionary: Dictionary, hook_point: Site) -> tuple[ResolvedHookPoint, ResolvedHookPoint]:
    """Where in a model (a `TracedLM` or a `SentenceEncoder`) a dictionary reads and where it writes, the same place but
    for a transcoder.

    Raises:
        UserError: no such hook point, or one of another width; a transcoder without its two hook points.
    """
    names = (hook_point, hook_point) if isinstance(hook_point, str) else tuple(hook_point)
    if dictionary.is_transcoder and isinstance(hook_point, str):
        raise UserError(
            f"A transcoder reads at one hook point and writes at another: give both, got '{hook_point}' alone."
        )
    read, written = lm.resolve(names)
    for point, width in ((read, dictionary.activation_dim), (written, dictionary.output_dim)):
        if point.width != width:
            raise UserError(
                f"The dictionary is of width {width}, but '{point.name}' of {lm.name} has width {point.width}: it "
                "belongs to another hook point or model."
            )
    return read, written


def check_feature(dictionary: Dictionary, feature: Any) -> int:
    """A latent's number. Raises UserError where the dictionary has no such latent."""
    if isinstance(feature, bool) or not isinstance(feature, (int, np.integer)):
        raise UserError(f"A latent is given by its number, got {feature!r}.")
    if not 0 <= feature < dictionary.dict_size:
        raise UserError(f"There is no latent {feature}: they are numbered 0 to {dictionary.dict_size - 1}.")
    return int(feature)


def _indices(dictionary: Dictionary, features: Sequence[int] | None) -> Tensor:
    if features is None:
        return torch.arange(dictionary.dict_size)
    return torch.tensor([check_feature(dictionary, feature) for feature in features], dtype=torch.long)


def _checked_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UserError(f"k must be a positive integer, got {k!r}.")
    return k
