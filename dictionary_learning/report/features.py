"""What the page holds of latents: a table of each dictionary, chunks of their details, the texts of their examples.

In: the folder of an analysis. Out: named parts (see `parts`), and what the page needs to know of them.

The parts are made within a budget of bytes. Where all that the analysis kept does not fit, the samples of the quantiles
go first, then the top texts but for the first ones: `LEVELS`, each tried until one fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.types import Examples
from dictionary_learning.errors import UserError
from dictionary_learning.report.details import Details, Source
from dictionary_learning.report.parts import compressed, packed_columns, packed_json
from dictionary_learning.report.windows import pooled_windows

CHUNK = 64  # latents of a chunk of details
TOKENS = 1 << 15  # of a chunk of texts
TEXT_BYTES = 1 << 16  # of a chunk of whole texts, about
LONGEST_TEXT = 4000  # characters of a whole text that are kept
ALL = 255  # examples: as many as there are
LEVELS = (
    (ALL, ALL),
    (ALL, 10),
    (ALL, 5),
    (10, 5),
    (10, 0),
    (7, 0),
    (5, 0),
    (3, 0),
    (2, 0),
    (1, 0),
    (0, 0),
)  # (top, samples)
TRIED = 12  # parts of a kind by which the size of a level is estimated
NONE = 255  # in a column of small indices
STATUSES = ("", "dead", "dense")
HOLE = "⋯"  # in place of a token that the vocabulary lacks


@dataclass(frozen=True)
class Parts:
    """encoded: part name -> base64. facts: what the page is told of all. level: (top, samples) kept of each latent."""

    encoded: dict[str, str]
    facts: dict[str, Any]
    level: tuple[int, int]

    @property
    def size(self) -> int:
        return sum(len(name) + len(text) + 44 for name, text in self.encoded.items())  # 44: of the element around it


def read_source(folder: AnalysisFolder, name: str) -> Source:
    """Raises UserError: see `AnalysisFolder`; or its arrays are of different numbers of latents."""
    top, samples = folder.examples(name)
    source = Source(name, folder.table(name), top, samples, folder.descriptions(name))
    if any(len(array) != source.features for array in (*top, *samples)):
        raise UserError(f"The examples of {name} in '{folder.path}' don't fit its table: analyse it again.")
    return source


def fitting_parts(folder: AnalysisFolder, sources: Sequence[Source], names: Sequence[str], budget: int) -> Parts:
    """The fullest parts that take at most `budget` bytes in the page.

    Args:
        names: of all dictionaries of the page, whose numbers name the parts.
    """
    corpora = corpora_of(folder)
    strings = folder.vocabulary()
    texts = folder.texts()
    tried, tables, chunks = 0, 0, 0  # examples of the level that was looked at last, bytes of its tables and chunks
    for level in LEVELS:
        last = level == LEVELS[-1]
        examples = sum(_kept(source.top, level[0]) + _kept(source.samples, level[1]) for source in sources)
        if tried and not last and (examples == tried or tables + chunks * examples / tried > budget):
            continue  # it needs more: half of the examples take more than half of the room, since their texts overlap
        build = _Build(folder, sources, names, corpora, strings, texts, level)
        tried, (tables, chunks) = examples, build.estimate()
        if tables + chunks > 1.05 * budget and not last:
            continue
        parts = Parts(compressed(build.parts()), build.facts(), level)
        if parts.size <= budget or last:
            return parts
    raise AssertionError("the last level is always taken")


def corpora_of(folder: AnalysisFolder) -> list[str]:
    """Labels of the corpora that were analysed, as examples number them."""
    corpora = folder.info.get("corpora")
    return [str(label) for label in corpora] if isinstance(corpora, dict | list) else []


class _Build:
    """The parts of one level."""

    def __init__(
        self,
        folder: AnalysisFolder,
        sources: Sequence[Source],
        names: Sequence[str],
        corpora: list[str],
        strings: dict[int, str],
        texts: dict[int, dict[str, Any]],
        level: tuple[int, int],
    ) -> None:
        self.folder, self.sources, self.corpora = folder, sources, corpora
        self.number = {source.name: list(names).index(source.name) for source in sources}
        self.kept = [(first(source.top, level[0]), spread(source.samples, level[1])) for source in sources]
        flat = [part for pair in self.kept for part in pair]
        self.whole = all(part.token_FEW.shape[-1] == 0 for part in flat)
        self.texts: list[list[str]] = []
        self.strings: list[str] = []
        self.rank_V = np.zeros(0, np.int64)
        if self.whole:
            documents = sorted({int(d) for part in flat for d in np.unique(part.document_FE) if d >= 0})
            self.texts = [_clipped(texts.get(document, {})) for document in documents]
            known = np.array(documents, np.int64)
            self.places = [_whole_places(part, known) for part in flat]
            self.bounds = _text_bounds(self.texts)
        else:
            token_T, self.places = pooled_windows(flat)
            ids, inverse, counts = np.unique(token_T, return_inverse=True, return_counts=True)
            order = np.argsort(-counts, kind="stable")  # common tokens get small numbers, which pack well
            self.rank_V = np.empty(len(ids), np.int64)
            self.rank_V[order] = np.arange(len(ids))
            self.rank_T = self.rank_V[inverse].astype(np.uint16 if len(ids) <= 1 << 16 else np.uint32)
            self.strings = [str(strings.get(int(ids[i]), HOLE)) for i in order]
            self.ids = ids
            self.bounds = list(range(0, len(token_T) + TOKENS, TOKENS))
        numbers = {string: number for number, string in reversed(list(enumerate(self.strings)))}
        self.details = [Details(source, corpora, numbers, self.strings) for source in sources]

    def facts(self) -> dict[str, Any]:
        return {"whole": self.whole, "bounds": self.bounds, "chunk": CHUNK, "tokens": TOKENS}

    def parts(self, every: int = 1) -> Iterator[tuple[str, bytes]]:
        """All parts, or of the chunks one in `every`."""
        yield "vocabulary", packed_json(self.strings)
        for index, source in enumerate(self.sources):
            yield f"d{self.number[source.name]}/table", self._table(index, source)
        yield from self.chunks(every)

    def chunks(self, every: int) -> Iterator[tuple[str, bytes]]:
        for index, source in enumerate(self.sources):
            details = self.details[index]
            for chunk in range(0, math.ceil(source.features / CHUNK), every):
                low, high = chunk * CHUNK, min((chunk + 1) * CHUNK, source.features)
                yield f"d{self.number[source.name]}/{chunk}", self._chunk(index, details, low, high)
        for chunk in range(0, len(self.bounds) - 1, every):
            low, high = self.bounds[chunk], self.bounds[chunk + 1]
            data = (
                packed_json(self.texts[low:high])
                if self.whole
                else packed_columns(None, {"token": self.rank_T[low:high]})
            )
            yield f"texts/{chunk}", data

    def estimate(self) -> tuple[int, int]:
        """About how many bytes (tables, chunks) will take; zeros where trying it out costs no more than asking."""
        chunks = len(self.bounds) + sum(source.features // CHUNK + 1 for source in self.sources)
        every = max(1, chunks // TRIED)
        if every == 1:
            return 0, 0
        table = compressed([("table", self._table(0, self.sources[0]))])["table"]
        return len(table) * len(self.sources), every * sum(map(len, compressed(self.chunks(every)).values()))

    def _table(self, index: int, source: Source) -> bytes:
        """What the table of latents shows and searches."""
        table = source.table
        statuses = np.array([STATUSES.index(s) if s in STATUSES else 0 for s in table["status"]], np.uint8)
        known = {corpus: i for i, corpus in enumerate(self.corpora)}
        corpus = np.array([known.get(c, NONE) if c else NONE for c in table["corpus"]], np.uint8)
        meta = {
            "label": [str(label or "") for label in table["label"]],
            "promoted": [[str(token) for token in (tokens or [])[:3]] for tokens in table["top_tokens"]],
            "description": {
                str(feature): str(said.get("description") or "")
                for feature, said in sorted(source.descriptions.items())
                if isinstance(said, dict)
            },
        }
        columns = {
            name: table[name].astype(np.float32) for name in ("density", "max", "mean", "ablation_loss", "label_share")
        }
        return packed_columns(meta, {**columns, "status": statuses, "corpus": corpus, "fires": self._fires(index)})

    def _fires(self, index: int) -> np.ndarray:
        """[F, 3] numbers of the tokens that the best examples peak at, the most frequent first; from 1, 0 is none."""
        top = self.kept[index][0]
        features = len(top.value_FE)
        if self.whole or top.document_FE.shape[1] == 0 or not len(self.ids):
            return np.zeros((features, 0), np.uint32)
        peak_FE = top.peak_FE.astype(np.int64).clip(0, top.token_FEW.shape[-1] - 1)
        token_FE = np.take_along_axis(top.token_FEW, peak_FE[..., None], axis=-1)[..., 0]
        there_FE = (top.document_FE >= 0) & (token_FE >= 0)
        same_FEE = (token_FE[:, :, None] == token_FE[:, None, :]) & there_FE[:, None, :]
        count_FE = np.where(there_FE, same_FEE.sum(-1), 0)
        seen_FE = (same_FEE & np.tri(top.document_FE.shape[1], k=-1, dtype=bool)).any(-1)
        count_FE[seen_FE] = 0  # the first place of a token stands for it
        order_FK = np.argsort(-count_FE, axis=1, kind="stable")[:, :3]
        chosen_FK = np.take_along_axis(token_FE, order_FK, axis=1)
        number_FK = self.rank_V[np.searchsorted(self.ids, chosen_FK).clip(max=len(self.ids) - 1)] + 1
        return np.where(np.take_along_axis(count_FE, order_FK, axis=1) > 0, number_FK, 0).astype(np.uint32)

    def _chunk(self, index: int, details: Details, low: int, high: int) -> bytes:
        """Details and examples of the latents low ... high - 1."""
        columns: dict[str, list[np.ndarray]] = {}
        counts = []
        for kind in (0, 1):
            part = self.kept[index][kind]
            start_FE, first_FE, length_FE = (array[low:high] for array in self.places[2 * index + kind])
            there_FE = part.document_FE[low:high] >= 0
            counts.append(there_FE.sum(axis=1).astype(np.uint8))
            offset_FEW = np.arange(part.act_FEW.shape[-1]) - first_FE[..., None]
            inside_FEW = (offset_FEW >= 0) & (offset_FEW < length_FE[..., None]) & there_FE[..., None]
            scale_F = details.scale_F[low:high].astype(np.float32)
            values = {
                "start": start_FE[there_FE].astype(np.uint32),
                "length": length_FE[there_FE].astype(np.uint16),
                "peak": np.maximum(part.peak_FE[low:high] - first_FE, 0)[there_FE].astype(np.uint16),
                "value": part.value_FE[low:high][there_FE].astype(np.float32),
                "corpus": np.minimum(part.corpus_FE[low:high], NONE)[there_FE].astype(np.uint8),
                "document": part.document_FE[low:high][there_FE].astype(np.uint32),
                "position": np.maximum(part.position_FE[low:high], 0)[there_FE].astype(np.uint32),
                "act": (part.act_FEW[low:high] / scale_F[:, None, None])[inside_FEW].astype(np.float16),
            }
            for name, array in values.items():
                columns.setdefault(name, []).append(array)
        joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        return packed_columns(
            details.said(low, high), {"tops": counts[0], "samples": counts[1], **details.columns(low, high), **joined}
        )


def _kept(part: Examples, count: int) -> int:
    """How many places `count` examples of each latent are."""
    return len(part.value_FE) * min(count, part.value_FE.shape[1])


def first(part: Examples, count: int) -> Examples:
    """The best `count` examples of each latent."""
    return Examples(*(array[:, :count] for array in part))


def spread(part: Examples, count: int) -> Examples:
    """`count` examples of each latent, spread evenly over all of them."""
    there = part.value_FE.shape[1]
    chosen = np.linspace(0, there - 1, count).round().astype(int) if count < there else np.arange(there)
    return Examples(*(array[:, chosen] for array in part))


def _whole_places(part: Examples, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    zero_FE = np.zeros(part.document_FE.shape, np.int64)
    return np.searchsorted(documents, np.maximum(part.document_FE, 0)), zero_FE, zero_FE


def _clipped(entry: Any) -> list[str]:
    text = str(entry.get("text", "")) if isinstance(entry, dict) else ""
    return [text] if len(text) <= LONGEST_TEXT else [text[:LONGEST_TEXT], "cut"]


def _text_bounds(texts: Sequence[list[str]]) -> list[int]:
    """Where chunks of whole texts begin, and the end of the last."""
    bounds, size = [0], 0
    for index, text in enumerate(texts):
        size += len(text[0])
        if size > TEXT_BYTES:
            bounds.append(index + 1)
            size = 0
    return bounds if bounds[-1] == len(texts) else [*bounds, len(texts)]
