"""eai-sparsify 1.3.3: its trainer's own `fit`, on a stand-in for the language model that hands out our batches."""

from __future__ import annotations

from typing import Any

import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from worker import Batches, Contestant, Gate, serve

STEPS = 100_000


class HandedOut(torch.nn.Module):
    """A "model" of one layer whose output is the next batch, so that `fit` costs what training costs."""

    def __init__(self, batches: Batches, contexts: int) -> None:
        super().__init__()
        self.layer, self.batches, self.contexts = torch.nn.Identity(), batches, contexts
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.gate: Gate | None = None

    @property
    def base_model(self) -> HandedOut:
        return self

    @property
    def device(self) -> torch.device:
        return self.batches.all[0].device

    def forward(self, input_ids: torch.Tensor) -> None:
        if self.gate is not None:
            self.gate.tick()
        x = self.batches()
        self.layer(x.view(self.contexts, -1, x.shape[-1]))


class Contexts(torch.utils.data.Dataset):
    """As many contexts of `length` token ids as the pretended run has."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.ids = count, torch.arange(length)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids}


def step(
    architecture: str, state: str, d: int, m: int, k: int, batch: int, device: str = "cpu", optimizer: str = "signum"
) -> Contestant:
    if architecture != "top_k":
        raise ValueError(f"it has no {architecture}")
    contexts = max(c for c in (16, 8, 4, 2, 1) if batch % c == 0)
    batches = Batches(d, batch, device)
    model = HandedOut(batches, contexts)
    config = TrainConfig(
        sae=SparseCoderConfig(num_latents=m, k=k),
        batch_size=contexts,
        hookpoints=["layer"],
        optimizer=optimizer,
        log_to_wandb=False,
        save_every=10 * STEPS,
    )
    trainer = Trainer(config, Contexts(STEPS * contexts, batch // contexts), model)
    coder: Any = next(iter(trainer.saes.values()))

    def run(gate: Gate) -> None:
        model.gate = gate
        trainer.fit()

    @torch.no_grad()
    def info() -> dict[str, Any]:
        return {"l0": float((coder.encode(batches.all[0]).top_acts > 0).sum(-1).float().mean())}

    gate = Gate(run)
    return Contestant(gate.step, info, close=gate.close)


if __name__ == "__main__":
    serve({"step": step})
