"""The optimiser through Triton kernels trains what it trains in passes; under the interpreter, in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import sys

import torch

from dictionary_learning.trainers import StandardTrainer, StandardTrainerAprilUpdate, TopKTrainer

sizes = {"steps": 20, "activation_dim": 6, "dict_size": 12, "layer": 0, "lm_name": "toy", "seed": 0, "device": "cpu"}
g = torch.Generator().manual_seed(0)
data = [torch.randn(16, 6, generator=g) for _ in range(4)]
result = {}
for name, cls, settings in (
    ("top_k", TopKTrainer, {"k": 3}),
    ("unclipped", TopKTrainer, {"k": 3, "grad_clip_norm": None}),
    ("free norms", StandardTrainerAprilUpdate, {"l1_penalty": 0.1}),
    ("standard", StandardTrainer, {"l1_penalty": 0.1}),
):
    trainer = cls(**sizes, **settings)
    for step, x in enumerate(data[:2]):
        trainer.update(step, x)
    resumed = cls(**sizes, **settings)
    resumed.load_state_dict(trainer.state_dict())
    for step, x in enumerate(data[2:], start=2):
        resumed.update(step, x)
    result |= {f"{name} {key}": tensor for key, tensor in resumed.ae.state_dict().items()}
torch.save(result, sys.argv[1])
"""


@pytest.mark.timeout(400)
def test_the_fused_step_is_the_step_in_passes(tmp_path: Path) -> None:
    import torch

    found = {}
    for kernels in ("cpu", "triton"):
        environment = os.environ | {
            "SAE_FACTORY_KERNELS": kernels, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])
        }  # fmt: skip
        file = tmp_path / kernels
        subprocess.run([sys.executable, "-c", SCRIPT, str(file)], env=environment, check=True, timeout=380)
        found[kernels] = torch.load(file, weights_only=True)
    assert found["cpu"].keys() == found["triton"].keys()
    for name, tensor in found["cpu"].items():
        torch.testing.assert_close(
            found["triton"][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
