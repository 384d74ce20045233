"""How tests start ranks by themselves, as torchrun would."""

from __future__ import annotations

import contextlib
import os
import socket


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
