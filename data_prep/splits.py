"""Which split a record belongs to, decided by its question alone, so that no question has records in two splits.

In: a question key and the seed. Out: a split name. A stable hash draws the split, not a generator: the answer does not
depend on the order of the records, on what else is in the table, or on the machine, and a new record moves no old one.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence

from dictionary_learning.errors import UserError

SPLITS = ("train", "validation", "test")
_NOT_WORD = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """Text with case, compatibility forms, punctuation and white space levelled: words, one space apart."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip() or folded.strip()


def question_key(question: str) -> str:
    """A 32-digit key, equal for questions that differ only in case, punctuation or white space."""
    return hashlib.blake2b(normalised(question).encode("utf-8", "replace"), digest_size=16).hexdigest()


def checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """The fractions of train, validation and test. Raises UserError unless three, none negative, with the sum 1."""
    shown = " ".join(f"{fraction:g}" for fraction in fractions)
    if len(fractions) != len(SPLITS):
        raise UserError(f"--split takes three fractions (train validation test), like 0.98 0.01 0.01, not {shown!r}.")
    if not all(math.isfinite(fraction) and fraction >= 0 for fraction in fractions):
        raise UserError(f"--split {shown}: a fraction must be between 0 and 1.")
    if abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"--split {shown}: the fractions must sum to 1, these sum to {sum(fractions):g}.")
    train, validation, test = fractions
    return train, validation, test


def split_of(key: str, fractions: Sequence[float], seed: int = 0) -> str:
    """The split of the question with this key: train, validation or test with the probabilities `fractions`."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "big") / 2**64
    reached = 0.0
    for name, fraction in zip(SPLITS, fractions, strict=True):
        reached += fraction
        if draw < reached:
            return name
    return max(zip(fractions, SPLITS, strict=True))[1]  # rounding left a sliver above the sum
