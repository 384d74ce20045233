"""sae-lens 6.54.0: each trainer's own `fit`, and its runner of several dictionaries on one stream."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from models import gpt2_shape
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from worker import Batches, Contestant, Gate, cut_for_l0, serve

STEPS = 100_000
CONFIGS = {
    "top_k": TopKTrainingSAEConfig,
    "batch_top_k": BatchTopKTrainingSAEConfig,
    "matryoshka_batch_top_k": MatryoshkaBatchTopKTrainingSAEConfig,
    "standard": StandardTrainingSAEConfig,
    "jump_relu": JumpReLUTrainingSAEConfig,
    "gated": GatedTrainingSAEConfig,
}


def dictionary(architecture: str, d: int, m: int, k: int, device: str) -> Any:
    """Its training SAE at its defaults but for the sizes."""
    more: dict[str, Any] = {"k": k} if "top_k" in architecture else {}
    if "matryoshka" in architecture:
        more["matryoshka_widths"] = [m // 16, m * 3 // 16, m * 7 // 16, m]
    config = CONFIGS[architecture](d_in=d, d_sae=m, device=device, **more)
    return get_sae_training_class(config.architecture())[0](config)


def step(
    architecture: str, state: str, d: int, m: int, k: int, batch: int, device: str = "cpu", autocast: bool = False
) -> Contestant:
    torch.manual_seed(0)
    sae, batches = dictionary(architecture, d, m, k, device), Batches(d, batch, device)
    config = SAETrainerConfig(
        total_training_samples=STEPS * batch,
        train_batch_size_samples=batch,
        device=device,
        autocast=autocast,
        lr_end=3e-5,  # its runners' default: a tenth of the rate
        lr_warm_up_steps=STEPS // 100,
        logger=LoggingConfig(log_to_wandb=False),
    )

    @torch.no_grad()
    def info() -> dict[str, Any]:
        return {"l0": float((sae.encode(batches.all[0]) > 0).sum(-1).float().mean())}

    @torch.no_grad()
    def make_sparse() -> None:
        bias = sae.b_gate if architecture == "gated" else sae.b_enc
        cut_F = cut_for_l0(sae.process_sae_in(torch.cat(batches.all)) @ sae.W_enc + bias)
        if architecture == "jump_relu":
            sae.threshold.copy_(cut_F.clamp_min(1e-4))
        else:
            bias.sub_(cut_F)

    gate = Gate(lambda gate: SAETrainer(config, sae, gate.gated(batches)).fit())
    gate.step()
    if state == "sparse":
        make_sparse()
    return Contestant(gate.step, info, close=gate.close)


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
    """Its multi-SAE runner over its HookedTransformer, whose forward stops behind the hook point."""
    from datasets import Dataset
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

    signal.signal = lambda *_: None  # the runner sets handlers; its loop runs in a thread here
    lm = hooked_gpt2_shape(tokenizer, dtype, device, shape)
    with open(texts) as lines:
        pieces = [json.loads(line)["text"] for line in lines]
    d = lm.cfg.d_model
    config = MultiSAETrainingRunnerConfig(
        saes={f"top_k_{i}": TopKTrainingSAEConfig(d_in=d, d_sae=m, k=k, device=device) for i in range(dictionaries)},
        hook_names=f"blocks.{layer}.hook_resid_post",
        streaming=False,
        context_size=ctx_len,
        n_batches_in_buffer=buffer_contexts,
        store_batch_size_prompts=contexts,
        training_tokens=STEPS * batch,
        train_batch_size_tokens=batch,
        device=device,
        dtype="float32",
        autocast_lm=dtype == "bfloat16",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    runner = MultiSAETrainingRunner(
        config, override_dataset=Dataset.from_dict({"text": pieces * 50}), override_model=lm
    )
    load = runner.activations_store.get_multi_hook_data_loader

    def run(gate: Gate) -> None:
        batches = gate.gated(load().__next__)
        runner.activations_store.get_multi_hook_data_loader = lambda: batches
        runner.run()

    gate = Gate(run)

    def one() -> int:
        gate.step()
        return batch

    return Contestant(one, close=gate.close)


def hooked_gpt2_shape(tokenizer: str, dtype: str, device: str, shape: dict[str, Any] | None) -> Any:
    """The same shape in the form its runner wants. With bf16 the weights stay fp32 and its autocast is on, which is how
    it offers that format."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model, tokens = gpt2_shape(tokenizer, "float32", "meta", shape)
    gpt2 = model.config
    tokens.bos_token = tokens.bos_token or tokens.eos_token
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=gpt2.n_layer,
            d_model=gpt2.n_embd,
            n_ctx=gpt2.n_positions,
            d_head=gpt2.n_embd // gpt2.n_head,
            n_heads=gpt2.n_head,
            d_mlp=4 * gpt2.n_embd,
            d_vocab=gpt2.vocab_size,
            act_fn="gelu_new",
            normalization_type="LN",
            device=device,
            seed=0,
        ),
        tokenizer=tokens,
    )


if __name__ == "__main__":
    serve({"step": step, "stream": stream})
