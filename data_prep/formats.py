"""From one raw record to one training text, for each of the three record layouts of the six corpora.

In: the record as the Hub serves it (a dict, hostile until proven otherwise). Out: a `str`, or `RecordError(reason)`.
The reasons are short and few, so that they can be counted; a record that lacks something its schema requires is
refused whole, never half-formatted. Only MedMCQA's `exp` may be null: that leaves the explanation out, nothing else.

The layout, one part a line, parts that a corpus does not have left out:

    Context:                                     PubMedQA
    <paragraph>                                  PubMedQA, one line each
    Question: <question>                         the label only where a context stands before it
    The options are:
    A. yes
    B. no
    C. maybe
    Correct option: A. yes
    Detailed answer: <long answer>               PubMedQA
    Explanation: <exp without its references>    MedMCQA

Text is kept as it came, but for surrounding white space, NUL characters, lone surrogates (which no file can hold)
and line breaks inside an option, which would break "one option a line".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

LETTERS = "ABCDEFGHIJ"
MEDMCQA_OPTIONS = {"A": "opa", "B": "opb", "C": "opc", "D": "opd"}


class RecordError(ValueError):
    """A record that can't become a text. `reason` is a short stable phrase, fit to be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# ---------------------------------------------------------------------------------------------- the formatters


def format_medqa(record: Mapping[str, Any]) -> str:
    """MedQA: question, options A to D, correct option.

    Raises RecordError for a missing question, missing options, a missing answer or an unknown option letter.
    """
    data = _data(record)
    return "\n".join([_question(data), *_answered(_options(data, "ABCD"), _letter(data))])


def format_mmlu(record: Mapping[str, Any]) -> str:
    """The three MMLU medical subjects: the layout and the errors of `format_medqa`."""
    return format_medqa(record)


def format_pubmed_qa(record: Mapping[str, Any]) -> str:
    """PubMedQA: context paragraphs, question, options yes / no / maybe, correct option, detailed answer.

    Raises RecordError as `format_medqa` does, and for a missing context or detailed answer.
    """
    data = _data(record)
    question = _question(data)
    context = list(_paragraphs(data.get("Context")))
    answered = _answered(_options(data, "ABC"), _letter(data))
    detailed = _text(data.get("Long Answer"), "detailed answer")
    return "\n".join(["Context:", *context, f"Question: {question}", *answered, f"Detailed answer: {detailed}"])


def format_medmcqa(record: Mapping[str, Any]) -> str:
    """MedMCQA: question, options A to D, correct option, explanation cut before its reference list.

    Raises RecordError for a missing question, missing options, a missing answer, `cop = -1` (unlabelled) and any
    other `cop` outside 0 to 3. A null or empty `exp` only leaves the explanation out.
    """
    record = _mapping(record)
    question = _question(record)
    options = {letter: _option(record.get(field)) for letter, field in MEDMCQA_OPTIONS.items()}
    lines = [question, *_answered(options, _medmcqa_letter(record.get("cop")))]
    exp = record.get("exp")
    explanation = "" if exp is None else without_references(_clean(exp, "explanation"))
    return "\n".join([*lines, f"Explanation: {explanation}"] if explanation else lines)


def question_of(record: Mapping[str, Any]) -> str:
    """The question of a record of any of the layouts, cleaned as in the text. Raises RecordError without one."""
    record = _mapping(record)
    return _question(_data(record) if "data" in record else record)


# ---------------------------------------------------------------------------------------------- references

# "Ref" alone is a marker before punctuation or a capital (`Ref Harrison 20/e`); "Refer", "Refractory" are words.
# "Reference" is also a word of prose ("reference range"): a marker before a colon or a dash, or alone on a line.
_MARKER = r"(?:(?i:refs?)(?:\s*[:.;=-]|[ \t]+(?=[A-Z0-9]))|(?i:references?)[ \t]*(?::|-(?!\w)))"
_BRACKETED_CITATION = re.compile(rf"[(\[][ \t]*{_MARKER}[^()\[\]\n]{{0,300}}[)\]]")
_REFERENCE_LIST = re.compile(rf"(?<!\w)[(\[]?{_MARKER}|^[ \t]*(?i:references?)[ \t]*$", re.MULTILINE)


