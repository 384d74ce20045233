"""The plots: bars of groups, and curves on logarithmic axes, as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same picture from the same numbers, byte for byte

import matplotlib.pyplot as plt  # noqa: E402


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """A panel for each group, a horizontal bar for each of its entries, all panels on their own scale."""
    rows = (len(groups) + 2) // 3
    tallest = max((len(entries) for entries in groups.values()), default=1)
    figure, axes = plt.subplots(rows, min(3, len(groups)) or 1, squeeze=False, figsize=(17, rows * (1 + 0.3 * tallest)))
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, (title, entries) in zip(axes.flat, groups.items(), strict=False):
        names = list(entries)[::-1]
        drawn = axis.barh(names, [entries[name] for name in names], color=[_color(name) for name in names])
        axis.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
        axis.set(title=title, xlabel=unit)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def curves(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], unit: str) -> None:
    """A panel for each varied size, a curve of (size, value) points for each of its entries."""
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(5.2 * len(panels), 4.2))
    for axis, (label, lines) in zip(axes.flat, panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot(
                *zip(*points, strict=True), marker="o", label=name, color=_color(name) if len(lines) > 1 else None
            )
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        axis.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.minorticks_off()
        axis.tick_params(axis="x", rotation=45)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _save(figure, path)


def _color(name: str) -> str:
    if name.startswith("ours"):
        return "tab:blue" if "bf16" not in name else "tab:cyan"
    return (
        "tab:gray" if "bound" in name or "matmul" in name or "harvest" in name or "Adam" in name[:12] else "tab:orange"
    )


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
