"""How tests start ranks by themselves, as torchrun would."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, world: int, port: int, **more: str) -> dict[str, str]:
    """What torchrun puts into the environment of a rank."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} | more
