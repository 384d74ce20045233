"""Prompts for a model, and places in them.

In: texts, and positions as a user gives them (an index, a slice, "last", "all", a pattern). Out: token ids as one batch
with the padding on the right, which a causal model needs no mask for, and a mask over its tokens.

Every prompt begins with BOS where the tokenizer has one, as the contexts that dictionaries train on do. It is no token
of the prompt: position 0 is the first token of the text, and "all" leaves out special tokens, on which dictionaries do
not train.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.errors import UserError, did_you_mean

Positions: TypeAlias = "str | int | slice | Sequence[int] | re.Pattern[str]"
WORDS = ("all", "last")


@dataclass(frozen=True)
class Prompts:
    """C prompts as a batch of L tokens.

    tokens_CL: int64 ids, BOS first where there is one. first: the place in a row of the prompt's own first token (1
    behind a BOS, else 0). lengths: each prompt's own tokens. ordinary_CL: bool, tokens of a prompt that are not
    special. texts: as given. pieces: the string of each token of each prompt, decoded alone.
    """

    tokens_CL: Tensor
    first: int
    lengths: list[int]
    ordinary_CL: Tensor
    texts: list[str]
    pieces: list[list[str]]

    def mask(self, positions: Positions) -> Tensor:
        """[C, L] bool, the tokens meant.

        Args:
            positions: "all" (tokens that are not special), "last", an index of the prompt's tokens (negative: from its
                end), several of them, a slice, or a compiled pattern: tokens that overlap with a match of it in the
                text.

        Raises:
            UserError: a position outside a prompt, a slice of nothing, a pattern without a match in any prompt.
        """
        if isinstance(positions, str):
            if positions not in WORDS:
                raise UserError(
                    f"Positions are 'all', 'last', numbers, a slice or a compiled pattern, got '{positions}'."
                    f"{did_you_mean(positions, WORDS)}"
                )
            if positions == "all":
                return self.ordinary_CL.clone()
        mask_CL = torch.zeros_like(self.ordinary_CL)
        for row, length in enumerate(self.lengths):
            for place in self._places(positions, row, length):
                mask_CL[row, self.first + place] = True
        if isinstance(positions, re.Pattern) and not mask_CL.any():
            where = "the prompt" if len(self.lengths) == 1 else "any prompt"
            raise UserError(f"The pattern '{positions.pattern}' matches nothing in {where}.")
        return mask_CL

    def _places(self, positions: Positions, row: int, length: int) -> list[int]:
        if isinstance(positions, re.Pattern):
            ends = list(accumulate(map(len, self.pieces[row])))
            spans = [match.span() for match in positions.finditer("".join(self.pieces[row]))]
            return [
                place
                for place, (piece, end) in enumerate(zip(self.pieces[row], ends, strict=True))
                if any(start < end and end - len(piece) < stop for start, stop in spans)
            ]
        if isinstance(positions, slice):
            if places := list(range(length))[positions]:
                return places
            shown = ["" if end is None else str(end) for end in (positions.start, positions.stop)]
            raise UserError(f"The slice {':'.join(shown)} holds no token of {self._which(row)}, which has {length}.")
        wanted: Any = -1 if positions == "last" else positions
        indices = list(wanted) if isinstance(wanted, Sequence) else [wanted]
        try:
            indices = [operator.index(index) for index in indices]
        except TypeError:
            raise UserError(f"Positions are whole numbers, got {positions!r}.") from None
        for index in indices:
            if not -length <= index < length:
                raise UserError(
                    f"Position {index} is outside {self._which(row)}, which has {length} tokens: 0 to {length - 1}, or "
                    f"-{length} to -1 from its end."
                )
        return [index % length for index in indices]

    def _which(self, row: int) -> str:
        return "the prompt" if len(self.lengths) == 1 else f"prompt {row}"


def read_prompts(lm: TracedLM, texts: str | Sequence[str], *, bos: bool = True, room: int = 0) -> Prompts:
    """Texts -> tokens.

    Args:
        bos: put the tokenizer's BOS, where it has one, in front.
        room: tokens that are to follow, which must fit too.

    Raises:
        UserError: no prompt, an empty one, one that is too long for the model, a model without a tokenizer.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UserError("There is no prompt: give at least one text.")
    tokenizer: Any = lm.tokenizer
    first = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    rows: list[list[int]] = []
    for number, text in enumerate(texts):
        which = "The prompt" if len(texts) == 1 else f"Prompt {number}"
        if not isinstance(text, str):
            raise UserError(f"{which} should be a text, got {type(text).__name__}.")
        whole = text.encode("utf-8", "replace").decode()  # no tokenizer takes a lone surrogate
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError(f"{which} is empty: give at least one token of text.")
        longest, needed = lm.max_positions, len(first) + len(ids) + room
        if longest is not None and needed > longest:
            counted = f"{needed - room} tokens" + (f" and {room} new ones" if room else "")
            remedy = "ask for fewer new tokens" if needed - room < longest else "shorten it"
            raise UserError(f"{which} is too long: {counted}, and {lm.name} has {longest} positions; {remedy}.")
        rows.append(first + ids)
    tokens_CL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    ordinary_CL = torch.zeros_like(tokens_CL, dtype=torch.bool)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens_CL[row, : len(ids)] = torch.tensor(ids)
        ordinary_CL[row, : len(ids)] = ~torch.isin(tokens_CL[row, : len(ids)], special)
    own = [ids[len(first) :] for ids in rows]
    return Prompts(
        tokens_CL, len(first), [len(ids) for ids in own], ordinary_CL, texts, [decode_each(lm, ids) for ids in own]
    )


def decode_each(lm: TracedLM, ids: Sequence[int]) -> list[str]:
    """The string of each token, decoded alone (a part of a character shows as a replacement character)."""
    return lm.tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
