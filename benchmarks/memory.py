"""Resident memory over a long run on the embedded model, and the peak of allocating and filling the buffer.

`python -m benchmarks run --only memory`; the measurement itself runs in a process of its own
(`python -m benchmarks.memory FILE`), so that nothing else is in its resident memory.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plots import curves
from benchmarks.results import Report, Table

MIB = 2**20
POINTS = 20


@dataclass
class Options:
    """Lengths of the memory benchmark."""

    tokens: int = 2_000_000
    corpus: str = "embedded"
    buffer_contexts: int = 8192
    batch: int = 1024

    def quick(self) -> Options:
        return Options(**vars(self) | {"tokens": self.tokens // 10, "buffer_contexts": self.buffer_contexts // 4})


def measure(options: Options, threads: int | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.json"
        path.write_text(json.dumps({"options": dataclasses.asdict(options), "threads": threads}))
        subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", str(path)], check=True, cwd=Path(__file__).parents[1]
        )
        return json.loads(path.read_text())


def in_this_process(options: Options) -> dict[str, Any]:
    """Bytes of a small and a large buffer, the peaks while each is filled and drawn from, and a run's memory."""
    import psutil

    from data_prep.embedded import MODEL_DIR
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.corpus import TextStream, open_corpus
    from dictionary_learning.trainers import TopKTrainer
    from dictionary_learning.training import TrainingRun

    process = psutil.Process()
    lm = TracedLM.load(str(MODEL_DIR))
    stream = TextStream(open_corpus(options.corpus), epochs=None, seed=0)

    @contextmanager
    def peak_into(peaks: list[int]) -> Iterator[None]:
        """Append the highest resident memory while the block runs."""
        highest, done = [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                highest[0] = max(highest[0], process.memory_info().rss)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield
        done.set()
        watcher.join()
        peaks.append(highest[0])

    peaks: list[int] = []
    sizes: list[int] = []
    for n_ctxs in (64, 64, options.buffer_contexts):  # twice, so that all that is not the buffer has been used once
        with peak_into(peaks):
            buffer = ActivationBuffer(
                stream,
                lm,
                "resid_post_layer_2",
                n_ctxs=n_ctxs,
                ctx_len=128,
                refresh_batch_size=32,
                out_batch_size=options.batch,
                remove_bos=True,
            )
            for _ in range(20):
                next(buffer)
        sizes.append(buffer.nbytes)

    steps = options.tokens // options.batch
    curve: list[tuple[int, int]] = []

    def sample(run: TrainingRun, step: int) -> None:
        if step % max(1, steps // POINTS) == 0:
            curve.append((run.tokens, process.memory_info().rss))

    width = next(iter(buffer.source.widths.values()))
    trainer = TopKTrainer(steps, width, 8 * width, 32, 2, "embedded", seed=0, device="cpu")
    TrainingRun(buffer, [trainer], steps, normalize_activations=True, callbacks=[sample]).run()
    return {"peaks": peaks[1:], "sizes": sizes[1:], "curve": curve}


def report(data: dict[str, Any], options: dict[str, Any]) -> Report:
    grown, larger = data["peaks"][1] - data["peaks"][0], data["sizes"][1] - data["sizes"][0]
    settled = [bytes_ for _, bytes_ in data["curve"][2:]] or [bytes_ for _, bytes_ in data["curve"]]
    title = (
        f"Resident memory over a run with one TopK dictionary on the embedded model ({options['tokens']:,} tokens): "
        f"after warm-up between {min(settled) / MIB:.0f} and {max(settled) / MIB:.0f} MiB."
    )
    rows = [[f"{tokens // 1000:,}", f"{resident / MIB:.0f}"] for tokens, resident in data["curve"]]
    remark = (
        f"The peak while filling and drawing a buffer of {data['sizes'][1] / MIB:.0f} MiB lies {grown / MIB:.0f} MiB "
        f"above that of a buffer {larger / MIB:.0f} MiB smaller: {grown / larger:.3f} x."
    )
    return Report("Memory of the stream", [Table(title, ["tokens (k)", "MiB"], rows)], [remark], ["memory.svg"])


def plot(data: dict[str, Any], folder: Path) -> None:
    line = [(max(tokens, 1), resident / MIB) for tokens, resident in data["curve"]]
    curves(folder / "memory.svg", {"tokens": {"resident memory": line}}, "MiB")


def main(path: Path) -> None:
    import torch

    asked = json.loads(path.read_text())
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    path.write_text(json.dumps(in_this_process(Options(**asked["options"]))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
