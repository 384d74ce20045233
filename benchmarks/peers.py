"""The peers: which libraries are measured beside ours, and an environment for each (they pin what ours does not).

`python -m benchmarks setup-peers` makes `benchmarks/.venvs/<peer>`; a peer without one is skipped, and the tables say
so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENVS = HERE / ".venvs"


@dataclass(frozen=True)
class Peer:
    """A library: what is installed, the worker that runs it, and the architectures it trains, by our names for them."""

    name: str
    requirements: tuple[str, ...]
    worker: str
    imports: str
    architectures: tuple[str, ...]

    @property
    def python(self) -> Path:
        return VENVS / self.name / "bin" / "python"

    @property
    def script(self) -> Path:
        return HERE / "workers" / self.worker

    @property
    def present(self) -> bool:
        return (VENVS / self.name / ".ready").exists()


ALL_OF_DICTIONARY_LEARNING = (
    "top_k",
    "batch_top_k",
    "matryoshka_batch_top_k",
    "standard",
    "jump_relu",
    "gated",
    "p_anneal",
    "gated_anneal",
)
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "dictionary-learning",
            ("dictionary-learning==0.1.0",),
            "dictionary_learning_worker.py",
            "dictionary_learning",
            ALL_OF_DICTIONARY_LEARNING,
        ),
        Peer(
            "sae-lens",
            ("sae-lens==6.54.0",),
            "sae_lens_worker.py",
            "sae_lens",
            ("top_k", "batch_top_k", "matryoshka_batch_top_k", "standard", "jump_relu", "gated"),
        ),
        Peer("sparsify", ("eai-sparsify==1.3.3",), "sparsify_worker.py", "sparsify", ("top_k",)),
        Peer(
            "overcomplete",
            ("overcomplete==0.3", "matplotlib<3.9"),  # its import needs an older matplotlib
            "overcomplete_worker.py",
            "overcomplete.sae",
            ("top_k", "batch_top_k", "standard", "jump_relu"),
        ),
    )
}


def setup(names: list[str] | None = None) -> dict[str, str]:
    """Make the environments that are missing; {peer: "ready" or why not}."""
    return {name: set_up_one(PEERS[name]) for name in (names or PEERS)}


def set_up_one(peer: Peer) -> str:
    """The pinned torch first (a bare `torch` may bring gigabytes of CUDA packages), then the peer, beside it."""
    if peer.present:
        return "ready"
    constraints = (ROOT / "constraints.txt").read_text()
    torch_pin = re.search(r"^torch==\S+", constraints, re.M)
    assert torch_pin is not None, "constraints.txt pins torch"
    pip = [str(peer.python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    commands = [
        [sys.executable, "-m", "venv", str(VENVS / peer.name)],
        [*pip, "install", torch_pin[0]],
        [*pip, "install", torch_pin[0], *peer.requirements],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"not installed: {_last_line(done.stderr)}"
    # A torchvision that came along for another build of torch breaks what imports it; nothing measured needs one.
    if subprocess.run([str(peer.python), "-c", "import torchvision"], capture_output=True).returncode:
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], capture_output=True)
    check = [str(peer.python), "-c", f"import stand_ins, {peer.imports}"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=HERE / "workers", env=clean_environment())
    if done.returncode:
        return f"installed, but can't be imported: {_last_line(done.stderr)}"
    (VENVS / peer.name / ".ready").touch()
    return "ready"


def clean_environment() -> dict[str, str]:
    """The environment without paths to this project: our package has the same import name as a peer's."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line and not line.startswith("WARNING")]
    return lines[-1][:200] if lines else "no message"
