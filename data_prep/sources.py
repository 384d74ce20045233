"""Where the records come from: the six corpora and their three sources (the Hub, a folder, the embedded samples).

In: `"hub"`, `"embedded"` or a folder, and the corpora wanted. Out: `stream_texts`, one dict a record, in the order of
the corpora, files and lines, so that "the first n texts" means the same thing in every run (a resume counts on it).

Everything is read a line or a row batch at a time: memory does not grow with the corpus. A record that can't be
formatted goes to the `skipped` callback with its reason and place; nothing is dropped without a word. A Hub read that
breaks off is taken up again after the rows already seen.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from data_prep.embedded import SAMPLES_DIR
from data_prep.formats import (
    RecordError,
    format_medmcqa,
    format_medqa,
    format_mmlu,
    format_pubmed_qa,
    question_of,
)
from data_prep.splits import question_key
from dictionary_learning.errors import CommitError, UserError, did_you_mean
from dictionary_learning.parquet_files import parquet_rows
from dictionary_learning.stopping import StoppedWaiting, interruptible, waited_for
from dictionary_learning.untrusted import spellable

log = logging.getLogger("data_prep")

SUFFIXES = (".jsonl", ".parquet")
MAX_LINE_BYTES = 16 * 2**20
PLACE_ROWS = 10_000  # of a Hub split, between two places from which it can be read on
MOST_KEYED = 10_000  # characters of a question: to level its accents takes the square of their number


@dataclass(frozen=True)
class CorpusSpec:
    """One corpus: its name here, where the Hub keeps it, how many records it has there, and how to read one."""

    name: str
    hub_path: str
    split: str
    records: int
    licence: str
    formatter: Callable[[Any], str]


CORPORA: dict[str, CorpusSpec] = {
    name: CorpusSpec(name, f"openlifescienceai/{name}", split, records, licence, formatter)
    for name, split, records, licence, formatter in (
        ("medqa", "train", 10_178, "mit", format_medqa),
        ("medmcqa", "train", 182_822, "apache-2.0", format_medmcqa),
        ("pubmedqa", "train", 450, "mit", format_pubmed_qa),
        ("mmlu_college_medicine", "test", 173, "mit", format_mmlu),
        ("mmlu_clinical_knowledge", "test", 265, "mit", format_mmlu),
        ("mmlu_professional_medicine", "test", 272, "mit", format_mmlu),
    )
}


class RawRecord(NamedTuple):
    """A record as it was read. `record` is the dict, or the RecordError that reading the line gave."""

    corpus: str
    split: str
    where: str  # "medqa/train.jsonl:17", "openlifescienceai/medqa row 17"; rows and lines count from 1
    record: Any


class SkippedRecord(NamedTuple):
    """A record that did not become a text, and why."""

    corpus: str
    where: str
    id: str
    reason: str


class TextRecord(TypedDict):
    """A text, ready for the table (`text`, `source_dataset`), with what splits and provenance need."""

    text: str
    source_dataset: str
    id: str
    where: str  # as in RawRecord
    question_key: str  # equal for records that ask the same question, see splits.py


# ---------------------------------------------------------------------------------------------- the stream


def stream_texts(
    source: str | Path = "embedded",
    corpora: Sequence[str] | None = None,
    *,
    skipped: Callable[[SkippedRecord], None] | None = None,
    strict: bool = False,
    start: int = 0,
    hub_retries: int = 100,
    hub_wait: float = 20.0,
    commits: Mapping[str, str] | None = None,
) -> Iterator[TextRecord]:
    """Texts of `corpora` (None: all six, those present in a folder) from "hub", "embedded" or a folder; those of the
    Hub as they were at the `commits`, {hub path: commit}, where these are given.

    `start` passes over the first `start` texts: what comes then is exactly what an unbroken stream would yield next,
    and records skipped before that point are not reported again. `strict` stops at the first bad record.

    Raises UserError at once for an unknown corpus or a folder without records of the six, and while reading for a
    source without a single usable record, a damaged file, a Hub that stays away, and (strict) a bad record.
    """
    if start < 0:
        raise UserError(f"start must be 0 or more, not {start}.")
    if hub_retries < 1 or not hub_wait >= 0:
        raise UserError(f"Hub reads need at least 1 try and a wait of 0 s or more, not {hub_retries} and {hub_wait:g}.")
    specs = chosen_corpora(corpora)
    if str(source) == "hub":
        at = commits or {}
        raw = _chain(read_hub(spec, retries=hub_retries, wait=hub_wait, commit=at.get(spec.hub_path)) for spec in specs)
        shown = "the Hub"
    else:
        folder = SAMPLES_DIR if str(source) == "embedded" else Path(source)
        files = corpus_files(folder, specs, all_required=corpora is not None)
        raw = _chain(read_file(spec, file, folder) for spec in specs for file in files.get(spec.name, []))
        shown = str(source)
    return _texts(raw, shown, skipped, strict, start)


def _texts(
    raw: Iterator[RawRecord],
    source: str,
    skipped: Callable[[SkippedRecord], None] | None,
    strict: bool,
    start: int,
) -> Iterator[TextRecord]:
    texts = bad = 0
    first_reason = ""
    for record in raw:
        try:
            text = format_record(record)
        except RecordError as error:
            if strict:
                raise UserError(f"{record.where} in {source}: {error.reason} (a strict run stops here).") from None
            bad += 1
            first_reason = first_reason or error.reason
            if skipped is not None and texts >= start:
                skipped(SkippedRecord(record.corpus, record.where, record_id(record.record), error.reason))
            continue
        texts += 1
        if texts > start:
            yield {
                "text": text,
                "source_dataset": record.corpus,
                "id": spellable(record_id(record.record)),
                "where": record.where,
                "question_key": question_key(spellable(question_of(record.record)[:MOST_KEYED])),
            }
    if not texts:
        why = f"all {bad:,} were skipped, the first for: {first_reason}" if bad else "its files are empty"
        raise UserError(f"No usable record in {source}: {why}.")


def format_record(record: RawRecord) -> str:
    """The text of a raw record. Raises RecordError, also for one that could not be read."""
    if isinstance(record.record, RecordError):
        raise record.record
    return CORPORA[record.corpus].formatter(record.record)


def record_id(record: Any) -> str:
    """The record's own id as a short string; empty where it has none (hostile ids are cut)."""
    value = record.get("id") if isinstance(record, dict) else None
    printable = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 10**18)
    return str(value)[:200] if printable else ""


