"""`sae-factory report RUN`: one page about a run, and pictures for a paper."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dictionary_learning.command_line import parse
from dictionary_learning.errors import exit_code
from dictionary_learning.report import MAX_MB, write_report


@dataclass
class ReportArgs:
    """Write report.html, one self-contained page: the front, training curves, and every latent of an analysed run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path | None = None
    """File to write (default: report.html in the run's folder)."""
    figures: bool = False
    """Write the front, the curves and the densities as PNG and SVG too, into figures/ beside the page."""
    max_mb: float = MAX_MB
    """The most that the page may take, in megabytes; it keeps fewer texts of each latent where all would take more."""


def run_command(args: ReportArgs) -> None:
    """Write what was asked for; prints where it is.

    Raises:
        UserError: see `write_report` and `write_figures`.
    """
    from dictionary_learning.report.figures import require_matplotlib, write_figures

    if args.figures:
        require_matplotlib()  # before the work
    path = write_report(args.run, args.out, args.max_mb)
    print(f"Written to {path} ({path.stat().st_size / 1e6:.1f} MB).")
    if args.figures:
        for figure in write_figures(args.run, path.parent / "figures"):
            print(f"Written to {figure}.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0; 2 for what the user can mend (one sentence); 130 after Ctrl-C."""
    args = parse(ReportArgs, argv, "sae-factory report")
    return exit_code(lambda: run_command(args))


if __name__ == "__main__":
    sys.exit(main())
