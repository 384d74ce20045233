"""The views of the report inside a notebook: objects that show themselves.

`show_run(folder)` is the whole page, `show_feature(folder, dictionary, feature)` one latent, `show_front` and
`show_densities` the figures. The page stands in a frame of its own, so that its styles and scripts and those of the
notebook know nothing of each other.
"""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dictionary_learning.errors import UserError
from dictionary_learning.report.data import read_run
from dictionary_learning.report.figures import densities_figure, front_figure, rendered, require_matplotlib
from dictionary_learning.report.page import report_html

NOTEBOOK_MB = 12.0  # a notebook keeps what it shows, and is slow to open when that is much


@dataclass(frozen=True)
class Frame:
    """A page in a notebook. page: its HTML. height: of the frame, in pixels. label: for screen readers."""

    page: str
    height: int
    label: str

    def _repr_html_(self) -> str:
        """A frame that may run the page's script, and nothing of the notebook's."""
        return (
            f'<iframe title="{html.escape(self.label)}" sandbox="allow-scripts" srcdoc="{html.escape(self.page)}" '
            f'style="width: 100%; height: {self.height}px; border: 0; border-radius: 8px;"></iframe>'
        )


@dataclass(frozen=True)
class Picture:
    """A figure in a notebook. svg: its bytes. label: what it shows, for screen readers."""

    svg: bytes
    label: str

    def _repr_html_(self) -> str:
        """An image, so that no name inside the SVG can clash with the notebook's."""
        data = base64.b64encode(self.svg).decode("ascii")
        style = "max-width: 100%; background: white;"
        return f'<img alt="{html.escape(self.label)}" src="data:image/svg+xml;base64,{data}" style="{style}">'


def show_run(folder: str | Path, height: int = 900, max_mb: float = NOTEBOOK_MB) -> Frame:
    """The report of a run. Raises UserError: see `report_html`."""
    return Frame(report_html(Path(folder).expanduser(), max_mb), height, "Report of a run")


def show_feature(folder: str | Path, dictionary: str, feature: int, height: int = 760) -> Frame:
    """One latent of an analysed run. Raises UserError: see `report_html`."""
    page = report_html(Path(folder).expanduser(), NOTEBOOK_MB, only=(dictionary, feature))
    return Frame(page, height, f"Latent {feature} of {dictionary}")


def show_front(folder: str | Path) -> Picture:
    """Quality against sparsity. Raises UserError: no matplotlib, no run, or nothing measured."""
    require_matplotlib()
    return _picture(front_figure(read_run(Path(folder).expanduser())), "Quality by L0", "no dictionary was measured")


def show_densities(folder: str | Path, *dictionaries: str) -> Picture:
    """How often latents fire, of the dictionaries named or of all. Raises UserError: no matplotlib, run or analysis."""
    require_matplotlib()
    figure = densities_figure(read_run(Path(folder).expanduser()), dictionaries or None)
    return _picture(figure, "Latents by log10 density", "it has no analysis of these dictionaries")


def _picture(figure: Any, label: str, why_not: str) -> Picture:
    if figure is None:
        raise UserError(f"There is nothing to show of this run: {why_not}.")
    return Picture(rendered(figure, "svg"), label)