def chosen_corpora(names: Sequence[str] | None) -> list[CorpusSpec]:
    """The specs of `names` in the order given, each once; None means all six. Raises UserError on an unknown name."""
    if names is not None and not names:
        raise UserError(f"No corpus was chosen; the corpora are {', '.join(CORPORA)}.")
    for name in names or ():
        if name not in CORPORA:
            raise UserError(
                f"Unknown corpus {name!r}; the corpora are {', '.join(CORPORA)}.{did_you_mean(name, CORPORA)}"
            )
    return [CORPORA[name] for name in dict.fromkeys(names or CORPORA)]


def _chain(parts: Iterable[Iterator[RawRecord]]) -> Iterator[RawRecord]:
    for part in parts:
        yield from part


# ---------------------------------------------------------------------------------------------- folders


def corpus_files(
    folder: Path, specs: Sequence[CorpusSpec] | None = None, *, all_required: bool = False
) -> dict[str, list[Path]]:
    """Corpus name -> its files in `folder`: `<corpus>.jsonl`, `<corpus>/<split>.jsonl`, deeper ones, and parquet.

    Raises UserError for a missing folder, one that holds none of the corpora or (all_required) lacks one of them.
    """
    specs = specs or list(CORPORA.values())
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        near = did_you_mean(folder, ["hub", "embedded"]) if len(folder.parts) == 1 else ""
        raise UserError(f"The source {folder} {what}; give hub, embedded or a folder of records.{near}")
    files = {spec.name: _files_of(folder, spec.name) for spec in specs}
    missing = [name for name, found in files.items() if not found]
    if len(missing) == len(specs):
        inside = f" {folder.name} is a corpus itself: give the folder around it." if folder.name in CORPORA else ""
        raise UserError(
            f"{folder} holds none of the corpora {', '.join(files)}; each is expected as "
            f"<corpus>/<split>.jsonl or .parquet, or <corpus>.jsonl.{inside}"
        )
    if all_required and missing:
        raise UserError(f"{folder} has no records of {missing[0]} ({missing[0]}/<split>.jsonl or .parquet).")
    return {name: found for name, found in files.items() if found}


def _files_of(folder: Path, corpus: str) -> list[Path]:
    beside = [folder / f"{corpus}{suffix}" for suffix in SUFFIXES]
    inside = sorted((folder / corpus).rglob("*")) if (folder / corpus).is_dir() else []
    visible = (path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return [path for path in [*beside, *visible] if path.suffix in SUFFIXES and path.is_file()]


def looks_like_raw_records(folder: Path) -> bool:
    """Whether `folder` holds raw records of the corpora, as against files that have a `text` column already."""
    if not folder.is_dir():
        return False
    for name, spec in CORPORA.items():
        for file in _files_of(folder, name):
            for record in read_file(spec, file, folder):
                if isinstance(record.record, dict):
                    return "text" not in record.record and not {"question", "data"}.isdisjoint(record.record)
    return False


def read_file(spec: CorpusSpec, file: Path, folder: Path) -> Iterator[RawRecord]:
    """The records of one .jsonl or .parquet file, a line or a row batch at a time. Raises UserError if damaged."""
    rows = _jsonl_rows if file.suffix == ".jsonl" else _parquet_rows
    split = spec.split if file.parent == folder else file.stem.split("-")[0]
    shown = file.relative_to(folder).as_posix()
    try:
        for number, record in rows(file):
            yield RawRecord(spec.name, split, f"{shown}:{number}", record)
    except OSError as error:
        raise UserError(f"Could not read {file}: {error.strerror or error}.") from error


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE_BYTES)
                yield number, RecordError(f"line over {MAX_LINE_BYTES // 2**20} MiB")
            elif line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return RecordError("not UTF-8")
    except (ValueError, RecursionError):
        return RecordError("invalid JSON")


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    rows = parquet_rows(file)
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:  # pyarrow's own, and those of Python's types of what a column may hold
            raise UserError(f"{file} is not a readable parquet file ({_one_line(error)}).") from error
        if row is None:
            return
        yield number, row


