"""What a TopK step costs and holds as one size grows: width, k, batch, dictionaries; and the stream's context length.

Beside each step stands what it may not outgrow: the encoder's product and Adam over the weights. The peak of memory
is taken in a process of its own for each width; it stands beside weights + Adam + one [B, m].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import stream
from benchmarks.plots import curves
from benchmarks.results import Report, Table, skipped_remarks
from benchmarks.turns import Entry, Workers, milliseconds, rate, rate_ratio, take_turns, times_faster

OURS = "ours"
BOUND = "encoder matmul + Adam"
BOUND_FASTEST = "encoder matmul + Adam, fastest matmul"
FLOAT = 4  # bytes


@dataclass
class Options:
    """Sizes and repetitions of the scaling benchmark; each is varied with the others at their first values below."""

    d: int = 768
    m: int = 6144
    k: int = 32
    batch: int = 2048
    widths: list[int] = field(default_factory=lambda: [2**power for power in range(11, 18)])
    ks: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256])
    batches: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192])
    dictionaries: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    contexts: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024])
    layer: int = 8
    shape: dict[str, int] = field(default_factory=dict)
    device: str = "cpu"
    rounds: int = 5
    steps: int = 2

    def quick(self) -> Options:
        few = {name: getattr(self, name)[::2] for name in ("widths", "ks", "batches", "dictionaries", "contexts")}
        return Options(**vars(self) | few | {"rounds": 2, "steps": 1})


def measure(options: Options, threads: int | None = None) -> dict[str, Any]:
    """A list of points for each varied size."""
    base = {"d": options.d, "m": options.m, "batch": options.batch, "device": options.device}
    varied = {"m": options.widths, "k": options.ks, "batch": options.batches, "dictionaries": options.dictionaries}
    data: dict[str, Any] = {}
    with Workers(threads) as workers:
        for name, values in varied.items():
            data[name] = [
                {
                    "value": value,
                    "entries": take_turns(workers, contestants(options, base, name, value), options.rounds),
                }
                for value in values
            ]
    for point in data["m"]:
        point["alone"] = peak_alone(contestants(options, base, "m", point["value"])[0], threads)
    data["context"] = [
        {"value": length, "entries": of_context(options, length, threads)} for length in options.contexts
    ]
    return data


def contestants(options: Options, base: dict[str, Any], name: str, value: int) -> list[Entry]:
    sizes = base | ({name: value} if name in base else {})
    ours = {"architecture": "top_k", "state": "top-k", "k": options.k} | sizes | {name: value}
    entries = [Entry(OURS, "ours", "step", ours, options.steps)]
    if name != "dictionaries":
        for label, way in ((BOUND, "default"), (BOUND_FASTEST, "fastest")):
            entries.append(Entry(label, "ours", "encoder_and_adam", sizes | {"way": way}, options.steps))
    return entries


def peak_alone(ours: Entry, threads: int | None) -> dict[str, Any]:
    """A few steps of our contestant in a process without any other: its info says the peak of memory."""
    alone = Entry(OURS, "ours", "step", ours.options | {"memory": True}, steps=3)
    with Workers(threads) as workers:
        return take_turns(workers, [alone], rounds=1)[0]


def of_context(options: Options, length: int, threads: int | None) -> list[dict[str, Any]]:
    """Harvest alone and with one dictionary, at about the same number of tokens a forward."""
    streams = stream.Options(
        layer=options.layer,
        m=options.m,
        k=options.k,
        batch=options.batch,
        ctx_len=length,
        contexts=max(1, options.batch // length),
        dictionaries=[1],
        dtypes=["float32"],
        device=options.device,
        shape=options.shape,
        peers=[],
        rounds=options.rounds,
        refills=1,
    )
    return stream.measure(streams, threads)["entries"]


def memory_floor(options: dict[str, Any], m: int) -> int:
    """Bytes of weights, their two Adam moments and one [B, m]."""
    return FLOAT * (3 * 2 * m * options["d"] + options["batch"] * m)


def report(data: dict[str, Any], options: dict[str, Any]) -> Report:
    everything = [entry for points in data.values() for point in points for entry in point["entries"]]
    sizes = f"d = {options['d']}, m = {options['m']:,}, k = {options['k']}, B = {options['batch']:,}"
    held = f"{sizes}, {options['device']}; the others as given while one varies"
    tables = [
        Table(
            f"TopK step against the width ({held}). Peak: memory that the process grew by, and how many times weights "
            "+ Adam + one [B, m] that is.",
            ["m", "step (ms)", BOUND, BOUND_FASTEST, "peak (MiB)"],
            [[*step_cells(point), memory_cell(point, options)] for point in data["m"]],
        )
    ]
    for name, title in (("k", "k"), ("batch", "B")):
        columns = [title, "step (ms)", BOUND, BOUND_FASTEST]
        tables.append(Table(f"TopK step against {title}.", columns, [step_cells(point) for point in data[name]]))
    one = entry_of(data["dictionaries"][0], OURS) if data["dictionaries"] else None
    tables.append(
        Table(
            "Steps of several TopK dictionaries on one batch.",
            ["dictionaries", "all steps (ms)", "a dictionary (ms)", "of the first row"],
            [many_cells(point, one) for point in data["dictionaries"]],
        )
    )
    names = [stream.HARVEST, stream.name_of("ours", 1, "float32")]
    tables.append(
        Table(
            f"The stream against the context length (GPT-2 shape, layer {options['layer']}), activations/s.",
            ["context", *names, "fraction"],
            [context_cells(point, names) for point in data["context"]],
        )
    )
    return Report("Scaling", tables, skipped_remarks(everything), ["scaling.svg", "scaling_context.svg"])


def entry_of(point: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((e for e in point["entries"] if e["name"] == name and not e.get("skipped")), None)


def step_cells(point: dict[str, Any]) -> list[str]:
    """The size, our step, and the two bounds with how many times as long our step takes."""
    ours = entry_of(point, OURS)
    cells = [f"{point['value']:,}", f"{milliseconds(ours):.1f}" if ours else "–"]
    for name in (BOUND, BOUND_FASTEST):
        bound = entry_of(point, name)
        cells.append(f"{milliseconds(bound):.1f} ({times_faster(bound, ours):.2f}x)" if bound and ours else "–")
    return cells


def memory_cell(point: dict[str, Any], options: dict[str, Any]) -> str:
    if point["alone"].get("skipped"):
        return "–"
    peak = point["alone"]["info"]["peak_bytes"]
    return f"{peak / 2**20:,.0f} ({peak / memory_floor(options, point['value']):.2f}x)"


def many_cells(point: dict[str, Any], one: dict[str, Any] | None) -> list[str]:
    ours = entry_of(point, OURS)
    if ours is None or one is None:
        return [str(point["value"]), "–", "–", "–"]
    each, first = milliseconds(ours) / point["value"], milliseconds(one) / one["options"]["dictionaries"]
    return [str(point["value"]), f"{milliseconds(ours):.1f}", f"{each:.1f}", f"{each / first:.2f}x"]


def context_cells(point: dict[str, Any], names: list[str]) -> list[str]:
    bare, trained = (entry_of(point, name) for name in names)
    if bare is None or trained is None:
        return [str(point["value"]), "–", "–", "–"]
    return [str(point["value"]), f"{rate(bare):,.0f}", f"{rate(trained):,.0f}", f"{rate_ratio(trained, bare):.3f}"]


def plot(data: dict[str, Any], folder: Path) -> None:
    def lines(points: list[dict[str, Any]], measure_of: Callable[[dict[str, Any]], float]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for point in points:
            for entry in point["entries"]:
                if not entry.get("skipped"):
                    found.setdefault(entry["name"], []).append((point["value"], measure_of(entry)))
        return found

    labels = {"m": "m", "k": "k", "batch": "B", "dictionaries": "dictionaries"}
    curves(
        folder / "scaling.svg", {text: lines(data[name], milliseconds) for name, text in labels.items()}, "ms a step"
    )
    curves(folder / "scaling_context.svg", {"context": lines(data["context"], rate)}, "activations/s")
