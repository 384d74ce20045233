"""`python -m data_prep` (and `sae-factory prep`): records in, one table of texts out, on disk or on the Hub.

In: the settings below. Out: the folder described in publish.py and a `PrepReport`. One pass: read, format, drop
duplicates, choose the split, write; each step sees one record at a time.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.dedupe import Deduper
from data_prep.publish import TableWriter, check_out, check_push, push_folder, staged_folder
from data_prep.report import PrepReport, dataset_card
from data_prep.sources import CORPORA, SkippedRecord, TextRecord, stream_texts
from data_prep.splits import SPLITS, checked_fractions, split_of
from dictionary_learning.errors import UserError, exit_code


@dataclass(frozen=True)
class PrepConfig:
    """Turn medical QA records into one table with the columns `text` and `source_dataset`."""

    source: str = "embedded"
    """Where the records are: `hub`, `embedded` (the samples in this package), or a folder that holds
    <corpus>/<split>.jsonl or .parquet files."""

    corpora: tuple[str, ...] = ()
    """Corpora to take, in this order, of medqa, medmcqa, pubmedqa, mmlu_college_medicine, mmlu_clinical_knowledge and
    mmlu_professional_medicine (default: all that the source has)."""

    out: Path | None = None
    """Folder for the table: parquet files, dataset card, skipped.jsonl. Without it and --push_to, records are counted
    only."""

    overwrite: bool = False
    """Replace an earlier table in the --out folder (other files in it stay)."""

    push_to: str | None = None
    """Dataset repository on the Hub (user/name) to push the table to; needs HF_TOKEN or `hf auth login`."""

    private: bool = False
    """Make that repository private."""

    dedupe: bool = False
    """Leave out exact and near duplicates, but for the first of each family."""

    dedupe_threshold: float = 0.8
    """Share of word triples (of all that either text has, Jaccard's) from which two texts are near duplicates."""

    split: tuple[float, float, float] | None = None
    """Fractions of train, validation and test, like 0.98 0.01 0.01 (default: everything is train). All records of a
    question go to one split."""

    seed: int = 0
    """Of the split: another number, another choice of questions."""

    strict: bool = False
    """Stop at the first record that can't be formatted, instead of skipping it with its reason."""

    hub_retries: int = 100
    """Tries of a Hub read that fails before giving up."""

    hub_wait: float = 20.0
    """Seconds between these tries."""

    progress: bool = True
    """Show a progress bar (never shown when the output is not a terminal)."""


def prepare(config: PrepConfig) -> PrepReport:
    """Runs a preparation, prints its summary, and gives the report. Raises UserError for anything the user can mend."""
    fractions = checked_fractions(config.split or (1.0, 0.0, 0.0))
    if config.private and not config.push_to:
        raise UserError("--private is about the Hub repository: it needs --push_to.")
    if config.push_to:
        check_push(config.push_to)
    if config.out is not None:
        check_out(config.out, config.overwrite)
    with contextlib.ExitStack() as stack:
        out = config.out
        if out is None and config.push_to:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "dataset"
        try:
            report = _write_table(replace(config, split=fractions), out)
        except sqlite3.Error as error:
            raise UserError(f"The index of duplicates could not be kept in the temporary folder: {error}.") from error
        report.out = config.out
        if config.push_to and out is not None:
            try:
                report.url = push_folder(out, config.push_to, private=config.private)
            except UserError as error:
                kept = f" The table itself is in {config.out}." if config.out is not None else ""
                raise UserError(f"{error}{kept}") from error
    print(report.summary())
    return report


def _write_table(config: PrepConfig, out: Path | None) -> PrepReport:
    """One pass over the source; without `out` it only counts."""
    fractions = config.split or (1.0, 0.0, 0.0)
    report = PrepReport(
        source=config.source if config.source in ("hub", "embedded") else "folder",
        splits=tuple(split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0),
    )
    with contextlib.ExitStack() as stack:
        staging = stack.enter_context(staged_folder(out, config.overwrite)) if out is not None else None
        writer = stack.enter_context(TableWriter(staging)) if staging is not None else None
        deduper = Deduper(config.dedupe_threshold) if config.dedupe else None
        if deduper is not None:
            stack.callback(deduper.close)

        def left_out(record: SkippedRecord) -> None:
            report.skipped[record.corpus, record.reason] += 1
            if writer is not None:
                writer.skip(**record._asdict())

        for text in _with_progress(config, left_out):
            repeats = deduper.check(text["text"], text["where"]) if deduper is not None else None
            corpus = text["source_dataset"]
            if repeats is not None:
                report.duplicates[corpus, repeats.kind] += 1
                if writer is not None:
                    reason = f"{repeats.kind} duplicate"
                    writer.skip(corpus=corpus, where=text["where"], id=text["id"], reason=reason, of=repeats.of)
                continue
            split = split_of(text["question_key"], fractions, config.seed)
            report.add(corpus, split, text["text"])
            if writer is not None:
                writer.write(split, text["text"], corpus)
        if writer is not None and staging is not None:
            writer.close()
            card = dataset_card(report, writer.files, _notes(config))
            (staging / "README.md").write_text(card, encoding="utf-8")
    return report


def _with_progress(config: PrepConfig, left_out: Callable[[SkippedRecord], None]) -> Iterator[TextRecord]:
    from tqdm import tqdm

    texts = stream_texts(
        config.source,
        config.corpora or None,
        skipped=left_out,
        strict=config.strict,
        hub_retries=config.hub_retries,
        hub_wait=config.hub_wait,
    )
    expected = sum(CORPORA[name].records for name in config.corpora or CORPORA) if config.source == "hub" else None
    with tqdm(texts, total=expected, unit=" texts", disable=None if config.progress else True) as bar:
        yield from bar


def _notes(config: PrepConfig) -> list[str]:
    notes = []
    if config.split is not None and config.split[0] < 1:
        shown = " / ".join(f"{fraction:g}" for fraction in config.split)
        notes.append(
            f"Splits (train / validation / test {shown}, seed {config.seed}) are drawn by question: records "
            f"of one question are in one split."
        )
    if config.dedupe:
        notes.append(
            f"Exact duplicates and near duplicates (Jaccard similarity of word triples of at least "
            f"{config.dedupe_threshold:g}) were removed."
        )
    return notes


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Gives the exit code: 0, 2 for what the user can mend (one sentence on stderr), 130 after Ctrl-C."""
    from dictionary_learning.command_line import parse

    config = parse(PrepConfig, argv, "python -m data_prep" if argv is None else "sae-factory prep")

    def command() -> None:
        prepare(config)

    return exit_code(command, "Interrupted; no half-written table was left.")


if __name__ == "__main__":
    sys.exit(main())
