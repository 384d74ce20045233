"""The model of the streams, the same in every environment: GPT-2 small's shape with random weights (speed does not
depend on them) and the tokenizer of this project's embedded model."""

from __future__ import annotations

from typing import Any

import torch


def gpt2_shape(tokenizer: str, dtype: str, device: str, shape: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """(model, tokenizer). `shape` overrides fields of GPT-2 small's configuration."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(pad_token_id=None, **(shape or {}))
    model: Any = GPT2LMHeadModel(config)
    return model.to(device, getattr(torch, dtype)).eval(), AutoTokenizer.from_pretrained(tokenizer)
