"""What only a CUDA device can show. Skipped, and said so, where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers import TRAINERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

D, F, B = 16, 64, 128
SPARSITY: dict[str, dict[str, Any]] = {
    "top_k": {"k": 4},
    "jump_relu": {"target_l0": 4.0},
    "standard": {"l1_penalty": 0.05},
}


def trainer(architecture: str, device: str) -> Any:
    sizes = {"steps": 40, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "toy", "seed": 0}
    return TRAINERS[architecture](**sizes, **SPARSITY[architecture], device=device)


def batches(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, D, generator=g) for _ in range(count)]


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_cuda_trains_as_the_cpu_does(architecture: str) -> None:
    on_cpu, on_cuda = trainer(architecture, "cpu"), trainer(architecture, "cuda")
    for step, x in enumerate(batches(5)):
        on_cpu.update(step, x)
        on_cuda.update(step, x.cuda())
    for name, value in on_cpu.ae.state_dict().items():
        torch.testing.assert_close(on_cuda.ae.state_dict()[name].cpu(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_ten_steps_wait_for_the_device_nowhere(architecture: str) -> None:
    trained, data = trainer(architecture, "cuda"), [x.cuda() for x in batches(13)]
    for step in range(3):
        trained.update(step, data[step])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 13):
            trained.update(step, data[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_buffer_draws_the_same_rows_on_every_device() -> None:
    def drawn(device: str) -> list[torch.Tensor]:
        source = TensorStream(batches(20))
        buffer = ActivationBuffer(None, source, n_ctxs=40, ctx_len=10, out_batch_size=64, device=device)
        return [batch.cpu() for batch in buffer]

    assert all(torch.equal(a, b) for a, b in zip(drawn("cpu"), drawn("cuda"), strict=True))
