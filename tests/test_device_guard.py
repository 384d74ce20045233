"""The guard pauses a run while its GPU is hot, and is out of the way where nothing tells the temperature."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dictionary_learning.activations.in_memory import InMemoryActivations
from dictionary_learning.device_guard import DeviceGuard, device_guard
from dictionary_learning.errors import UserError
from dictionary_learning.trainers import TopKTrainer
from dictionary_learning.training import TrainingRun

UUID = "1f2e3d4c-0000-1111-2222-333344445555"


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Run:
    """What the guard sees of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.tracker = types.SimpleNamespace(message=self.messages.append)
        self.stop_requested = False


def fake_nvml(temperatures: Iterator[Any], broken: str = "") -> types.ModuleType:
    """pynvml, as far as it is used. Each reading is the next of `temperatures`, or raises it."""
    nvml: Any = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def init() -> None:
        if broken:
            raise NVMLError(broken)
        nvml.initialised = True

    def handle(uuid: str) -> str:
        assert nvml.initialised and uuid == f"GPU-{UUID}"
        return uuid

    def temperature(handle: str, sensor: int) -> int:
        assert handle == f"GPU-{UUID}" and sensor == 0
        value = next(temperatures)
        if isinstance(value, str):
            raise NVMLError(value)
        return value

    nvml.NVMLError, nvml.NVML_TEMPERATURE_GPU = NVMLError, 0
    nvml.nvmlInit, nvml.nvmlDeviceGetHandleByUUID, nvml.nvmlDeviceGetTemperature = init, handle, temperature
    return nvml


@pytest.fixture
def hot(monkeypatch: pytest.MonkeyPatch) -> Any:
    """guard(temperatures, ...): a guard on a GPU that has those, one after the other."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=UUID))

    def guard(temperatures: list[Any], broken: str = "", **options: Any) -> tuple[DeviceGuard, Run, Clock]:
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(iter(temperatures), broken))
        clock = Clock()
        settings = {"max_temperature": 80, "resume_temperature": 70, "clock": clock, "sleep": clock.sleep} | options
        return DeviceGuard("cuda", **settings), Run(), clock

    return guard


def test_a_cool_gpu_is_never_paused(hot: Any) -> None:
    guard, run, clock = hot([60, 79, 80, 80])  # the first when the sensor is opened
    for step in (1, 2, 3):
        guard(run, step)
        clock.now += 5
    assert guard.pauses == 0 and clock.now == 15 and run.messages == []


def test_a_hot_gpu_is_waited_for_until_it_is_below_the_lower_temperature(hot: Any) -> None:
    guard, run, clock = hot([60, 81, 79, 71, 70, 69])
    guard(run, 7)
    assert guard.pauses == 1 and guard.paused_s == clock.now == pytest.approx(4.0)
    (message,) = run.messages  # once for the whole pause
    assert "behind step 7" in message and "81 degrees, above 80" in message and "below 70" in message


def test_each_pause_is_said_once(hot: Any) -> None:
    guard, run, clock = hot([60, 90, 85, 60, 75, 90, 60])
    for step in (1, 2, 3):
        guard(run, step)
        clock.now += 5
    assert guard.pauses == len(run.messages) == 2


def test_between_two_looks_the_sensor_is_left_alone(hot: Any) -> None:
    guard, run, _ = hot([60, 61])  # a third reading would raise StopIteration
    for step in range(1, 100):
        guard(run, step)
    assert run.messages == []


def test_a_stop_request_ends_the_pause_at_once(hot: Any) -> None:
    guard, run, clock = hot([60] + [99] * 1000)
    sleep = clock.sleep

    def sleep_until_interrupted(seconds: float) -> None:
        sleep(seconds)
        run.stop_requested = clock.now > 2.5

    guard._sleep = sleep_until_interrupted
    guard(run, 1)
    assert 2.5 < clock.now < 3.0 and len(run.messages) == 1, "it left with the sensor whole and still hot"


def test_without_cuda_it_does_nothing_and_says_so_once() -> None:
    guard, run = DeviceGuard("cpu", 80), Run()
    for step in (1, 2):
        guard(run, step)
    assert run.messages == ["The temperature is not watched: the device is cpu."]


def test_without_the_package_it_does_nothing_and_says_so_once(hot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, run, _ = hot([])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for step in (1, 2):
        guard(run, step)
    assert run.messages == ["The temperature is not watched: the package nvidia-ml-py is not installed."]


def test_a_driver_that_fails_switches_it_off(hot: Any) -> None:
    guard, run, _ = hot([], broken="Driver Not Loaded")
    for step in (1, 2):
        guard(run, step)
    assert run.messages == ["The temperature is not watched: NVML does not answer (Driver Not Loaded)."]
    guard, run, clock = hot([60, "GPU is lost"])
    for step in (1, 2):
        guard(run, step)
        clock.now += 5
    assert run.messages == ["The temperature is no longer watched: NVML does not tell it (GPU is lost)."]


def test_a_sensor_that_breaks_in_a_pause_ends_it(hot: Any) -> None:
    guard, run, _ = hot([60, 90, "GPU is lost"])
    guard(run, 1)
    assert guard.pauses == 1 and "no longer watched" in run.messages[-1]


@pytest.mark.parametrize(
    ("most", "resume", "message"),
    [
        (80, 80, "below max_temperature 80, got 80"),
        (80, 90, "below max_temperature 80, got 90"),
        (80, -1, "above 0"),
        (0, None, "max_temperature is in degrees"),
        (400, None, "below 150, got 400"),
        (float("nan"), None, "max_temperature"),
        (80, float("nan"), "resume_temperature"),
    ],
)
def test_temperatures_that_cannot_be_are_refused(most: float, resume: float | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DeviceGuard("cuda", most, resume)


def test_ten_degrees_lie_between_them_by_default() -> None:
    assert DeviceGuard("cuda", 83).resume_temperature == 73


def test_the_flags_of_a_command_line() -> None:
    assert device_guard("cpu", None, None) == []
    assert device_guard("cpu", 80, 60)[0].resume_temperature == 60
    with pytest.raises(UserError, match="--max_temperature begins"):
        device_guard("cpu", None, 60)


def test_ctrl_c_in_a_pause_ends_the_run_with_a_saved_state(hot: Any, tmp_path: Path) -> None:
    guard, _, clock = hot([60] + [99] * 100_000)
    sleep = clock.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if clock.now > 3:
            os.kill(os.getpid(), signal.SIGINT)

    guard._sleep = interrupted
    trainer = TopKTrainer(10, 8, 16, 2, 0, "toy", device="cpu", seed=0)
    data = InMemoryActivations(torch.randn(64, 8), 8, epochs=None)
    run = TrainingRun(data, [trainer], 10, save_dir=tmp_path, callbacks=[guard])
    run.run()
    assert (run.stopped, run.step) == ("SIGINT", 1)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000000001"]
