"""overcomplete 0.3: its own `train_sae` with the criterion that its documentation gives for each dictionary."""

from __future__ import annotations

from typing import Any

import stand_ins  # noqa: F401  (before the library)
import torch
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE, mse_l1, train_sae
from overcomplete.sae.losses import top_k_auxiliary_loss
from worker import Batches, Contestant, Gate, cut_for_l0, serve


def step(architecture: str, state: str, d: int, m: int, k: int, batch: int, device: str = "cpu") -> Contestant:
    torch.manual_seed(0)
    common = {"device": device}
    model, criterion = {
        "top_k": lambda: (TopKSAE(d, m, top_k=k, **common), top_k_auxiliary_loss),
        "batch_top_k": lambda: (BatchTopKSAE(d, m, top_k=k * batch, **common), top_k_auxiliary_loss),
        "standard": lambda: (SAE(d, m, **common), mse_l1),
        "jump_relu": lambda: (JumpSAE(d, m, **common), mse_l1),
    }[architecture]()
    batches, optimizer = Batches(d, batch, device), torch.optim.Adam(model.parameters(), lr=1e-5)

    @torch.no_grad()
    def info() -> dict[str, Any]:
        return {"l0": float((model.encode(batches.all[0])[1] > 0).sum(-1).float().mean())}

    @torch.no_grad()
    def make_sparse() -> None:
        cut_F = cut_for_l0(torch.cat([model.encode(x)[0] for x in batches.all]))
        if architecture == "jump_relu":
            model.thresholds.copy_(cut_F.clamp_min(1e-4).log())  # it learns the logarithm
        else:
            model.encoder.final_block[0].bias.sub_(cut_F)

    def run(gate: Gate) -> None:
        train_sae(model, gate.gated(batches), criterion, optimizer, nb_epochs=1, monitoring=0, device=device)

    gate = Gate(run)
    gate.step()
    if state == "sparse":
        make_sparse()
    return Contestant(gate.step, info, close=gate.close)


if __name__ == "__main__":
    serve({"step": step})
