"""`--profile`: where the time of a step goes, without changing what it computes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from dictionary_learning.profiling import StepProfile, as_text, own_times, span
from dictionary_learning.trainers import TopKTrainer
from dictionary_learning.training import TrainingRun


def trained(folder: Path | None, callback: StepProfile | None, steps: int = 30) -> TrainingRun:
    g = torch.Generator().manual_seed(0)
    trainer = TopKTrainer(steps, 8, 32, 4, 0, "toy", seed=0, device="cpu")
    data = [torch.randn(64, 8, generator=g) for _ in range(steps)]
    run = TrainingRun(data, [trainer], steps, save_dir=folder, callbacks=[callback] if callback else [])
    run.run()
    return run


def test_it_names_the_parts_of_a_step_and_writes_them_down(tmp_path: Path) -> None:
    callback = StepProfile(steps=10, folder=tmp_path / "profile")
    trained(tmp_path, callback)
    rows = {row["span"]: row for row in callback.table}
    parts = {"loss", "encoder product", "top-k", "decode", "backward", "code gradient", "weight gradient", "optimiser"}
    assert parts | {"other"} <= rows.keys()
    assert all(rows[name]["ms_a_step"] > 0 for name in parts)
    assert sum(row["share"] for row in callback.table) == pytest.approx(1.0, abs=0.02)
    written = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert written["steps"] == 10 and written["spans"] == callback.table
    assert "traceEvents" in json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert all(name in as_text(callback.table) for name in parts)


def test_training_is_the_same_with_it() -> None:
    plain, profiled = trained(None, None), trained(None, StepProfile(steps=5))
    for name, tensor in plain.trainers[0].ae.state_dict().items():
        assert torch.equal(tensor, profiled.trainers[0].ae.state_dict()[name]), name


@pytest.mark.parametrize("steps", [2, 5, 12])
def test_a_short_run_is_profiled_to_its_end(steps: int) -> None:
    callback = StepProfile(steps=10)
    trained(None, callback, steps)
    assert callback.table and callback._profile is None


def test_a_span_is_charged_for_what_no_span_inside_it_did() -> None:
    with profile() as recorded:
        began = time.perf_counter()
        with span("outer"):
            time.sleep(0.02)
            with span("inner"):
                time.sleep(0.05)
        time.sleep(0.03)
        wall = time.perf_counter() - began
    ms = {row["span"]: row["ms_a_step"] for row in own_times(recorded, wall, 1)}
    # On a busy machine a sleep is longer than asked for, never shorter; what is counted twice makes the sum too long.
    assert ms["inner"] > 49 and ms["outer"] > 19 and ms["other"] > 29
    assert sum(ms.values()) == pytest.approx(1e3 * wall)
