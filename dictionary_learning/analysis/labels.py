"""Words that set the examples of a latent apart: a first name for each latent, found without a language model.

In: the examples of F latents, top ones and samples, and the strings of their tokens (or whole texts). Out: a label such
as "fracture, femur, hip" for each, and the share of its samples in which one of these words is active.

A word is as long as its tokens join (sub-words are put together), and counts in an example with the latent's activation
on it, as a share of the latent's largest; a word of the window on which the latent is silent counts a little, so that a
latent that fires on the full stop behind "fracture" is named too. Words are ranked by the log-likelihood ratio of this
rate against their rate in the samples of all others: G2 of Dunning (1993), "Accurate methods for the statistics of
surprise and coincidence", with the background's rate smoothed by half a count. Unlike a plain ratio it does not favour
words that were seen once, and common words ("of", "the") drop out unless the latent really is about them. Everything is
counted in numpy over all latents at once; Python touches each distinct word once.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from dictionary_learning.analysis.types import Examples

LABEL_WORDS = 3
AROUND = 0.1  # what a word of the window counts on which the latent is silent, of the activation at the place
SURPRISE = 10.83  # G2 that a word of a label needs: 0.1 % of a chi-square with one degree of freedom
LIFT = 2.0  # its rate against the background's, at least
OF_THE_BEST = 0.15  # its G2 against that of the label's first word, at least
CONTRASTED = 20_000
LATENTS_AT_ONCE = 2048  # bounds the memory: about 100 bytes a token of their windows

_APART, _BEGINS, _GOES_ON = range(3)  # what a token is to a word
_SPAN = 1 << 32  # latent * _SPAN + word is one sortable key


def label_features(
    top: Examples,
    samples: Examples,
    vocabulary: Mapping[int, str],
    texts: Mapping[int, str] | None = None,
) -> tuple[list[str], np.ndarray]:
    """Labels of F latents, and how far each holds.

    Args:
        top, samples: the kept examples; E may differ, and either may have none (E = 0).
        vocabulary: the string of every token id in them, decoded alone (" hip", "##ology"), for examples with windows.
        texts: the text of every document in them, for examples of whole texts (W = 0).

    Returns:
        labels: for each latent at most `LABEL_WORDS` words, the most telling first, joined by ", "; "" where it has no
            examples, or nothing in them is unusual.
        shares: [F] float64 in [0, 1]: the share of the latent's samples (of its top examples where it has no samples)
            that hold one of the words at a token on which it is active; 0 without a label.
    """
    lexicon = Lexicon(vocabulary, texts or {})
    largest_F = np.full(len(top.value_FE), 1e-30)
    for kept in (top, samples):
        np.maximum(largest_F, np.where(kept.document_FE >= 0, kept.value_FE, 0).max(1, initial=0), out=largest_F)
    top_counts, sample_counts = (_count(kept, largest_F, lexicon) for kept in (top, samples))
    base_V = lexicon.base_forms()
    background = sample_counts if sample_counts.trials_F.any() else top_counts
    label_FK = _best_words([top_counts, sample_counts], background, base_V)
    names = [*lexicon.words, ""]  # -1 is the last
    labels = [", ".join(filter(None, (names[word] for word in row))) for row in label_FK.tolist()]
    in_samples, in_top = (_shares(counts, label_FK, base_V) for counts in (sample_counts, top_counts))
    return labels, np.where(sample_counts.examples_F > 0, in_samples, in_top)


def word_contrast(
    samples: Examples, general: Collection[int], vocabulary: Mapping[int, str], texts: Mapping[int, str] | None = None
) -> dict[str, float]:
    """Of each word in up to `CONTRASTED` samples: log2 of the share of documents that hold it, elsewhere to that in the
    corpora `general` (indices), smoothed by half a document; none where one side has no document."""
    lexicon = Lexicon(vocabulary, texts or {})
    there_R = np.flatnonzero(samples.document_FE.ravel() >= 0)
    there_R = there_R[:: max(1, -(-len(there_R) // CONTRASTED))]
    kept = Examples(*(array.reshape(1, samples.document_FE.size, *array.shape[2:])[:, there_R] for array in samples))
    if samples.token_FEW.shape[2]:
        row_N, word_N, _ = lexicon.of_windows(kept)
    else:
        row_N, word_N = lexicon.of_texts(kept.document_FE)
    documents_R, document_R = np.unique(kept.document_FE[0], return_inverse=True)
    general_R = np.isin(kept.corpus_FE[0], list(general))
    general_M = np.zeros(len(documents_R), dtype=bool)
    general_M[document_R] = general_R
    if general_M.all() or not general_M.any():
        return {}  # nothing to compare with
    held_N = np.unique(document_R[row_N] * _SPAN + lexicon.base_forms()[word_N])  # a document holds a word once
    document_N, word_N = np.divmod(held_N, _SPAN)
    in_V, all_V = (np.bincount(word_N[which], minlength=len(lexicon.words)) for which in (general_M[document_N], ...))
    elsewhere_V = (all_V - in_V + 0.5) / ((~general_M).sum() + 1)
    log2_V = np.log2(elsewhere_V / ((in_V + 0.5) / (general_M.sum() + 1)))
    return dict(zip(lexicon.words, log2_V.tolist(), strict=True))


class _Counts(NamedTuple):
    """The words in the examples of F latents.

    key_N, count_N: latent * `_SPAN` + word, each once, and what the word counts in its examples; trials_F, what
    it could count at most. key_A, example_A: one entry for each word of an example on which the latent is active.
    examples_F: how many examples there are.
    """

    key_N: np.ndarray
    count_N: np.ndarray
    trials_F: np.ndarray
    key_A: np.ndarray
    example_A: np.ndarray
    examples_F: np.ndarray


def _count(kept: Examples, largest_F: np.ndarray, lexicon: Lexicon) -> _Counts:
    there_FE = kept.document_FE >= 0
    weight_FE = np.where(there_FE, kept.value_FE, 0) / largest_F[:, None]
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(weight_FE), LATENTS_AT_ONCE):
        chunk = slice(start, start + LATENTS_AT_ONCE)
        examples = weight_FE[chunk].shape[1]
        if kept.token_FEW.shape[2]:
            rows_N, words_N, act_N = lexicon.of_windows(Examples(*(array_F[chunk] for array_F in kept)))
        else:
            rows_N, words_N = lexicon.of_texts(kept.document_FE[chunk])
            act_N = kept.value_FE[chunk].ravel()[rows_N]
        weight_N = np.maximum(act_N / largest_F[chunk][rows_N // max(examples, 1)], 0)
        weight_N = np.maximum(weight_N, AROUND * weight_FE[chunk].ravel()[rows_N])
        # A word counts once in an example, with the largest of its weights there
        key_N, weight_N, active_N = _reduce(np.maximum, rows_N * _SPAN + words_N, weight_N, act_N > 0)
        row_N, word_N = np.divmod(key_N, _SPAN)
        key_N = (row_N // max(examples, 1) + start) * _SPAN + word_N
        parts.append((*_reduce(np.add, key_N, weight_N), key_N[active_N], row_N[active_N] + start * examples))
    key_N, count_N, key_A, example_A = map(np.concatenate, zip(*parts, strict=True))
    return _Counts(key_N, count_N, weight_FE.sum(1), key_A, example_A, there_FE.sum(1))


def _best_words(counts: list[_Counts], background: _Counts, base_V: np.ndarray) -> np.ndarray:
    """[F, LABEL_WORDS] int64, the words of each label, the best first and -1 where there are fewer."""
    key_N = np.concatenate([_rekeyed(part.key_N, base_V) for part in counts])
    in_samples_N = np.concatenate([np.where(part is background, part.count_N, 0) for part in counts])
    both_N = np.concatenate([part.count_N for part in counts])
    key_N, count_N, in_samples_N = _reduce(np.add, key_N, both_N, in_samples_N)
    latent_N, word_N = np.divmod(key_N, _SPAN)
    trials_N = np.sum([part.trials_F for part in counts], axis=0)[latent_N]
    elsewhere_N = np.bincount(word_N, in_samples_N)[word_N] - in_samples_N  # in the samples of all other latents
    expected_N = (elsewhere_N + 0.5) / (background.trials_F.sum() - background.trials_F[latent_N] + 1)
    rate_N = np.minimum(count_N / trials_N, 1)  # two forms of a word may both be in an example
    g2_N = 2 * trials_N * _divergence(rate_N, np.minimum(expected_N, 1 - 1e-9))
    chosen_N = (g2_N >= SURPRISE) & (rate_N >= LIFT * expected_N)
    latent_N, word_N, g2_N = latent_N[chosen_N], word_N[chosen_N], g2_N[chosen_N]
    order_N = np.lexsort((word_N, -g2_N, latent_N))
    latent_N, word_N, g2_N = latent_N[order_N], word_N[order_N], g2_N[order_N]
    first_N = np.searchsorted(latent_N, latent_N)  # where each latent's words begin
    rank_N = np.arange(len(latent_N)) - first_N
    kept_N = (rank_N < LABEL_WORDS) & (g2_N >= OF_THE_BEST * g2_N[first_N])
    label_FK = np.full((len(background.trials_F), LABEL_WORDS), -1, dtype=np.int64)
    label_FK[latent_N[kept_N], rank_N[kept_N]] = word_N[kept_N]
    return label_FK


def _shares(counts: _Counts, label_FK: np.ndarray, base_V: np.ndarray) -> np.ndarray:
    """[F] float64: the share of each latent's examples in which a word of its label is active."""
    latent_N, rank_N = np.nonzero(label_FK >= 0)
    labels_N = latent_N * _SPAN + label_FK[latent_N, rank_N]
    held_A = np.isin(_rekeyed(counts.key_A, base_V), labels_N)
    _, first_A = np.unique(counts.example_A[held_A], return_index=True)  # an example counts once
    latents_A = counts.key_A[held_A][first_A] // _SPAN
    return np.bincount(latents_A, minlength=len(label_FK)) / np.maximum(counts.examples_F, 1)


