"""One record -> one text: the exact layout, every reason for refusing, and hostile input."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import CORPORA, RecordError, format_medmcqa, format_medqa, format_mmlu, format_pubmed_qa
from data_prep.formats import question_of, without_references
from tests.data_prep.records import MEDMCQA, MEDQA, PUBMEDQA, changed

NERVE = """\
Which nerve is at risk in a fracture of the surgical neck of the humerus?
The options are:
A. Radial
B. Axillary
C. Ulnar
D. Median
Correct option: B. Axillary"""
SEIZURE = """\
Drug of choice for absence seizures
The options are:
A. Phenytoin
B. Carbamazepine
C. Ethosuximide
D. Diazepam
Correct option: C. Ethosuximide"""
EXERCISE = """\
Context:
Background paragraph.
Methods paragraph.
Question: Does exercise lower blood pressure?
The options are:
A. yes
B. no
C. maybe
Correct option: A. yes
Detailed answer: Exercise lowered it by 5 mm Hg."""


def test_medqa_and_mmlu_layout():
    assert format_medqa(MEDQA) == NERVE
    assert format_mmlu(MEDQA) == NERVE


def test_pubmed_qa_layout_has_context_before_and_detailed_answer_after():
    assert format_pubmed_qa(PUBMEDQA) == EXERCISE


def test_medmcqa_layout_ends_with_the_explanation_without_its_references():
    assert format_medmcqa(MEDMCQA) == f"{SEIZURE}\nExplanation: It blocks T-type calcium channels."


@pytest.mark.parametrize("exp", [None, "", "  \n ", "Ref: Katzung 14/e p 412"])
def test_an_empty_explanation_only_leaves_the_explanation_out(exp):
    assert format_medmcqa({**MEDMCQA, "exp": exp}) == SEIZURE


def test_an_absent_explanation_field_is_an_empty_one():
    assert format_medmcqa({name: value for name, value in MEDMCQA.items() if name != "exp"}) == SEIZURE


@pytest.mark.parametrize(
    ("explanation", "kept"),
    [
        ("Iron is absorbed here.\nReferences:-\n1. Guyton\n2. Ganong", "Iron is absorbed here."),
        ("Iron is absorbed here. Ref. Harrison 20/e p 3", "Iron is absorbed here."),
        ("Iron is absorbed here. Ref Harrison 20/e p 3", "Iron is absorbed here."),
        ("Iron is absorbed here.\nREF:-Harrison", "Iron is absorbed here."),
        ("Iron is absorbed here.\nReferences\nGuyton, ch. 3", "Iron is absorbed here."),
        ("Iron (Ref: Guyton p 3) is absorbed here.", "Iron  is absorbed here."),
        ("Iron is absorbed here [Ref. Guyton p 3]", "Iron is absorbed here"),
        ("Ref: Guyton p 3\nIron is absorbed here.\nRef: Ganong", "Iron is absorbed here."),
        ("Refer such patients. Refractory reflexes. (reference range 3-5)", None),
        ("The point of reference. A reference value. href=x", None),
    ],
)
def test_reference_lists_are_cut_and_words_that_only_look_like_them_stay(explanation, kept):
    assert without_references(explanation) == (explanation if kept is None else kept)


def test_cutting_references_is_linear_in_a_hostile_explanation():
    for hostile in ("Ref:\n" * 100_000, "(Ref: " * 50_000, "( " * 100_000, "ref" + " " * 200_000, " " * 200_000 + "x"):
        without_references(hostile)  # pytest's timeout is the assertion


@pytest.mark.parametrize(
    ("formatter", "record", "reason"),
    [
        (format_medqa, [1], "not a JSON object"),
        (format_medqa, {"id": "1"}, "missing question"),
        (format_medqa, {"data": "text"}, "data is not a JSON object"),
        (format_medqa, changed(MEDQA, Question=None), "missing question"),
        (format_medqa, changed(MEDQA, Question=" \n"), "missing question"),
        (format_medqa, changed(MEDQA, Question=3), "question is not text"),
        (format_medqa, changed(MEDQA, Options=None), "missing options"),
        (format_medqa, changed(MEDQA, Options={}), "missing options"),
        (format_medqa, changed(MEDQA, Options={"A": "x", "B": "y"}), "missing options"),
        (format_medqa, changed(MEDQA, Options={"A": "x", "B": "y", "C": " ", "D": "z"}), "missing options"),
        (format_medqa, changed(MEDQA, Options=["x", "y"]), "options are not a JSON object"),
        (format_medqa, changed(MEDQA, Options={"A": "x", "B": 2, "C": "y", "D": "z"}), "option is not text"),
        (format_medqa, changed(MEDQA, Options={**MEDQA["data"]["Options"], "AB": "x"}), "unknown option letter 'AB'"),
        (format_medqa, changed(MEDQA, Correct_Option=None), "missing answer"),
        (format_medqa, changed(MEDQA, Correct_Option=""), "missing answer"),
        (format_medqa, changed(MEDQA, Correct_Option="E"), "unknown option letter 'E'"),
        (format_medqa, changed(MEDQA, Correct_Option="\x1b[31mred-alert"), "unknown option letter '\\x1b[31m..."),
        (format_pubmed_qa, changed(PUBMEDQA, Correct_Option="D"), "unknown option letter 'D'"),
        (format_pubmed_qa, changed(PUBMEDQA, Context=None), "missing context"),
        (format_pubmed_qa, changed(PUBMEDQA, Context=[]), "missing context"),
        (format_pubmed_qa, changed(PUBMEDQA, Context=["a", None]), "missing context"),
        (format_pubmed_qa, changed(PUBMEDQA, Context=3), "context is not text"),
        (format_pubmed_qa, changed(PUBMEDQA, Long_Answer=None), "missing detailed answer"),
        (format_medmcqa, None, "not a JSON object"),
        (format_medmcqa, changed(MEDMCQA, question=None), "missing question"),
        (format_medmcqa, changed(MEDMCQA, opc=""), "missing options"),
        (format_medmcqa, changed(MEDMCQA, cop=None), "missing answer"),
        (format_medmcqa, changed(MEDMCQA, cop=-1), "unlabelled (cop = -1)"),
        (format_medmcqa, changed(MEDMCQA, cop=4), "unknown option number 4"),
        (format_medmcqa, changed(MEDMCQA, cop=float("nan")), "unknown option number nan"),
        (format_medmcqa, changed(MEDMCQA, cop=10**5000), "unknown option number beyond 10^9"),
        (format_medmcqa, changed(MEDMCQA, cop="2"), "cop is not a number"),
        (format_medmcqa, changed(MEDMCQA, cop=True), "cop is not a number"),
        (format_medmcqa, changed(MEDMCQA, exp=["x"]), "explanation is not text"),
    ],
)
def test_each_bad_record_has_its_reason(formatter, record, reason):
    with pytest.raises(RecordError) as caught:
        formatter(record)
    assert caught.value.reason == reason


def test_arrow_fillings_and_whole_floats_are_accepted():
    """Parquet gives every struct of a column the same keys, and pandas turns a column with nulls into floats."""
    options = {**PUBMEDQA["data"]["Options"], "D": None, "E": None}
    assert format_pubmed_qa(changed(PUBMEDQA, Options=options)) == EXERCISE
    assert format_medmcqa(changed(MEDMCQA, cop=2.0, exp=None)) == SEIZURE
    assert "\nE. None of them\nCorrect option: E. None of them" in format_medqa(
        changed(MEDQA, Options={**MEDQA["data"]["Options"], "E": "None of them"}, Correct_Option="E")
    )


def test_text_stays_as_it_came_but_for_nul_lone_surrogates_and_broken_option_lines():
    record = changed(MEDMCQA, question="\0 β-blockers,\ttwo\n\nlines \ud800 😀", opa="two\r\nlines")
    lines = format_medmcqa(record)
    assert lines.startswith("β-blockers,\ttwo\n\nlines \N{REPLACEMENT CHARACTER} 😀\nThe options are:\nA. two lines\n")
    assert lines.encode()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([-1, 0, 3, "A"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ABCDEx"), inner, max_size=5),
    max_leaves=6,
)
FIELDS = ["Question", "Context", "Options", "Correct Option", "Long Answer"]


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """Any dict at all, or a good record of which some fields became junk."""
    if draw(st.booleans()):
        return draw(st.dictionaries(st.text(max_size=8) | st.sampled_from([*MEDMCQA, "data"]), JUNK, max_size=6))
    if draw(st.booleans()):
        return {**MEDMCQA, **draw(st.dictionaries(st.sampled_from(list(MEDMCQA)), JUNK | st.text(), max_size=3))}
    junk = draw(st.dictionaries(st.sampled_from(FIELDS), JUNK | st.text(), max_size=3))
    return {**PUBMEDQA, "data": {**PUBMEDQA["data"], **junk}}


@settings(max_examples=150, deadline=None)
@given(damaged())
def test_any_dict_becomes_a_text_with_its_question_or_is_refused_with_a_reason(record):
    for spec in CORPORA.values():
        try:
            text = spec.formatter(record)
        except RecordError as error:
            assert error.reason and error.reason.isprintable() and len(error.reason) < 60
        else:
            assert question_of(record) in text and text == text.strip() and text.encode()
