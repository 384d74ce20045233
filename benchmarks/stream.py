"""What the stream costs beside the bare harvest: the buffer, one TopK dictionary, a second hook point.

    python benchmarks/stream.py --model embedded --seconds 20
    python benchmarks/stream.py --model gpt2-shape --seconds 60

Everything runs in turns in one process on the same texts, so that a change of the machine's load falls on all alike.
`gpt2-shape` is GPT-2 small with random weights (speed does not depend on them), layer 8, m = 6,144, batch 2,048;
`embedded` is the project's tiny model, layer 2, m = 1,536, batch 1,024.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from data_prep.embedded import MODEL_DIR
from dictionary_learning.activations.language_model import LanguageModelActivations, TracedLM
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.corpus import TextStream, open_corpus
from dictionary_learning.packing import ContextPacker
from dictionary_learning.trainers import TopKTrainer


@dataclass
class Args:
    model: str = "embedded"
    """embedded or gpt2-shape"""
    seconds: float = 20.0
    """For each of the measured streams, in turns."""
    turns: int = 5
    dtype: str = "float32"


def load(args: Args) -> tuple[TracedLM, list[str], int, int, int]:
    """(model, two hook points, width, batch, contexts a forward)."""
    if args.model == "embedded":
        lm = TracedLM.load(str(MODEL_DIR), dtype=args.dtype)
        return lm, ["resid_post_layer_1", "resid_post_layer_2"], 1536, 1024, 32
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(pad_token_id=None)).to(getattr(torch, args.dtype)).eval()
    lm = TracedLM.load(model, AutoTokenizer.from_pretrained(MODEL_DIR))
    return lm, ["resid_post_layer_7", "resid_post_layer_8"], 6144, 2048, 16


def main(args: Args) -> None:
    lm, points, width, batch, contexts = load(args)
    corpus = open_corpus("embedded")

    def packer() -> ContextPacker:
        return ContextPacker(
            TextStream(corpus, epochs=None, seed=0), lm.tokenizer, ctx_len=128, batch_contexts=contexts
        )

    def harvest(names: list[str]) -> Iterator[int]:
        for acts in LanguageModelActivations(lm, packer(), names):
            yield len(next(iter(acts.acts.values())))

    def buffered(names: list[str], train: bool) -> Iterator[int]:
        buffer = ActivationBuffer(
            TextStream(corpus, epochs=None, seed=0),
            lm,
            names,
            n_ctxs=contexts * 8,
            ctx_len=128,
            refresh_batch_size=contexts,
            out_batch_size=batch,
            remove_bos=True,
        )
        width_of_acts = next(iter(buffer.source.widths.values()))
        trainer = TopKTrainer(100_000, width_of_acts, width, 32, None, None, seed=0, device="cpu")
        buffer.refresh()  # the first fill is no part of the steady state
        for step, acts in enumerate(buffer):
            rows: Any = next(iter(acts.values())) if isinstance(acts, dict) else acts
            if train:
                trainer.update(step, rows)
            yield len(rows)

    streams: dict[str, Callable[[], Iterator[int]]] = {
        "harvest, one hook point": lambda: harvest(points[1:]),
        "harvest, two hook points": lambda: harvest(points),
        "buffer, one hook point": lambda: buffered(points[1:], train=False),
        "buffer, two hook points": lambda: buffered(points, train=False),
        "buffer and one TopK dictionary": lambda: buffered(points[1:], train=True),
    }
    running = {name: make() for name, make in streams.items()}
    rows, seconds = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0.0)
    for stream in running.values():
        for _ in range(3):
            next(stream)
    for _ in range(args.turns):
        for name, stream in running.items():
            began = time.perf_counter()
            while time.perf_counter() - began < args.seconds / args.turns:
                rows[name] += next(stream)
            seconds[name] += time.perf_counter() - began
    bare = rows["harvest, one hook point"] / seconds["harvest, one hook point"]
    print(f"{args.model}, {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| stream | activations a second | of the bare harvest |\n|---|---|---|")
    for name in streams:
        rate = rows[name] / seconds[name]
        print(f"| {name} | {rate:,.0f} | {rate / bare:.3f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
