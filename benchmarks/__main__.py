"""`python -m benchmarks`: measure, print, draw and write RESULTS.md; or make the peers' environments.

python -m benchmarks setup-peers            an environment for each peer (once)
python -m benchmarks run                    all but quality (half an hour to an hour)
python -m benchmarks run --only quality --quality.acts FOLDER
python -m benchmarks run --quick --only step,stream
python -m benchmarks report                 RESULTS.md and the plots anew from the saved results
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro
from rich.console import Console

from benchmarks import analysis, memory, peers, quality, ranks, results, scaling, step, stream
from dictionary_learning.errors import UserError

SECTIONS: dict[str, ModuleType] = {
    "step": step,
    "stream": stream,
    "scaling": scaling,
    "memory": memory,
    "analysis": analysis,
    "ranks": ranks,
    "quality": quality,
}
BY_DEFAULT = [name for name in SECTIONS if name != "quality"]  # which takes hours, and activations


@dataclass
class Run:
    """Measure, print tables, draw plots, and write the measured sections of RESULTS.md."""

    quick: bool = False
    """Fewer repetitions: the same sizes, less certain figures. Writes nothing unless --out is given."""
    only: str = ",".join(BY_DEFAULT)
    """Sections to run, with commas between; quality, which takes hours and needs activations, only if it is named."""
    threads: int | None = None
    """Threads of every worker (torch's default otherwise)."""
    out: Path | None = None
    """Where RESULTS.md, results/ and plots/ go; benchmarks/ otherwise."""
    step: step.Options = field(default_factory=step.Options)
    stream: stream.Options = field(default_factory=stream.Options)
    scaling: scaling.Options = field(default_factory=scaling.Options)
    memory: memory.Options = field(default_factory=memory.Options)
    analysis: analysis.Options = field(default_factory=analysis.Options)
    ranks: ranks.Options = field(default_factory=ranks.Options)
    quality: quality.Options = field(default_factory=quality.Options)


@dataclass
class ReportAgain:
    """Write RESULTS.md and the plots anew from the saved results."""

    only: str = ",".join(SECTIONS)
    out: Path = results.HERE


@dataclass
class SetupPeers:
    """Make an environment for each peer in benchmarks/.venvs (several GB; needs a package index)."""

    only: str = ",".join(peers.PEERS)


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[ReportAgain, tyro.conf.subcommand("report")]
    | Annotated[SetupPeers, tyro.conf.subcommand("setup-peers")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 2 for a name that does not exist, 1 where a peer's environment can't be made."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = tyro.cli(Command, args=given, prog="python -m benchmarks", use_underscores=False)
    known = peers.PEERS if isinstance(command, SetupPeers) else SECTIONS
    names = command.only.split(",")
    if unknown := [name for name in names if name not in known]:
        print(f"Error: --only has {', '.join(unknown)}: use any of {', '.join(known)}.", file=sys.stderr)
        return 2
    if isinstance(command, SetupPeers):
        outcome = peers.setup(names)
        print("\n".join(f"{name}: {state}" for name, state in outcome.items()))
        return 0 if set(outcome.values()) == {"ready"} else 1
    console = Console(width=None if sys.stdout.isatty() else 220)
    if isinstance(command, ReportAgain):
        for name in names:
            if saved := results.load(command.out, name):
                publish(name, saved, command.out, console)
        return 0
    folder = command.out or (None if command.quick else results.HERE)
    text = "python -m benchmarks " + shlex.join(given)
    try:
        for name in names:
            measured(name, command, folder, text, console)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def measured(name: str, command: Run, folder: Path | None, text: str, console: Console) -> None:
    """Measure one section, print it, and where there is a folder write it."""
    module, options = SECTIONS[name], getattr(command, name)
    if command.quick:
        options = options.quick()
    if isinstance(options, quality.Options):
        data = accumulated(options, command.threads, folder, text)
        text, given = options.published(text)
    else:
        data, given = module.measure(options, command.threads), vars(options)
    if folder is None:
        show(module.report(data, given), console)
        return
    results.save(folder, name, text, command.threads, given, data)
    saved = results.load(folder, name)
    assert saved is not None
    publish(name, saved, folder, console)


def accumulated(options: quality.Options, threads: int | None, folder: Path | None, text: str) -> dict[str, Any]:
    """The rows saved before and those measured now, each saved as soon as it is there."""
    text, given = options.published(text)
    saved = results.load(folder, "quality") if folder else None

    def keep(data: dict[str, Any]) -> None:
        if folder is not None:
            results.save(folder, "quality", text, threads, given, data)

    return quality.measure(options, threads, command=text, done=saved and saved["data"], keep=keep)


def publish(name: str, saved: dict[str, Any], folder: Path, console: Console) -> None:
    """Print a section, write it into RESULTS.md and draw its plots."""
    module = SECTIONS[name]
    report = module.report(saved["data"], saved["options"])
    show(report, console)
    module.plot(saved["data"], folder / "plots")
    results.write_section(folder, name, report, saved)


def show(report: results.Report, console: Console) -> None:
    console.rule(report.title)
    for table in report.tables:
        table.show(console)
    for remark in report.remarks:
        console.print(remark)


if __name__ == "__main__":
    sys.exit(main())
