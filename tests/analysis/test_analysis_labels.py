"""Labels: words that set a latent's examples apart; concepts: the latents that a reader would name first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from description_cases import write_analysis

from dictionary_learning.analysis.concepts import concepts, print_concepts, telling_features
from dictionary_learning.analysis.labels import label_features, word_contrast
from dictionary_learning.analysis.types import Examples
from dictionary_learning.errors import UserError

WORDS = ["the", "of", "and", "patient", "with", "in", "a", "is", "at", "on", "was", "has", "by", "or", "to", "for"]


class Corpus:
    """Token ids of strings, given out as they come."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def examples(self, latents: Sequence[Sequence[tuple[Sequence[str], Sequence[float]]]], number: int) -> Examples:
        """`number` places for each latent: windows of tokens with activations, whose largest is the place's."""
        width = max((len(tokens) for windows in latents for tokens, _ in windows), default=1)
        shape = (len(latents), number)
        value, document = np.zeros(shape, np.float32), np.full(shape, -1, np.int64)
        peak, position = np.zeros(shape, np.int16), np.full(shape, -1, np.int32)
        token, act = np.full((*shape, width), -1, np.int32), np.zeros((*shape, width), np.float32)
        for f, windows in enumerate(latents):
            for e, (tokens, acts) in enumerate(windows[:number]):
                token[f, e, : len(tokens)] = [self.ids.setdefault(text, len(self.ids)) for text in tokens]
                act[f, e, : len(acts)] = acts
                value[f, e], peak[f, e] = max(acts), int(np.argmax(acts))
                position[f, e], document[f, e] = peak[f, e], 1000 * f + e
        return Examples(value, document, position, np.zeros(shape, np.int16), token, act, peak)

    @property
    def vocabulary(self) -> dict[int, str]:
        return {number: text for text, number in self.ids.items()}

    def label(self, latents: Any, number: int = 20) -> tuple[list[str], np.ndarray]:
        return label_features(self.examples(latents, 0), self.examples(latents, number), self.vocabulary)


def around(rng: np.random.Generator, *pieces: str, act: float = 1.0) -> tuple[list[str], list[float]]:
    """Filler words with `pieces` in their middle, on the last of which a latent is active."""
    before, behind = ([f" {word}" for word in rng.choice(WORDS, 6)] for _ in range(2))
    return [*before, *pieces, *behind, " end"], [0.0] * (5 + len(pieces)) + [act] + [0.0] * 7


def test_the_word_at_the_peak_is_the_label_and_its_share_is_one() -> None:
    rng = np.random.default_rng(0)
    words = ["fracture", "insulin", "hip"]
    labels, shares = Corpus().label([[around(rng, f" {word}") for _ in range(20)] for word in words])
    assert labels == words
    assert shares.tolist() == [1.0, 1.0, 1.0]


def test_sub_words_are_joined_to_whole_words() -> None:
    rng = np.random.default_rng(0)
    others = [[around(rng, f" {word}") for _ in range(20)] for word in ("hip", "knee")]
    labels, shares = Corpus().label([[around(rng, " hyper", "th", "yroid", "ism") for _ in range(20)], *others])
    assert labels[0] == "hyperthyroidism"
    assert shares[0] == 1.0


def test_word_pieces_are_joined_where_no_token_begins_with_a_space() -> None:
    rng = np.random.default_rng(0)

    def bare(*pieces: str) -> tuple[list[str], list[float]]:
        tokens, acts = around(rng, *pieces)
        return [text.strip() for text in tokens], acts

    latents = [[bare(*pieces) for _ in range(20)] for pieces in (("osteo", "##por", "##osis"), ("knee",))]
    assert Corpus().label(latents)[0] == ["osteoporosis", "knee"]


def test_common_words_drop_out_unless_the_latent_is_about_them() -> None:
    rng = np.random.default_rng(0)
    latents = [[around(rng, f" w{f}") for _ in range(20)] for f in range(8)]
    labels, _ = Corpus().label([*latents, [around(rng, " the") for _ in range(20)]])
    assert labels == [*(f"w{f}" for f in range(8)), "the"]
    labels, _ = Corpus().label([[around(rng, " hip") for _ in range(20)], *[[around(rng, " the")] * 20] * 8])
    assert labels[0] == "hip"  # and not "the", though that is unusually rare here


def test_shares_count_the_samples_in_which_a_word_of_the_label_is_active() -> None:
    rng = np.random.default_rng(0)
    half = [around(rng, " hip") for _ in range(10)] + [around(rng, f" {rng.choice(WORDS)}") for _ in range(10)]
    labels, shares = Corpus().label([half, [around(rng, " knee") for _ in range(20)]])
    assert labels == ["hip", "knee"]
    assert shares.tolist() == [0.5, 1.0]


