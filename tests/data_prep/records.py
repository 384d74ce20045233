"""Small well-formed records in the three layouts, and a writer of folders like the ones `--source DIR` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEDQA: dict[str, Any] = {
    "id": "q1",
    "data": {
        "Question": "  Which nerve is at risk in a fracture of the surgical neck of the humerus? ",
        "Options": {"A": "Radial", "B": " Axillary ", "C": "Ulnar", "D": "Median"},
        "Correct Option": "B",
        "Correct Answer": "Axillary",
    },
    "subject_name": None,
}
MEDMCQA: dict[str, Any] = {
    "id": "m1",
    "question": "Drug of choice for absence seizures",
    "opa": "Phenytoin",
    "opb": "Carbamazepine",
    "opc": "Ethosuximide",
    "opd": "Diazepam",
    "cop": 2,
    "choice_type": "single",
    "exp": "It blocks T-type calcium channels.\nRef: Katzung 14/e p 412",
    "subject_name": "Pharmacology",
    "topic_name": None,
}
PUBMEDQA: dict[str, Any] = {
    "id": 7,
    "data": {
        "Question": "Does exercise lower blood pressure?",
        "Context": ["Background paragraph.", "Methods paragraph."],
        "Options": {"A": "yes", "B": "no", "C": "maybe"},
        "Correct Option": "A",
        "Correct Answer": "yes",
        "Long Answer": "Exercise lowered it by 5 mm Hg.",
    },
    "subject_name": None,
}


def changed(record: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A copy with fields replaced: those of `data` where the record has one (`Long_Answer` for `Long Answer`)."""
    if "data" not in record:
        return {**record, **fields}
    return {**record, "data": {**record["data"], **{name.replace("_", " "): v for name, v in fields.items()}}}


def medmcqa(number: int, **fields: Any) -> dict[str, Any]:
    """The `number`-th of any number of MedMCQA records; all their questions and words differ."""
    words = " ".join(f"word{number}x{i}" for i in range(12))
    options = {f"op{letter}": f"{words} choice {letter}{number}" for letter in "abcd"}
    return {**MEDMCQA, "id": f"m{number}", "question": f"Question {number} {words}", **options, "exp": None, **fields}


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Writes one record a line; a str is written as it is (to make damaged lines)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
