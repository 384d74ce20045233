"""How tests start ranks by themselves, as torchrun would."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives away by itself in the meantime."""
    for port in range(20_000 + 17 * os.getpid() % 10_000, 32_768):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("localhost", port))
            return port
    raise OSError("no port is free")


def rank_environment(rank: int, world: int, port: int, **more: str) -> dict[str, str]:
    """What torchrun puts into the environment of a rank."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} | more


class Ended(NamedTuple):
    """How a rank ended, and what it said."""

    code: int
    said: str


def run_ranks(command: Sequence[str], world: int, limit: float) -> list[Ended]:
    """Run a Python program as so many ranks, of which none is left after `limit` seconds."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=rank_environment(rank, world, port, SAE_FACTORY_RANK_TIMEOUT="600"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, words) for process, words in zip(processes, said, strict=True)]