def test_a_latent_on_the_full_stop_is_named_by_the_word_before_it_but_holds_it_nowhere() -> None:
    rng = np.random.default_rng(0)
    others = [[around(rng, f" w{f}") for _ in range(20)] for f in range(20)]
    labels, shares = Corpus().label([[around(rng, " fracture", ".") for _ in range(20)], *others])
    assert labels[0] == "fracture"
    assert shares[0] == 0.0


def test_a_stronger_activation_counts_for_more() -> None:
    rng = np.random.default_rng(0)
    latent = [around(rng, " weak", act=0.05) for _ in range(10)] + [around(rng, " strong") for _ in range(10)]
    others = [[around(rng, f" w{f}") for _ in range(20)] for f in range(20)]
    assert Corpus().label([latent, *others])[0][0].split(", ")[0] == "strong"


def test_plurals_are_one_word() -> None:
    rng = np.random.default_rng(0)
    latent = [around(rng, " fractures") for _ in range(10)] + [around(rng, " Fracture") for _ in range(10)]
    labels, shares = Corpus().label([latent, [around(rng, " mass") for _ in range(20)]])
    assert labels == ["fracture", "mass"]
    assert shares[0] == 1.0


def test_words_cut_by_the_window_or_the_context_are_left_out() -> None:
    corpus = Corpus()
    cut = [(["oid", " a", ".", " b", " hy"], [0.0, 0.0, 1.0, 0.0, 0.0])] * 20
    examples = corpus.examples([cut], 20)
    examples.position_FE[:] += 30  # not at the beginning of the document
    other = corpus.examples([[([" knee", " c", " d", " e", " f"], [1.0, 0.0, 0.0, 0.0, 0.0])] * 20] * 20, 20)
    both = Examples(*(np.concatenate(pair) for pair in zip(examples, other, strict=True)))
    labels, _ = label_features(both, both, corpus.vocabulary)
    assert sorted(labels[0].split(", ")) == ["a", "b"]


def test_whole_texts_are_named_by_what_is_in_them() -> None:
    texts = {
        f * 100 + e: f"The {word}, of patient number{f}{e} is in!"
        for f, word in enumerate(("hip", "eye"))
        for e in range(20)
    }
    documents = np.array([[f * 100 + e for e in range(20)] for f in range(2)], np.int64)
    zeros = np.zeros((2, 20), np.int32)
    empty = np.zeros((2, 20, 0), np.int32)
    kept = Examples(np.ones((2, 20), np.float32), documents, zeros, zeros.astype(np.int16), empty, empty, zeros)
    labels, shares = label_features(Examples(*(array[:, :0] for array in kept)), kept, {}, texts)
    assert labels == ["hip", "eye"]
    assert shares.tolist() == [1.0, 1.0]


def test_silent_latents_and_no_examples_at_all_have_no_label() -> None:
    rng = np.random.default_rng(0)
    labels, shares = Corpus().label([[], [around(rng, " hip") for _ in range(20)]])
    assert labels[0] == "" and shares[0] == 0.0
    labels, shares = Corpus().label([[], []])
    assert labels == ["", ""] and shares.tolist() == [0.0, 0.0]


def test_top_examples_stand_in_where_there_are_no_samples() -> None:
    rng = np.random.default_rng(0)
    corpus, latents = Corpus(), [[around(rng, f" {word}") for _ in range(10)] for word in ("hip", "knee")]
    labels, shares = label_features(corpus.examples(latents, 10), corpus.examples(latents, 0), corpus.vocabulary)
    assert labels == ["hip", "knee"]
    assert shares.tolist() == [1.0, 1.0]


def test_other_scripts_emoji_and_controls_are_words_or_not_but_never_fail() -> None:
    rng = np.random.default_rng(0)
    words = ["переломы", "骨", "कूल्हे", "🩺", "\u202e\x07", "&lt;script&gt;", "0", "", "مفصل"]
    labels, _ = Corpus().label([[around(rng, f" {word}") for _ in range(20)] for word in words])
    assert [labels[at] for at in (0, 1, 2, 8)] == ["переломы", "骨", "कूल्हे", "مفصل"]
    assert labels[3] == labels[4] == ""


def test_many_latents_give_what_each_chunk_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    latents = [[around(rng, f" w{f}") for _ in range(8)] for f in range(50)]
    whole = Corpus().label(latents, 8)
    monkeypatch.setattr("dictionary_learning.analysis.labels.LATENTS_AT_ONCE", 7)
    parts = Corpus().label(latents, 8)
    assert whole[0] == parts[0]
    assert whole[1].tolist() == parts[1].tolist()


# ---------------------------------------------------------------------------------------------- concepts


