"""Continuations of prompts, as the model writes them and as it writes them under interventions.

Both sides start from the same prompts and, where they are sampled, from the same random numbers: at each step one
uniform number a prompt, read through the inverse of the distribution function over tokens in the order of their
probability. Equal distributions then give equal tokens, so that what differs is the intervention's doing.

A step runs the new tokens alone, behind the keys and values that the model kept of the earlier ones, which hold the
effect of what was done to those. Prompts of any lengths share a batch, which moves on a token at a time from the end of
the shortest prompt: rows whose prompt is longer read on where others write. All rows then have one length at any time,
and need neither padding nor masks nor positions of their own. A model without a cache of keys and values runs the whole
sequence each time, and so does one whose keys of earlier tokens no longer hold once the sequence is longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.analysis.interventions import Intervention, _Placed, place, replacements
from dictionary_learning.analysis.prompts import read_prompts
from dictionary_learning.errors import UserError, did_you_mean

SCOPES = ("both", "prompt", "generated")


class Continuation(NamedTuple):
    """A prompt and how it goes on: texts and token ids, without and with the interventions. An end-of-text token ends a
    continuation and is no part of it."""

    prompt: str
    original: str
    modified: str
    original_ids: list[int]
    modified_ids: list[int]


@torch.no_grad()
def generate(
    model: Any,
    prompts: str | Sequence[str],
    interventions: Intervention | Sequence[Intervention],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    scope: str = "both",
    bos: bool = True,
) -> list[Continuation]:
    """Continue each prompt, without and with the interventions.

    Args:
        model: whatever `TracedLM.load` takes.
        max_new_tokens: at most so many; fewer where the model writes its end-of-text token.
        temperature: 0 takes the likeliest token each time; otherwise tokens are drawn with softmax(logits /
            temperature).
        top_p: draw from the fewest likeliest tokens that have this probability together (nucleus sampling, Holtzman et
            al. 2020, arXiv:1904.09751).
        seed: of the draws' own generator.
        scope: where the interventions act: "prompt" (their positions in the prompt), "generated" (every token that the
            model writes), or "both".
        bos: put the tokenizer's BOS, where it has one, in front of every prompt.

    Raises:
        UserError: see `compare`; a bad number; a prompt that with its continuation is too long for the model.
    """
    lm = TracedLM.load(model)
    check_settings(max_new_tokens, temperature, top_p, seed, scope)
    interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    read = read_prompts(lm, prompts, bos=bos, room=max_new_tokens)
    begin_C = read.first + torch.tensor(read.lengths)
    masks = [_acting(read.mask(one.positions), begin_C, max_new_tokens, scope) for one in interventions]
    placed = place(lm, interventions, masks)
    generator = torch.Generator().manual_seed(seed)
    draws_CS = torch.rand(len(read.lengths), max_new_tokens, generator=generator, dtype=torch.float64)
    draw = partial(choose, temperature=temperature, top_p=top_p)
    sides = [_write(lm, read.tokens_CL, begin_C, acting, draws_CS, draw) for acting in ([], placed)]
    return [
        Continuation(text, lm.tokenizer.decode(old), lm.tokenizer.decode(new), old, new)
        for text, old, new in zip(read.texts, *sides, strict=True)
    ]


def check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int, scope: str) -> None:
    """Raises UserError for a number that generation can't take."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}.")
    if not math.isfinite(temperature) or temperature < 0:
        raise UserError(f"temperature must be 0 (the likeliest token) or a positive number, got {temperature}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}.")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed must be a whole number that is not negative, got {seed}.")
    if scope not in SCOPES:
        raise UserError(f"Unknown scope '{scope}': use one of {', '.join(SCOPES)}.{did_you_mean(scope, SCOPES)}")


def _acting(mask_CL: Tensor, begin_C: Tensor, steps: int, scope: str) -> Tensor:
    """[C, L + steps] bool: a mask over prompts, cut to the scope and going on over the tokens behind each."""
    mask_CL = torch.nn.functional.pad(mask_CL & (scope != "generated"), (0, steps))
    return mask_CL | (torch.arange(mask_CL.shape[1]) >= begin_C[:, None]) & (scope != "prompt")


