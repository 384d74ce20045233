"""Exact and near duplicates among streamed texts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from data_prep.dedupe import Deduper, jaccard, shingle_hashes
from data_prep.splits import normalised
from dictionary_learning.errors import UserError

PASSAGE = (
    "The axillary nerve winds round the surgical neck of the humerus with the posterior circumflex vessels and "
    "supplies the deltoid and the skin over it, so that a fracture there weakens abduction of the shoulder."
)


def test_the_first_of_a_family_stays_and_the_others_name_it():
    deduper = Deduper()
    assert deduper.check(PASSAGE, "first") is None
    assert deduper.check(PASSAGE, "second") == ("exact", "first")
    assert deduper.check(PASSAGE.upper().replace(" ", "\n"), "third") == ("near", "first")
    assert deduper.check(PASSAGE.replace("weakens", "impairs"), "fourth") == ("near", "first")
    assert deduper.check("Something else altogether about the kidney.", "fifth") is None


def test_jaccard_of_hashed_word_triples_is_the_jaccard_of_word_triples():
    def triples(text):
        words = normalised(text).split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    other = PASSAGE.replace("weakens", "impairs").replace("humerus", "arm")
    expected = len(triples(PASSAGE) & triples(other)) / len(triples(PASSAGE) | triples(other))
    assert jaccard(shingle_hashes(PASSAGE), shingle_hashes(other)) == expected
    for short in ("", "one", "one two", "?!"):
        assert jaccard(shingle_hashes(short), shingle_hashes(short)) == 1.0


def test_near_duplicates_are_those_of_brute_force_at_the_threshold():
    """1,200 texts, half of them slight to strong variations of the others: LSH finds what comparing all pairs finds
    (within its stated recall) and never flags a pair below the threshold."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(400)]
    texts: list[list[str]] = []
    for _ in range(600):
        texts.append(rng.choices(words, k=60))
        varied = list(rng.choice(texts))
        for position in rng.sample(range(60), rng.randrange(1, 8)):
            varied[position] = rng.choice(words)
        texts.append(varied)
    deduper = Deduper(threshold=0.8)
    kept: list[np.ndarray] = []
    expected, found = 0, 0
    for number, parts in enumerate(texts):
        shingles = shingle_hashes(" ".join(parts))
        similarity = max((jaccard(shingles, other) for other in kept), default=0.0)
        flagged = deduper.check(" ".join(parts), str(number)) is not None
        assert similarity >= 0.8 or not flagged
        expected, found = expected + (similarity >= 0.8), found + flagged
        if not flagged:
            kept.append(shingles)
    assert expected > 150 and found >= 0.98 * expected


def test_which_duplicates_are_found_does_not_change_from_run_to_run():
    texts = [PASSAGE.replace("the", word, count) for count, word in enumerate(["a", "its", "that", "this", "one"])]
    first, second = Deduper(0.5), Deduper(0.5)
    found = [first.check(text, str(number)) for number, text in enumerate(texts)]
    assert found == [second.check(text, str(number)) for number, text in enumerate(texts)]
    assert any(found) and not all(found)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="threshold"):
        Deduper(threshold)
