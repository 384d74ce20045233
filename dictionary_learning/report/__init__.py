"""One self-contained HTML page a run: how good its dictionaries are, how they trained, and what their latents fire on.

`write_report(folder)` writes report.html; `figures` the pictures of a paper; `notebook` the same views in a notebook.
"""

from __future__ import annotations

from pathlib import Path

from dictionary_learning.errors import UserError
from dictionary_learning.report.page import MAX_MB, report_html
from dictionary_learning.storage import atomic_file

FILE = "report.html"

__all__ = ["FILE", "MAX_MB", "report_html", "write_report"]


def write_report(run_folder: str | Path, out: str | Path | None = None, max_mb: float = MAX_MB) -> Path:
    """Write the report of a run; where it is.

    Args:
        run_folder: a run, with its analysis where there is one.
        out: the file to write, by default report.html in the run's folder.
        max_mb: the most that it may take, in millions of bytes.

    Raises:
        UserError: there is no run, a file of it is damaged, the page takes more than `max_mb` without any text, or it
            can't be written there.
    """
    folder = Path(run_folder).expanduser()
    path = folder / FILE if out is None else Path(out).expanduser()
    if path.is_dir():
        path = path / FILE
    page = report_html(folder, max_mb)
    size = len(page.encode()) / 1e6
    if size > max_mb:
        raise UserError(
            f"Without any text of its latents the page takes {size:.2f} MB: --max_mb must be more than that."
        )
    try:
        with atomic_file(path) as handle:
            handle.write(page)
    except OSError as error:
        raise UserError(
            f"The report can't be written to '{path}' ({error.strerror or error}): give another --out."
        ) from error
    return path
