"""Every architecture's loss written out once more in plain autograd, from the papers.

`formula` owes nothing to the package: parameters come in as a dict of leaves, the loss comes out. Straight-through
gradients to a JumpReLU threshold are written as terms of value zero that carry them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.trainers import SAETrainer

PENALISED = ("standard", "standard_april_update", "p_anneal")
BY_K = ("top_k", "batch_top_k", "group_max", "matryoshka_batch_top_k")
GATED = ("gated", "gated_anneal")


def formula(architecture: str, p: dict[str, Tensor], x: Tensor, y: Tensor | None = None, **s: Any) -> Tensor:
    """The loss of predicting y (None: of reconstructing x) from x; `s` holds what the equations need.

    standard: Bricken et al. 2023. standard_april_update: Conerly et al. 2024. top_k: arXiv:2406.04093, sections 2.3,
    2.4 and A.2. batch_top_k: arXiv:2412.06410, section 3. matryoshka: arXiv:2503.17547, section 3. jump_relu:
    arXiv:2407.14435, eq. 9 with the pseudo-derivatives of eqs. 11 and 12. gated: arXiv:2404.16014, eq. 8. p_anneal:
    arXiv:2408.00113, section 3.2; gated_anneal: the two together. group_max: the largest of each group of neighbours.
    """
    E, W, b_dec = encoder_rows(p), decoder_rows(p), decoder_bias(p)
    skip = x @ p["W_skip"].T if "W_skip" in p else 0.0
    centred = x if architecture == "jump_relu" or y is not None else x - b_dec
    target = x if y is None else y
    u = centred @ E.T

    def error(f: Tensor) -> Tensor:
        return (f @ W + b_dec + skip - target).pow(2).sum(1).mean()

    if architecture in GATED:
        gate = u + p["gate_bias"]
        f = (gate > 0).to(x.dtype) * torch.clamp(p["r_mag"].exp() * u + p["mag_bias"], min=0)
        frozen_skip = skip.detach() if isinstance(skip, Tensor) else skip
        aux = (torch.clamp(gate, min=0) @ W.detach() + b_dec.detach() + frozen_skip - target).pow(2).sum(1).mean()
        return error(f) + s["weight"] * penalty(torch.clamp(gate, min=0), W, **s) + aux
    pre = u + encoder_bias(p)
    if architecture == "jump_relu":
        f, l0 = jump(pre, p["threshold"], s["bandwidth"])
        return error(f) + s["weight"] * (l0 if s["target_l0"] is None else (l0 / s["target_l0"] - 1) ** 2)
    acts = torch.clamp(pre, min=0)
    if architecture in PENALISED:
        return error(acts) + s["weight"] * penalty(acts, W, **s)
    f = acts * chosen(architecture, pre.detach(), s["k"])
    loss = error(f)
    if architecture == "matryoshka_batch_top_k":
        ends = torch.tensor(s["group_sizes"]).cumsum(0).tolist()
        parts = [error(torch.cat([f[:, :end], torch.zeros_like(f[:, end:])], 1)) for end in ends]
        loss = sum(weight * part for weight, part in zip(s["group_weights"], parts, strict=True))
    if s.get("dead") is not None and s["dead"].any():
        loss = loss + auxk(acts, pre.detach(), W, (target - (f @ W + b_dec + skip)).detach(), target, **s)
    return loss


def jump(z: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
    on = (z > theta).to(z.dtype).detach()
    kernel = (((z - theta) / width).abs() < 0.5).to(z.dtype).detach()
    step = theta - theta.detach()
    return z * on - theta.detach() / width * kernel * step, (on - 1 / width * kernel * step).sum(1).mean()


def penalty(f: Tensor, W: Tensor, kind: str = "l1", exponent: float = 1.0, **_: Any) -> Tensor:
    """Mean over inputs of the L1 norm, of that weighted by the decoder's norms, or of the Lp norm with or without its
    root; at exponent 0 the number of active latents."""
    if kind == "l1":
        return f.sum(1).mean()
    if kind == "l1 by norms":
        return (f * W.norm(dim=1)).sum(1).mean()
    sums = []
    for row in f:
        active = row[row > 0]
        total = (active**exponent).sum()
        sums.append(total if kind == "Lp^p" or not len(active) else total ** (1 / exponent))
    return torch.stack(sums).mean()


def chosen(architecture: str, pre: Tensor, k: int) -> Tensor:
    """Mask of the pre-activations that may fire."""
    if architecture == "top_k":
        return pre >= pre.sort(dim=1, descending=True).values[:, [k - 1]]
    if architecture == "group_max":
        groups = pre.view(len(pre), k, -1)
        return (groups == groups.max(dim=2, keepdim=True).values).view_as(pre)
    return pre >= pre.flatten().sort(descending=True).values[k * len(pre) - 1]


def auxk(acts: Tensor, pre: Tensor, W: Tensor, residual: Tensor, target: Tensor, **s: Any) -> Tensor:
    dead = s["dead"]
    number = int(min(s["auxk_size"], dead.sum()))
    dead_pre = torch.where(dead, pre, -torch.inf)
    kth = dead_pre.sort(dim=1, descending=True).values[:, [number - 1]]
    explained = (acts * dead * (dead_pre >= kth)) @ W
    fraction = (residual - explained).pow(2).sum(1).mean() / (residual - residual.mean(0)).pow(2).sum(1).mean()
    of_data = (target - target.mean(0)).pow(2).sum(1).mean()
    return s["auxk_alpha"] * of_data * min(1.0, int(dead.sum()) / s["auxk_size"]) * fraction


def encoder_rows(p: dict[str, Tensor]) -> Tensor:
    return p["W_enc"].T if "W_enc" in p else p["encoder.weight"]


def decoder_rows(p: dict[str, Tensor]) -> Tensor:
    return p["W_dec"] if "W_dec" in p else p["decoder.weight"].T


def encoder_bias(p: dict[str, Tensor]) -> Tensor:
    return next(p[name] for name in ("b_enc", "encoder.bias", "gate_bias") if name in p)


def decoder_bias(p: dict[str, Tensor]) -> Tensor:
    return next(p[name] for name in ("b_dec", "decoder_bias", "bias") if name in p)


def what_the_equations_need(trainer: SAETrainer, step: int) -> dict[str, Any]:
    """`s` of `formula` for a trainer at a step, from its settings."""
    c, scale = trainer.config, trainer.input_scale
    warmup = c["sparsity_warmup_steps"]
    warm = min(1.0, step / warmup) if warmup else 1.0
    architecture = trainer.architecture
    if architecture in BY_K:
        s = {"k": c["k"], "auxk_alpha": c["auxk_alpha"], "auxk_size": c["top_k_aux"]}
        return s | {name: c[name] for name in ("group_sizes", "group_weights") if name in c}
    if architecture == "jump_relu":
        weight = c["sparsity_penalty"] * scale**2 * warm
        return {"weight": weight, "target_l0": c["target_l0"], "bandwidth": c["bandwidth"] * scale}
    if "anneal" in architecture:
        kind, exponent = c["sparsity_function"], trainer.p(step)  # type: ignore[attr-defined]
        return {"weight": c["sparsity_penalty"] * warm, "kind": kind, "exponent": exponent}
    kind = "l1 by norms" if architecture == "standard_april_update" else "l1"
    return {"weight": c["l1_penalty"] * warm, "kind": kind}
