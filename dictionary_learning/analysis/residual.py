"""The way from a hook point to the residual stream, and from the residual stream to the tokens.

In: a language model and a hook point. Out: the modules that a direction goes through. Nothing here lists model
families: what runs behind the last block, and what a part of a block gives its output to, is seen in a forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dictionary_learning.activations.hook_points import PROBE_SHAPE, ResolvedHookPoint, find_blocks
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.errors import UserError


def from_residual(lm: TracedLM) -> list[Any]:
    """The modules that run behind the last block, in turn: norms (or what has no weights, a dropout), the unembedding.

    Raises:
        UserError: they are not norms and then a linear map to the vocabulary.
    """
    blocks_path, blocks = find_blocks(lm.module)
    behind = lm._probed[(f"{blocks_path}.{len(blocks) - 1}", "out")].order
    leaves = [
        (seen.order, module)
        for path, module in lm.module.named_modules()
        if (seen := lm._probed.get((path, "in"))) is not None and seen.order > behind
        if not list(module.children())
    ]
    chain = [module for _, module in sorted(leaves, key=lambda entry: entry[0])]
    *norms, unembedding = chain or [None]
    shape = getattr(getattr(unembedding, "weight", None), "shape", ())
    if tuple(shape) != (lm.vocab_size, lm.d_model) or not all(map(keeps_axes, norms)):
        kinds = ", ".join(type(module).__name__ for module in chain) or "nothing"
        raise UserError(
            f"{lm.name} has no final norm and unembedding behind its blocks that directions could be read through: "
            f"there run {kinds}."
        )
    return chain


def to_residual(lm: TracedLM, point: ResolvedHookPoint) -> tuple[list[nn.Module], str | None]:
    """(Norms between a hook point and the residual stream, None), or ([], why its output is not added to it).

    A part's output is followed by tensor identity through one forward: a module that takes that very tensor is on its
    way, one that takes a sum is not. Only norms and dropouts, which keep the axes, may be.
    """
    inside = f"'{point.name}' is not what {lm.name} adds to its residual stream"
    blocks_path, blocks = find_blocks(lm.module)
    parent = point.path.rpartition(".")[0]
    if parent == blocks_path:
        return [], None
    if point.width != lm.d_model or point.layer is None or parent != f"{blocks_path}.{point.layer}" or point.io == "in":
        return [], f"{inside}, so its directions have no direct path to the tokens."
    block = blocks[point.layer]
    part = lm.module.get_submodule(point.path)
    carried: list[Tensor] = []
    takers: list[nn.Module] = []

    def takes(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if module is part:
            carried.append(out if point.slot is None else out[point.slot])
        elif carried and any(value is carried[-1] for value in (*args, *kwargs.values())):
            takers.append(module)
            carried.append(out)

    handles = [child.register_forward_hook(takes, with_kwargs=True) for child in block.children()]
    try:
        with lm._lock, torch.no_grad():
            tokens_CL = torch.ones(PROBE_SHAPE, dtype=torch.long, device=lm.device)
            lm.module(**lm._inputs(tokens_CL, None))
    finally:
        for handle in handles:
            handle.remove()
    if not all(map(keeps_axes, takers)):
        return [], f"{inside}: {type(takers[-1]).__name__} takes it first, so its directions are not read as tokens."
    return takers, None


def keeps_axes(module: nn.Module) -> bool:
    """A norm, which has weights of one axis, or a module without weights, such as a dropout."""
    return all(weight.ndim == 1 for weight in module.parameters())
