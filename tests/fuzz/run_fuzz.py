"""Fuzz the readers: `python tests/fuzz/run_fuzz.py --minutes 30 [--target NAME] [--out FOLDER]`.

Each target runs in a process of its own, one at a time, for its share of the minutes of processor time: guided by
coverage where `atheris` is installed (a tool for developers, no dependency), else by chance alone. A finding is told
with its traceback, its input kept as FOLDER/<target>-<digest>, and the fuzzing goes on; one and the same place is told
once. FOLDER/log.jsonl has executions, refusals, processor seconds and findings of each target.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", WANDB_MODE="offline")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]


class Campaign:
    """One target's run: what was tried, and what was found."""

    def __init__(self, name: str, seconds: float, out: Path, seed: int) -> None:
        from fuzz_oracle import Box
        from fuzz_targets import TARGETS

        self.target, self.out = TARGETS[name], out
        self.box = Box(self.target, Path(tempfile.mkdtemp(prefix="fuzz-", dir=out)))
        self.current = out / f"{name}-current"
        self.corpus = self.target.seeds(self.box.inner)
        self.rng = random.Random(seed)
        self.executions = self.refused = 0
        self.places: dict[str, int] = {}
        self.began = _used()  # without the imports
        self.seconds = seconds
        self.last_word = time.monotonic()
        found = Path(__file__).parent / "found"
        self.corpus += [file.read_bytes() for file in sorted(found.glob(f"{name}-*"))]

    def run(self, data: bytes) -> None:
        from fuzz_oracle import Finding

        self.current.write_bytes(data)  # what a crash of the interpreter leaves behind
        self.executions += 1
        try:
            self.refused += self.box.run(data) is not None
        except Finding as finding:
            self.told(finding, data)
        if time.monotonic() - self.last_word > 30:
            self.report("running")
        if _used() > self.began + self.seconds:
            self.finish()

    def told(self, finding: BaseException, data: bytes) -> None:
        cause = finding.__cause__ or finding
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if str(ROOT) in f.filename]
        ours = [f for f in frames if "tests/fuzz" not in f.filename]
        kind = str(finding).split(":")[0]
        last = f"{ours[-1].filename.removeprefix(str(ROOT))}:{ours[-1].lineno}" if ours else str(finding)[:60]
        place = f"{kind} at {last}"
        self.places[place] = self.places.get(place, 0) + 1
        if self.places[place] > 1:
            return
        name = f"{self.target.name}-{hashlib.sha1(data).hexdigest()[:10]}"
        (self.out / name).write_bytes(data)
        print(f"FINDING {name} ({len(data)} bytes) {place}\n  {finding}", flush=True)
        if finding.__cause__ is not None:
            print("  " + "  ".join(traceback.format_exception(cause)[-3:]), flush=True)

    def report(self, status: str) -> None:
        self.last_word = time.monotonic()
        row = {
            "target": self.target.name,
            "status": status,
            "executions": self.executions,
            "refused": self.refused,
            "cpu_seconds": round(_used() - self.began, 1),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "findings": self.places,
        }
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        self.report("done")
        self.current.unlink(missing_ok=True)
        os._exit(0)

    def by_chance(self) -> None:
        from fuzz_mutations import mutate

        for data in self.corpus:
            self.run(data)
        while True:
            self.run(mutate(self.rng.choice(self.corpus), self.target.kind, self.rng, self.corpus))

    def by_coverage(self, atheris: Any) -> None:
        from fuzz_mutations import MOST_BYTES, mutate

        for data in self.corpus:
            self.run(data)
        folder = Path(tempfile.mkdtemp(prefix="corpus-", dir=self.out))
        for number, data in enumerate(self.corpus):
            if len(data) <= MOST_BYTES:
                (folder / str(number)).write_bytes(data)

        def mutated(data: bytes, size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if rng.random() < 0.2:
                return atheris.Mutate(data, size)
            return mutate(data, self.target.kind, rng, self.corpus)[:size]

        options = ["-timeout=300", "-rss_limit_mb=0", f"-max_len={MOST_BYTES}", "-verbosity=0", "-detect_leaks=0"]
        options += [f"-artifact_prefix={self.out}/{self.target.name}-", f"-seed={self.rng.randrange(1, 2**31)}"]
        atheris.Setup([sys.argv[0], *options, str(folder)], self.run, custom_mutator=mutated)
        atheris.Fuzz()


def _used() -> float:
    """Seconds of processor time of this process and those it started."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in spent)


READERS = """config sae_config record demo_args summary sync weights_and_biases tracking hub_load storage utils corpus
untrusted parquet_files formats.files activations.saved activations.writer activations.statistics analysis.folder
report.page""".split()


def imported(guided: bool) -> Any:
    """Import all readers; atheris, where it is to guide and is there, having put its counters into them."""
    with contextlib.ExitStack() as counted:
        atheris = None
        if guided:
            with contextlib.suppress(ImportError):
                import atheris  # type: ignore[no-redef]

                counted.enter_context(atheris.instrument_imports(["dictionary_learning", "data_prep"]))
        for name in (*(f"dictionary_learning.{reader}" for reader in READERS), "data_prep.sources", "pyarrow.parquet"):
            importlib.import_module(name)
    from fuzz_oracle import Forked

    sys.modules["dictionary_learning.parquet_files"]._started = Forked  # type: ignore[attr-defined]
    return atheris


def in_a_process(name: str, seconds: float, out: Path, seed: int, atheris: Any) -> None:
    """Fuzz one target in a copy of this process, so that one that crashes takes no other with it."""
    sys.stdout.flush()
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if status:
            print(f"FINDING {name}: its process ended with status {status}; its input is {name}-current", flush=True)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps({"target": name, "status": f"crashed {status}"}) + "\n")
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # what has no bound takes the machine with it
        campaign = Campaign(name, seconds, out, seed)
        campaign.by_chance() if atheris is None else campaign.by_coverage(atheris)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of processor time, all targets together")
    parser.add_argument("--target", action="append", help="one of them; again for another (default: all)")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "sae-factory-fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unguided", action="store_true", help="by chance, also where atheris is installed")
    args = parser.parse_args()
    atheris = imported(not args.unguided)
    import torch
    from fuzz_targets import TARGETS

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = args.target or list(TARGETS)
    for name in names:
        in_a_process(name, args.minutes * 60 / len(names), out, args.seed, atheris)
    lines = (out / "log.jsonl").read_text().splitlines()
    last = {row["target"]: row for row in map(json.loads, lines)}
    total = {key: sum(row.get(key, 0) for row in last.values()) for key in ("executions", "refused", "cpu_seconds")}
    print(f"{len(last)} targets: {total}; findings: {sum(len(row.get('findings', 'x')) for row in last.values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
