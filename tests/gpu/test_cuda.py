"""What only a CUDA device can show. Skipped, and said so, where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers import TRAINERS
from dictionary_learning.trainers.sparse_autoencoder import SparseAutoencoderTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

D, F, B = 16, 64, 128
ANNEALED = {"initial_sparsity_penalty": 0.05, "anneal_start": 8}
SPARSITY: dict[str, dict[str, Any]] = {
    "top_k": {"k": 4},
    "group_max": {"k": 4},
    "batch_top_k": {"k": 4},
    "matryoshka_batch_top_k": {"k": 4, "group_fractions": [0.25, 0.75]},
    "jump_relu": {"target_l0": 4.0},
    "standard": {"l1_penalty": 0.05},
    "standard_april_update": {"l1_penalty": 0.05},
    "gated": {"l1_penalty": 0.05},
    "p_anneal": ANNEALED,
    "gated_anneal": ANNEALED,
}
assert SPARSITY.keys() == TRAINERS.keys()  # seen where there is no device, too
BY_K = [name for name in SPARSITY if "k" in SPARSITY[name]]


def trainer(architecture: str, device: str, **settings: Any) -> Any:
    sizes: dict[str, Any] = {"steps": 40, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "toy", "seed": 0}
    return TRAINERS[architecture](**sizes, **SPARSITY[architecture], **settings, device=device)


def batches(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, D, generator=g) for _ in range(count)]


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_cuda_trains_as_the_cpu_does(architecture: str) -> None:
    on_cpu, on_cuda = trainer(architecture, "cpu"), trainer(architecture, "cuda")
    for step, x in enumerate(batches(5)):
        on_cpu.update(step, x)
        on_cuda.update(step, x.cuda())
    ours, theirs = (
        torch.cat([value.cpu().float().flatten() for value in one.ae.state_dict().values()])
        for one in (on_cuda, on_cpu)
    )
    # Adam takes the sign of a gradient that is all rounding, so that one weight in a thousand may differ.
    assert torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4).float().mean() > 0.999


def update_without_a_wait(trained: Any, data: list[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 36):
            trained.update(step, data[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_steps_wait_for_the_device_nowhere(architecture: str, sparse: bool) -> None:
    """Over two looks at the numbers that are read behind their time, with AuxK and in sparse steps too."""
    trained, data = trainer(architecture, "cuda"), [x.cuda() for x in batches(36)]
    trained.update(0, data[0])
    if hasattr(trained, "switch"):
        limits = type(trained.switch.densities)
        trained.switch.sparse, trained.switch.densities = sparse, limits(2.0, 0.5) if sparse else limits(-1.0, -1.0)
    elif sparse:
        trained.auxk.some_dead, trained.auxk.dead_after_tokens, trained.auxk.room = True, 1, F
    for step in (1, 2):  # compiles
        trained.update(step, data[step])
    update_without_a_wait(trained, data)
    assert all(value.isfinite().all() for value in trained.ae.state_dict().values())


@pytest.mark.parametrize("sparsity", [{"k": 4}, {"beta_l1": 0.05}])
def test_steps_of_the_configurable_autoencoder_wait_nowhere_either(sparsity: dict[str, Any]) -> None:
    trained = SparseAutoencoderTrainer(40, D, F, **sparsity, seed=0, device="cuda", dead_after_tokens=1)
    data = [x.cuda() for x in batches(36)]
    for step in range(3):
        trained.update(step, data[step])
    update_without_a_wait(trained, data)
    assert torch.cat([value.flatten() for value in trained.ae.state_dict().values()]).isfinite().all()


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_the_same_steps_give_the_same_bits(architecture: str) -> None:
    """Without that no resume could be compared with an unbroken run."""
    found = []
    for _ in range(2):
        trained = trainer(architecture, "cuda")
        if hasattr(trained, "switch"):
            trained.switch.sparse, trained.switch.densities = True, type(trained.switch.densities)(2.0, 0.5)
        for step, x in enumerate(batches(20)):
            trained.update(step, x.cuda())
        found.append(trained.ae.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("architecture", BY_K)
def test_auxk_on_cuda_is_that_of_the_cpu(architecture: str) -> None:
    x, losses, gradients = batches(1)[0], [], []
    for device in ("cpu", "cuda"):
        one = trainer(architecture, device, auxk_alpha=1.0)
        one.initialize(x.to(device), x.to(device))
        one.auxk.some_dead, one.auxk.dead_after_tokens = True, 1
        one.tokens_since_fired_F[::3] = 1
        if device == "cuda":
            one.auxk.room = F // 2
        out = one.compute_loss(x.to(device), x.to(device), 0)
        out.loss.backward()
        losses.append(out.terms["auxk_loss"].item())
        gradients.append(one.ae.encoder_bias.grad.cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_trainer_works_on_a_device_that_is_not_the_current_one() -> None:
    on_cpu, on_second = trainer("top_k", "cpu"), trainer("top_k", "cuda:1")
    for step, x in enumerate(batches(34)):
        on_cpu.update(step, x)
        on_second.update(step, x)
    assert on_second.auxk.some_dead == on_cpu.auxk.some_dead


def test_the_buffer_draws_the_same_rows_on_every_device() -> None:
    def drawn(device: str) -> list[torch.Tensor]:
        source = TensorStream(batches(20))
        buffer = ActivationBuffer(None, source, n_ctxs=40, ctx_len=10, out_batch_size=64, device=device)
        return [batch.cpu() for batch in buffer]

    assert all(torch.equal(a, b) for a, b in zip(drawn("cpu"), drawn("cuda"), strict=True))
