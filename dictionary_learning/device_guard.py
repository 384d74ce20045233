"""A callback that lets a hot GPU cool down between two steps.

In: a device and two temperatures. While the GPU is hotter than the one, no further step is given to it until it is
below the other; each pause is said once. The temperature comes from NVML (package nvidia-ml-py, which is optional):
without it, without CUDA, or where a driver doesn't tell temperatures, the guard does nothing and says so once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from dictionary_learning.training import TrainingRun

LOOK_EVERY_S = 1.0  # a GPU warms up in seconds; asking NVML takes a fraction of a millisecond
COOLER = 10.0  # degrees between the two temperatures where only one is given
SLICE_S = 0.2  # how long a stop request may have to wait


class DeviceGuard:
    """Pauses a run while its GPU is hot.

    Args:
        device: of the run; on anything but CUDA the guard does nothing.
        max_temperature: degrees Celsius above which a pause begins.
        resume_temperature: below which it ends; None is 10 degrees less.
        clock, sleep: seconds that pass, and how to let them pass.

    Attributes:
        pauses: pauses so far. paused_s: seconds spent in them.

    Raises:
        UserError: a temperature that can't be, or a pause that could not end.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_temperature: float,
        resume_temperature: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        resume = max_temperature - COOLER if resume_temperature is None else resume_temperature
        if not 0 < max_temperature < 150:
            raise UserError(f"max_temperature is in degrees Celsius, above 0 and below 150, got {max_temperature:g}.")
        if not 0 < resume < max_temperature:
            raise UserError(
                f"resume_temperature must lie above 0 and below max_temperature {max_temperature:g}, got {resume:g}."
            )
        self.device, self.max_temperature, self.resume_temperature = torch.device(device), max_temperature, resume
        self.pauses, self.paused_s = 0, 0.0
        self._clock, self._sleep = clock, sleep
        self._next_look = -float("inf")
        self._sensor: _Sensor | None = None
        self._why_not = "" if self.device.type == "cuda" else f"the device is {self.device}"
        self._opened = False

    def __call__(self, run: TrainingRun, step: int) -> None:
        """Wait here, behind a step, as long as the GPU is too hot, or until the run is asked to stop."""
        if not self._opened:
            self._open(run)
        if self._sensor is None or self._clock() < self._next_look:
            return
        degrees = self._read(run)
        if degrees is not None and degrees > self.max_temperature:
            self._pause(run, step, degrees)
        self._next_look = self._clock() + LOOK_EVERY_S

    def _open(self, run: TrainingRun) -> None:
        self._opened = True
        if not self._why_not:
            try:
                self._sensor = _Sensor(self.device)
            except ImportError:
                self._why_not = "the package nvidia-ml-py is not installed"
            except Exception as error:  # NVML's errors are classes of a package that may be absent
                self._why_not = f"NVML does not answer ({error})"
        if self._why_not:
            run.tracker.message(f"The temperature is not watched: {self._why_not}.")

    def _read(self, run: TrainingRun) -> float | None:
        assert self._sensor is not None
        try:
            return self._sensor.degrees()
        except Exception as error:  # as above; a sensor that breaks must not take the training with it
            self._sensor = None
            run.tracker.message(f"The temperature is no longer watched: NVML does not tell it ({error}).")
            return None

    def _pause(self, run: TrainingRun, step: int, degrees: float) -> None:
        run.tracker.message(
            f"Pausing behind step {step:,}: {self.device} is at {degrees:g} degrees, above {self.max_temperature:g}; "
            f"training goes on below {self.resume_temperature:g}."
        )
        began = self._clock()
        self.pauses += 1
        now: float | None = degrees
        while now is not None and now >= self.resume_temperature and not run.stop_requested:
            look = self._clock() + LOOK_EVERY_S
            while (left := look - self._clock()) > 0 and not run.stop_requested:
                self._sleep(min(left, SLICE_S))
            now = self._read(run)
        self.paused_s += self._clock() - began


class _Sensor:
    """The thermometer of a CUDA device.

    Raises:
        ImportError: nvidia-ml-py is not installed. Anything of NVML's: no driver, no such device.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        # NVML numbers all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES shows: what both know is the UUID.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        self.degrees()

    def degrees(self) -> float:
        """Degrees Celsius of the GPU's core."""
        return float(self._nvml.nvmlDeviceGetTemperature(self._handle, self._nvml.NVML_TEMPERATURE_GPU))


def device_guard(
    device: torch.device | str, max_temperature: float | None, resume_temperature: float | None
) -> list[DeviceGuard]:
    """The guard that a command line asks for, or none.

    Raises:
        UserError: a resume_temperature alone; see `DeviceGuard`.
    """
    if max_temperature is None:
        if resume_temperature is not None:
            raise UserError("--resume_temperature ends a pause that --max_temperature begins: give that too.")
        return []
    return [DeviceGuard(device, max_temperature, resume_temperature)]