def _divergence(p_N: np.ndarray, q_N: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence in nats of a coin of p from one of q."""
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = np.where(p_N > 0, p_N * np.log(p_N / q_N), 0)
        tails = np.where(p_N < 1, (1 - p_N) * np.log((1 - p_N) / (1 - q_N)), 0)
    return heads + tails


def _rekeyed(key_N: np.ndarray, base_V: np.ndarray) -> np.ndarray:
    latent_N, word_N = np.divmod(key_N, _SPAN)
    return latent_N * _SPAN + base_V[word_N]


def _reduce(how: np.ufunc, key_N: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each key once, sorted, and for each the values of its occurrences put together."""
    if not len(key_N):
        return key_N, *values
    order_N = np.argsort(key_N, kind="stable")
    key_N = key_N[order_N]
    start_M = np.flatnonzero(np.r_[True, key_N[1:] != key_N[:-1]])
    return key_N[start_M], *(how.reduceat(value_N[order_N], start_M) for value_N in values)


class Lexicon:
    """Numbers words as they come: `words[number]`, in lower case."""

    def __init__(self, vocabulary: Mapping[int, str], texts: Mapping[int, str]) -> None:
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}
        self._texts = texts
        self._of_text: dict[int, np.ndarray] = {}
        self._of_hash: dict[int, int] = {}
        spaced = any(text[:1].isspace() and len(text) > 1 for text in vocabulary.values())
        self._piece_T = [""] * (max(vocabulary, default=-1) + 2)  # the last stands for -1, outside the document
        self._kind_T = np.zeros(len(self._piece_T), dtype=np.int8)
        for token, text in vocabulary.items():
            self._piece_T[token], self._kind_T[token] = _piece(text, spaced)

    def of_windows(self, kept: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, word, activation) of every word in windows: the row of [F * E], the largest activation on the word.

        A word that the edge of the window or the beginning of the context cuts counts only where the place is in it.
        """
        width = kept.token_FEW.shape[2]
        token_RW = np.where(kept.document_FE[..., None] >= 0, kept.token_FEW, -1).reshape(-1, width)
        known_RW = (token_RW >= 0) & (token_RW < len(self._piece_T) - 1)
        token_RW = np.where(known_RW, token_RW, -1)
        kind_RW = self._kind_T[token_RW]
        word_RW, before_RW = kind_RW != _APART, np.pad(token_RW, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        begins_RW = word_RW & ((kind_RW == _BEGINS) | (self._kind_T[before_RW] == _APART))
        row_P, column_P = np.nonzero(word_RW)
        if not len(row_P):
            return row_P, row_P, np.empty(0)
        token_P = token_RW[row_P, column_P]
        start_N = np.flatnonzero(begins_RW[row_P, column_P])
        length_N = np.diff(np.r_[start_N, len(row_P)])
        act_N = np.maximum.reduceat(kept.act_FEW.reshape(-1, width)[row_P, column_P], start_N)
        word_N = self._spelt(token_P, start_N, length_N)
        row_N, first_N, last_N = row_P[start_N], column_P[start_N], column_P[start_N] + length_N - 1
        peak_N, position_N = kept.peak_FE.ravel()[row_N], kept.position_FE.ravel()[row_N]
        opens_N = (before_RW[row_N, first_N] < 0) & (position_N - peak_N + first_N > 0)  # and not its document
        cut_N = (opens_N & (kind_RW[row_N, first_N] == _GOES_ON)) | (last_N == width - 1)
        whole_N = ~cut_N | ((first_N <= peak_N) & (peak_N <= last_N))
        return row_N[whole_N], word_N[whole_N], act_N[whole_N]

    def _spelt(self, token_P: np.ndarray, start_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
        """[N] the numbers of words, given the tokens of all of them and where each begins.

        Spellings (sequences of tokens) are told apart by 64 bits: a polynomial in a large odd number, modulo 2**64.
        """
        power_P = np.arange(len(token_P)) - np.repeat(start_N, length_N)
        odd = np.full(int(length_N.max()), 0x9E3779B97F4A7C15, dtype=np.uint64)
        odd[0] = 1
        hash_N = np.add.reduceat((token_P.astype(np.uint64) + np.uint64(1)) * np.cumprod(odd)[power_P], start_N)
        hash_M, first_M, which_N = np.unique(hash_N, return_index=True, return_inverse=True)
        number_M = np.empty(len(hash_M), dtype=np.int64)
        for m, (spelling, first) in enumerate(zip(hash_M.tolist(), first_M.tolist(), strict=True)):
            number = self._of_hash.get(spelling)
            if number is None:
                pieces = token_P[start_N[first] : start_N[first] + length_N[first]].tolist()
                number = self._of_hash[spelling] = self._number("".join(self._piece_T[token] for token in pieces))
            number_M[m] = number
        return number_M[which_N]

    def of_texts(self, document_FE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, word) of every word in whole texts, those of documents that are -1 or not known left out."""
        rows, words = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for row, document in enumerate(document_FE.ravel().tolist()):
            if document not in self._of_text:
                found = split_words(self._texts.get(document, "") if document >= 0 else "")
                self._of_text[document] = np.array(
                    [self._number(word) for word in dict.fromkeys(found)], dtype=np.int64
                )
            words.append(self._of_text[document])
            rows.append(np.full(len(words[-1]), row, dtype=np.int64))
        return np.concatenate(rows), np.concatenate(words)

    def base_forms(self) -> np.ndarray:
        """[V] int64: each word's number, or that of the word it is the plural of ("fractures": "fracture")."""
        base_V = np.arange(len(self.words), dtype=np.int64)
        for number, word in enumerate(self.words):
            if len(word) > 4 and word[-1] == "s" and word[-2] != "s":
                base_V[number] = self._numbers.get(word[:-1], number)
        return base_V

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = len(self.words)
            self.words.append(word)
        return self._numbers[word]


def split_words(text: str) -> list[str]:
    """The words of a text: runs of letters, marks and digits, in lower case."""
    return "".join(char if _in_word(char) else " " for char in text).lower().split()


def _piece(text: str, spaced: bool) -> tuple[str, int]:
    """What a token adds to a word, and whether it begins one: where some tokens begin with a space (`spaced`), one that
    does not goes on; otherwise one that is marked ## does (WordPiece). Scripts without spaces go on nowhere."""
    piece = text.removeprefix("##").strip()
    if not piece or not all(map(_in_word, piece)):
        return "", _APART
    goes_on = text.startswith("##") or (spaced and not text[0].isspace())
    return piece.lower(), _GOES_ON if goes_on and ord(piece[0]) < 0x2E80 else _BEGINS


def _in_word(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char)[0] == "M"
