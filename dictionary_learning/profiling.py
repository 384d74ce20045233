"""Where the time of a training step goes: `--profile`.

The stream, the kernels and the trainers mark what they do with `span`; a `StepProfile` records some steps with
PyTorch's profiler, adds up the time spent in each span and not in a span inside it, prints the table, and leaves a
trace for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dictionary_learning import storage

if TYPE_CHECKING:
    from dictionary_learning.training import TrainingRun

PREFIX = "sae/"
FIRST_STEP = 10  # by then memory is allocated, and kernels are compiled


def span(name: str) -> record_function:
    """`with span("decode"):` names what is inside in a profile; costs microseconds without one."""
    return record_function(PREFIX + name)


class StepProfile:
    """A training callback that profiles `steps` steps after the first ten (or after the first, in a short run).

    Args:
        folder: where `profile.json` (seconds by span) and `trace.json` are written; None writes nothing.
    """

    def __init__(self, steps: int = 10, folder: Path | None = None) -> None:
        self.steps, self.folder = steps, folder
        self.table: list[dict[str, Any]] = []
        self._profile: profile | None = None
        self._first = self._began = 0.0

    def __call__(self, run: TrainingRun, step: int) -> None:
        if self._profile is None and not self.table and step >= min(FIRST_STEP, max(1, run.steps - self.steps)):
            if step >= run.steps:
                run.tracker.message("There is no profile: no step is left to record.")
                return
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.__enter__()
            self._first, self._began = step, time.perf_counter()
        elif self._profile is not None and (step - self._first >= self.steps or step >= run.steps or run.stopped):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall = time.perf_counter() - self._began
            recorded, self._profile = self._profile, None
            recorded.__exit__(None, None, None)
            steps = int(step - self._first)
            self.table = own_times(recorded, wall, steps)
            run.tracker.message(f"Where {steps} steps spent their time:\n{as_text(self.table)}")
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                storage.write_json(self.folder / "profile.json", {"steps": steps, "spans": self.table})
                recorded.export_chrome_trace(str(self.folder / "trace.json"))


def own_times(recorded: profile, wall: float, steps: int) -> list[dict[str, Any]]:
    """Rows of {span, ms_a_step, share}, longest first: the CPU time between a span's begin and end less that of the
    spans inside it; "other" is what lies outside all of them. On CUDA it is the time of launching, `cuda_ms_a_step`
    that of the kernels launched."""
    spans = sorted(
        (e for e in recorded.events() if e.name.startswith(PREFIX) and not e.is_async and e.device_type.name == "CPU"),
        key=lambda e: (e.thread, e.time_range.start, -e.time_range.end),
    )
    own: dict[str, float] = defaultdict(float)
    cuda: dict[str, float] = defaultdict(float)
    outermost = 0.0
    open_spans: list[Any] = []
    for event in spans:
        while open_spans and (
            open_spans[-1].thread != event.thread or open_spans[-1].time_range.end <= event.time_range.start
        ):
            open_spans.pop()
        elapsed = event.time_range.elapsed_us() / 1e6
        own[event.name] += elapsed
        cuda[event.name] += event.device_time_total / 1e6
        if open_spans:
            own[open_spans[-1].name] -= elapsed
            cuda[open_spans[-1].name] -= event.device_time_total / 1e6
        else:
            outermost += elapsed
        open_spans.append(event)
    own[PREFIX + "other"] = max(0.0, wall - outermost)
    rows = [
        {
            "span": name.removeprefix(PREFIX),
            "ms_a_step": 1e3 * seconds / steps,
            "cuda_ms_a_step": 1e3 * cuda[name] / steps,
            "share": seconds / wall,
        }
        for name, seconds in own.items()
    ]
    return sorted(rows, key=lambda row: -row["ms_a_step"])


def as_text(table: list[dict[str, Any]]) -> str:
    """The rows of `own_times` for a terminal."""
    on_cuda = any(row["cuda_ms_a_step"] for row in table)
    lines = [f"{'':18s}{'ms a step':>10s}{'share':>8s}" + (f"{'CUDA ms':>10s}" if on_cuda else "")]
    for row in table:
        line = f"{row['span']:18s}{row['ms_a_step']:10.2f}{row['share']:8.1%}"
        lines.append(line + (f"{row['cuda_ms_a_step']:10.2f}" if on_cuda else ""))
    return "\n".join(lines)