# ---------------------------------------------------------------------------------------------- the Hub


class Place(NamedTuple):
    """A row of a Hub split, counted from 0, and what the dataset has to be told to go on there."""

    row: int
    state: dict[str, Any]


class HubSplit:
    """Iterates over the rows of a streamed dataset from `first_row` on; from a place at or before it, without reading
    what is before that."""

    def __init__(self, dataset: Any, first_row: int, place: Place | None = None) -> None:
        if place is not None:
            dataset.load_state_dict(place.state)
        self._dataset = dataset
        self._rows = itertools.islice(dataset, first_row - (0 if place is None else place.row), None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """What `Place.state` holds, behind the row given last."""
        return self._dataset.state_dict()


def open_hub_split(
    hub_path: str, split: str, first_row: int, place: Place | None = None, revision: str | None = None
) -> Iterable[dict[str, Any]]:
    """The rows of a dataset on the Hub from `first_row` on, streamed. The seam that tests replace."""
    from datasets import load_dataset

    return HubSplit(load_dataset(hub_path, split=split, streaming=True, revision=revision), first_row, place)


def hub_rows(
    hub_path: str,
    split: str,
    *,
    start: int = 0,
    retries: int = 100,
    wait: float = 20.0,
    instead: str = "a local file or folder",
    places: dict[int, Place] | None = None,
    commit: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a dataset on the Hub (as of a `commit`) after the first `start`, with their numbers, from 1 on.

    With `places`, {row: `Place`}, reading begins at the last of them before the row that is wanted, and every
    `PLACE_ROWS` rows one is entered.

    A read that breaks is tried again, `wait` seconds later, after the last row it gave; `retries` failures without a
    new row, or one that no retry can mend, end in a UserError that advises to work offline with `instead`.
    """
    from datasets.exceptions import DatasetNotFoundError

    hopeless = (DatasetNotFoundError, ImportError, TypeError, AttributeError, NameError)
    options: dict[str, Any] = {} if commit is None else {"revision": commit}
    row, failures = start, 0
    while True:
        try:
            if known := [place for at, place in (places or {}).items() if at <= row]:
                options["place"] = max(known, key=lambda place: place.row)
            with interruptible():
                rows = open_hub_split(hub_path, split, row, **options)
            for record in waited_for(rows):
                row, failures = row + 1, 0
                if places is not None and row % PLACE_ROWS == 0 and hasattr(rows, "state_dict"):
                    places[row] = Place(row, rows.state_dict())
                yield row, record
            return
        except StoppedWaiting:
            raise
        except Exception as error:
            failures += 1
            shown = f"{type(error).__name__}: {_one_line(error)}"
            # `datasets` says "no such split" by a plain ValueError, and "offline" in the words of a ConnectionError.
            offline = "offlinemode" in shown.lower().replace(" ", "")
            if isinstance(error, hopeless) or offline or type(error) is ValueError or failures >= retries:
                tries = "1 try" if failures == 1 else f"{failures:,} tries"
                at = "" if commit is None else f", commit {commit[:12]}"
                why = (
                    f"Could not read {hub_path} (split {split}{at}) from the Hub after {tries} ({shown}): check the "
                    f"network, or work offline with {instead}"
                )
                raise (UserError(f"{why}.") if commit is None else CommitError(why)) from error
            log.warning("%s: %s; try %d of %d in %g s", hub_path, shown, failures + 1, retries, wait)
        with interruptible():
            time.sleep(wait)


def read_hub(
    spec: CorpusSpec, *, retries: int = 100, wait: float = 20.0, commit: str | None = None
) -> Iterator[RawRecord]:
    """One of the six corpora, streamed from the Hub by `hub_rows`."""
    instead = f"the embedded samples or a folder that holds {spec.name}/{spec.split}.jsonl or .parquet"
    for row, record in hub_rows(spec.hub_path, spec.split, retries=retries, wait=wait, instead=instead, commit=commit):
        yield RawRecord(spec.name, spec.split, f"{spec.hub_path} row {row}", record)


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or "no message")[:200]
