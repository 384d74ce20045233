"""The tables of the quality benchmark: ours beside the best peer for each architecture, and every run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks import machine
from benchmarks.results import Report, Table, skipped_remarks

NEAR = 0.1  # relative difference of L0 up to which two dictionaries are compared
UNIT = 1e-5  # deviation of a norm from 1
METRICS = ("l0", "explained_variance", "alive", "dense", "max_cosine", "norm_error")


@dataclass
class Group:
    """The runs of one contestant: {seed: metrics and seconds}."""

    who: str
    architecture: str
    label: str
    runs: dict[int, dict[str, float]]
    unit_norm: bool = False
    learning_rate: float | None = None

    def mean(self, name: str) -> float:
        values = [run[name] for run in self.runs.values()]
        return sum(values) / len(values)

    def each(self, name: str, form: str) -> str:
        """The mean, and behind it each seed's value where there are several."""
        values = [format(run[name], form) for _, run in sorted(self.runs.items())]
        return values[0] if len(values) == 1 else f"{self.mean(name):{form}} ({', '.join(values)})"

    def near(self, l0: float) -> bool:
        return all(abs(run["l0"] / l0 - 1) <= NEAR for run in self.runs.values())


def line(row: dict[str, Any]) -> str:
    """A row as it is printed when it is done."""
    name = f"{row['who']} {row['architecture']}, {row['label']}, seed {row['seed']}"
    if row.get("skipped"):
        return f"{name}: not measured, {row['skipped']}"
    m = row["metrics"]
    return (
        f"{name}: L0 {m['l0']:.1f}, explained variance {m['explained_variance']:.4f}, alive {m['alive']:.3f}, "
        f"{row['seconds']:.0f} s"
    )


def groups_of(rows: Sequence[dict[str, Any]], k: int) -> list[Group]:
    """What was measured, and of each series its interpolation at L0 = k."""
    groups: dict[tuple[str, str, str], Group] = {}
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("skipped"):
            continue
        key = (row["who"], row["architecture"], row["label"])
        group = groups.setdefault(key, Group(*key, {}, row["unit_norm"], row["settings"].get("lr")))
        group.runs[row["seed"]] = row["metrics"] | {"seconds": row["seconds"]}
        if row["series"]:
            series.setdefault(key[:2], []).append(row)
    between = [interpolated(*key, rows, k) for key, rows in series.items()]
    return [*groups.values(), *(group for group in between if group.runs)]


def interpolated(who: str, architecture: str, rows: Sequence[dict[str, Any]], k: int) -> Group:
    """At L0 = k, for each seed: linear in log L0 between the two runs with the L0 next below and next above."""
    group = Group(who, architecture, f"interpolated at L0 = {k}", {}, rows[0]["unit_norm"])
    for seed in sorted({row["seed"] for row in rows}):
        runs = [row["metrics"] | {"seconds": row["seconds"]} for row in rows if row["seed"] == seed]
        runs = sorted((run for run in runs if run["l0"] > 0), key=lambda run: run["l0"])
        for low, high in pairwise(runs):
            if low["l0"] <= k <= high["l0"] and low["l0"] < high["l0"]:
                t = math.log(k / low["l0"]) / math.log(high["l0"] / low["l0"])
                group.runs[seed] = {name: low[name] + t * (high[name] - low[name]) for name in low} | {"l0": float(k)}
                break
    return group


def best_peer(groups: Sequence[Group], k: int) -> Group | None:
    """The peer's setting with the highest mean explained variance among those whose L0 is near k."""
    near = [group for group in groups if group.who != "ours" and group.near(k)]
    return max(near, key=lambda group: group.mean("explained_variance"), default=None)


def differences(ours: Group, groups: Sequence[Group], k: int) -> list[float]:
    """Explained variance of ours less the best of all near peers, for each seed that both have."""
    peers = [group for group in groups if group.who != "ours" and group.near(k)]
    found = []
    for seed, run in sorted(ours.runs.items()):
        theirs = [peer.runs[seed]["explained_variance"] for peer in peers if seed in peer.runs]
        if theirs:
            found.append(run["explained_variance"] - max(theirs))
    return found


def verdict_row(ours: Group, groups: Sequence[Group], k: int) -> list[str]:
    cells = [
        ours.architecture,
        ours.each("l0", ".1f"),
        ours.each("explained_variance", ".4f"),
        f"{ours.mean('alive'):.3f}",
    ]
    peer = best_peer(groups, k)
    if peer is None:
        measured = any(group.who != "ours" for group in groups)
        return [*cells, "–", "–", "–", "–", "–", "no peer near this L0" if measured else "no peer measured here"]
    cells += [f"{peer.who}, {peer.label}", peer.each("l0", ".1f"), peer.each("explained_variance", ".4f")]
    cells.append(f"{peer.mean('alive'):.3f}")
    gaps = differences(ours, groups, k)
    cells.append(", ".join(f"{gap:+.4f}" for gap in gaps) or "–")
    if not ours.near(k):
        return [*cells, "not at this L0"]
    if not gaps:
        return [*cells, "no seed in common"]
    variance = "at or above on every seed" if min(gaps) >= 0 else "below" if max(gaps) < 0 else "above on some seeds"
    alive = "as many alive" if ours.mean("alive") >= peer.mean("alive") else "fewer alive"
    return [*cells, f"{variance}; {alive}"]


