"""Quality at equal budget: each trainer on the same activations in the same order, measured by one function.

Ours train at their defaults; the peers at theirs and at the rates at which they do best. A training run takes minutes,
so every run's row is saved as soon as it is measured, and a row that is there is not measured again: runs of some
architectures add up to one table.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine, quality_acts, quality_metrics, quality_report
from benchmarks.peers import HERE, PEERS, ROOT, clean_environment
from benchmarks.results import Report
from benchmarks.turns import Worker, WorkerError
from dictionary_learning.errors import UserError, did_you_mean

OURS = "ours"
WORKERS = {
    OURS: "quality_ours.py",
    "dictionary-learning": "quality_dictionary_learning.py",
    "sae-lens": "quality_sae_lens.py",
    "sparsify": "quality_sparsify.py",
}
ARCHITECTURES = (
    "top_k",
    "batch_top_k",
    "matryoshka_batch_top_k",
    "jump_relu",
    "standard",
    "gated",
    "standard_april_update",
    "p_anneal",
    "gated_anneal",
    "group_max",
)


@dataclass
class Options:
    """Activations, sizes and contestants of the quality benchmark."""

    acts: str = ""
    """Folder of train.safetensors and eval.safetensors (`acts` [N, D], mean squared norm D); made there from a corpus
    if missing."""
    corpus: str = ""
    """Records to make the activations from: whatever `--corpus` takes elsewhere."""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence encoder to make them with: a Hub id or a local folder."""
    layer: int = 4
    """Its block whose output is taken, counted from 1."""
    max_tokens: int = 256
    heldout: float = 0.08
    """Share of the records that is held out."""
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    architectures: list[str] = field(default_factory=lambda: list(ARCHITECTURES))
    peers: list[str] = field(default_factory=lambda: [name for name in WORKERS if name != OURS])
    steps: int = 1500
    batch: int = 1024
    m: int = 3072
    k: int = 32
    """Latents that fire on an input; the L0 that is asked of those who choose it themselves."""
    l1: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Penalties of the peers' L1 SAEs, whose explained variance is interpolated at L0 = k."""
    again: bool = False
    """Train and measure what is in the saved results once more."""

    def quick(self) -> Options:
        return Options(**vars(self) | {"seeds": self.seeds[:1]})

    def published(self, command: str) -> tuple[str, dict[str, Any]]:
        """The command and the options without the folders of this machine."""
        given = vars(self).copy()
        for name in ("acts", "corpus", "encoder"):
            if Path(given[name]).is_absolute():
                command = command.replace(given[name], Path(given[name]).name)
                given[name] = Path(given[name]).name
        return command, given


@dataclass(frozen=True)
class Contestant:
    """Who trains what with which settings; those of one `series` differ in a penalty and are interpolated."""

    who: str
    architecture: str
    label: str = "defaults"
    settings: dict[str, Any] = field(default_factory=dict)
    series: bool = False

    def key(self, seed: int) -> tuple[str, str, str, int]:
        return self.who, self.architecture, self.label, seed


def contestants(options: Options) -> list[Contestant]:
    """In the order of the table. Rates and decay of the peers are those at which they were found to do best."""
    learns, lens = "dictionary-learning", "sae-lens"
    decayed = {"lr": 2e-3, "decay": True}
    everyone = [Contestant(OURS, architecture) for architecture in ARCHITECTURES]
    everyone += [Contestant(who, a) for who in (learns, lens) for a in ("top_k", "batch_top_k", "jump_relu")]
    everyone += [Contestant(learns, "top_k", f"lr {rate:g}", {"lr": rate}) for rate in (1e-3, 2e-3, 4e-3)]
    for architecture in ("top_k", "batch_top_k"):
        everyone.append(Contestant(learns, architecture, "lr 0.002, decayed over the last third", decayed))
    for rate in (1e-3, 2e-3):
        everyone.append(Contestant(learns, "matryoshka_batch_top_k", f"lr {rate:g}", {"lr": rate}))
    everyone.append(Contestant(learns, "jump_relu", "lr 0.001", {"lr": 1e-3}))
    for architecture in ("top_k", "batch_top_k", "matryoshka_batch_top_k", "jump_relu"):
        everyone.append(Contestant(lens, architecture, "lr 0.001", {"lr": 1e-3}))
    everyone += [Contestant(lens, "standard")]
    for who, name in ((learns, "l1_penalty"), (lens, "l1_coefficient")):
        for l1 in options.l1:
            settings = {"lr": 1e-3, name: l1}
            everyone.append(Contestant(who, "standard", f"lr 0.001, L1 {l1:g}", settings, series=True))
    everyone.append(Contestant("sparsify", "top_k", "defaults (Signum)", {"optimizer": "signum"}))
    everyone.append(Contestant("sparsify", "top_k", "Adam, lr 0.001", {"optimizer": "adam", "lr": 1e-3}))
    wanted = [c for c in everyone if c.architecture in options.architectures and c.who in (OURS, *options.peers)]
    return sorted(wanted, key=lambda c: (ARCHITECTURES.index(c.architecture), list(WORKERS).index(c.who)))


