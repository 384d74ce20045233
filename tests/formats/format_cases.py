"""Dictionaries to convert, and what they must compute: for the tests of formats, with and without the libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dictionary_learning.dictionary import (
    DICTIONARIES,
    AutoEncoder,
    AutoEncoderTopK,
    Dictionary,
    IdentityDict,
    JumpReluAutoEncoder,
)

D, F, K = 12, 40, 5
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
CONFIG: dict[str, Any] = {
    "trainer": {"lm_name": "gpt2", "layer": 8, "submodule_name": "resid_post_layer_8", "norm_factor": 3.5},
    "buffer": {"ctx_len": 128, "add_special_tokens": True, "remove_bos": True},
    "corpus": "embedded",
}


def inputs() -> Tensor:
    """[3, 50, D], a few of them larger than the others."""
    x = torch.randn(3, 50, D, generator=torch.Generator().manual_seed(11)) + 0.5
    x[0, :2] *= 5
    return x


def _filled(dictionary: Dictionary, unit_decoder: bool = True) -> Dictionary:
    """Every parameter is away from where it began; encoder and decoder are untied."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in dictionary.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim > 0:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim == 1 else 1.0))
        rows_FD = dictionary.decoder_rows
        rows_FD.div_(rows_FD.norm(dim=1, keepdim=True).clone())
        if not unit_decoder:
            rows_FD.mul_(torch.rand(rows_FD.shape[0], 1, generator=generator) * 2 + 0.2)
        if isinstance(dictionary, JumpReluAutoEncoder):
            dictionary.threshold.uniform_(0.05, 1.5, generator=generator)
    return dictionary.requires_grad_(False)


def _top_k(threshold: float, unit_decoder: bool = True) -> Dictionary:
    dictionary = _filled(AutoEncoderTopK(D, F, K), unit_decoder)
    dictionary.threshold.fill_(threshold)
    return dictionary


def _jump_relu(apply_b_dec: bool = False, unit_decoder: bool = True) -> Dictionary:
    dictionary = _filled(JumpReluAutoEncoder(D, F), unit_decoder)
    dictionary.apply_b_dec_to_input = apply_b_dec
    return dictionary


CASES = {
    "relu": lambda: _filled(AutoEncoder(D, F)),
    "relu, decoder of other norms": lambda: _filled(AutoEncoder(D, F), unit_decoder=False),
    "topk": lambda: _top_k(1.25),
    "topk, decoder of other norms": lambda: _top_k(1.25, unit_decoder=False),
    "topk, no threshold": lambda: _top_k(-1.0),
    "jumprelu": lambda: _jump_relu(),
    "jumprelu, decoder of other norms": lambda: _jump_relu(unit_decoder=False),
    "jumprelu, subtracting b_dec": lambda: _jump_relu(apply_b_dec=True),
}
LEARNED = [cls for cls in DICTIONARIES.values() if cls is not IdentityDict]


def expected(dictionary: Dictionary, format_name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, reconstructions) that a format must preserve: our own; of TopK in Gemma Scope, those by the threshold."""
    if format_name == "gemma_scope" and isinstance(dictionary, AutoEncoderTopK):
        f = dictionary.encode(x, use_threshold=True)
    else:
        f = dictionary.encode(x)
    return f, dictionary.decode(f)


def refusal(case: str, format_name: str) -> str | None:
    """Why a format can't hold a case, as a part of the message; None where it can."""
    if format_name == "sparsify" and case.startswith("jumprelu"):
        return "sparsify has no thresholds"
    if format_name == "gemma_scope" and case == "topk, no threshold":
        return "through its measured threshold, and this one has none"
    return None


def assert_same(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.float(), w.float(), **TOLERANCE)


def largest_difference(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Over codes and reconstructions, relative to 1 + |value|."""
    return max(float(((a - w).abs() / (1 + w.abs())).max()) for a, w in zip(actual, wanted, strict=True))