def run_row(group: Group) -> list[str]:
    norm = max(run["norm_error"] for run in group.runs.values())
    kept = "–" if not group.unit_norm else f"{norm:.0e}" + ("" if norm <= UNIT else " (not unit)")
    return [
        group.architecture,
        group.who,
        group.label,
        "–" if group.learning_rate is None else f"{group.learning_rate:.2g}",
        group.each("l0", ".1f"),
        group.each("explained_variance", ".4f"),
        f"{group.mean('alive'):.3f}",
        f"{group.mean('dense'):.4f}",
        f"{group.mean('max_cosine'):.3f}",
        "–" if group.label.startswith("interpolated") else kept,
        "–" if group.label.startswith("interpolated") else f"{group.mean('seconds'):.0f}",
    ]


def report(data: dict[str, Any]) -> Report:
    sizes, acts, rows = data["sizes"], data["acts"], data["rows"]
    k, groups = sizes["k"], groups_of(data["rows"], data["sizes"]["k"])
    architectures = list(dict.fromkeys(row["architecture"] for row in sorted(rows, key=place)))
    groups.sort(key=lambda g: (architectures.index(g.architecture), g.who != "ours", -g.mean("explained_variance")))
    verdicts = []
    for architecture in architectures:
        same = [group for group in groups if group.architecture == architecture]
        verdicts += [verdict_row(group, same, k) for group in same if group.who == "ours"]
    setting = (
        f"d = {acts['d']}, {sizes['m']:,} latents, batch {sizes['batch']:,}, {sizes['steps']:,} steps, fp32, "
        f"{acts['train_rows']:,} rows to train on, {acts['eval_rows']:,} held-out rows"
    )
    beside = Table(
        f"Explained variance at L0 = {k}, ours at our defaults beside the best setting of any peer ({setting}). Mean "
        "of the seeds, and each in parentheses; the difference is to the best of all peers at each seed.",
        [
            "architecture",
            "our L0",
            "ours",
            "our alive",
            "best peer",
            "its L0",
            "its",
            "its alive",
            "difference",
            "ours is",
        ],
        verdicts,
    )
    every = Table(
        "Every run. Alive and dense (firing on more than a tenth of the rows) are shares of the latents; the cosine is "
        "that of a decoder row to the nearest other one, in the mean; the norm is the largest deviation of a decoder "
        "row's norm from 1 (– where the trainer promises no unit norm); seconds are of training, in the mean.",
        [
            "architecture",
            "trainer",
            "setting",
            "lr",
            "L0",
            "explained variance",
            "alive",
            "dense",
            "cosine",
            "norm",
            "s",
        ],
        [run_row(group) for group in groups],
    )
    return Report("Quality at equal budget", [beside, every], remarks(rows, k))


def place(row: dict[str, Any]) -> int:
    from benchmarks.quality import ARCHITECTURES

    return ARCHITECTURES.index(row["architecture"])


def remarks(rows: Sequence[dict[str, Any]], k: int) -> list[str]:
    said = [
        "All trainers see the same rows in the same order at each seed. Every dictionary is handed over as arrays, "
        "whose reconstructions are checked against its own forward, and is measured by one function on the held-out "
        "rows, pooled, the variance taken about the mean. Peers run at their defaults but for what the setting says; "
        "their warm-ups are cut to 100 steps, in shorter runs to a tenth. Ours train on activations of unit mean "
        "squared norm (the default of a run's configuration), and the factor is folded into the weights.",
        f"Peers count as the best only with an L0 within {NEAR:.0%} of {k} on every seed; both L0 are shown. Where a "
        "peer has no control over L0, its explained variance is interpolated linearly in log L0 between the two "
        "penalties around it, for each seed, and the row says so.",
    ]
    said += sources(rows)
    named = [row | {"name": f"{row['architecture']} ({row['label']})"} for row in rows]
    return said + skipped_remarks(named)


def sources(rows: Sequence[dict[str, Any]]) -> list[str]:
    """By which commands and on which machines the rows were measured, if not all by one."""
    origins: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if not row.get("skipped"):
            origin = (row["command"], machine.sentence(row["machine"]))
            origins.setdefault(origin, set()).add(f"{row['who']} {row['architecture']}")
    if len(origins) < 2:
        return []
    lines = [f"- `{command}` on {where}: {', '.join(sorted(who))}" for (command, where), who in origins.items()]
    return ["The rows were measured by several commands:\n" + "\n".join(lines)]
