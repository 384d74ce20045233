"""Weights & Biases: one run a dictionary, all runs of a folder in one group; and dictionaries back from artifacts.

In: configs, lines of metrics and a run's folder. Out: W&B runs, artifacts, and `wandb.json` beside them: which W&B run
belongs to which dictionary, and what of it has arrived. Training (`tracking.WandbSink`, live) and `sae-factory sync`
(afterwards) both go through `WandbRuns`. Lines are sent in order and W&B counts them by training step, so what a
server holds is always a beginning of metrics.jsonl: whoever goes on sends the lines behind it, and none twice.

The key comes from wandb's own login or environment and is neither read nor written here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dictionary_learning import storage
from dictionary_learning.errors import UserError

MARKER = "wandb.json"
METRICS = "metrics.jsonl"
PATIENCE = 60.0  # seconds that one answer may take; an upload may take one more for each megabyte
SCHEME = "wandb://"
DICTIONARY_FILES = ("config.json", "ae.safetensors", "eval_results.json")  # of an artifact; the last where it exists


def wandb_module() -> Any:
    """The wandb package. Raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "Weights & Biases is not installed: pip install 'sae-factory[wandb]', or leave out --use_wandb."
        ) from None
    return wandb


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl (none where it is absent); a line cut short by a crash is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("trainer"), str):
                    yield row


def read_marker(folder: Path | None) -> dict[str, Any]:
    """`wandb.json` of a run's folder, {} where there is none. Raises UserError where it is damaged."""
    if folder is None or not (folder / MARKER).is_file():
        return {}
    found = storage.read_json(folder / MARKER)
    whole = isinstance(found, dict) and isinstance(found.get("group"), str) and isinstance(found.get("runs"), dict)
    if not whole or not all(map(_is_name, found["runs"])) or not all(map(_is_entry, found["runs"].values())):
        raise UserError(f"'{folder / MARKER}' is damaged: delete it, and a sync makes new runs.")
    return found


def _is_name(name: str) -> bool:
    """Whether it can be that of a dictionary's folder, whose files are sent: never one elsewhere."""
    return re.fullmatch(r"\w[\w.-]{0,99}", name) is not None


def _is_entry(entry: Any) -> bool:
    """Whether it is what `close_run` writes of a run."""
    kinds = {"id": str, "step": int, "sent": dict}
    found = isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
    return found and all(isinstance(sent, dict) and "reference" in sent for sent in entry["sent"].values())


