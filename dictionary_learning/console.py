"""What the main job prints: the plan, how the stream went, and the table of results."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dictionary_learning.config import RunConfig

if TYPE_CHECKING:
    from dictionary_learning.planning import Plan
    from dictionary_learning.training import TrainingRun

SHOWN_DICTIONARIES = 3  # in the progress bar and the log lines


def shown_trainers(config: RunConfig) -> list[str]:
    """A few dictionaries for the log: the middle one of each architecture."""
    by_architecture: dict[str, list[int]] = {}
    for index, spec in enumerate(config.dictionaries):
        by_architecture.setdefault(spec.architecture, []).append(index)
    return [f"trainer_{which[len(which) // 2]}" for which in by_architecture.values()][:SHOWN_DICTIONARIES]


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """Print the warnings inside the block as sentences, without the line of the program that they come from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                print(f"Warning: {warning.message}")


def print_plan(config: RunConfig, plan: Plan) -> None:
    table = Table(title="The plan", show_header=False, title_justify="left")
    rows = [("model", config.model_name), ("corpus", config.corpus), ("hook points", ", ".join(config.hook_points))]
    for name, value in [*rows, *plan.lines()]:
        table.add_row(name, escape(value))
    Console().print(table)


def print_stream_facts(run: TrainingRun, buffer: Any) -> None:
    """How the stream went: the buffer's mixing, the rows that the norm filter dropped, passes over the corpus."""
    mixing = buffer.mixing()
    epoch = buffer.source.contexts.state_dict()["texts"]["epoch"]  # of what was trained on, not of what was read ahead
    facts = [f"{run.tokens:,} activations, {epoch + 1} pass(es) over the corpus begun"]
    if mixing:
        each, alone = mixing["rows_per_context"], mixing["rows_alone"]
        facts.append(f"{each:.2f} rows a context in the last batch, {alone:.0%} of them alone")
    facts.append(f"{buffer.source.rows_dropped_by_norm:,} of {buffer.source.rows_seen:,} rows dropped for their norm")
    print("Stream: " + "; ".join(facts) + ".")


def print_summary(rows: Sequence[dict[str, Any]], save_dir: Path) -> None:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    columns = (
        ("L0", "l0", ".1f"),
        ("variance explained", "frac_variance_explained", ".4f"),
        ("loss recovered", "frac_recovered", ".4f"),
        ("KL", "kl", ".4f"),
        ("alive", "frac_alive", ".3f"),
    )
    table = Table(title="Held-out results, by hook point and L0 (* on the front)", title_justify="left")
    for name in ("", "dictionary", "architecture", "sparsity", "width", "hook point"):
        table.add_column(name)
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            "*" if row["front"] else "",
            f"{row['trainer']} (stopped)" if row.get("stopped") else row["trainer"],
            row["architecture"],
            row["sparsity"],
            str(row["width"]),
            row["hook_point"],
            *(number(row[key], form) for _, key, form in columns),
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    print(f"Written to {save_dir}: summary.csv, metrics.jsonl, and a folder for each dictionary.")
