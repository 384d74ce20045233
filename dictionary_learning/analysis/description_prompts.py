"""What a language model is shown of a latent: examples that explain it, and others to judge a description by.

In: the table and the examples of an analysis. Out: prompts. Texts of corpora are hostile: they are quoted as JSON
strings, which they can't end, without control characters, and what could be taken for our marks is spelt otherwise.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dictionary_learning.analysis.endpoint import printable
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.probes import BEFORE, BEHIND
from dictionary_learning.analysis.types import Examples
from dictionary_learning.errors import UserError

EXPLAINED = 12  # examples shown for a description
JUDGED = 10  # held-out examples of the latent to judge by, and as many of others
TEXT_CHARACTERS = 600  # of a whole text
EFFECTS = 10  # tokens a side


class Place(NamedTuple):
    """The text around a place, as prompts show it: marked to explain, plain (of tokens: shorter) to judge by.

    share: its activation, of the latent's largest.
    """

    marked: str
    plain: str
    share: float
    corpus: str


class Split(NamedTuple):
    """The examples of a latent: those that explain it, those that judge, and judges in which it is silent."""

    explain: list[Place]
    active: list[Place]
    silent: list[Place]


class Material:
    """What an analysis knows of the latents of one dictionary, as prompts need it.

    Raises:
        UserError: see `AnalysisFolder`.
    """

    def __init__(self, folder: AnalysisFolder, name: str, seed: int = 0) -> None:
        self.table = folder.table(name)
        self.top, self.samples = folder.examples(name)
        self.seed = seed
        self._strings = folder.vocabulary()
        self._texts = folder.texts()
        self._spaced = any(text[:1].isspace() and len(text) > 1 for text in self._strings.values())
        self._corpora = list(folder.info.get("corpora") or [])
        self._several = any(column.startswith("rate:") for column in self.table)
        self.probes = folder.probes(name)
        if self.probes is not None and self.probes.fired_RF.shape[1] != len(self.table["feature"]):
            raise UserError(f"The probes of {name} in '{folder.path}' don't fit its table: analyse it again.")

    def has_examples(self, feature: int) -> bool:
        """Whether any text is kept in which the latent is active."""
        return any(bool((kept.document_FE[feature] >= 0).any()) for kept in (self.top, self.samples))

    def split(self, feature: int) -> Split:
        """The latent's examples in two halves that share no document, and as many places where it is silent.

        Documents, each with its strongest place, take turns in the order of these.
        """
        strongest: dict[int, tuple[float, Examples, int]] = {}
        for kept in (self.top, self.samples):
            for at in np.flatnonzero(kept.document_FE[feature] >= 0).tolist():
                document, value = int(kept.document_FE[feature, at]), float(kept.value_FE[feature, at])
                if document not in strongest or value > strongest[document][0]:
                    strongest[document] = (value, kept, at)
        ranked = sorted(strongest.values(), key=lambda entry: -entry[0])
        places = [self._place(kept, feature, at, ranked[0][0]) for _, kept, at in ranked]
        explain = _different(places[0::2], set())
        active = _different(places[1::2], {place.plain for place in explain})
        silent = self._silent(feature, {place.plain for place in [*explain, *active]})
        judges = min(len(active), len(silent), JUDGED)
        return Split(_spread(explain, EXPLAINED), _spread(active, judges), silent[:judges])

    def prompt(self, feature: int, explain: Sequence[Place]) -> str:
        """The question for a description."""
        row = {name: column[feature] for name, column in self.table.items()}
        lines = [f"The latent is active on {row['density']:.3%} of all {'texts' if self.whole else 'tokens'}."]
        if self._several:
            rates = ", ".join(f"{quoted(name)} {row[f'rate:{name}']:.3%}" for name in self._corpora)
            lines.append(f"By corpus: {rates}.")
        lines.append(f"\nTexts on which it is active, the most active first{'' if self.whole else ', marked'}:")
        for number, place in enumerate(explain, 1):
            source = f", from {quoted(place.corpus)}" if self._several else ""
            lines.append(f"{number}. ({place.share:.0%}{source}) {quoted(place.marked)}")
        for side, verb in (("top", "likelier"), ("bottom", "less likely")):
            if len(tokens := list(row[f"{side}_tokens"] or [])[:EFFECTS]):
                lines.append(f"\nTokens that it makes {verb} to come next: {', '.join(map(quoted, tokens))}")
        return "\n".join(lines)

    @property
    def whole(self) -> bool:
        """Whether the unit is a whole text."""
        return self.top.token_FEW.shape[2] == 0

    def _place(self, kept: Examples, feature: int, at: int, largest: float) -> Place:
        share = float(kept.value_FE[feature, at]) / largest
        corpus = self._corpora[kept.corpus_FE[feature, at]] if self._corpora else ""
        if self.whole:
            text = self._text(int(kept.document_FE[feature, at]))
            return Place(text, text, share, corpus)
        inside = kept.token_FEW[feature, at] >= 0
        pieces = self._pieces(kept.token_FEW[feature, at][inside])
        active = (kept.act_FEW[feature, at][inside] > 0).tolist()
        peak = int(inside[: kept.peak_FE[feature, at]].sum())
        around = pieces[max(peak - BEFORE, 0) : peak + BEHIND + 1]
        return Place(_marked(pieces, active), _marked(around, [False] * len(around)), share, corpus)

    def _silent(self, feature: int, texts: set[str]) -> list[Place]:
        """`JUDGED` places at random, of no text that is named, in which the latent is known not to fire."""
        if self.probes is None:
            return []
        silent = np.flatnonzero(~self.probes.fired_RF[:, feature])
        places = map(self._probe, np.random.default_rng((self.seed, feature)).permutation(silent).tolist())
        found: dict[str, Place] = {}
        while len(found) < JUDGED and (place := next(places, None)) is not None:
            if place.plain not in texts:
                found.setdefault(place.plain, place)
        return list(found.values())

    def _probe(self, at: int) -> Place:
        assert self.probes is not None
        corpus = self._corpora[self.probes.corpus_R[at]] if self._corpora else ""
        if self.whole:
            text = self._text(int(self.probes.document_R[at]))
        else:
            pieces = self._pieces(self.probes.token_RW[at][self.probes.token_RW[at] >= 0])
            text = _marked(pieces, [False] * len(pieces))
        return Place(text, text, 0.0, corpus)

    def _pieces(self, tokens: np.ndarray) -> list[str]:
        pieces = [self._strings.get(token, "") for token in tokens.tolist()]
        if self._spaced:
            return pieces
        # WordPiece: a token is a word unless it says that it goes on
        return [piece.removeprefix("##") if piece.startswith("##") else f" {piece}" for piece in pieces]

    def _text(self, document: int) -> str:
        """The beginning of a whole text."""
        text = str(self._texts.get(document, {}).get("text", ""))
        return _unmarked(text[:TEXT_CHARACTERS] + ("…" if len(text) > TEXT_CHARACTERS else ""))


def quoted(text: str) -> str:
    return json.dumps(printable(text), ensure_ascii=False)


def _unmarked(text: str) -> str:
    """Corpus text that can't be taken for our marks."""
    return _bytes_joined(text).replace("<<", "‹‹").replace(">>", "››")