def without_references(explanation: str) -> str:
    """The explanation up to its reference list.

    A citation in brackets goes alone. Any other marker (`Ref:`, `Ref. Harrison`, `References:-`) starts the list, and
    everything from there on goes; where it opens the explanation only its line goes, for prose follows the citation.
    """
    text = _BRACKETED_CITATION.sub("", explanation)
    start = 0
    while marker := _REFERENCE_LIST.search(text, start):
        if before := text[start : marker.start()].strip():
            return before
        line_end = text.find("\n", marker.end())
        if line_end < 0:
            return ""
        start = line_end + 1
    return text[start:].strip()


# ---------------------------------------------------------------------------------------------- the parts


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError("not a JSON object")
    return value


def _data(record: Any) -> Mapping[str, Any]:
    data = _mapping(record).get("data")
    if data is None:
        raise RecordError("missing question")
    if not isinstance(data, Mapping):
        raise RecordError("data is not a JSON object")
    return data


def _clean(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{what} is not text")
    text = value.replace("\0", "").strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON escapes can carry and UTF-8 can't
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").strip()
    return text


def _text(value: Any, what: str) -> str:
    text = "" if value is None else _clean(value, what)
    if not text:
        raise RecordError(f"missing {what}")
    return text


def _question(fields: Mapping[str, Any]) -> str:
    return _text(fields.get("Question", fields.get("question")), "question")


def _paragraphs(context: Any) -> Iterator[str]:
    paragraphs = [context] if isinstance(context, str) else context
    if not paragraphs:
        raise RecordError("missing context")
    if not isinstance(paragraphs, list | tuple):
        raise RecordError("context is not text")
    for paragraph in paragraphs:
        yield _text(paragraph, "context")


def _option(value: Any) -> str:
    text = "" if value is None else _clean(value, "option")
    if not text:
        raise RecordError("missing options")
    return " ".join(text.splitlines())


def _options(data: Mapping[str, Any], required: str) -> dict[str, str]:
    """Option letter -> text, in the order of the letters. A null beyond the required letters is Arrow's filling."""
    options = data.get("Options")
    if not options:
        raise RecordError("missing options")
    if not isinstance(options, Mapping):
        raise RecordError("options are not a JSON object")
    for letter, text in options.items():
        if text is not None and (not isinstance(letter, str) or len(letter) != 1 or letter not in LETTERS):
            raise RecordError(f"unknown option letter {_shown(letter)}")
    return {
        letter: _option(options.get(letter))
        for letter in LETTERS
        if letter in required or options.get(letter) is not None
    }


def _letter(data: Mapping[str, Any]) -> str:
    return _text(data.get("Correct Option"), "answer")


def _medmcqa_letter(cop: Any) -> str:
    if cop is None:
        raise RecordError("missing answer")
    if isinstance(cop, bool) or not isinstance(cop, int | float):
        raise RecordError("cop is not a number")
    if cop == -1:
        raise RecordError("unlabelled (cop = -1)")
    if cop not in (0, 1, 2, 3):
        raise RecordError(f"unknown option number {_shown(cop)}")
    return LETTERS[int(cop)]


def _answered(options: dict[str, str], letter: str) -> list[str]:
    if letter not in options:
        raise RecordError(f"unknown option letter {_shown(letter)}")
    listed = [f"{name}. {text}" for name, text in options.items()]
    return ["The options are:", *listed, f"Correct option: {letter}. {options[letter]}"]


def _shown(value: Any) -> str:
    """A hostile value, short and printable: reasons are counted, written to a terminal and put on the card."""
    if isinstance(value, int) and abs(value) > 10**9:  # printing a huge integer is itself an error in Python
        return "beyond 10^9"
    shown = ascii(value)
    return shown if len(shown) <= 12 else f"{shown[:9]}..."
