"""The pictures of a report for a paper: the front, training curves, densities, as PNG and SVG.

In: `RunData`, and densities. Out: matplotlib figures, or files of them; the same run gives the same bytes. Colours and
shapes are those of the page: they differ for colour-blind readers, and in print without colour. Hollow points were not
evaluated, and what is below 0 stands at the lower edge, as on the page.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
        values = [d[quality] for d in there]
        low = None
        if min(values) < 0 < max(values):  # how bad those are does not matter, and would flatten the rest
            kept = [value for value in values if value >= 0]
            low = min(kept) - 0.09 * ((max(kept) - min(kept)) or max(kept))
            there = [{**d, quality: max(d[quality], low)} for d in there]
            label += "\n(what is below 0 stands at the edge)"
        for hook_point in dict.fromkeys(d["hook_point"] for d in there):
            along = sorted((d["l0"], d[quality]) for d in there if d[front] and d["hook_point"] == hook_point)
            axes.plot([x for x, _ in along], [y for _, y in along], ":", color="#5a6067", linewidth=1, zorder=1)
        for name in _architectures(data):
            points = [d for d in there if d["architecture"] == name]
            x, y = [d["l0"] for d in points], [d[quality] for d in points]
            batch = [d["measured"] == "batch" for d in points]
            colour, marker = _look(data, name)
            axes.scatter(
                x,
                y,
                s=[22 if hollow else 26 for hollow in batch],
                c=["white" if hollow else colour for hollow in batch],
                marker=marker,
                edgecolors=[colour if hollow else "white" for hollow in batch],
                linewidths=[1.3 if hollow else 0.5 for hollow in batch],
                clip_on=False,
                zorder=2,
            )
        if (least := min(d["l0"] for d in there)) > 0:
            axes.set_xlim(least / 1.18, 1.18 * max(d["l0"] for d in there))
            _log_axis(axes, "x", 9)
        axes.set_xlabel("L0 (active latents)")
        axes.set_ylim(bottom=low)
        axes.set_ylabel(label)
    _legend(figure, data, line="")
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
                colour, marker = _look(data, dictionary["architecture"])
                last = np.flatnonzero(np.isfinite(y))[-1:].tolist()
                axes.plot(x, y, color=colour, marker=marker, markevery=last, markersize=3.5, linewidth=0.9, alpha=0.8)
                values += y[np.isfinite(y)].tolist()
        if metric in SHARES:
            low = min(max(0, min(values)), 0.95)
            high = min(1, max(max(values), low + 0.05))
            axes.set_ylim(low, high + 0.02 * (high - low))
        elif values and min(values) > 0 and max(values) > 20 * min(values):
            _log_axis(axes, "y", 7)
        axes.xaxis.set_major_locator(_few(3))
        axes.xaxis.set_major_formatter(_short)
        axes.set_xlabel("activations")
        axes.set_title(CURVES[metric][0], fontsize=9, loc="left")
    _legend(figure, data, line="-")
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
        dead = len(density) - len(log10)
        axes.bar([LOWEST - 0.5], [dead], width=0.8, color="#a0a0a0", hatch="///", edgecolor="white")
        title = f"{dictionary['name']} · {dictionary['architecture']} {dictionary['sparsity']}"
        axes.set_title(_plain(title), fontsize=8, loc="left")
        axes.set_xlabel("log10 density")
        axes.set_xticks([LOWEST - 0.5, -8, -6, -4, -2, 0], ["never", "−8", "−6", "−4", "−2", "0"])
        axes.yaxis.set_major_locator(_few(5, integer=True))
    for axes in panels[::4]:
        axes.set_ylabel("latents")
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
        axes.set_axisbelow(True)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _architectures(data: RunData) -> list[str]:
    return list(dict.fromkeys(d["architecture"] for d in data.dictionaries))


def _look(data: RunData, architecture: str) -> tuple[str, str]:
    """(colour, marker), the same as on the page."""
    index = _architectures(data).index(architecture)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _legend(figure: Figure, data: RunData, line: Literal["", "-"]) -> None:
    """Above the panels, where it hides nothing: each architecture as it is drawn, and what hollow points are."""
    from matplotlib.lines import Line2D

    handles = []
    for name in _architectures(data):
        colour, marker = _look(data, name)
        handles.append(
            Line2D([], [], color=colour, marker=marker, markersize=4.5, linestyle=line, label=f" {_plain(name)}")
        )
    if not line and any(d["measured"] == "batch" for d in data.dictionaries):
        look = Line2D([], [], color=COLOURS[5], marker="o", markersize=4.5, linestyle="", label=" not evaluated")
        look.set(markerfacecolor="white", markeredgewidth=1.3)
        handles.append(look)
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4), frameon=False, fontsize=8)


def _plain(text: Any) -> str:
    """On one line, printable, and no formula."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:60].replace("$", r"\$")


def _few(most: int, integer: bool = False) -> Any:
    """Where the ticks of a linear axis go."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer)


def _short(value: float, position: object = None) -> str:
    """Of many activations: 50 k, 1.5 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _log_axis(axes: Axes, which: str, most: int) -> None:
    """A logarithmic axis with at most so many ticks, plain numbers all of them."""
    from matplotlib.ticker import FixedLocator, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in decades for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            break
    axis.set_major_locator(FixedLocator(ticks) if len(ticks) > 2 else _few(4))  # a narrow range has few round ones
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