def table_of(**changes: Sequence[Any]) -> dict[str, np.ndarray]:
    """Five latents that are all alike but for their labels."""
    columns: dict[str, Sequence[Any]] = {
        "label": ["hip, femur", "insulin", "kidney", "cancer", "asthma"],
        "label_share": [0.9, 0.8, 0.7, 0.6, 0.5],
        "density": [0.001] * 5,
        "documents": [20] * 5,
        "status": [""] * 5,
        "log2_ratio:general": [-5.0] * 5,
        "q:general": [1e-9] * 5,
        "log2_ratio:medical": [5.0] * 5,
        "q:medical": [1e-9] * 5,
    } | changes
    return {
        name: np.array(values, dtype=object if isinstance(values[0], str) else None) for name, values in columns.items()
    }


def found(against: Sequence[str] = ("general",), **changes: Sequence[Any]) -> list[int]:
    return [concept.feature for concept in concepts(table_of(**changes), 1000, against=against)]


def test_concepts_come_by_the_share_of_samples_that_hold_their_words() -> None:
    assert found() == [1, 2, 3, 4]  # "hip" has too few letters to be told from a fragment
    assert found(label=["femur", "insulin", "kidney", "cancer", "asthma"], label_share=[0.1, 0.5, 0.9, 0.6, 0.7]) == [
        2,
        4,
        3,
        1,
    ]


def test_function_words_fragments_dead_dense_and_rare_latents_are_no_concepts() -> None:
    labels = ["femur", "with, insulin", "", "x9", "asthma"]
    assert found(label=labels) == [0, 4]
    assert found(label=["femur"] * 5, status=["dead", "dense", "dense", "dead", ""]) == [4]
    assert found(label=["femur"] * 5, documents=[1, 2, 3, 4, 20]) == [4]


def test_words_of_a_template_come_behind_those_that_tell_documents_apart() -> None:
    labels = ["option", "insulin", "kidney", "cancer", "asthma"]
    assert found(label=labels, documents=[900, 20, 20, 20, 20])[-1] == 0


def test_concepts_fire_less_in_the_general_text() -> None:
    names = ["femur", "insulin", "kidney", "cancer", "asthma"]
    assert found(label=names, **{"log2_ratio:general": [-5.0, 5.0, -5.0, 0.0, -0.5]}) == [0, 2, 4]
    assert found(label=names, **{"q:general": [0.5, 0.5, 1e-3, 0.5, 0.5]}) == [2]
    assert found(against=(), label=names, **{"log2_ratio:general": [5.0] * 5}) == [0, 1, 2, 3, 4]


def test_a_word_is_named_once_by_its_best_latent() -> None:
    assert found(label=["femur, bone", "femur", "kidney", "femur", "asthma"]) == [0, 2, 4]
    best = concepts(table_of(), 1000, against=["general"], limit=1)
    assert [(concept.label, concept.share, concept.log2_ratio) for concept in best] == [("insulin", 0.8, 5.0)]


def test_an_unknown_corpus_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="no rates of corpus 'genral'.*Did you mean 'general'"):
        concepts(table_of(), 1000, against=["genral"])


def test_the_contrast_of_a_word_counts_documents_in_each_corpus() -> None:
    corpus, rng = Corpus(), np.random.default_rng(0)
    windows = [around(rng, word) for word in [" hip"] * 12 + [" both"] * 8 + [" code"] * 12 + [" both"] * 8]
    kept = corpus.examples([windows[:20], windows[20:]], 20)
    kept.corpus_FE[1] = 1
    log2 = word_contrast(kept, [1], corpus.vocabulary)
    assert log2["hip"] == pytest.approx(np.log2(12.5 / 0.5))
    assert log2["code"] == pytest.approx(-np.log2(12.5 / 0.5))
    assert log2["both"] == pytest.approx(0.0)
    kept.document_FE[0, :12] = 5  # all in one document, which counts once
    assert word_contrast(kept, [1], corpus.vocabulary)["hip"] == pytest.approx(np.log2((1.5 / 10) / (0.5 / 21)))
    assert word_contrast(Examples(*(array[:, :0] for array in kept)), [1], corpus.vocabulary) == {}
    assert word_contrast(kept, [2], corpus.vocabulary) == word_contrast(kept, [0, 1], corpus.vocabulary) == {}


def test_words_of_the_general_text_make_no_concepts() -> None:
    names = ["femur", "learning", "kidney", "cancer", "asthma"]
    ranked = concepts(table_of(label=names), 1000, against=["general"], words={"learning": 0.5, "kidney": 9.0})
    assert [concept.label for concept in ranked] == ["femur", "kidney", "cancer", "asthma", "learning"]
    ranked = concepts(table_of(label=names), 1000, against=["general"], words={"learning": -0.1})
    assert "learning" not in [concept.label for concept in ranked]


def test_the_telling_latents_of_an_analysis_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_analysis(tmp_path / "analysis")
    assert [concept.feature for concept in telling_features(folder, "trainer_0", 2)] == [0, 1]
    print_concepts(folder, "trainer_0", 2)
    out = capsys.readouterr().out
    assert "fracture" in out and "insulin" in out and "kidney" not in out
    assert ("general text" in out) == bool(folder.info["settings"].get("against"))
