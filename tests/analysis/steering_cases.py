"""Tiny random models with tokenizers, and dictionaries for them, for the tests of effects and interventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.dictionary import DICTIONARIES, Dictionary
from tests.activations.conftest import FAMILIES, VOCAB, build
from tests.conftest import byte_tokenizer

__all__ = ["D", "F", "FAMILIES", "POINT", "VOCAB", "by_hand", "dictionary", "models", "own"]

D, F = 32, 48
POINT = "resid_post_layer_1"
EXTRA: dict[str, dict[str, Any]] = {
    "AutoEncoderTopK": {"k": 8},
    "AutoEncoderGroupMax": {"k": 8},
    "BatchTopKSAE": {"k": 8},
    "MatryoshkaBatchTopKSAE": {"k": 8, "group_sizes": [16, 32]},
}


def models() -> dict[str, TracedLM]:
    """A model a family, with norms that are no identity."""
    tokenizer = byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    found = {}
    for family in FAMILIES:
        module = build(family)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
        found[family] = TracedLM.load(module, tokenizer)
    return found


def dictionary(name: str = "AutoEncoder", seed: int = 0, **options: Any) -> Dictionary:
    """A dictionary of any architecture in which about half of the latents fire."""
    torch.manual_seed(seed)
    made = DICTIONARIES[name](D, F, **{**EXTRA.get(name, {}), **options})
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            if "threshold" in key:
                tensor.copy_(torch.rand(tensor.shape) * 0.1)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
    return made.requires_grad_(False).eval()


@torch.no_grad()
def by_hand(lm: TracedLM, tokens_CL: Tensor, change: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """Logits with what passes at hook points changed by plain torch hooks."""
    handles = []
    for name, function in change.items():
        point = lm.resolve(name)[0]
        part = lm.module.get_submodule(point.path)
        if point.io == "in":

            def before(_: Any, args: tuple, kwargs: dict, function: Any = function) -> Any:
                if args:
                    return (function(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

            handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_: Any, args: Any, out: Any, function: Any = function) -> Any:
                return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)

            handles.append(part.register_forward_hook(after))
    try:
        return lm.module(tokens_CL, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def own(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of the prompt's own tokens alone: BOS keeps what it has."""
    return lambda x: torch.cat([x[:, :1], change(x)[:, 1:]], 1)
