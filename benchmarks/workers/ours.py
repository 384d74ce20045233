"""Ours: each trainer's `update`, and `TrainingRun` on the buffer; and the bounds, which run in the same environment."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from bounds import MAKERS
from models import gpt2_shape
from worker import Batches, Contestant, Gate, cut_for_l0, serve

from dictionary_learning.activations.language_model import LanguageModelActivations, TracedLM
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.corpus import TextStream, corpus_from_iterable
from dictionary_learning.packing import ContextPacker
from dictionary_learning.trainers import SAETrainer, trainer_class
from dictionary_learning.training import TrainingRun

STEPS = 100_000  # of the pretended run: the schedules stay in their warm-up
SETTLE_STEPS = 34  # after which a trainer that switches kernels by the measured density has switched


def make_trainer(
    architecture: str, d: int, m: int, k: int, device: str, encoder_dtype: str = "fp32", seed: int = 0
) -> SAETrainer:
    """A trainer at its defaults but for the sizes."""
    cls = trainer_class(architecture)
    wanted: dict[str, Any] = {"k": k, "group_fractions": [1 / 16, 1 / 8, 1 / 4, 9 / 16]}
    known = inspect.signature(cls).parameters
    more = {name: value for name, value in wanted.items() if name in known}
    if encoder_dtype != "fp32":
        more["encoder_dtype"] = encoder_dtype
    sizes: dict[str, Any] = {"steps": STEPS, "activation_dim": d, "dict_size": m, "layer": None, "lm_name": None}
    return cls(**sizes, **more, seed=seed, device=device)


def step(
    architecture: str,
    state: str,
    d: int,
    m: int,
    k: int,
    batch: int,
    device: str = "cpu",
    encoder_dtype: str = "fp32",
    dictionaries: int = 1,
    memory: bool = False,
) -> Contestant:
    """One step of as many dictionaries. With `memory`, `info` says how far the process has grown for them at most."""
    batches = Batches(d, batch, device)
    if memory:  # a small one first, so that libraries and their scratch memory are there and don't count
        small = make_trainer(architecture, 16, 64, min(k, 8), device, encoder_dtype)
        for done in range(3):
            small.update(done, batches()[:, :16])
    peak = memory_watch(device) if memory else None
    trainers = [make_trainer(architecture, d, m, k, device, encoder_dtype) for _ in range(dictionaries)]
    done = 0

    def update() -> None:
        nonlocal done
        x_BD = batches()
        for trainer in trainers:
            trainer.update(done, x_BD)
        done += 1

    def info() -> dict[str, Any]:
        last = trainers[0].last
        assert last is not None
        return {"l0": float(last.l0)} | ({"peak_bytes": peak()} if peak else {})

    update()
    if state == "sparse":
        for trainer in trainers:
            make_sparse(trainer.ae, torch.cat(batches.all))
        for _ in range(SETTLE_STEPS):
            update()
    return Contestant(update, info)


@torch.no_grad()
def make_sparse(ae: Any, x_BD: torch.Tensor) -> None:
    """Move the biases (of a JumpReLU: the thresholds) so that SPARSE_L0 latents fire an input."""
    if hasattr(ae, "gate_bias"):
        ae.gate_bias.sub_(cut_for_l0(ae.encoder(x_BD - ae.decoder_bias) + ae.gate_bias))
    elif hasattr(ae, "W_enc") and "threshold" in dict(ae.named_parameters()):
        ae.threshold.copy_(cut_for_l0(ae.preactivations(x_BD)).clamp_min(1e-4))
    else:
        ae.encoder.bias.sub_(cut_for_l0(ae.preactivations(x_BD)))


def memory_watch(device: str) -> Any:
    """A function that gives the peak of memory in bytes since this call, above what is in use now."""
    if device == "cpu":
        process = psutil.Process()
        base = process.memory_info().rss
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the kernel's mark of the highest resident memory starts anew (Linux)

        def peak() -> int:
            with open("/proc/self/status") as status:
                kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
            return kib * 1024 - base

        return peak
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return lambda: torch.cuda.max_memory_allocated() - base


@functools.cache
def traced(tokenizer: str, dtype: str, device: str, shape: str) -> TracedLM:
    model, tokens = gpt2_shape(tokenizer, dtype, device, json.loads(shape))
    return TracedLM.load(model, tokens)


def stream(
    tokenizer: str,
    texts: str,
    dictionaries: int | None,
    m: int,
    k: int,
    batch: int,
    contexts: int,
    buffer_contexts: int,
    ctx_len: int,
    layer: int,
    dtype: str,
    device: str = "cpu",
    encoder_dtype: str = "fp32",
    shape: dict[str, Any] | None = None,
) -> Contestant:
    """`dictionaries` None: the bare harvest. 0: the buffer alone. Otherwise as many TopK dictionaries."""
    lm = traced(tokenizer, dtype, device, json.dumps(shape or {}))
    with open(texts) as lines:
        pieces = [json.loads(line)["text"] for line in lines]
    corpus, point = TextStream(corpus_from_iterable(pieces), epochs=None, seed=0), f"resid_post_layer_{layer}"
    if dictionaries is None:
        packer = ContextPacker(corpus, lm.tokenizer, ctx_len=ctx_len, batch_contexts=contexts)
        harvest = rows_of(LanguageModelActivations(lm, packer, [point]))
        return Contestant(lambda: next(harvest))
    buffer = ActivationBuffer(
        corpus,
        lm,
        point,
        n_ctxs=buffer_contexts,
        ctx_len=ctx_len,
        refresh_batch_size=contexts,
        out_batch_size=batch,
        remove_bos=True,
        device=device,
    )
    if not dictionaries:
        return Contestant(lambda: len(next(buffer)))
    d = buffer.source.widths[point]
    trainers = [make_trainer("top_k", d, m, k, device, encoder_dtype, seed=number) for number in range(dictionaries)]

    def run(gate: Gate) -> None:
        TrainingRun(buffer, trainers, STEPS, callbacks=[lambda run, step: gate.tick()]).run()

    gate = Gate(run)

    def one() -> int:
        gate.step()
        return batch

    return Contestant(one, close=gate.close)


def rows_of(source: Iterator[Any]) -> Iterator[int]:
    for acts in source:
        yield len(next(iter(acts.acts.values())))


if __name__ == "__main__":
    serve({"step": step, "stream": stream} | MAKERS)
