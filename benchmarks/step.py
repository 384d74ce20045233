"""One training step of every architecture: ours, each peer's own trainer, and the machine's bounds, in turns.

A step is all that a trainer does with a batch: loss, gradients, optimiser, dead latents, norms. Architectures that fire
by a threshold are measured in two states: fresh, when half of the latents fire ("dense"), and with biases or
thresholds set so that 48 latents fire an input ("sparse"), the peers' in the same way as ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.plots import bars
from benchmarks.results import Report, Table, skipped_remarks
from benchmarks.turns import Entry, Workers, milliseconds, take_turns, times_faster

OURS, OURS_BF16 = "ours", "ours, bf16 encoder"
BOUNDS = {
    "one matmul, as torch does it by default": ("matmul", "default"),
    "one matmul, the fastest exact one known here": ("matmul", "fastest"),
    "dense bound, as torch does it by default": ("dense", "default"),
    "dense bound, the fastest exact one known here": ("dense", "fastest"),
}
BF16_BOUND = "one matmul in bf16"
BY_THRESHOLD = ("standard", "jump_relu", "gated", "p_anneal", "gated_anneal")
"""Architectures whose number of active latents is learnt: they have a dense and a sparse state."""


@dataclass
class Options:
    """Sizes and repetitions of the step benchmark."""

    d: int = 768
    m: int = 6144
    k: int = 32
    batch: int = 2048
    device: str = "cpu"
    architectures: list[str] = field(default_factory=list)
    """All that the registry has, unless named."""
    peers: list[str] = field(default_factory=lambda: list(PEERS))
    rounds: int = 7
    steps: int = 3

    def quick(self) -> Options:
        return Options(**vars(self) | {"rounds": 2, "steps": 1})


def measure(options: Options, threads: int | None = None) -> dict[str, Any]:
    """A group for each architecture and state: its contestants and their seconds."""
    from dictionary_learning.trainers import TRAINERS

    groups = []
    with Workers(threads) as workers:
        for architecture in options.architectures or TRAINERS:
            for state in ("dense", "sparse") if architecture in BY_THRESHOLD else ("top-k",):
                entries = take_turns(workers, contestants(options, architecture, state), options.rounds)
                groups.append({"architecture": architecture, "state": state, "entries": entries})
    return {"groups": groups}


def contestants(options: Options, architecture: str, state: str) -> list[Entry]:
    sizes = {"d": options.d, "m": options.m, "batch": options.batch, "device": options.device}
    trained = {"architecture": architecture, "state": state, "k": options.k} | sizes
    entries = [Entry(OURS, "ours", "step", trained, options.steps)]
    if state != "dense":  # the narrow encoder is for steps that go through the active latents
        entries.append(Entry(OURS_BF16, "ours", "step", trained | {"encoder_dtype": "bf16"}, options.steps))
    for name in options.peers:
        if architecture in PEERS[name].architectures:
            entries.append(Entry(name, name, "step", trained, options.steps))
    if architecture == "top_k" and "sparsify" in options.peers:
        entries.append(Entry("sparsify, Adam", "sparsify", "step", trained | {"optimizer": "adam"}, options.steps))
    if architecture == "top_k" and "sae-lens" in options.peers:
        entries.append(Entry("sae-lens, autocast", "sae-lens", "step", trained | {"autocast": True}, options.steps))
    for name, (kind, way) in BOUNDS.items():
        entries.append(Entry(name, "ours", kind, sizes | {"way": way}, options.steps))
    bf16 = sizes | {"way": "default", "dtype": "bfloat16"}
    entries.append(Entry(BF16_BOUND, "ours", "matmul", bf16, options.steps))
    return entries


def report(data: dict[str, Any], options: dict[str, Any]) -> Report:
    groups = data["groups"]
    everything = [entry for group in groups for entry in group["entries"]]
    names = [name for name in dict.fromkeys(entry["name"] for entry in everything) if name not in bound_names()]
    peers = [name for name in names if name not in (OURS, OURS_BF16)]
    sizes = f"d = {options['d']}, m = {options['m']:,}, k = {options['k']}, B = {options['batch']:,}"
    steps = Table(
        f"A step in ms ({sizes}, fp32; {options['device']}). Of a peer, behind it: how many times as long as ours, "
        "and as ours with the bf16 encoder.",
        ["architecture", "L0", OURS, OURS_BF16, *peers],
        [step_row(group, peers) for group in groups],
    )
    bounds = Table(
        "The bounds in ms, and how many times as long our step takes (fp32; of the last: with the bf16 encoder).",
        ["architecture", "L0", *BOUNDS, BF16_BOUND],
        [bound_row(group) for group in groups],
    )
    return Report("One training step", [steps, bounds], skipped_remarks(everything), ["step.svg"])


def bound_names() -> list[str]:
    return [*BOUNDS, BF16_BOUND]


def by_name(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in group["entries"] if entry.get("rounds") and not entry.get("skipped")}


def step_row(group: dict[str, Any], peers: list[str]) -> list[str]:
    measured = by_name(group)
    cells = [f"{milliseconds(measured[name]):.1f}" if name in measured else "–" for name in (OURS, OURS_BF16)]
    for name in peers:
        if name not in measured:
            cells.append("–")
            continue
        ratios = [times_faster(measured[us], measured[name]) for us in (OURS, OURS_BF16) if us in measured]
        behind = f" ({', '.join(f'{ratio:.2f}x' for ratio in ratios)})" if ratios else ""
        cells.append(f"{milliseconds(measured[name]):.1f}{behind}")
    return [*_heading(group, measured), *cells]


def bound_row(group: dict[str, Any]) -> list[str]:
    measured, cells = by_name(group), []
    for name in bound_names():
        us = OURS_BF16 if name == BF16_BOUND else OURS
        if name not in measured:
            cells.append("–")
            continue
        behind = f" ({times_faster(measured[name], measured[us]):.2f}x)" if us in measured else ""
        cells.append(f"{milliseconds(measured[name]):.1f}{behind}")
    return [*_heading(group, measured), *cells]


def _heading(group: dict[str, Any], measured: dict[str, dict[str, Any]]) -> list[str]:
    """The architecture, and the lowest and highest L0 that its contestants had at the end."""
    label = group["architecture"] + (f", {group['state']}" if group["state"] != "top-k" else "")
    l0s = [entry["info"]["l0"] for entry in measured.values() if "l0" in entry.get("info", {})]
    if not l0s:
        return [label, "–"]
    low, high = f"{min(l0s):,.0f}", f"{max(l0s):,.0f}"
    return [label, low if low == high else f"{low} to {high}"]


def plot(data: dict[str, Any], folder: Path) -> None:
    groups = {}
    for group in data["groups"]:
        label = _heading(group, {})[0]
        groups[label] = {name: milliseconds(entry) for name, entry in by_name(group).items()}
    bars(folder / "step.svg", groups, "ms a step")
