"""A stand-in for the wandb package: keeps what a server would, and hangs or fails at a chosen call."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = ("setup", "init", "define_metric", "log", "log_artifact", "wait", "finish")


@dataclass
class Server:
    """What has arrived. History is a list of (step, values) for each run id."""

    store: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)  # qualified name -> {file: copy}

    def by_name(self) -> dict[str, dict[str, Any]]:
        assert len({run["name"] for run in self.runs.values()}) == len(self.runs), "a dictionary has two runs"
        return {run["name"]: run for run in self.runs.values()}


class FakeWandb:
    """The part of the package that is used here.

    Args:
        hangs_at, fails_at: one of `CALLS`; what hangs does till `released` is set. after: so many calls go well before.
    """

    def __init__(self, server: Server, *, hangs_at: str = "", fails_at: str = "", after: int = 0) -> None:
        self.server, self.hangs_at, self.fails_at, self.after = server, hangs_at, fails_at, after
        self.released = threading.Event()
        self.calls: list[str] = []

    def called(self, name: str) -> None:
        assert threading.current_thread().name == "wandb" or not self.hangs_at, f"{name} can block training"
        self.calls.append(name)
        if self.calls.count(name) <= self.after:
            return
        if name == self.hangs_at:
            self.released.wait()
        if name == self.fails_at:
            raise ConnectionError("401: the key planted-" + "k" * 33 + " is not valid")

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def setup(self, settings: Any) -> None:
        self.called("setup")

    def init(self, **options: Any) -> Run:
        self.called("init")
        assert options["reinit"] == "create_new" and options["resume"] == "allow"
        return Run(self, options)

    def Artifact(self, name: str, type: str) -> Artifact:
        return Artifact(self, name, type)

    def Api(self, timeout: float) -> Api:
        return Api(self.server)


class Run:
    offline = disabled = False

    def __init__(self, wandb: FakeWandb, options: dict[str, Any]) -> None:
        self.wandb = wandb
        new = {"name": options["name"], "history": [], "metrics": {}, "summary": {}, "exit": None, "artifacts": []}
        self.kept = wandb.server.runs.setdefault(options["id"], new)
        self.kept |= {key: options[key] for key in ("project", "entity", "group")}
        self.kept["config"] = self.kept.get("config", {}) | options["config"]
        self.starting_step = self.kept["history"][-1][0] + 1 if self.kept["history"] else 0
        self.summary = self.kept["summary"]

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.wandb.called("define_metric")
        self.kept["metrics"][name] = step_metric

    def log(self, values: dict[str, Any], step: int) -> None:
        self.wandb.called("log")
        history = self.kept["history"]
        assert not history or step > history[-1][0], f"step {step} was sent twice"
        history.append((step, values))

    def log_artifact(self, artifact: Artifact) -> None:
        self.wandb.called("log_artifact")
        for version in range(100):
            artifact.qualified_name = f"{self.kept['entity'] or 'me'}/{self.kept['project']}/{artifact.name}:v{version}"
            if artifact.qualified_name not in self.wandb.server.artifacts:
                break
        folder = self.wandb.server.store / artifact.qualified_name.replace(":", "-")
        folder.mkdir(parents=True)
        copies = {name: Path(shutil.copy(path, folder / name)) for name, path in artifact.files.items()}
        self.wandb.server.artifacts[artifact.qualified_name] = copies
        self.kept["artifacts"].append(artifact.qualified_name)

    def finish(self, exit_code: int) -> None:
        self.wandb.called("finish")
        self.kept["exit"] = exit_code


class Artifact:
    qualified_name = ""

    def __init__(self, wandb: FakeWandb, name: str, type: str) -> None:
        self.wandb, self.name, self.type = wandb, name, type
        self.files: dict[str, str] = {}

    def add_file(self, path: str, name: str) -> None:
        self.files[name] = path

    def wait(self, timeout: int) -> None:
        self.wandb.called("wait")


class Api:
    def __init__(self, server: Server) -> None:
        self.server = server

    def artifact(self, reference: str) -> Downloadable:
        path, _, version = reference.partition(":")
        versions = [name for name in self.server.artifacts if name.startswith(f"{path}:")]
        name = versions[-1] if version == "latest" and versions else reference
        if name not in self.server.artifacts:
            raise ValueError(f"artifact '{reference}' not found")
        return Downloadable(self.server.artifacts[name])


class Downloadable:
    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    def download(self, root: str) -> str:
        for name, path in self.files.items():
            shutil.copy(path, Path(root) / name)
        return root
