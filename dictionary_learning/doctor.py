"""`sae-factory doctor`: what works on this machine, and the remedy for what does not.

In: the machine. Out: a table, or JSON, of findings (see `diagnosis`), and how fast a short run of the embedded model
goes. The exit code is 0 unless something is missing without which nothing works.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dictionary_learning import diagnosis
from dictionary_learning.diagnosis import Finding, plain
from dictionary_learning.errors import USER_ERROR_EXIT, UserError, exit_code

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
PIPED_WIDTH = 160  # columns, where there is no terminal to ask


@dataclass
class DoctorArgs:
    """Say what works on this machine: versions, devices, logins, room, speed; and the remedy for what does not."""

    folder: Path = Path(".")
    """Where runs are to be written."""
    device: str = "auto"
    """Whose speed to measure: auto, cpu, cuda, mps."""
    seconds: float = 10.0
    """How long to measure harvest and training steps; 0 measures nothing."""
    json: bool = False
    """Print JSON in place of the table."""


def examine(folder: Path, device: str = "auto", seconds: float = 10.0) -> Iterator[Finding]:
    """Every finding, in the order of the table."""
    essential = list(diagnosis.versions())
    yield from essential
    if any(finding.status == "fail" for finding in essential):
        return  # the rest would only say the same again
    yield from diagnosis.devices()
    yield from diagnosis.accounts()
    yield from diagnosis.room(folder)
    yield from diagnosis.extras()
    if seconds > 0:
        yield from speed(device, seconds)


def speed(device: str, seconds: float) -> Iterator[Finding]:
    """Harvest and step rates of the embedded model with one TopK dictionary, measured for `seconds`."""
    from dictionary_learning import demo, planning
    from dictionary_learning.config import DictionarySpec, RunConfig
    from dictionary_learning.corpus import open_corpus
    from dictionary_learning.devices import resolve_device

    config = RunConfig(
        model_name="embedded",
        corpus="embedded",
        dictionaries=[DictionarySpec("top_k", "resid_post_layer_2", 1536, {"k": 32})],
        num_tokens=600_000,
        ctx_len=128,
        harvest_contexts=32,
        buffer_contexts=512,
        batch_size=1024,
        dtype="float32",
        eval_tokens=16_000,
        eval_contexts=16,
    )
    group = "speed"
    try:
        here = resolve_device(device)
        corpus = open_corpus(config.corpus)
        lm = demo.load_model(config, here)
        plan = planning.plan_run(config, lm)
        plan = planning.probe(plan, config, demo.make_source(config, lm, corpus), here, seconds)
    except UserError as error:
        yield Finding(group, "probe", "fail", plain(error), "mend that first: no run works without it")
        return
    except Exception as error:  # noqa: BLE001 - whatever breaks here breaks every run
        why = plain(f"{type(error).__name__}: {error}")
        yield Finding(group, "probe", "fail", f"the embedded model does not run ({why})", "report it, with this table")
        return
    where = f"on {here.type}, embedded model"
    yield Finding(group, "harvest", "ok", f"{plan.harvest_rate:,.0f} activations a second ({where})")
    step = 1000 * config.batch_size / (plan.training_rate or 1)
    yield Finding(group, "training step", "ok", f"{step:.1f} ms (TopK, 1,536 latents, 1,024 activations)")


def print_findings(findings: Sequence[Finding]) -> None:
    """The table, a group at a time, and what to do about what is not well."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # one of the findings
        print("\n".join("  ".join(filter(None, finding[1:])) for finding in findings))
        return
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    table = Table(title="sae-factory doctor", title_justify="left")
    for column in ("", "", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for before, finding in zip([None, *findings], findings, strict=False):
        if before is not None and before.group != finding.group:
            table.add_section()
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(status, Text(finding.name), Text(finding.found), Text(finding.remedy))  # Text: never as markup
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in STYLES}
    if counts["fail"]:
        some = "one of these keeps" if counts["fail"] == 1 else f"{counts['fail']} of these keep"
        console.print(f"{some.capitalize()} everything from working: see the remedies.", highlight=False)
    elif counts["warn"]:
        remarks = "a remark above says" if counts["warn"] == 1 else f"{counts['warn']} remarks above say"
        console.print(f"Everything essential works; {remarks} what does not, and the remedy.", highlight=False)
    else:
        console.print("Everything works.")


def run_command(args: DoctorArgs) -> int:
    """Examine, print, and say whether anything essential fails."""
    if args.seconds > 0 and not args.json and sys.stderr.isatty():
        print(f"Looking, and measuring for {args.seconds:.0f} s ...", file=sys.stderr)
    findings = list(examine(args.folder, args.device, args.seconds))
    status = next((s for s in ("fail", "warn") if any(f.status == s for f in findings)), "ok")
    if args.json:
        print(json.dumps({"status": status, "findings": [f._asdict() for f in findings]}, indent=2))
    else:
        print_findings(findings)
    return USER_ERROR_EXIT if status == "fail" else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 where something essential fails."""
    try:
        from dictionary_learning.command_line import parse

        args = parse(DoctorArgs, argv, "sae-factory doctor")
    except ImportError:  # one of the findings: it must not keep the others from being told
        args = DoctorArgs()
    return exit_code(lambda: run_command(args))


if __name__ == "__main__":
    sys.exit(main())
