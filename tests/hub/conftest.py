"""A small finished run, and a Hub on this machine that the real client talks to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dictionary_learning import demo, hub_client, hub_load
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
from dictionary_learning.config import Sweep
from demo_config_original import PRESETS
SWEEP = Sweep(architectures=("top_k", "jump_relu"),
              sparsities={"top_k": {"k": (4, 8)}, "jump_relu": {"target_l0": (8,)}})
"""
SMALL = "--layers 1 --num_tokens 4096 --batch_size 256 --widths 64 --buffer_contexts 48 --eval_tokens 600".split()
SMALL += ["--no-report"]
PATIENCE = 500  # seconds, with the Hub on this machine
PATIENT = f"""
from dictionary_learning import hub_client, hub_load
hub_client.REACH_SECONDS = hub_load.REACH_SECONDS = {PATIENCE}
"""  # so begins the program of a process that is to have it too


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a sweep of three small dictionaries."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copy(ROOT / "demo_config.py", folder / "demo_config_original.py")
    (folder / "demo_config.py").write_text(SWEEP)
    return folder


@pytest.fixture(scope="session")
def trained(workplace: Path) -> Path:
    """A finished run; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.syspath_prepend(workplace)
        assert demo.main(["--save_dir", "run", *SMALL]) == 0
    return workplace / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to do with as one likes."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub, logged in to, with an empty cache; safetensors go through LFS, as on the real one."""
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for module in (hub_client, hub_load):  # it always answers, on a busy machine later
        monkeypatch.setattr(module, "REACH_SECONDS", PATIENCE)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, PATIENCE)
    clock = SimpleNamespace(**vars(http.time) | {"sleep": lambda seconds: None})  # the client's waits between its tries
    monkeypatch.setattr(http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    with HubServer() as server:
        server.lfs = (".safetensors",)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def fresh_process(hub_url: str, home: Path, **more: str) -> dict[str, Any]:
    """The environment of a process that knows the Hub's address and token, and nothing else."""
    dropped = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    ours = {"HF_ENDPOINT": hub_url, "HF_TOKEN": HubServer.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    ours |= dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"), str(PATIENCE))
    return kept | ours | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
