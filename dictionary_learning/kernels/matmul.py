"""Exact fp32 matrix products from the faster of the two libraries that PyTorch carries.

On CPUs PyTorch gives fp32 products to MKL, which runs on AMD's AVX-512 processors at half of their rate; oneDNN, in the
same wheel, runs at the full one. PyTorch goes to oneDNN when reduced precision is allowed ("bf16"); on a processor
without matrix units for it (AMX) oneDNN then computes in fp32 all the same. Whether it does is tested before use.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # threads that are inside, the setting of the process being shared
_before = "none"


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Inside, fp32 products on CPU are exact and as fast as they can be made here. Does nothing where the default is
    that already. The setting is one of the process: other threads see it too, which changes no precision."""
    global _inside, _before
    if not _onednn_is_exact_and_faster():
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _lock:
        if not _inside:
            _before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                matmul.fp32_precision = _before


@functools.cache
def _onednn_is_exact_and_faster() -> bool:
    try:
        has = torch.cpu.get_capabilities()
        amd = str(has.get("cpu_name", "")).startswith("AMD")
        amx = any(on for name, on in has.items() if name.startswith("amx"))
        if not (amd and has.get("avx512_f")) or amx or not torch.backends.mkldnn.is_available():
            return False
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    except AttributeError:  # another version of PyTorch, where these switches have other names
        return False
    try:
        # 1 + 2^-12 has no neighbour in bf16 or tf32: rounded, every product would be 512 exactly.
        product = torch.full((256, 512), 1 + 2.0**-12) @ torch.ones(512, 256)
    finally:
        matmul.fp32_precision = before
    return bool((product == 512 + 0.125).all())