def said(error: BaseException) -> str:
    """An error of wandb in one line, without the key."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = os.environ.get("WANDB_API_KEY")
    return (text.replace(key, "***") if key else text)[:300].rstrip(".")


class WandbRuns:
    """The W&B runs of one folder.

    Args:
        folder: of the training run: its artifacts are sent from there, wandb's own files and `wandb.json` go there;
            None sends metrics alone.
        config: what every run's config holds besides the dictionary's own.

    Attributes:
        patience_ends: until when (`time.monotonic`) the call under way should have been answered.
    """

    def __init__(
        self,
        wandb: Any,
        *,
        project: str | None,
        entity: str | None,
        group: str,
        folder: Path | None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.wandb, self.folder = wandb, folder
        self.project, self.entity, self.group = project or "sae-factory", entity or None, group
        self.config = dict(config or {})
        self.marker: dict[str, Any] = {"project": self.project, "entity": self.entity, "group": group, "runs": {}}
        self.runs: dict[str, Any] = {}
        self.patience_ends = time.monotonic() + PATIENCE
        self._steps: dict[str, int] = {}  # the last step handed to wandb

    def known(self) -> dict[str, Any]:
        """Take over `wandb.json`, where it is about this project; its entry for each dictionary."""
        found = read_marker(self.folder)
        if all(found.get(key) == self.marker[key] for key in ("project", "entity")):
            self.marker |= {"group": found["group"], "runs": found["runs"]}
            self.group = found["group"]
        return self.marker["runs"]

    def start(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Open a run for each dictionary. Training that goes on at a later step goes on in the runs that it had, and
        first sends the lines up to there that never arrived."""
        if step:
            self.known()
        for name, config in configs.items():
            self.open(name, config)
        if step and self.folder is not None:
            for row in read_rows(self.folder / METRICS):
                if row["step"] <= step and row["trainer"] in self.runs:
                    self.log_row(row)

    def open(self, name: str, config: Mapping[str, Any]) -> None:
        """Open the run of a dictionary: a new one, or the one that `wandb.json` names."""
        self._await()
        self.wandb.setup(self.wandb.Settings(silent=True))  # no question for a key from a thread that can't be asked
        entry = self.marker["runs"].setdefault(name, {"id": uuid.uuid4().hex[:12], "step": 0, "sent": {}})
        self._write_marker()  # before the run exists: whoever goes on must find its id
        run = self.wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=f"{config.get('wandb_name') or 'dictionary'}-{name}",
            id=entry["id"],
            resume="allow",
            config=dict(storage.finite({**self.config, **config})),
            dir=None if self.folder is None else os.fspath(self.folder),
            reinit="create_new",
            settings=self._settings(),
        )
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        self.runs[name] = run
        self._steps[name] = run.starting_step - 1 if run.starting_step else 0

    def _settings(self) -> Any:
        options: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": PATIENCE}
        if "finish_timeout" in getattr(self.wandb.Settings, "model_fields", {}):  # newer versions of wandb
            options |= {"finish_timeout": PATIENCE, "finish_timeout_raises": True}
        return self.wandb.Settings(**options)

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Send one log step of every dictionary."""
        for name, values in metrics.items():
            self.log_row({"step": step, "tokens": tokens, "trainer": name, **values})

    def log_row(self, row: Mapping[str, Any]) -> bool:
        """Send one line of metrics.jsonl, unless the run has got as far already; whether it was sent."""
        name, step = row["trainer"], row["step"]
        if step <= self._steps[name]:
            return False
        self._await()
        values = {key: value for key, value in storage.finite(row).items() if value is not None}
        self.runs[name].log({key: value for key, value in values.items() if key not in ("step", "trainer")}, step=step)
        self._steps[name] = step
        return True

    def close(self, failed: bool = False) -> None:
        """End the runs: of training that did not fail with results and artifacts, as far as they are on disk."""
        for name in list(self.runs):
            self.close_run(name, failed)

    def close_run(self, name: str, failed: bool = False) -> None:
        """End one run, and note what has arrived."""
        run, entry = self.runs.pop(name), self.marker["runs"][name]
        sent: dict[str, dict[str, str]] = {}
        if not failed:
            for artifact, files in self.unsent(name).items():
                sent[artifact] = self._send_artifact(run, artifact, files)
            if self.folder is not None and (self.folder / name / "eval_results.json").is_file():
                results = storage.read_json(self.folder / name / "eval_results.json")
                run.summary.update({f"eval/{key}": value for key, value in results.items()})
        self._await()
        run.finish(exit_code=int(failed))
        if not (run.offline or run.disabled):
            entry["step"] = max(entry["step"], self._steps[name])
            entry["sent"] |= sent
            self._write_marker()

    def unsent(self, name: str) -> dict[str, dict[str, Path]]:
        """Artifact -> {file name: path} of what a run should hold and is not known to: the dictionary with its config
        and evaluation, and in the first run the report."""
        if self.folder is None:
            return {}
        prefix = re.sub(r"[^A-Za-z0-9._-]+", "-", self.group)[:100]
        wanted: dict[str, dict[str, Path]] = {}
        files = {file: self.folder / name / file for file in DICTIONARY_FILES if (self.folder / name / file).is_file()}
        if {"config.json", "ae.safetensors"} <= set(files):
            wanted[f"{prefix}-{name}"] = files
        if name == next(iter(self.marker["runs"]), name) and (self.folder / "report.html").is_file():
            wanted[f"{prefix}-report"] = {"report.html": self.folder / "report.html"}
        sent = self.marker["runs"].get(name, {}).get("sent", {})
        return {key: files for key, files in wanted.items() if sent.get(key, {}).get("sha256") != _digest(files)}

    def _send_artifact(self, run: Any, name: str, files: Mapping[str, Path]) -> dict[str, str]:
        kind = "report" if "report.html" in files else "dictionary"
        artifact = self.wandb.Artifact(name, type=kind)
        for file, path in files.items():
            artifact.add_file(os.fspath(path), name=file)
        seconds = sum(path.stat().st_size for path in files.values()) / 1e6
        self._await(seconds)
        run.log_artifact(artifact)
        if run.offline or run.disabled:
            return {}
        artifact.wait(timeout=int(PATIENCE + seconds))
        return {"sha256": _digest(files), "reference": SCHEME + artifact.qualified_name}

    def _await(self, seconds: float = 0.0) -> None:
        """Note that a call begins that may take a while."""
        self.patience_ends = time.monotonic() + PATIENCE + seconds

    def _write_marker(self) -> None:
        if self.folder is not None:
            storage.write_json(self.folder / MARKER, self.marker)


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        with path.open("rb") as handle:
            digest.update(f"{name}:{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def downloaded(reference: str) -> Iterator[Path]:
    """The files of the artifact `wandb://entity/project/name:version`, in a folder that lasts as long as the block.

    Without an entity the account's own is taken, without a version the newest. wandb checks every file's checksum.

    Raises:
        UserError: a malformed reference; wandb is not installed; no such artifact, or no way to it.
    """
    path = reference.removeprefix(SCHEME)
    if not re.fullmatch(r"([^/:]+/)?[^/:]+/[^/:]+(:[^/:]+)?", path):
        raise UserError(f"'{reference}' is no artifact: write {SCHEME}entity/project/name:version.")
    wandb = wandb_module()
    with tempfile.TemporaryDirectory(prefix="sae-factory-") as folder:
        try:
            artifact = wandb.Api(timeout=30).artifact(path if ":" in path else f"{path}:latest")
            artifact.download(root=folder)
        except Exception as error:  # wandb passes on what its transports raise
            raise UserError(f"The artifact '{reference}' can't be had from Weights & Biases: {said(error)}.") from error
        yield Path(folder)
