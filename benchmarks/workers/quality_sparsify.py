"""eai-sparsify 1.3.3: its trainer's own `fit` over the run, on a stand-in for the language model that hands out the
rows (see sparsify_worker.py). `settings`: optimizer, lr. Of Signum, which averages the weights, the averages count."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from quality_common import Clock, Task, Trained, main
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from sparsify_worker import Contexts, HandedOut


class InOrder:
    """The rows of the run, in the form that the stand-in reads."""

    def __init__(self, task: Task) -> None:
        self.all = [torch.zeros(task.batch, task.d)]  # for the look at the width, which comes before the run
        self.left = iter(())

    def __call__(self) -> torch.Tensor:
        return next(self.left, self.all[0])


def train(task: Task) -> tuple[float, Trained]:
    contexts = max(c for c in (16, 8, 4, 2, 1) if task.batch % c == 0)
    batches = InOrder(task)
    model = HandedOut(batches, contexts)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            sae=SparseCoderConfig(num_latents=task.m, k=task.k),
            batch_size=contexts,
            hookpoints=["layer"],
            init_seeds=[task.seed],
            lr_warmup_steps=task.warmup,
            log_to_wandb=False,
            save_every=10 * task.steps,
            save_dir=folder,
            **task.settings,
        )
        trainer = Trainer(config, Contexts(task.steps * contexts, task.batch // contexts), model)
        batches.left = task.batches()
        with Clock() as clock:
            trainer.fit()
    if next(batches.left, None) is not None:
        raise RuntimeError("its loop ended before the run did")
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    coder: Any = next(iter(trainer.saes.values()))
    arrays = {
        "encoder_FD": coder.encoder.weight,
        "encoder_bias_F": coder.encoder.bias,
        "decoder_FO": coder.W_dec,
        "decoder_bias_O": coder.b_dec,
    }
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = {"lr": task.settings.get("lr", rates[0])} | task.settings
    return clock.seconds, Trained(arrays, "topk", True, True, lambda x: coder(x).sae_out, settings)


if __name__ == "__main__":
    main(train)
