"""What happens to a model's predictions when latents are turned up, down, off or round?

In: a language model, prompts, and interventions: a dictionary at its hook point, latents of it, what to do with them
and at which tokens. Out: next-token distributions with and without, position by position (`compare`); continuations
are in `generation.py`.

An intervention changes codes, not activations: it encodes what the model has at the hook point, replaces the codes f of
its latents by f', and adds the change to the activations,

    x' = x + W_dec (f' - f)                   the error term x - x_hat is kept (the default)
    x' = x_hat + W_dec (f' - f)               it is dropped

so that f' = f leaves x as it is to the last bit. Tokens that are not chosen are never touched. All interventions at
one hook point see the activations that the model has there, under the effect of those earlier in the forward pass, and
their changes add up.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.hook_points import ResolvedHookPoint
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.analysis.effects import (
    Site,
    as_the_dictionary,
    check_feature,
    check_fit,
    decoder_terms,
    plus,
)
from dictionary_learning.analysis.prompts import Positions, Prompts, decode_each, read_prompts
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError, did_you_mean

LOGITS_A_FORWARD = 1 << 27  # contexts x tokens x vocabulary: 512 MiB in fp32

# Mode -> the codes f' from the codes f and the value v (of "set" and "add": in activations).
MODES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "amplify": lambda f, v: f * v,
    "suppress": lambda f, v: f / v,
    "ablate": lambda f, v: torch.zeros_like(f),
    "negate": lambda f, v: -f,
    "set": lambda f, v: torch.zeros_like(f) + v,
    "add": lambda f, v: f + v,
}
WITHOUT_VALUE = ("ablate", "negate")
FACTORS = ("amplify", "suppress")
SCALES = (*FACTORS, *WITHOUT_VALUE)  # modes that leave a latent that does not fire as it is


@dataclass(frozen=True)
class Intervention:
    """What to do with latents of a dictionary at the chosen tokens.

    Args:
        hook_point: where the dictionary belongs, or (input, output) of a transcoder, which acts on the output.
        features: numbers of latents, or one.
        mode: amplify (f' = v f), suppress (f' = f / v), ablate (f' = 0), negate (f' = -f), set (f' = v), add
            (f' = f + v).
        value: v. For amplify and suppress a positive factor, where 1 changes nothing; for set and add any number, in
            multiples of `unit`; none for ablate and negate.
        positions: see `Prompts.mask`. By default every token that is not special.
        drop_error: replace x by the reconstruction at the chosen tokens, before the change.
        unit: the activation that value 1 stands for in set and add, one for all latents or one each: give a latent's
            largest activation to have the value in multiples of it.

    Raises:
        UserError: an unknown mode, a value that is missing, superfluous, not finite or not positive where it must be, a
            latent that there is not or that is given twice.
    """

    hook_point: Site
    dictionary: Dictionary = field(repr=False)
    features: int | Sequence[int]
    mode: str
    value: float | None = None
    positions: Positions = "all"
    drop_error: bool = False
    unit: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        given = [self.features] if isinstance(self.features, int | np.integer) else list(self.features)
        numbers = tuple(check_feature(self.dictionary, feature) for feature in given)
        if not numbers:
            raise UserError("There is no latent to intervene on: give at least one number.")
        if twice := next((number for number in numbers if numbers.count(number) > 1), None):
            raise UserError(f"Latent {twice} is given twice in one intervention.")
        object.__setattr__(self, "features", numbers)
        if self.mode not in MODES:
            near = did_you_mean(self.mode, MODES)
            raise UserError(f"Unknown mode '{self.mode}': use one of {', '.join(MODES)}.{near}")
        self._check_value()
        units = [self.unit] * len(numbers) if isinstance(self.unit, int | float) else [float(u) for u in self.unit]
        if len(units) != len(numbers) or not all(math.isfinite(unit) and unit > 0 for unit in units):
            raise UserError(f"unit should be one positive number, or one for each of the {len(numbers)} latents.")
        object.__setattr__(self, "unit", tuple(units))

    def _check_value(self) -> None:
        value = self.value
        if self.mode in WITHOUT_VALUE:
            if value is not None:
                raise UserError(f"Mode '{self.mode}' takes no value, got {value}.")
            return
        if value is None:
            raise UserError(f"Mode '{self.mode}' needs a value: add one (--value), such as 2.")
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"The value of mode '{self.mode}' must be a finite number, got {value!r}.")
        if self.mode in FACTORS and value <= 0:
            other = "ablate" if value == 0 else "negate"
            raise UserError(f"Mode '{self.mode}' takes a positive factor, got {value}; mode '{other}' exists too.")

    def codes(self, f_n: Tensor) -> Tensor:
        """f' [..., n] for the codes f [..., n] of the intervention's latents."""
        value: Any = self.value
        if value is not None and self.mode not in FACTORS:
            value = f_n.new_tensor(self.unit) * value
        return MODES[self.mode](f_n, value)


# ---- placing them in a forward pass ------------------------------------------------------------------------------


class _Placed(NamedTuple):
    """An intervention found in a model. `mask_CL`: the tokens that it changes."""

    intervention: Intervention
    read: ResolvedHookPoint
    written: ResolvedHookPoint
    mask_CL: Tensor


class Codes(NamedTuple):
    """Codes of an intervention's n latents in one forward, before and after it: [C, L, n] each, on the CPU."""

    before_CLn: Tensor
    after_CLn: Tensor


def place(lm: Any, interventions: Sequence[Intervention], masks: Sequence[Tensor]) -> list[_Placed]:
    """Interventions with the tokens [C, L] that each changes, found in a `TracedLM` or a `SentenceEncoder`.

    Raises:
        UserError: no intervention, a dictionary that does not fit its hook point, one latent changed twice at one
            token, or two dictionaries that both replace the activations there by a reconstruction.
    """
    if not interventions:
        raise UserError("There is no intervention: give at least one.")
    points: dict[tuple[str, str], ResolvedHookPoint] = {}  # a place may go by several names
    placed = []
    for one, mask_CL in zip(interventions, masks, strict=True):
        ends = check_fit(lm, one.dictionary, one.hook_point)
        read, written = (points.setdefault((end.path or end.name, end.io), end) for end in ends)
        placed.append(_Placed(one, read, written, mask_CL))
    for number, (one, _, at, mask_CL) in enumerate(placed):
        for other, _, there, other_CL in placed[:number]:
            if at != there or not (mask_CL & other_CL).any():
                continue
            same = one.dictionary is other.dictionary
            if same and (common := set(one.features) & set(other.features)):  # type: ignore[arg-type]
                raise UserError(f"Latent {min(common)} at '{at.name}' is changed by two interventions at one token.")
            if not same and one.drop_error and other.drop_error:
                raise UserError(f"Two dictionaries can't both replace the activations at '{at.name}' of one token.")
    return placed


def replacements(placed: Sequence[_Placed]) -> tuple[dict[Any, Callable[[Tensor], Tensor]], list[Codes]]:
    """What `TracedLM.logits` takes as `replace`, and the codes, which the forward pass fills in."""
    seen: dict[str, Tensor] = {}  # what transcoders read, as the model reads it
    codes: list[Codes] = [Codes(torch.empty(0), torch.empty(0))] * len(placed)
    read_elsewhere = {one.read.name for one in placed if one.read != one.written}

    def at(point: ResolvedHookPoint) -> Callable[[Tensor], Tensor]:
        here = [(number, one) for number, one in enumerate(placed) if one.written == point]

        def change(x: Tensor) -> Tensor:
            new = x
            made = [(number, one, *_change(one, x, _read(one, x, seen))) for number, one in here]
            for _, one, base, _, _ in made:
                if one.intervention.drop_error:
                    new = torch.where(one.mask_CL.to(x.device)[..., None], base.to(x), new)
            for number, _, _, term, record in made:
                new, codes[number] = plus(new, term), record
            if point.name in read_elsewhere:
                seen[point.name] = new
            return new

        return change

    points = {one.read for one in placed} | {one.written for one in placed}
    return {point: at(point) for point in points}, codes


def _read(one: _Placed, x: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
    """What an intervention's dictionary encodes: what is to be changed, x, or of a transcoder what passed earlier."""
    if one.read == one.written:
        return x
    if one.read.name not in seen:
        raise UserError(f"A transcoder can't act at '{one.written.name}', which runs before '{one.read.name}'.")
    return seen[one.read.name]


def _change(one: _Placed, x: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Codes]:
    """Of one intervention the reconstruction, if it is asked for, W_dec (f' - f), 0 but at the chosen tokens, and the
    codes."""
    intervention, dictionary = one.intervention, one.intervention.dictionary
    read = as_the_dictionary(read, dictionary)
    f_CLF = dictionary.encode(read)
    features = torch.tensor(intervention.features, device=f_CLF.device)
    before_CLn = f_CLF[..., features]
    after_CLn = torch.where(one.mask_CL.to(f_CLF.device)[..., None], intervention.codes(before_CLn), before_CLn)
    amounts_CLF = torch.zeros_like(f_CLF).index_copy_(-1, features, after_CLn - before_CLn)
    base = dictionary.reconstruct(f_CLF, read) if intervention.drop_error else x
    return base, decoder_terms(dictionary, amounts_CLF, read), Codes(before_CLn.cpu(), after_CLn.cpu())


# ---- comparing predictions ---------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """The k likeliest next tokens behind each of T tokens: ids [T, k], probabilities [T, k], and of all ids their
    strings."""

    tokens_Tk: np.ndarray
    probabilities_Tk: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """One prompt's predictions, original beside modified, behind each of its T tokens.

    tokens: strings. token_T: ids. changed_T: bool, tokens at which some intervention acts. original, modified: the
    likeliest next tokens. kl_T: float64, KL(original || modified) in nats. watched: strings of the tokens asked for;
    original_Tw, modified_Tw: their probabilities. latents: a label for each of n latents, (hook point, number);
    before_Tn, after_Tn: their codes where the intervention acts on them. strings: {id: string} of all ids above.
    """

    prompt: str
    tokens: list[str]
    token_T: np.ndarray
    changed_T: np.ndarray
    original: Prediction
    modified: Prediction
    kl_T: np.ndarray
    watched: list[str]
    original_Tw: np.ndarray
    modified_Tw: np.ndarray
    latents: list[tuple[str, int]]
    before_Tn: np.ndarray
    after_Tn: np.ndarray
    strings: dict[int, str] = field(repr=False)

    def table(self, position: int = -1) -> dict[str, list[tuple[str, float]]]:
        """{"original": [(token, probability), ...], "modified": ...} behind a token, the likeliest first."""
        sides = {"original": self.original, "modified": self.modified}
        return {
            name: [
                (self.strings[int(token)], float(p))
                for token, p in zip(side.tokens_Tk[position], side.probabilities_Tk[position], strict=True)
            ]
            for name, side in sides.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        tables = [self.table(position) for position in range(len(self.tokens))]
        return {
            "prompt": self.prompt,
            "latents": [{"hook_point": point, "feature": number} for point, number in self.latents],
            "watched": self.watched,
            "positions": [
                {
                    "token": token,
                    "token_id": int(self.token_T[position]),
                    "changed": bool(self.changed_T[position]),
                    "kl": float(self.kl_T[position]),
                    "before": self.before_Tn[position].tolist(),
                    "after": self.after_Tn[position].tolist(),
                    "watched_original": self.original_Tw[position].tolist(),
                    "watched_modified": self.modified_Tw[position].tolist(),
                    **{name: [{"token": t, "p": p} for t, p in rows] for name, rows in tables[position].items()},
                }
                for position, token in enumerate(self.tokens)
            ],
        }


@torch.no_grad()
def compare(
    model: Any,
    prompts: str | Sequence[str],
    interventions: Intervention | Sequence[Intervention],
    *,
    k: int = 10,
    watch: Sequence[str | int] = (),
    bos: bool = True,
) -> list[Comparison]:
    """Next-token distributions of each prompt, without and with the interventions.

    Args:
        model: whatever `TracedLM.load` takes.
        prompts: texts of any lengths. k: tokens listed a side.
        watch: tokens whose probabilities to follow: ids, or texts, of which the first token counts.
        bos: put the tokenizer's BOS, where it has one, in front of every prompt.

    Raises:
        UserError: see `read_prompts`, `Prompts.mask`, `place`; a watched text without a token; a bad k.
    """
    lm = TracedLM.load(model)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UserError(f"k must be a positive integer, got {k!r}.")
    interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    read = read_prompts(lm, prompts, bos=bos)
    watched = [_watched(lm, token) for token in watch]
    placed = place(lm, interventions, [read.mask(one.positions) for one in interventions])
    rows = max(1, LOGITS_A_FORWARD // (read.tokens_CL.shape[1] * lm.vocab_size))
    found = []
    for start in range(0, len(read.lengths), rows):
        part = slice(start, start + rows)
        here = [one._replace(mask_CL=one.mask_CL[part]) for one in placed]
        replace, codes = replacements(here)
        original_CLV = lm.logits(read.tokens_CL[part])[0]
        modified_CLV = lm.logits(read.tokens_CL[part], replace=replace)[0]
        for row in range(len(original_CLV)):
            codes_here = [(made.before_CLn[row], made.after_CLn[row]) for made in codes]
            masks = [one.mask_CL[row] for one in here]
            logits = (original_CLV[row], modified_CLV[row])
            found.append(_compared(lm, read, start + row, logits, placed, masks, codes_here, k, watched))
    return found


def _compared(
    lm: TracedLM,
    read: Prompts,
    row: int,
    logits: tuple[Tensor, Tensor],
    placed: Sequence[_Placed],
    masks: Sequence[Tensor],
    codes: Sequence[tuple[Tensor, Tensor]],
    k: int,
    watched: Sequence[int],
) -> Comparison:
    """One prompt's comparison, of its row of logits [L, V], masks [L] and codes [L, n]."""
    own = slice(read.first, read.first + read.lengths[row])
    log_p_TV, log_q_TV = (side_LV[own].float().log_softmax(-1) for side_LV in logits)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).clamp_min(0)
    tops = [side_TV.topk(min(k, side_TV.shape[1]), dim=-1) for side_TV in (log_p_TV, log_q_TV)]
    original, modified = (Prediction(top.indices.cpu().numpy(), top.values.exp().cpu().numpy()) for top in tops)
    ids = sorted({*watched, *original.tokens_Tk.flatten().tolist(), *modified.tokens_Tk.flatten().tolist()})
    strings = dict(zip(ids, decode_each(lm, ids), strict=True))
    watched_Tw = [side_TV[:, list(watched)].exp().cpu().numpy() for side_TV in (log_p_TV, log_q_TV)]
    before_Tn, after_Tn = (torch.cat([made[side][own] for made in codes], -1).float().numpy() for side in (0, 1))
    return Comparison(
        prompt=read.texts[row],
        tokens=read.pieces[row],
        token_T=read.tokens_CL[row, own].numpy(),
        changed_T=torch.stack(list(masks)).any(0)[own].numpy(),
        original=original,
        modified=modified,
        kl_T=kl_T.cpu().double().numpy(),
        watched=[strings[token] for token in watched],
        original_Tw=watched_Tw[0],
        modified_Tw=watched_Tw[1],
        latents=[(one.written.name, number) for one in placed for number in one.intervention.features],  # type: ignore[union-attr]
        before_Tn=before_Tn,
        after_Tn=after_Tn,
        strings=strings,
    )


def _watched(lm: TracedLM, token: str | int) -> int:
    if isinstance(token, str):
        ids = lm.tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError(f"The watched text {token!r} has no token.")
        return int(ids[0])
    if not 0 <= token < lm.vocab_size:
        raise UserError(f"There is no token {token}: {lm.name} has 0 to {lm.vocab_size - 1}.")
    return int(token)
