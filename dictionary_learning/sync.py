"""`sae-factory sync RUN`: send a run's log to Weights & Biases after the fact.

In: a run's folder: metrics.jsonl, the config.json files and weights of its dictionaries, the report. Out: the same W&B
runs and artifacts that live logging makes, and `wandb.json`, which notes what has arrived. Run it as often as needed:
it goes on where live logging or an earlier sync ended, and sends nothing twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dictionary_learning import storage
from dictionary_learning.command_line import parse
from dictionary_learning.errors import UserError, exit_code
from dictionary_learning.weights_and_biases import METRICS, WandbRuns, read_marker, read_rows, said, wandb_module


@dataclass
class SyncArgs:
    """Send a run's log, dictionaries and report to Weights & Biases. Repeat it at will: nothing is sent twice."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    wandb_project: str | None = None
    """Default: the project that the run was logged to, or sae-factory."""
    wandb_entity: str | None = None
    """Default: the entity that the run was logged to, or the account's own."""
    group: str | None = None
    """Default: the run's group, or the name of its folder."""


def sync_run(folder: Path, project: str | None = None, entity: str | None = None, group: str | None = None) -> int:
    """Send what has not arrived of a run, a line on the console for each dictionary; lines of metrics sent.

    Raises:
        UserError: no run there, wandb is not installed or switched off, no key, or no way to the server.
    """
    if not (folder / METRICS).is_file() and not list(folder.glob("trainer_*/config.json")):
        raise UserError(f"There is nothing to send in '{folder}': give the save_dir of a run, with its {METRICS}.")
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise UserError(f"WANDB_MODE is '{mode}', but a sync needs the network: unset it and try again.")
    wandb = wandb_module()
    marker = read_marker(folder)
    runs = WandbRuns(
        wandb,
        project=project or marker.get("project"),
        entity=entity or marker.get("entity"),
        group=group or folder.resolve().name,
        folder=folder,
    )
    known = runs.known()
    if group is not None and group != runs.group:
        raise UserError(f"The run was logged in the group '{runs.group}': leave out --group, or name another project.")
    lines = 0
    for name in _names(folder):
        arrived = known.get(name, {}).get("step", 0)
        rows = [row for row in read_rows(folder / METRICS) if row["trainer"] == name and row["step"] > arrived]
        if name in known and not rows and not runs.unsent(name):
            print(f"{name}: all of it is there")
            continue
        config = storage.read_json(folder / name / "config.json") if (folder / name / "config.json").is_file() else {}
        trainer = config.get("trainer") if isinstance(config, dict) else None
        try:
            sent = _send(runs, name, trainer if isinstance(trainer, dict) else {}, rows)
        except Exception as error:  # wandb passes on what its transports raise
            raise UserError(
                f"Weights & Biases could not take {name}: {said(error)}; nothing is lost, run the same command again."
            ) from error
        lines += sent
        references = [item["reference"] for item in known[name]["sent"].values()]
        print(f"{name}: {sent} lines sent; {', '.join(references) or 'it has no weights yet'}")
    return lines


def _send(runs: WandbRuns, name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    runs.open(name, config)
    if runs.runs[name].offline or runs.runs[name].disabled:
        raise RuntimeError("its settings say offline (change them with: wandb online)")
    sent = sum(runs.log_row(row) for row in rows)
    runs.close_run(name)
    return sent


def _names(folder: Path) -> Iterator[str]:
    """The dictionaries of a run, by number."""
    names = {row["trainer"] for row in read_rows(folder / METRICS)}
    names |= {path.parent.name for path in folder.glob("trainer_*/config.json")}
    yield from sorted(names, key=lambda name: ([int(part) for part in re.findall(r"[0-9]{1,18}", name)], name))


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0; 2 for what the user can mend (one sentence); 130 after Ctrl-C."""
    args = parse(SyncArgs, argv, "sae-factory sync")

    def command() -> None:  # what sync_run gives is a count, not an exit code
        sync_run(args.run, args.wandb_project, args.wandb_entity, args.group)

    return exit_code(command, "Interrupted: the same command sends the rest.")
