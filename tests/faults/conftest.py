"""A disk that fails on cue, and a working folder with a small run of the main job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_cases import FailingDisk
from kill_harness import CONFIG

sys.path.insert(0, str(Path(__file__).parent))

Job = Callable[..., int]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("a descriptor's path is only known on Linux")
    return FailingDisk(monkeypatch)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Runs the main job in a folder of the working folder: job("run", "--resume", corpus=..., steps=...)."""
    from dictionary_learning import demo

    monkeypatch.chdir(tmp_path)

    def run(folder: str, *arguments: str, steps: int = 20, **changes: Any) -> int:
        small = {**CONFIG, "num_tokens": steps * 256, "dictionaries": CONFIG["dictionaries"][:1], "eval_tokens": 300}
        Path("config.json").write_text(json.dumps({**small, **changes}))
        plain = ["--save_dir", folder, "--config", "config.json", "--device", "cpu", "--log_steps", "1", "--no-report"]
        return demo.main([*plain, *arguments])

    return run
