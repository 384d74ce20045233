"""What the page tells of a latent besides its examples, as columns.

In: the table of a dictionary's latents. Out: columns of a chunk of them. Lists of different lengths (logit effects,
neighbours) lie one behind the other, with their lengths; tokens are numbers of the page's vocabulary. As JSON the same
would take twice the room and most of the time that a report takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dictionary_learning.analysis.folder import PER_CORPUS
from dictionary_learning.analysis.types import Examples

SPREAD = ("q10", "q25", "q50", "q75", "q90")
MOST = 255  # entries of a list
LISTS = {  # in the page: (what, how much) in the table
    "near": ("neighbours", "neighbour_cosines"),
    "coactive": ("coactive", "coactive_jaccard"),
    "up": ("top_tokens", "top_logits"),
    "down": ("bottom_tokens", "bottom_logits"),
}


@dataclass(frozen=True)
class Source:
    """Of one dictionary, read once: its columns, examples and descriptions."""

    name: str
    table: dict[str, np.ndarray]
    top: Examples
    samples: Examples
    descriptions: dict[int, dict[str, Any]]

    @property
    def features(self) -> int:
        return len(self.table["density"])


class Details:
    """Of one dictionary. `scale_F` is what a latent's activations are divided by, since the parts hold eleven bits of
    each; `numbers` (string -> number) and `strings` are the page's vocabulary, and grow by what it lacks."""

    def __init__(self, source: Source, corpora: Sequence[str], numbers: dict[str, int], strings: list[str]) -> None:
        self.source = source
        table = source.table
        largest = [np.abs(part.act_FEW).max(axis=(1, 2), initial=0) for part in (source.top, source.samples)]
        scale_F = np.maximum(*largest).astype(np.float32)
        self.scale_F = np.where(scale_F > 0, scale_F, np.float32(1))
        self.spread_FQ = np.stack([table[q].astype(np.float32) for q in SPREAD], axis=1)
        tested = [c for c in corpora if f"rate:{c}" in table]
        each = [table[f"{kind}:{c}"].astype(np.float32) for c in tested for kind in PER_CORPUS]
        self.corpora_FC = np.stack(each, axis=1) if each else np.zeros((source.features, 0), np.float32)

        def number(token: Any) -> int:
            string = str(token)
            if string not in numbers:
                numbers[string] = len(strings)
                strings.append(string)
            return numbers[string]

        self.lists = {}
        for key, (what, how_much) in LISTS.items():
            entries, amounts = table[what], table[how_much]
            lengths_F = np.array(
                [min(len(a or ()), len(b or ()), MOST) for a, b in zip(entries, amounts, strict=True)], np.int64
            )
            words = key in ("up", "down")
            flat = [
                number(entry) if words else entry
                for of_one, length in zip(entries, lengths_F, strict=True)
                for entry in (of_one or ())[:length]
            ]
            values = [v for of_one, length in zip(amounts, lengths_F, strict=True) for v in (of_one or ())[:length]]
            with np.errstate(over="ignore"):
                value_N = np.array(values, np.float32).astype(np.float16)
            self.lists[key] = (lengths_F, np.array(flat, np.int64).astype(np.uint32), value_N)
        self.ends = {key: np.concatenate([[0], np.cumsum(lengths)]) for key, (lengths, _, _) in self.lists.items()}

    def columns(self, low: int, high: int) -> dict[str, np.ndarray]:
        """Of the latents low ... high - 1."""
        table = self.source.table
        columns = {
            "scale": self.scale_F[low:high],
            "active": table["active"][low:high].clip(0, 2**32 - 1).astype(np.uint32),
            "documents": table["documents"][low:high].clip(0, 2**32 - 1).astype(np.uint32),
            "std": table["std"][low:high].astype(np.float32),
            "spread": self.spread_FQ[low:high],
            "corpora": self.corpora_FC[low:high],
        }
        for key, (lengths_F, number_N, value_N) in self.lists.items():
            span = slice(self.ends[key][low], self.ends[key][high])
            columns |= {f"{key}_length": lengths_F[low:high].astype(np.uint8)}
            columns |= {key: number_N[span], f"{key}_value": value_N[span]}
        return columns

    def said(self, low: int, high: int) -> dict[str, dict[str, Any]]:
        """Who described a latent, and how well: {place in the chunk: {"model", "score"}}."""
        said = {}
        for feature in range(low, high):
            entry = self.source.descriptions.get(feature)
            if isinstance(entry, dict):
                said[str(feature - low)] = {
                    k: entry[k] for k in ("model", "score") if isinstance(entry.get(k), str | float)
                }
        return said
