"""One rank beside several: what a step of the stream costs, what the cost model says, and the model extended on paper.

Ranks are processes of one thread each that talk over Gloo, on one machine. Each trains its share of TopK dictionaries
on the embedded model's activations, as a run does: split harvest, one buffer, no gradients sent. The terms of the model
are measured one by one on a single rank (harvest alone, one dictionary's step) and between the ranks (bytes a second,
seconds a message); its prediction of the whole stands beside what the whole took.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.plots import curves
from benchmarks.results import Report, Table

ROOT = Path(__file__).resolve().parent.parent
HOOK_POINTS = ("resid_post_layer_1", "resid_post_layer_2")
START_LIMIT = 600  # seconds
MESSAGES_A_STEP = 1  # that every rank waits for: whether to stop
FLOAT = 4


@dataclass
class Options:
    """Sizes and repetitions."""

    ranks: list[int] = field(default_factory=lambda: [1, 2])
    dictionaries: list[int] = field(default_factory=lambda: [2, 8])
    widths: list[int] = field(default_factory=lambda: [1536, 6144])
    batch: int = 1024
    contexts: int = 16
    steps: int = 12
    rounds: int = 3

    def quick(self) -> Options:
        return Options(ranks=self.ranks, dictionaries=[4], widths=[1536], steps=6, rounds=1)


# ------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Costs:
    """What the model is made of, of one rank.

    harvest: activations a second of the language model's forward. dictionary: seconds a row and dictionary.
    row_bytes: of a row at the hook points that a rank needs. bandwidth: bytes a second into a rank. message: seconds
    of a message that all ranks wait for. reading: tokens a second that the first rank reads and tokenises.
    """

    harvest: float
    dictionary: float
    row_bytes: float
    bandwidth: float
    message: float
    reading: float


def seconds_a_row(costs: Costs, ranks: int, dictionaries: int, batch: int, overlapped: bool) -> dict[str, float]:
    """The terms of the model, in seconds a row of the stream, and their "total".

    Args:
        overlapped: on CUDA the harvest, with its messages, runs beside the training: the longer of the two counts.
    """
    most = -(-dictionaries // ranks)  # of one rank
    terms = {
        "harvest": 1 / (costs.harvest * ranks),
        "network": (ranks - 1) / ranks * costs.row_bytes / costs.bandwidth,
        "training": most * costs.dictionary,
        "messages": MESSAGES_A_STEP * costs.message / batch if ranks > 1 else 0.0,
        "reading": 1 / costs.reading,
    }
    stream, steps = terms["harvest"] + terms["network"], terms["training"] + terms["messages"]
    total = max(stream, steps, terms["reading"]) if overlapped else stream + steps + terms["reading"]
    return terms | {"total": total}


# ------------------------------------------------------------------------------------------- measuring


def measure(options: Options, threads: int | None = None) -> dict[str, Any]:
    """`rounds` of every size on every number of ranks, in turn; `threads` of each rank (1 where not given)."""
    sizes = [(count, width) for width in options.widths for count in options.dictionaries]
    found: dict[str, Any] = {"points": [], "threads": threads or 1}
    for _ in range(options.rounds):
        for world in options.ranks:
            ranks = started(world, options, sizes, threads or 1)
            found["points"] += [point | {"ranks": world} for point in ranks["points"]]
            found.setdefault(f"network {world}", []).append(ranks["network"])
    return found


def started(world: int, options: Options, sizes: Sequence[tuple[int, int]], threads: int) -> dict[str, Any]:
    """What `world` ranks measured, as the first of them wrote it down."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        task = json.dumps({"options": asdict(options), "sizes": sizes, "threads": threads, "out": str(out)})
        processes = []
        for rank in range(world):
            where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = os.environ | where | {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": str(threads)}
            environment |= {"SAE_FACTORY_RANK_TIMEOUT": "300", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "benchmarks.ranks", task]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        try:
            codes = [process.wait(START_LIMIT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        return json.loads(out.read_text())


def work(task: dict[str, Any]) -> None:
    """One rank."""
    import torch

    from dictionary_learning.distributed import join

    torch.set_num_threads(task["threads"])
    ranks, options = join("cpu"), Options(**task["options"])
    points = [point(ranks, options, *size) for size in task["sizes"]]
    network = messages(ranks)
    if ranks.first:
        Path(task["out"]).write_text(json.dumps({"points": points, "network": network}))
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


def point(ranks: Any, options: Options, dictionaries: int, width: int) -> dict[str, Any]:
    """Rows a second with this many dictionaries, and alone on a rank the harvest's and a step's part of it."""
    from data_prep.embedded import MODEL_DIR
    from dictionary_learning.activations.traced_lm import TracedLM
    from dictionary_learning.corpus import TextStream, open_corpus
    from dictionary_learning.distributed.harvest import RankedBuffer
    from dictionary_learning.trainers.top_k import TopKTrainer

    lm = TracedLM.load(str(MODEL_DIR))
    shares = [list(range(rank, dictionaries, ranks.world)) for rank in range(ranks.world)]
    at = [HOOK_POINTS[number * len(HOOK_POINTS) // dictionaries] for number in range(dictionaries)]
    buffer = RankedBuffer(
        TextStream(open_corpus("embedded"), epochs=None, seed=0),
        lm,
        list(HOOK_POINTS),
        ranks=ranks,
        wanted=[list(dict.fromkeys(at[number] for number in share)) for share in shares],
        n_ctxs=4 * options.contexts,
        ctx_len=128,
        refresh_batch_size=options.contexts,
        out_batch_size=options.batch,
        remove_bos=True,
    )
    own = shares[ranks.rank]
    settings = {"steps": 10_000, "activation_dim": buffer.d_submodule, "dict_size": width, "k": 32, "device": "cpu"}
    trainers = [TopKTrainer(layer=None, lm_name=None, seed=number, **settings) for number in own]

    def steps(first: int, count: int) -> tuple[float, float, int]:
        """(all seconds, seconds in the buffer, rows)"""
        waited, rows, began = 0.0, 0, time.perf_counter()
        for step in range(first, first + count):
            asked = time.perf_counter()
            batch = next(buffer)
            waited += time.perf_counter() - asked
            acts = batch if isinstance(batch, dict) else dict.fromkeys(HOOK_POINTS, batch)
            for number, trainer in zip(own, trainers, strict=True):
                trainer.update(step, acts[at[number]])
            ranks.agreed("")
            rows += len(next(iter(acts.values())))
        return time.perf_counter() - began, waited, rows

    steps(0, 3)
    ranks.everyone(None)
    seconds, waited, rows = steps(3, options.steps)
    return {
        "dictionaries": dictionaries,
        "width": width,
        "rows_a_second": rows / seconds,
        "harvest_a_second": rows / waited,
        "dictionary_seconds_a_row": (seconds - waited) / rows / max(1, len(own)),
        "row_bytes": sum(buffer.source.widths.values()) * FLOAT,
    }


def messages(ranks: Any) -> dict[str, float]:
    """Bytes a second into a rank, and seconds of a message that all wait for."""
    import torch

    if ranks.world == 1:
        return {}
    each = (8 << 20) // FLOAT
    x = torch.zeros(each * ranks.world)
    parts, took, waits = [each] * ranks.world, [], []
    for _ in range(8):
        began = time.perf_counter()
        ranks.exchanged(x, parts, parts)
        took.append(time.perf_counter() - began)
    for _ in range(100):
        began = time.perf_counter()
        ranks.agreed("")
        waits.append(time.perf_counter() - began)
    return {
        "bandwidth": (ranks.world - 1) * each * FLOAT / statistics.median(took),
        "message": statistics.median(waits),
    }


# ------------------------------------------------------------------------------------------- saying


def compared(data: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    """For every size and number of ranks: rows a second as measured, and as predicted from one rank's parts."""
    rows = []
    for width in options["widths"]:
        for count in options["dictionaries"]:
            of_size = [p for p in data["points"] if (p["dictionaries"], p["width"]) == (count, width)]
            alone = [p for p in of_size if p["ranks"] == 1]
            for world in options["ranks"]:
                here = [p for p in of_size if p["ranks"] == world]
                network = [n for n in data.get(f"network {world}", []) if n]
                costs = Costs(
                    harvest=statistics.median(p["harvest_a_second"] for p in alone),
                    dictionary=statistics.median(p["dictionary_seconds_a_row"] for p in alone),
                    row_bytes=statistics.median(p["row_bytes"] for p in here),
                    bandwidth=statistics.median([n["bandwidth"] for n in network] or [float("inf")]),
                    message=statistics.median([n["message"] for n in network] or [0.0]),
                    reading=float("inf"),  # part of the harvest that was measured
                )
                terms = seconds_a_row(costs, world, count, options["batch"], overlapped=False)
                measured = statistics.median(p["rows_a_second"] for p in here)
                rows.append(
                    {"width": width, "dictionaries": count, "ranks": world, "measured": measured, "terms": terms}
                    | {"predicted": 1 / terms["total"], "costs": asdict(costs)}
                )
    return rows


def report(data: dict[str, Any], options: dict[str, Any]) -> Report:
    lines = []
    for row in (found := compared(data, options)):
        alone = next(r for r in found if (r["width"], r["dictionaries"], r["ranks"]) == (*_size(row), 1))
        terms = row["terms"]
        lines.append(
            [
                f"{row['dictionaries']} x {row['width']:,}",
                str(row["ranks"]),
                f"{row['measured']:,.0f}",
                f"{row['measured'] / alone['measured']:.2f}x",
                f"{row['predicted']:,.0f}",
                f"{row['predicted'] / row['measured']:.2f}",
                *(f"{1e6 * terms[name]:.1f}" for name in ("harvest", "network", "training", "messages")),
            ]
        )
    columns = ["dictionaries", "ranks", "measured, rows/s", "against 1 rank", "model, rows/s", "model / measured"]
    columns += [f"{name}, µs a row" for name in ("harvest", "network", "training", "messages")]
    title = f"TopK dictionaries at two hook points of the embedded model, B = {options['batch']:,}, Gloo on one machine"
    threads = data["threads"]
    return Report(
        "Several ranks",
        [Table(f"{title}, {threads} thread{'s' * (threads > 1)} a rank.", columns, lines), on_paper()],
        [
            "The model's terms are measured on one rank and between ranks that do nothing else; ranks at work together "
            "share memory and caches, which the model does not know. The second table is the model alone: no such "
            "machine was measured."
        ],
        ["ranks.svg"],
    )


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["width"], row["dictionaries"]


PAPER = Costs(  # one GPU of the class of an H100; see docs/distributed.md for where each figure comes from
    harvest=75_000, dictionary=1.4e-6, row_bytes=2 * 2304 * 2, bandwidth=25e9, message=1e-3, reading=1e6
)
PAPER_TOKENS = 1e11
PAPER_GPUS = (1, 8, 16, 32, 64, 128)


def on_paper(costs: Costs = PAPER, dictionaries: int = 1000, batch: int = 8192) -> Table:
    """The model for 1,000 dictionaries of 16,384 latents on Gemma 2 2B (d = 2304): days by number of GPUs."""
    lines = []
    for gpus in PAPER_GPUS:
        terms = seconds_a_row(costs, gpus, dictionaries, batch, overlapped=True)
        shares = [f"{terms[name] / terms['total']:.1%}" for name in ("harvest", "network", "training", "reading")]
        days = PAPER_TOKENS * terms["total"] / 86_400
        lines.append([str(gpus), f"{1 / terms['total']:,.0f}", f"{days:,.0f}", f"{days * gpus:,.0f}", *shares])
    title = f"Model, not a measurement: {dictionaries:,} dictionaries, {PAPER_TOKENS:.0e} tokens, by GPUs of one run."
    columns = ["GPUs", "tokens/s", "days", "GPU-days"]
    return Table(title, columns + [f"{n}, of the time" for n in ("harvest", "network", "training", "reading")], lines)


def plot(data: dict[str, Any], folder: Path) -> None:
    """Tokens a second against GPUs, of the model."""
    rates = [(n, 1 / seconds_a_row(PAPER, n, 1000, 8192, overlapped=True)["total"]) for n in PAPER_GPUS]
    lines = {"the cost model, not measured": rates, "in proportion": [(n, n * rates[0][1]) for n in PAPER_GPUS]}
    curves(folder / "ranks.svg", {"GPUs, 1,000 dictionaries": lines}, "tokens/s")


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
