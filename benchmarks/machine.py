"""On what was measured: CPU, threads, memory, GPU, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch


def describe(threads: int | None) -> dict[str, Any]:
    """Everything about the machine that a figure depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "features": sorted({"amx_bf16", "avx512_bf16", "avx512f", "avx2"} & set(_cpu_flags())),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "nnsight")},
        "date": datetime.date.today().isoformat(),
    }


def sentence(machine: dict[str, Any]) -> str:
    features = f" with {', '.join(machine['features'])}" if machine["features"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}{features}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gib']} GiB, {machine['gpu'] or 'no GPU'}; Python {machine['python']}, {versions}; "
        f"{machine['date']}"
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")]
    return flags[0].split() if flags else []
