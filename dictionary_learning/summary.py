"""The summary of a sweep: which dictionaries are worth having, and the file that says so.

In: one row of metrics a dictionary. Out: the rows along the front of the best trade-offs, and `summary.csv`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dictionary_learning.errors import UserError
from dictionary_learning.metrics import EvalResult
from dictionary_learning.storage import atomic_file
from dictionary_learning.untrusted import shown

READING_LOSS = 0.02


def sorted_along_front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a summary by hook point and L0, with `front` True for the best trade-offs: where no other dictionary of
    that hook point has as low an L0 and recovers as much of the loss (or, without a loss, explains as much variance).
    """

    best: dict[Any, float] = {}
    out = []
    for row in sorted(rows, key=lambda row: (str(row.get("hook_point")), row["l0"], -_quality(row))):
        best_so_far = best.get(row.get("hook_point"), -math.inf)
        out.append({**row, "front": _quality(row) > best_so_far})
        best[row.get("hook_point")] = max(_quality(row), best_so_far)
    return out


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best dictionary: on the front, the one that recovers most of the loss (or, without a loss,
    explains most variance); of equals the sparsest."""
    return max((row for row in rows if row["front"]), key=lambda row: (_quality(row), -row["l0"]))


def worth_reading(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the dictionaries to read first: of each architecture at each hook point the sparsest that is at most
    `READING_LOSS` worse than its best (in loss recovered or, without a loss, in variance explained).

    The best dictionaries of a sweep are its least sparse, in which a latent means least; this gives up little for L0.
    """
    kinds: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row.get("hook_point"), row["architecture"]), []).append(row)
    found = []
    for kind in kinds.values():
        best = max(map(_quality, kind))
        found.append(min((row for row in kind if _quality(row) >= best - READING_LOSS), key=lambda row: row["l0"]))
    return found


def _quality(row: dict[str, Any]) -> float:
    values = (row.get("frac_recovered"), row["frac_variance_explained"])
    return next((value for value in values if value is not None), -math.inf)


def write_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `summary.csv`, one line a dictionary."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as handle:
        handle.write(text.getvalue())


def read_summary(path: Path) -> list[dict[str, Any]]:
    """The rows of a `summary.csv` as they were written, along the front.

    Raises:
        UserError: not a summary of at least one dictionary.
    """
    numbers = {field.name for field in dataclasses.fields(EvalResult)} | {"lr"}
    whole = ("width", "seed", "tokens")
    words = ("trainer", "architecture", "hook_point", "sparsity")
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            rows: list[dict[str, Any]] = list(csv.DictReader(handle))
        for row in rows:
            for name in numbers & set(row):
                row[name] = float(row[name]) if row[name] else None
            row |= {"frac_variance_explained": row["frac_variance_explained"], "l0": row["l0"]}  # what the front needs
            row |= {name: int(float(row[name])) for name in whole} | {name: str(row[name]) for name in words}
            row["front"] = row["front"] == "True"
        if not any(row["front"] and row["l0"] is not None for row in rows):
            raise ValueError("no dictionary is on the front")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise UserError(f"'{path}' is not a run's summary ({type(error).__name__}: {shown(error)}).") from error
    return rows