def measure(
    options: Options,
    threads: int | None = None,
    *,
    command: str = "",
    done: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda data: None,
) -> dict[str, Any]:
    """The rows of `done` and those of this run; `keep` is called with all of them after each new one.

    Raises:
        UserError: an unknown architecture or peer, no activations, `done` being of other sizes or activations.
    """
    check_names(options)
    acts = quality_acts.prepare(
        options.acts, options.corpus, options.encoder, options.layer, options.max_tokens, options.heldout
    )
    sizes = {name: getattr(options, name) for name in ("steps", "batch", "m", "k")}
    data: dict[str, Any] = {"sizes": sizes, "acts": quality_acts.description(acts), "rows": []}
    if done is not None:
        for name in ("sizes", "acts"):
            if done[name] != data[name]:
                raise UserError(f"The saved rows are of other {name} ({done[name]}): give another folder with --out.")
        data["rows"] = list(done["rows"])
    heldout_ND = quality_acts.heldout_rows(acts)
    for contestant in contestants(options):
        for seed in options.seeds:
            found = [row for row in data["rows"] if row_key(row) == contestant.key(seed)]
            if found and not found[0].get("skipped") and not options.again:
                continue
            row = one_row(contestant, seed, sizes, acts, heldout_ND, threads)
            row |= {"command": command, "machine": machine.describe(threads)}
            data["rows"] = [other for other in data["rows"] if row_key(other) != row_key(row)] + [row]
            print(quality_report.line(row), flush=True)
            keep(data)
    return data


def check_names(options: Options) -> None:
    peers = [name for name in WORKERS if name != OURS]
    for what, names, known in (
        ("architecture", options.architectures, ARCHITECTURES),
        ("peer", options.peers, peers),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"Unknown {what} '{name}': use any of {', '.join(known)}.{did_you_mean(name, known)}")


def row_key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["who"], row["architecture"], row["label"], row["seed"]


def one_row(
    contestant: Contestant, seed: int, sizes: dict[str, int], acts: Path, heldout_ND: Any, threads: int | None
) -> dict[str, Any]:
    """Train in a process of its own and measure; a peer that is absent or fails leaves the reason in `skipped`."""
    row: dict[str, Any] = {
        "who": contestant.who,
        "architecture": contestant.architecture,
        "label": contestant.label,
        "seed": seed,
        "series": contestant.series,
        "date": datetime.date.today().isoformat(),
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "dictionary.safetensors"
            task = {"acts": str(acts.resolve()), "out": str(out), "architecture": contestant.architecture, "seed": seed}
            info = train(contestant.who, task | sizes | {"settings": contestant.settings}, threads)
            metrics = quality_metrics.measure(out, info, sizes["k"], heldout_ND)
    except (WorkerError, ValueError) as error:
        return row | {"skipped": str(error)}
    return row | {
        "metrics": metrics,
        "seconds": info["seconds"],
        "settings": info["settings"],
        "unit_norm": info["unit_norm"],
    }


def train(who: str, task: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """What the worker says of its run."""
    script = HERE / "workers" / WORKERS[who]
    if who == OURS:
        worker = Worker(sys.executable, script, os.environ | {"PYTHONPATH": str(ROOT)}, threads)
    elif PEERS[who].present:
        worker = Worker(str(PEERS[who].python), script, clean_environment(), threads)
    else:
        raise WorkerError("its environment is missing (python -m benchmarks setup-peers)")
    try:
        return dict(worker.ask(do="make", name="run", kind="train", **task)["info"])
    finally:
        worker.close()


def report(data: dict[str, Any], options: dict[str, Any]) -> Report:
    return quality_report.report(data)


def plot(data: dict[str, Any], folder: Path) -> None:
    """None: explained variances lie too close together for a picture to say more than the table."""