def _write(
    lm: TracedLM,
    prompts_CL: Tensor,
    begin_C: Tensor,
    placed: Sequence[_Placed],
    draws_CS: Tensor,
    draw: Callable[[Tensor, Tensor], Tensor],
) -> list[list[int]]:
    """One side's continuations, as token ids, of prompts that go up to `begin_C`.

    Where a forward pass begins and ends follows from the prompts' lengths alone, and a row that has ended stays in the
    batch, filled up with token 0: rows that nothing is done to are then the same on both sides to the last bit.
    """
    end, steps = lm.tokenizer.eos_token_id, draws_CS.shape[1]
    tokens_CL = torch.nn.functional.pad(prompts_CL, (0, steps))
    stop_C, open_C = begin_C.clone(), torch.ones(len(begin_C), dtype=torch.bool)
    past, turns = lm.new_cache(), _turns(lm)
    for upto in sorted({begin + step for begin in begin_C.tolist() for step in range(steps)}):
        going_C = open_C & (upto < begin_C + steps)
        if not going_C.any():
            break
        if past is not None and turns(past.get_seq_length(), upto):
            past = lm.new_cache()
        logits_CV = _next_logits(lm, tokens_CL[:, :upto], placed, past)
        rows_C = (going_C & (begin_C <= upto)).nonzero().flatten()
        next_C = draw(logits_CV[rows_C], draws_CS[rows_C, upto - begin_C[rows_C]])
        ended_C = torch.zeros_like(next_C, dtype=torch.bool) if end is None else next_C == end
        tokens_CL[rows_C[~ended_C], upto] = next_C[~ended_C]
        stop_C[rows_C[~ended_C]] += 1
        open_C[rows_C[ended_C]] = False
    spans = zip(begin_C.tolist(), stop_C.tolist(), strict=True)
    return [tokens_CL[row, begin:stop].tolist() for row, (begin, stop) in enumerate(spans)]


def _turns(lm: TracedLM) -> Callable[[int, int], bool]:
    """Whether keys that were made for so many tokens do not hold for a sequence of so many.

    Rotary positions turn keys by fixed angles in most models. In two kinds (transformers, `modeling_rope_utils`) the
    angles of all positions depend on the length of the sequence: "longrope" (phi-3) has others beyond the length that
    the model was first trained on, "dynamic" others at each length beyond it. Models with a kind for each type of layer
    name them one by one.
    """
    config = getattr(lm.module, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    known = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", 0)
    ends: dict[str, list[int]] = {"longrope": [], "dynamic": []}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if (name := kind.get("rope_type", kind.get("type"))) in ends:
            ends[name].append(int(kind.get("original_max_position_embeddings") or known or 0))

    def turns(before: int, upto: int) -> bool:
        return any(before <= end < upto for end in ends["longrope"]) or any(upto > end for end in ends["dynamic"])

    return turns


def _next_logits(lm: TracedLM, tokens_CL: Tensor, placed: Sequence[_Placed], past: Any | None) -> Tensor:
    """[C, V] logits behind the last of the tokens, of which `past` holds the first and takes in the others, in fp64 on
    the CPU."""
    new = slice(past.get_seq_length() if past is not None else 0, tokens_CL.shape[1])
    replace, _ = replacements([one._replace(mask_CL=one.mask_CL[:, new]) for one in placed])
    return lm.logits(tokens_CL[:, new], replace=replace, past=past)[0][:, -1].cpu().double()


def choose(logits_CV: Tensor, draw_C: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """The next token of each row [C], from its logits and a uniform number: see `generate`."""
    if temperature == 0:
        return logits_CV.argmax(-1)
    probability_CV, token_CV = (logits_CV / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    below_CV = probability_CV.cumsum(-1) - probability_CV  # of the likelier tokens together
    probability_CV = probability_CV * (below_CV < top_p)
    upto_CV = probability_CV.cumsum(-1)
    chosen_C = torch.searchsorted(upto_CV, draw_C[:, None] * upto_CV[:, -1:], right=True)
    return token_CV.gather(1, chosen_C.clamp_max(token_CV.shape[1] - 1))[:, 0]
