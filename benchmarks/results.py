"""What was measured, on disk: a JSON file a section, and the sections of RESULTS.md that are written from them.

A section of RESULTS.md stands between two marks that carry its name; writing one leaves everything else as it is.
`python -m benchmarks report` writes all sections and plots anew from the JSON files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import machine

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Table:
    """A title, the columns' names, and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def show(self, console: Console) -> None:
        table = RichTable(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


@dataclass(frozen=True)
class Report:
    """What a section says of its raw results: tables, remarks below them, names of its plots (in the plots folder)."""

    title: str
    tables: Sequence[Table]
    remarks: Sequence[str] = ()
    plots: Sequence[str] = ()


def save(folder: Path, section: str, command: str, threads: int | None, options: dict[str, Any], data: Any) -> Path:
    """Write a section's raw results with the machine and the command that they come from."""
    content = {
        "command": command,
        "machine": machine.describe(threads),
        "options": options,
        "data": data,
    }
    path = folder / "results" / f"{section}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    # Where this checkout and its temporary files lie is nobody's business: a path is written as its last part.
    text = re.sub(r'"/[^"]*/([^"/]+)"', r'"\1"', json.dumps(content, indent=1))
    temporary.write_text(text + "\n")
    temporary.replace(path)
    return path


def load(folder: Path, section: str) -> dict[str, Any] | None:
    path = folder / "results" / f"{section}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_section(folder: Path, section: str, report: Report, saved: dict[str, Any]) -> None:
    """Put a section into RESULTS.md in place of what stood between its marks, or at the end."""
    begin, end = f"<!-- {section}: written by python -m benchmarks -->", f"<!-- end of {section} -->"
    parts = [f"## {report.title}", f"`{saved['command']}`", f"{machine.sentence(saved['machine'])}."]
    if saved["machine"]["gpu"] is None:
        parts.append("No GPU was at hand: this section's figures for CUDA wait for one.")
    parts += [table.markdown() for table in report.tables]
    parts += report.remarks
    parts += [f"![{name}](plots/{name})" for name in report.plots]
    block = "\n\n".join([begin, *parts, end])
    path = folder / "RESULTS.md"
    text = path.read_text() if path.exists() else "# Measurements\n"
    if begin in text:
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda _: block, text, count=1, flags=re.S)
    else:
        text = text.rstrip("\n") + "\n\n" + block + "\n"
    path.write_text(text)


def skipped_remarks(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every contestant that did not run, with its reason."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry.get("skipped"):
            reasons.setdefault(f"{entry['who']}: {entry['skipped']}", []).append(entry["name"])
    if not reasons:
        return []
    return ["Not measured:\n" + "\n".join(f"- {', '.join(sorted(set(n)))} — {why}" for why, n in reasons.items())]
