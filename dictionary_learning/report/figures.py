"""The pictures of a report for a paper: the front, training curves, densities, as PNG and SVG.

In: `RunData`, and densities. Out: matplotlib figures, or files of them; the same run gives the same bytes. Colours and
shapes are those of the page: they differ for colour-blind readers, and in print without colour.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.errors import UserError
from dictionary_learning.report.data import CURVES, RunData, read_run
from dictionary_learning.report.page import BINS, LOWEST
from dictionary_learning.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8558f", "#c58800", "#4b5563", "#7a4fb5")  # as in page.css
MARKERS = "os^DvP"  # as in axes.js
QUALITIES = (
    ("frac_recovered", "front_recovered", "loss recovered"),
    ("frac_variance_explained", "front_explained", "explained variance"),
)
SHARES = ("explained", "dead", "silent")
MAX_PANELS = 12  # of densities
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "sae-factory",
    "svg.fonttype": "path",
}


def require_matplotlib() -> None:
    """Raises UserError: matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("Figures need matplotlib: install it with pip install 'sae-factory[report]'.")


def write_figures(run_folder: Path, out: Path) -> list[Path]:
    """Write front, curves and, of an analysed run, densities into `out`; the files.

    Raises:
        UserError: matplotlib is not installed; see `read_run`.
    """
    require_matplotlib()
    data = read_run(run_folder)
    figures = {"front": front_figure(data), "curves": curves_figure(data), "densities": densities_figure(data)}
    written = []
    for name, form in ((name, form) for name in figures for form in ("png", "svg")):
        figure = figures[name]
        if figure is not None:
            path = out / f"{name}.{form}"
            try:
                with atomic_path(path) as temporary:
                    temporary.write_bytes(rendered(figure, form))
            except OSError as error:
                raise UserError(f"The figure can't be written to '{path}' ({error.strerror or error}).") from error
            written.append(path)
    return written


def rendered(figure: Figure, form: str) -> bytes:
    """The bytes of a figure as png or svg, without a date."""
    import matplotlib

    image = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(image, format=form, dpi=200, metadata={"Software": None} if form == "png" else {"Date": None})
    return image.getvalue()


def front_figure(data: RunData) -> Figure | None:
    """Quality by L0, a panel a quality and a line a hook point; None where nothing was measured."""
    shown = [q for q in QUALITIES if any(d[q[0]] is not None and d["l0"] is not None for d in data.dictionaries)]
    if not shown:
        return None
    figure, panels = _figure(len(shown), 4.2, 3.2)
    for axes, (quality, front, label) in zip(panels, shown, strict=True):
        there = [d for d in data.dictionaries if d[quality] is not None and d["l0"] is not None]
        for hook_point in dict.fromkeys(d["hook_point"] for d in there):
            along = sorted((d["l0"], d[quality]) for d in there if d[front] and d["hook_point"] == hook_point)
            axes.plot([x for x, _ in along], [y for _, y in along], ":", color="#5a6067", linewidth=1, zorder=1)
        for name in _architectures(data):
            points = [d for d in there if d["architecture"] == name]
            x, y = [d["l0"] for d in points], [d[quality] for d in points]
            colour, marker = _look(data, name)
            axes.scatter(
                x,
                y,
                s=26,
                color=colour,
                marker=marker,
                edgecolors="white",
                linewidths=0.5,
                label=_plain(name),
                zorder=2,
            )
        if all(d["l0"] > 0 for d in there):
            _log_axis(axes, "x")
        axes.set_xlabel("L0 (active latents)")
        axes.set_ylabel(label)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def curves_figure(data: RunData) -> Figure | None:
    """A panel a metric of the training; None without a log."""
    shown = [metric for metric in data.metrics if metric != "dead"]  # which not every architecture counts
    if not shown:
        return None
    figure, panels = _figure(len(shown), 3.2, 2.8)
    for axes, metric in zip(panels, shown, strict=True):
        values: list[float] = []
        for dictionary in data.dictionaries:
            curve = data.curves.get(dictionary["name"], {})
            if metric in curve:
                x, y = np.array(curve["tokens"], float), np.array(curve[metric], float)
                axes.plot(x, y, color=_look(data, dictionary["architecture"])[0], linewidth=0.9, alpha=0.8)
                values += y[np.isfinite(y)].tolist()
        if metric in SHARES:
            low = min(max(0, min(values)), 0.95)
            axes.set_ylim(low, min(1, max(max(values), low + 0.05)))
        elif values and min(values) > 0 and max(values) > 20 * min(values):
            _log_axis(axes, "y")
        axes.xaxis.set_major_locator(_few())
        axes.set_xlabel("activations")
        axes.set_title(CURVES[metric][0], fontsize=9, loc="left")
    for name in _architectures(data):
        panels[0].plot([], [], color=_look(data, name)[0], label=_plain(name))
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def densities_figure(data: RunData, names: Sequence[str] | None = None) -> Figure | None:
    """How many latents fire how often, a panel a dictionary (`MAX_PANELS` at most); None without an analysis."""
    folder = AnalysisFolder(data.folder / "analysis")
    if not (folder.path / "analysis.json").is_file() or folder.info["status"] != "complete":
        return None
    known = [d for d in data.dictionaries if d["name"] in folder.names and (names is None or d["name"] in names)]
    if not known:
        return None
    figure, panels = _figure(len(known[:MAX_PANELS]), 2.8, 2.1)
    for axes, dictionary in zip(panels, known, strict=False):
        density = np.asarray(folder.table(dictionary["name"])["density"], float)
        log10 = np.log10(density[density > 0]).clip(LOWEST, 0)
        axes.hist(log10, bins=BINS, range=(LOWEST, 0), color=_look(data, dictionary["architecture"])[0])
        axes.bar(
            [LOWEST - 0.5], [len(density) - len(log10)], width=0.5, color="#a0a0a0", hatch="///", edgecolor="white"
        )
        axes.set_title(_plain(f"{dictionary['name']} {dictionary['sparsity']}"), fontsize=8, loc="left")
        axes.set_xlabel("log10 density")
        axes.set_xticks([-10, -8, -6, -4, -2, 0])
    panels[0].set_ylabel("latents")
    return figure


def _figure(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Panels in rows of up to four, without pyplot: no window, no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    across = min(count, 4)
    down = -(-count // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * across, height * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _architectures(data: RunData) -> list[str]:
    return list(dict.fromkeys(d["architecture"] for d in data.dictionaries))


def _look(data: RunData, architecture: str) -> tuple[str, str]:
    """(colour, marker), the same as on the page."""
    index = _architectures(data).index(architecture)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _plain(text: Any) -> str:
    """On one line, printable, and no formula."""
    line = "".join(c if c.isprintable() else " " for c in str(text))[:60]
    return " " + line.replace("$", r"\$")  # matplotlib leaves out of a legend what begins with an underscore


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)


def _log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import LogLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
