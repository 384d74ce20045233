"""The penalty that moves until as many latents fire as were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import make, synthetic

from dictionary_learning.errors import UserError
from dictionary_learning.trainers.l0_controller import L0Controller

CPU = torch.device("cpu")
CONTROLLED = pytest.mark.parametrize("architecture", ["standard", "standard_april_update", "gated"])


def test_it_raises_the_penalty_above_the_target_and_lowers_it_below() -> None:
    controller = L0Controller(8.0, 0.5, 100, 64, CPU)
    controller.after_update(torch.tensor(20.0))
    raised = controller.penalty.item()
    assert raised > 0.5
    controller.after_update(torch.tensor(2.0))
    assert controller.penalty.item() < raised
    before = controller.penalty.clone()
    controller.after_update(torch.tensor(8.0))
    assert torch.equal(controller.penalty, before)


def test_without_a_target_the_penalty_stays() -> None:
    controller = L0Controller(None, 0.5, 100, 64, CPU)
    controller.after_update(torch.tensor(60.0))
    assert controller.penalty.item() == 0.5


@CONTROLLED
@pytest.mark.parametrize(("target", "start"), [(4.0, 0.02), (6.0, 1.0)])
def test_l0_ends_near_the_target_from_a_penalty_that_is_off(architecture: str, target: float, start: float) -> None:
    data = [x / 3 for x in synthetic(600)[0]]
    settings: dict[str, Any] = {"steps": 600, "activation_dim": 24, "dict_size": 48, "lr": 3e-3}
    trainer = make(architecture, **settings | {"l1_penalty": start, "target_l0": target})
    l0 = []
    for step, x in enumerate(data):
        trainer.update(step, x)
        assert trainer.last is not None
        l0.append(trainer.last.l0.item())
    assert sum(l0[-50:]) / 50 == pytest.approx(target, rel=0.15)
    assert trainer.config["target_l0"] == target


@CONTROLLED
def test_impossible_targets_are_refused(architecture: str) -> None:
    for target in (0.0, -1.0, 25.0):
        with pytest.raises(UserError, match="target_l0 must be positive and at most the width 24"):
            make(architecture, target_l0=target)
    with pytest.raises(UserError, match="begin above 0"):
        make(architecture, target_l0=4.0, l1_penalty=0.0)
