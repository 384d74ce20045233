"""What a preparation did: the counts, the table printed at its end, and the dataset card.

In: one call a record while the texts stream by. Out: text for people. Only counters are kept, never records, so that
the report of 200,000 records is as small as that of ten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.sources import CORPORA
from data_prep.splits import SPLITS

CHARACTERS_PER_TOKEN = 4
EMBEDDED_LICENCE = "mit"
REASONS_SHOWN = 30  # hostile records can make as many reasons as there are records


@dataclass
class PrepReport:
    """Counts of one preparation, by corpus and by what became of each record, and where the table went."""

    source: str  # "hub", "embedded" or "folder"
    splits: tuple[str, ...] = SPLITS[:1]  # those asked for, also where no text fell into one
    texts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (corpus, split) -> texts written
    characters: Counter[str] = field(default_factory=Counter)  # corpus -> characters of its texts
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)  # (corpus, reason) -> records
    duplicates: Counter[tuple[str, str]] = field(default_factory=Counter)  # (corpus, "exact" | "near") -> records
    out: Path | None = None
    url: str | None = None

    def add(self, corpus: str, split: str, text: str) -> None:
        """Counts a text that goes into the table."""
        self.texts[corpus, split] += 1
        self.characters[corpus] += len(text)

    @property
    def corpora(self) -> list[str]:
        """The corpora met, in the order of the registry."""
        met = {corpus for counter in (self.texts, self.skipped, self.duplicates) for corpus, _ in counter}
        return [name for name in CORPORA if name in met]

    def tokens(self, corpus: str | None = None) -> int:
        """Estimated tokens of a corpus or of all: characters / 4, the usual ratio of English under a BPE vocabulary."""
        characters = self.characters.total() if corpus is None else self.characters[corpus]
        return characters // CHARACTERS_PER_TOKEN

    def licence(self, corpus: str) -> str:
        """The licence of the records: the corpus's own, or this project's for the embedded samples."""
        return EMBEDDED_LICENCE if self.source == "embedded" else CORPORA[corpus].licence

    def rows(self) -> list[list[str]]:
        """Header, one row a corpus, total: texts by split, estimated tokens, skipped, duplicates."""
        header = ["corpus", "texts", *(self.splits if len(self.splits) > 1 else ()), "~tokens", "skipped"]
        kinds = sorted({kind for _, kind in self.duplicates})
        rows = [[*header, *(f"{kind} dup." for kind in kinds)]]
        for name in [*self.corpora, None]:
            chosen = self.corpora if name is None else [name]
            by_split = [sum(self.texts[corpus, split] for corpus in chosen) for split in self.splits]
            skipped = sum(n for (corpus, _), n in self.skipped.items() if corpus in chosen)
            repeated = [sum(self.duplicates[corpus, kind] for corpus in chosen) for kind in kinds]
            numbers = [sum(by_split), *(by_split if len(by_split) > 1 else ()), self.tokens(name), skipped, *repeated]
            rows.append([name or "total", *(f"{number:,}" for number in numbers)])
        return rows

    def reasons(self) -> list[tuple[str, str, int]]:
        """(corpus, reason, records) of what was skipped, the most frequent first, `REASONS_SHOWN` at most."""
        common = self.skipped.most_common(REASONS_SHOWN)
        shown = [(corpus, reason, number) for (corpus, reason), number in common]
        rest = self.skipped.total() - sum(number for _, _, number in shown)
        return [*shown, ("others", "see skipped.jsonl", rest)] if rest else shown

    def summary(self) -> str:
        """The table printed at the end, with the reasons below it and where the data set went."""
        lines = _aligned(self.rows())
        if self.skipped:
            reasons = [[corpus, reason, f"{number:,}"] for corpus, reason, number in self.reasons()]
            lines += ["", *_aligned([["corpus", "skipped for", "records"], *reasons])]
        lines += [f"Written to {self.out}"] if self.out else []
        lines += [f"Pushed to {self.url}"] if self.url else []
        return "\n".join(lines if self.out or self.url else [*lines, "Nothing was written: give --out or --push_to."])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows, the first a header, as lines of equal columns: words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(row[column].replace(",", "").isdigit() for row in rows[1:]) for column in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]


# ---------------------------------------------------------------------------------------------- the dataset card


def dataset_card(report: PrepReport, files: dict[str, str], notes: Iterable[str]) -> str:
    """README.md of the table: the YAML header that `datasets` and the Hub read, then the counts, for people.

    `files` maps a split to its parquet file (relative), `notes` are sentences about how this table was made.
    """
    sources = {
        "hub": "the Hub data sets below",
        "folder": "a folder of records in the layouts of the Hub data sets below",
        "embedded": "the sample records of SAE Factory, written for it in the layouts of the Hub data sets below",
    }
    header = [
        "license:",
        *(f"- {licence}" for licence in sorted({report.licence(corpus) for corpus in report.corpora})),
        "language:\n- en\ntask_categories:\n- text-generation\n- question-answering\ntags:\n- medical",
        f"size_categories:\n- {_size_category(report.texts.total())}",
        "configs:\n- config_name: default\n  data_files:",
        *(f"  - split: {split}\n    path: {path}" for split, path in files.items()),
    ]
    licences = [
        [f"[{name}](https://huggingface.co/datasets/{CORPORA[name].hub_path})", report.licence(name)]
        for name in report.corpora
    ]
    repeated = report.duplicates.total()
    parts = [
        "---\n" + "\n".join(header) + "\n---",
        "# Medical QA as plain text",
        f"Medical questions with their answers, one text a record, prepared by `data_prep` of SAE Factory from "
        f"{sources[report.source]}. Columns: `text`, and `source_dataset`, the corpus it comes from.",
        _markdown(report.rows()),
        f"Tokens are an estimate: characters / {CHARACTERS_PER_TOKEN}. " + " ".join(notes),
        "## Text\n\nContext (PubMedQA), question, `The options are:` with one option a line, `Correct option: ...`, "
        "then the explanation (MedMCQA, cut before its reference list) or the detailed answer (PubMedQA).",
        "## Records left out\n\n"
        + (
            _markdown([["corpus", "reason", "records"], *([c, r, f"{n:,}"] for c, r, n in report.reasons())])
            if report.skipped
            else "No record was skipped."
        )
        + (f"\n\n{repeated:,} duplicates were removed." if repeated else "")
        + ("\n\nEach is listed in `skipped.jsonl`." if report.skipped or repeated else ""),
        "## Sources and licences\n\n" + _markdown([["corpus", "licence"], *licences]),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]])


def _size_category(records: int) -> str:
    for bound, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if records < bound:
            return name
    return "1M<n<10M"
