"""Steps through Triton kernels, the optimiser's among them, train what those through the CPU's do: as on CUDA, with a
fixed number of places, but under the interpreter, in its own process."""

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

from dictionary_learning.trainers import TRAINERS

sizes = {"steps": 20, "activation_dim": 6, "dict_size": 12, "layer": 0, "lm_name": "toy", "seed": 0, "device": "cpu"}
g = torch.Generator().manual_seed(0)
data = [torch.randn(16, 6, generator=g) for _ in range(4)]
result = {}
cases = {
    "top_k": {"k": 3},
    "top_k unclipped": {"k": 3, "grad_clip_norm": None},
    "matryoshka_batch_top_k": {"k": 3, "group_fractions": [0.5, 0.5]},
    "standard_april_update": {"l1_penalty": 0.1},  # free norms
    "jump_relu": {"target_l0": 3.0, "bandwidth": 0.1},
    "gated": {"l1_penalty": 0.1},
    "p_anneal": {"anneal_start": 1},
}
for name, settings in cases.items():
    cls = TRAINERS[name.split()[0]]

    def made():
        trainer = cls(**sizes, **settings)
        if hasattr(trainer, "switch"):
            trainer.switch.sparse, trainer.switch.may_wait = True, False
            trainer.switch.densities = type(trainer.switch.densities)(2.0, 0.5)
        return trainer

    trainer = made()
    for step, x in enumerate(data[:2]):
        trainer.update(step, x)
    resumed = made()
    resumed.load_state_dict(trainer.state_dict())
    if hasattr(resumed, "auxk"):
        resumed.auxk.some_dead, resumed.auxk.room, resumed.tokens_since_fired_F[::2] = True, 8, 10**9
    for step, x in enumerate(data[2:], start=2):
        resumed.update(step, x)
    result |= {f"{name} {key}": tensor for key, tensor in resumed.ae.state_dict().items()}
torch.save(result, sys.argv[1])
"""


def test_the_fused_step_is_the_step_in_passes(tmp_path: Path) -> None:
    import torch

    found = {}
    for kernels in ("cpu", "triton"):
        environment = os.environ | {
            "SAE_FACTORY_KERNELS": kernels, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])
        }  # fmt: skip
        file = tmp_path / kernels
        subprocess.run([sys.executable, "-c", SCRIPT, str(file)], env=environment, check=True)
        found[kernels] = torch.load(file, weights_only=True)
    assert found["cpu"].keys() == found["triton"].keys()
    for name, tensor in found["cpu"].items():
        torch.testing.assert_close(
            found["triton"][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
