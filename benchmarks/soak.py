"""`python -m benchmarks.soak --minutes 20`: does a long run stay as it began?

A sweep on the embedded model trains for that long in a process of its own; memory, open files and tokens a second are
looked at from outside. The first fifth of the time is left out (the allocator and the file cache fill). Printed are
memory and files at the beginning and at the end of the rest, the slope of a line through the memory, and the throughput
of the last quarter beside that of the first. Other work on the machine shows in the throughput, not in the memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

from dictionary_learning.errors import UserError, exit_code

ROOT = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN = 5.0
TOKENS_A_MINUTE = 2_000_000  # more than any machine here trains: the run ends by the clock


@dataclass
class Soak:
    """Watch a long run on the embedded model."""

    minutes: float = 20.0
    """How long."""
    architectures: tuple[str, ...] = ("top_k", "jump_relu")
    """Of the sweep."""


def watch(options: Soak, folder: Path) -> dict[str, float]:
    """Run and look; the numbers. Raises UserError where the run ended by itself."""
    command = [sys.executable, str(ROOT / "dictionary_learning" / "demo.py"), "--save_dir", str(folder / "run")]
    command += ["--num_tokens", str(int(options.minutes * TOKENS_A_MINUTE)), "--architectures", *options.architectures]
    command += ["--state_every", "200", "--log_steps", "20", "--no-report"]
    seen = []
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        looked_at, began = psutil.Process(process.pid), time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            time.sleep(SECONDS_BETWEEN)
            if process.poll() is not None:
                raise UserError(f"The run ended by itself: {(folder / 'log').read_text()[-300:]}")
            seen.append((time.monotonic() - began, looked_at.memory_info().rss, looked_at.num_fds(), _tokens(folder)))
        process.terminate()
    seconds, memory, files, tokens = np.array(seen, dtype=np.float64).T
    rest = seconds > 0.2 * seconds[-1]
    seconds, memory, files, tokens = seconds[rest], memory[rest] / 2**20, files[rest], tokens[rest]
    quarter = len(seconds) // 4
    first, last = ((tokens[b] - tokens[a]) / (seconds[b] - seconds[a]) for a, b in ((0, quarter), (-quarter - 1, -1)))
    return {
        "minutes": float(seconds[-1] / 60),
        "tokens": float(tokens[-1]),
        "MiB at the beginning": float(np.median(memory[:quarter])),
        "MiB at the end": float(np.median(memory[-quarter:])),
        "MiB an hour": float(np.polyfit(seconds / 3600, memory, 1)[0]),
        "open files at the beginning": float(np.median(files[:quarter])),
        "open files at the end": float(np.median(files[-quarter:])),
        "tokens a second, first quarter": float(first),
        "tokens a second, last quarter": float(last),
        "last to first": float(last / first),
    }


def _tokens(folder: Path) -> int:
    """Tokens trained on, by the last whole line of the log of metrics."""
    path = folder / "run" / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - 4096))
        lines = handle.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["tokens"]) if len(lines) > 1 else 0


def main() -> int:
    options = tyro.cli(Soak, prog="python -m benchmarks.soak")

    def command() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in watch(options, Path(folder)).items():
                print(f"{name:<32} {value:,.2f}")

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
