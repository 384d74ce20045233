"""run.json: what a run computes and what it ran on, and whether a resume would still compute the same."""

from __future__ import annotations

import datetime
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictionary_learning import __version__, storage
from dictionary_learning.config import RunConfig, changed_fields, config_from_dict
from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.corpus import Corpus


def package_versions() -> dict[str, str]:
    """Of this program and of what it computes with."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"sae-factory": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "nnsight", "transformers", "datasets", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def run_record(config: RunConfig, lm: TracedLM, corpus: Corpus) -> dict[str, Any]:
    """What run.json says: the configuration, and what it ran on."""
    return {
        "status": "running",
        "config": config.to_dict(),
        "corpus_fingerprint": corpus.fingerprint,
        "model": storage.finite(lm.config),
        "versions": package_versions(),
        "git_revision": git_revision(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_revision() -> str | None:
    """The commit of the checkout that this file lies in, or None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def check_resumable(save_dir: Path, config: RunConfig, record: dict[str, Any]) -> None:
    """Refuse to go on with another configuration, corpus or model than the run began with.

    Raises:
        UserError: names what differs.
    """
    old = storage.read_json(save_dir / "run.json")
    differing = changed_fields(config_from_dict(old["config"], str(save_dir / "run.json")), config)
    if differing:
        raise UserError(
            f"The run in '{save_dir}' began with other settings ({', '.join(differing)}): resume it with the same."
        )
    if old["model"]["weights"] != record["model"]["weights"]:
        raise UserError(
            f"The weights of '{config.model_name}' have changed since the run in '{save_dir}' began: restore them, or "
            "start anew."
        )
    if old["corpus_fingerprint"] != record["corpus_fingerprint"]:
        raise UserError(
            f"The corpus '{config.corpus}' has changed since the run in '{save_dir}' began: restore it, or start anew."
        )


def resume_command() -> str:
    """The command line that goes on with this run."""
    given = [argument for argument in sys.argv if argument not in ("--overwrite", "--no-overwrite", "--resume")]
    start = ["python", given[0]] if given[0].endswith(".py") else [given[0]]
    return shlex.join([*start, *given[1:], "--resume"])
