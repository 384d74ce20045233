"""Exact and near duplicates, found while the texts stream by.

In: texts, one at a time. Out: for each, None (new, and remembered) or the earlier text that it repeats. The first of a
family stays, so a later member is always compared with one that was kept.

    exact   the same text, byte for byte
    near    Jaccard similarity of the sets of word triples (case, punctuation and white space levelled) >= `threshold`

Candidates come from MinHash signatures cut into bands (Broder 1997; Leskovec, Rajaraman & Ullman, "Mining of Massive
Datasets", section 3.4): two texts of similarity s share a band with probability 1 - (1 - s^ROWS)^BANDS, 0.991 at 0.8
and 0.9998 at 0.9. The signature only proposes; the decision is the exact Jaccard similarity of the two sets.

Why a private SQLite file and not dictionaries: an index of 200,000 texts has 2.4 million band keys, some 400 MB of
Python objects. `sqlite3.connect("")` keeps a small cache in memory, spills to a nameless temporary file and leaves
nothing behind.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from typing import TYPE_CHECKING, NamedTuple

from data_prep.splits import normalised
from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    import numpy as np

SHINGLE_WORDS = 3
BANDS, ROWS = 12, 5
MAX_CANDIDATES = 64  # of one text; a crowded bucket (boilerplate) must not make the search quadratic
CACHE_KIB = 32 * 1024


class Duplicate(NamedTuple):
    """What a repeated text repeats: `kind` is "exact" or "near", `of` the name of the text that was kept."""

    kind: str
    of: str


class Deduper:
    """Remembers the texts it has let through. Memory stays near `CACHE_KIB` however many there are.

    `threshold` is the Jaccard similarity, over 0 and at most 1, from which two texts are near duplicates.
    """

    def __init__(self, threshold: float = 0.8, seed: int = 0) -> None:
        import numpy as np

        if not 0 < threshold <= 1:
            raise UserError(f"The near-duplicate threshold must be over 0 and at most 1, not {threshold:g}.")
        self.threshold = threshold
        generator = np.random.Generator(np.random.PCG64(seed))
        self._multipliers_P1 = generator.integers(0, 2**63, (BANDS * ROWS, 1), dtype=np.uint64) * np.uint64(2) + 1
        self._offsets_P1 = generator.integers(0, 2**63, (BANDS * ROWS, 1), dtype=np.uint64)
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(
            f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{CACHE_KIB};
            CREATE TABLE kept (number INTEGER PRIMARY KEY, name TEXT, shingles BLOB);
            CREATE TABLE exact (digest BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID;
            CREATE TABLE bands (band INTEGER, number INTEGER, PRIMARY KEY (band, number)) WITHOUT ROWID;
            BEGIN;
            """
        )
        self._count = 0

    def check(self, text: str, name: str) -> Duplicate | None:
        """None for a new text, which is then remembered under `name`; else what it repeats."""
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        same = self._database.execute(
            "SELECT name FROM exact JOIN kept USING (number) WHERE digest = ?", (digest,)
        ).fetchone()
        if same:
            return Duplicate("exact", same[0])
        shingles_S = shingle_hashes(text)
        bands = self._bands(shingles_S)
        near = self._nearest(shingles_S, bands)
        if near:
            return Duplicate("near", near)
        self._count += 1
        self._database.execute("INSERT INTO kept VALUES (?, ?, ?)", (self._count, name, shingles_S.tobytes()))
        self._database.execute("INSERT INTO exact VALUES (?, ?)", (digest, self._count))
        self._database.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(band, self._count) for band in bands])
        return None

    def close(self) -> None:
        """Frees the temporary file."""
        self._database.close()

    def _bands(self, shingles_S: np.ndarray) -> list[int]:
        """One 64-bit key a band: a hash of its `ROWS` minima, each over one random permutation of the hash space."""
        minima_P = (shingles_S[None, :] * self._multipliers_P1 + self._offsets_P1).min(axis=1)
        keys = []
        for band, rows_R in enumerate(minima_P.reshape(BANDS, ROWS)):
            digest = hashlib.blake2b(rows_R.tobytes(), digest_size=8, salt=bytes([band])).digest()
            keys.append(int.from_bytes(digest, "big", signed=True))
        return keys

    def _nearest(self, shingles_S: np.ndarray, bands: list[int]) -> str | None:
        import numpy as np

        marks = ", ".join("?" * len(bands))
        candidates = self._database.execute(
            f"SELECT name, shingles FROM kept WHERE number IN "
            f"(SELECT number FROM bands WHERE band IN ({marks}) GROUP BY number "
            f"ORDER BY count(*) DESC, number LIMIT {MAX_CANDIDATES}) ORDER BY number",
            bands,
        )
        for name, blob in candidates:
            if jaccard(shingles_S, np.frombuffer(blob, np.uint64)) >= self.threshold:
                return name
        return None


def shingle_hashes(text: str) -> np.ndarray:
    """The set of word triples of a text as sorted 64-bit hashes [S], S >= 1. The same on every machine and run."""
    import numpy as np

    words = normalised(text).split()
    words_W = np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in words), np.uint64, len(words))
    size = min(SHINGLE_WORDS, max(len(words), 1))
    if not len(words):
        return np.zeros(1, np.uint64)
    hashed_S = np.zeros(len(words) - size + 1, np.uint64)
    for offset in range(size):
        hashed_S = hashed_S * np.uint64(0x9E3779B97F4A7C15) + words_W[offset : offset + len(hashed_S)]
        hashed_S ^= hashed_S >> np.uint64(29)
    return np.unique(hashed_S)


def jaccard(first_S: np.ndarray, second_T: np.ndarray) -> float:
    """|A and B| / |A or B| of two sets given as sorted arrays without repeats."""
    import numpy as np

    shared = len(np.intersect1d(first_S, second_T, assume_unique=True))
    return shared / (len(first_S) + len(second_T) - shared)
