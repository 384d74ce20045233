"""Resident memory over a long run on the embedded model, and the peak of allocating and filling the buffer.

    python benchmarks/memory.py --tokens 2_000_000

Prints the buffer's own size beside what the process grew by, then the resident memory at every twentieth of the run.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import psutil
import torch
import tyro

from data_prep.embedded import MODEL_DIR
from dictionary_learning.activations.language_model import TracedLM
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.corpus import TextStream, open_corpus
from dictionary_learning.trainers import TopKTrainer
from dictionary_learning.training import TrainingRun

MB = 2**20


@dataclass
class Args:
    tokens: int = 2_000_000
    corpus: str = "embedded"
    buffer_contexts: int = 8192


def main(args: Args) -> None:
    process = psutil.Process()
    lm = TracedLM.load(str(MODEL_DIR))
    stream = TextStream(open_corpus(args.corpus), epochs=None, seed=0)

    def filled(n_ctxs: int) -> tuple[ActivationBuffer, int]:
        """A buffer after 20 draws, and the highest resident memory on the way (the model's forward included)."""
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], process.memory_info().rss)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        buffer = ActivationBuffer(
            stream,
            lm,
            "resid_post_layer_2",
            n_ctxs=n_ctxs,
            ctx_len=128,
            refresh_batch_size=32,
            out_batch_size=1024,
            remove_bos=True,
        )
        for _ in range(20):
            next(buffer)
        done.set()
        watcher.join()
        return buffer, peak[0]

    small, small_peak = filled(64)
    small, small_peak = filled(64)  # again, now that everything that is not the buffer has been used once
    buffer, peak = filled(args.buffer_contexts)
    grown, larger = peak - small_peak, buffer.nbytes - small.nbytes
    print(
        f"buffer {buffer.nbytes / MB:.0f} MiB: the peak while filling and drawing is {grown / MB:.0f} MiB above that "
        f"of a buffer {larger / MB:.0f} MiB smaller: {grown / larger:.3f} x"
    )

    steps = args.tokens // 1024
    every = max(1, steps // 20)
    curve: list[tuple[int, float]] = []

    def sample(run: TrainingRun, step: int) -> None:
        if step % every == 0:
            curve.append((run.tokens, process.memory_info().rss / MB))

    trainer = TopKTrainer(steps, 192, 1536, 32, 2, "embedded", seed=0, device="cpu")
    began = time.perf_counter()
    TrainingRun(buffer, [trainer], steps, normalize_activations=True, callbacks=[sample]).run()
    print(f"{curve[-1][0]:,} tokens in {time.perf_counter() - began:.0f} s, torch {torch.__version__}")
    print("tokens (k): resident MiB  " + "  ".join(f"{tokens // 1000}: {rss:.0f}" for tokens, rss in curve))
    after_warmup = [rss for _, rss in curve[2:]]
    print(f"after warm-up: lowest {min(after_warmup):.0f}, highest {max(after_warmup):.0f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
