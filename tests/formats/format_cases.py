"""Dictionaries to convert, and what they must compute: for the tests of formats, with and without the libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dictionary_learning.dictionary import (
    DICTIONARIES,
    AutoEncoder,
    AutoEncoderGroupMax,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
    SparseAutoencoder,
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


def _measured(dictionary: Dictionary, threshold: float, unit_decoder: bool = True) -> Dictionary:
    dictionary = _filled(dictionary, unit_decoder)
    assert isinstance(dictionary, AutoEncoderTopK | BatchTopKSAE | MatryoshkaBatchTopKSAE)
    dictionary.threshold.fill_(threshold)
    return dictionary


def _jump_relu(apply_b_dec: bool = False, unit_decoder: bool = True) -> Dictionary:
    dictionary = _filled(JumpReluAutoEncoder(D, F), unit_decoder)
    dictionary.apply_b_dec_to_input = apply_b_dec
    return dictionary


OUT = 7  # the width of a transcoder's output, where it is another
CASES: dict[str, Callable[[], Dictionary]] = {
    "relu": lambda: _filled(AutoEncoder(D, F)),
    "relu, decoder of other norms": lambda: _filled(AutoEncoder(D, F), unit_decoder=False),
    "april": lambda: _filled(AutoEncoderNew(D, F), unit_decoder=False),
    "topk": lambda: _measured(AutoEncoderTopK(D, F, K), 1.25),
    "topk, decoder of other norms": lambda: _measured(AutoEncoderTopK(D, F, K), 1.25, unit_decoder=False),
    "topk, no threshold": lambda: _measured(AutoEncoderTopK(D, F, K), -1.0),
    "groupmax": lambda: _filled(AutoEncoderGroupMax(D, F, K)),
    "batch topk": lambda: _measured(BatchTopKSAE(D, F, K), 1.25),
    "batch topk, no threshold": lambda: _measured(BatchTopKSAE(D, F, K), -1.0),
    "matryoshka": lambda: _measured(MatryoshkaBatchTopKSAE(D, F, K, [10, 30]), 1.25),
    "jumprelu": lambda: _jump_relu(),
    "jumprelu, decoder of other norms": lambda: _jump_relu(unit_decoder=False),
    "jumprelu, subtracting b_dec": lambda: _jump_relu(apply_b_dec=True),
    "gated": lambda: _filled(GatedAutoEncoder(D, F)),
    "gated, decoder of other norms": lambda: _filled(GatedAutoEncoder(D, F), unit_decoder=False),
    "tied relu": lambda: _filled(SparseAutoencoder(D, F, input_norm=False, tie_weights=True)),
    "topk by magnitude": lambda: _filled(SparseAutoencoder(D, F, input_norm=False, k=K)),
    "relu transcoder": lambda: _filled(AutoEncoder(D, F, output_dim=D)),
    "april skip transcoder to another width": lambda: _filled(AutoEncoderNew(D, F, output_dim=OUT, skip=True)),
    "topk transcoder": lambda: _measured(AutoEncoderTopK(D, F, K, output_dim=D), 1.25),
    "topk skip transcoder": lambda: _measured(AutoEncoderTopK(D, F, K, output_dim=D, skip=True), 1.25),
    "topk transcoder to another width": lambda: _measured(AutoEncoderTopK(D, F, K, output_dim=OUT), 1.25),
    "groupmax skip transcoder": lambda: _filled(AutoEncoderGroupMax(D, F, K, output_dim=D, skip=True)),
    "batch topk transcoder": lambda: _measured(BatchTopKSAE(D, F, K, output_dim=D), 1.25),
    "jumprelu transcoder to another width": lambda: _filled(JumpReluAutoEncoder(D, F, output_dim=OUT)),
    "jumprelu skip transcoder": lambda: _filled(JumpReluAutoEncoder(D, F, output_dim=D, skip=True)),
    "gated skip transcoder": lambda: _filled(GatedAutoEncoder(D, F, output_dim=D, skip=True)),
}
LEARNED = [cls for cls in DICTIONARIES.values() if cls is not IdentityDict]


def expected(dictionary: Dictionary, format_name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, reconstructions) that a format must preserve: our own; of TopK in Gemma Scope, those by the threshold."""
    if format_name == "gemma_scope" and isinstance(dictionary, AutoEncoderTopK):
        f = dictionary.encode(x, use_threshold=True)
    else:
        f = dictionary.encode(x)
    return f, dictionary.reconstruct(f, x)


def refusal(case: str, format_name: str) -> str | None:
    """Why a format can't hold a case, as a part of the message; None where it can."""
    by_threshold = case.startswith(("jumprelu", "gated", "batch topk", "matryoshka"))
    reasons = {
        "saelens": [
            ("groupmax" in case, "no group-max"),
            (case.startswith("topk") and "transcoder" in case, "no TopK transcoder"),
        ],
        "sparsify": [(by_threshold, "sparsify has no thresholds"), ("another width" in case, "of one width only")],
        "gemma_scope": [
            ("skip" in case, "no skip connections"),
            ("groupmax" in case, "Group-max has no thresholds"),
            (
                case in ("topk, no threshold", "topk by magnitude"),
                "through its measured threshold, and this one has none",
            ),
        ],
        "dictionary_learning": [
            ("transcoder" in case, "no transcoders"),
            ("groupmax" in case, "has no AutoEncoderGroupMax"),
        ],
    }
    return next((why for holds, why in reasons[format_name] if holds), None)


def assert_same(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.float(), w.float(), **TOLERANCE)


def largest_difference(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Over codes and reconstructions, relative to 1 + |value|."""
    return max(float(((a - w).abs() / (1 + w.abs())).max()) for a, w in zip(actual, wanted, strict=True))