def _marked(pieces: Sequence[str], active: Sequence[bool]) -> str:
    """Pieces of a text joined, <<around>> runs of those that are active, without the space before them."""
    text = ""
    for on, run in itertools.groupby(zip(pieces, active, strict=True), key=lambda pair: pair[1]):
        part = _unmarked("".join(piece for piece, _ in run))
        lead = part[: len(part) - len(part.lstrip())]
        text += f"{lead}<<{part[len(lead) :]}>>" if on and part.strip() else part
    return text.strip()


def _bytes_joined(text: str) -> str:
    """Characters whose bytes stand in several tokens, which are spelt as in \\xe2, put together."""
    return re.sub(
        r"(?:\\x[0-9a-f]{2})+",
        lambda found: bytes.fromhex(found[0].replace("\\x", "")).decode("utf-8", "replace"),
        text,
    )


def _spread(places: list[Place], number: int) -> list[Place]:
    """So many of them, evenly from the first to the last."""
    if len(places) <= number:
        return places
    return [places[at] for at in np.linspace(0, len(places) - 1, number).round().astype(int).tolist()]


def _different(places: list[Place], seen: set[str]) -> list[Place]:
    """Each text once, and none that was seen."""
    return list({place.plain: place for place in reversed(places) if place.plain not in seen}.values())[::-1]
