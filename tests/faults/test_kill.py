"""kill -9 at random moments, in the small: `kill_harness.py --kills 25` does more of it by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 900  # seconds, on a very busy machine


@pytest.mark.timeout(LIMIT + 100)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_run_that_is_killed_and_resumed_ends_with_the_bytes_of_an_unbroken_one() -> None:
    harness = Path(__file__).with_name("kill_harness.py")
    command = [sys.executable, str(harness), "--kills", "2", "--steps", "60", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills" in done.stdout and "all bit for bit the same" in done.stdout
