"""dictionary-learning 0.1.0: each trainer's own `update`, and its buffer with its own `trainSAE`."""

from __future__ import annotations

import json
from typing import Any

import torch
from models import gpt2_shape
from worker import Batches, Contestant, Gate, cut_for_l0, serve

from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE

STEPS = 100_000  # of the pretended run: the schedules stay in their warm-up


def settings(architecture: str, d: int, m: int, k: int, device: str) -> dict[str, Any]:
    """A trainer's arguments: its defaults but for the sizes."""
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        "top_k": (TopKTrainer, {"k": k}),
        "batch_top_k": (BatchTopKTrainer, {"k": k}),
        "matryoshka_batch_top_k": (
            MatryoshkaBatchTopKTrainer,
            {"k": k, "group_fractions": [1 / 16, 1 / 8, 1 / 4, 9 / 16]},
        ),
        "standard": (StandardTrainer, {}),
        "jump_relu": (JumpReluTrainer, {}),
        "gated": (GatedSAETrainer, {}),
        "p_anneal": (PAnnealTrainer, {}),
        "gated_anneal": (GatedAnnealTrainer, {}),
    }
    trainer, more = known[architecture]
    common: dict[str, Any] = {
        "steps": STEPS,
        "activation_dim": d,
        "dict_size": m,
        "layer": 0,
        "lm_name": "none",
        "seed": 0,
    }
    return {"trainer": trainer, "device": device} | common | more


def step(architecture: str, state: str, d: int, m: int, k: int, batch: int, device: str = "cpu") -> Contestant:
    config = settings(architecture, d, m, k, device)
    trainer = config.pop("trainer")(**config)
    batches, done = Batches(d, batch, device), 0

    def update() -> None:
        nonlocal done
        trainer.update(done, batches())
        done += 1

    @torch.no_grad()
    def info() -> dict[str, Any]:
        x_BD, ae = batches.all[0], trainer.ae
        codes = ae.encode(x_BD, use_threshold=False) if "top_k" in architecture else ae.encode(x_BD)
        return {"l0": float((codes > 0).sum(-1).float().mean())}

    update()
    if state == "sparse":
        make_sparse(trainer.ae, torch.cat(batches.all))
    return Contestant(update, info)


@torch.no_grad()
def make_sparse(ae: Any, x_BD: torch.Tensor) -> None:
    if hasattr(ae, "gate_bias"):
        ae.gate_bias.sub_(cut_for_l0(ae.encoder(x_BD - ae.decoder_bias) + ae.gate_bias))
    elif hasattr(ae, "W_enc"):
        ae.threshold.copy_(cut_for_l0(x_BD @ ae.W_enc + ae.b_enc).clamp_min(1e-4))
    else:
        ae.encoder.bias.sub_(cut_for_l0(ae.encoder(x_BD - ae.bias)))


def stream(
    tokenizer: str,
    texts: str,
    dictionaries: int,
    m: int,
    k: int,
    batch: int,
    contexts: int,
    buffer_contexts: int,
    ctx_len: int,
    layer: int,
    dtype: str,
    device: str = "cpu",
    shape: dict[str, Any] | None = None,
) -> Contestant:
    """The buffer over a traced model, and `trainSAE` on it; with 0 dictionaries the buffer alone."""
    from nnsight import LanguageModel

    model, tokens = gpt2_shape(tokenizer, dtype, device, shape)
    lm = LanguageModel(model, tokenizer=tokens)
    with open(texts) as lines:
        pieces = [json.loads(line)["text"] for line in lines]
    d = model.config.n_embd

    def endless() -> Any:
        while True:
            yield from pieces

    buffer = ActivationBuffer(
        endless(),
        lm,
        lm.transformer.h[layer],
        d_submodule=d,
        n_ctxs=buffer_contexts,
        ctx_len=ctx_len,
        refresh_batch_size=contexts,
        out_batch_size=batch,
        device=device,
    )
    if not dictionaries:
        return Contestant(lambda: len(next(buffer)))

    configs = [settings("top_k", d, m, k, device) | {"seed": seed} for seed in range(dictionaries)]

    def run(gate: Gate) -> None:
        trainSAE(gate.gated(buffer.__next__), configs, steps=STEPS, device=device)

    gate = Gate(run)

    def one() -> int:
        gate.step()
        return batch

    return Contestant(one, close=gate.close)


if __name__ == "__main__":
    serve({"step": step, "stream": stream})
