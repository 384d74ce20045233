"""`sae-factory`: one command, a subcommand a job. Each is a dataclass whose field docstrings are its help."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {  # name -> (module:function that takes the arguments and gives the exit code, one line of help)
    "prep": ("data_prep.__main__:main", "medical QA records -> one table of texts (also: python -m data_prep)"),
    "harvest": ("dictionary_learning.harvest:main", "text -> activations saved as shards"),
    "train": ("dictionary_learning.demo:main", "text -> activations -> many trained dictionaries"),
    "fit": ("dictionary_learning.fit:main", "saved activations and a config.yaml -> one trained sparse autoencoder"),
    "evaluate": ("dictionary_learning.evaluate_command:main", "dictionaries -> their metrics on any text"),
    "analyze": ("dictionary_learning.analysis.command:main", "dictionaries, text -> what latents fire on and do"),
    "describe": ("dictionary_learning.analysis.describe:main", "analysed latents -> descriptions by a language model"),
    "steer": ("dictionary_learning.analysis.steer:main", "prompts -> what changes when a latent is turned"),
    "report": ("dictionary_learning.report.command:main", "a run -> one self-contained page"),
    "export": ("dictionary_learning.formats.commands:export_main", "dictionaries -> the formats of other libraries"),
    "import": ("dictionary_learning.formats.commands:import_main", "dictionaries of other libraries -> ours"),
    "push": ("dictionary_learning.hub:push_main", "a run -> a repository on the Hugging Face Hub"),
    "sync": ("dictionary_learning.sync:main", "a run's log -> Weights & Biases, after the fact"),
    "doctor": ("dictionary_learning.doctor:main", "what works on this machine, and the remedy for what does not"),
}


def usage() -> str:
    """The help of the command line."""
    lines = [f"  {name:<9} {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sae-factory COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "sae-factory COMMAND --help lists the options of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code."""
    from dictionary_learning import __version__
    from dictionary_learning.errors import USER_ERROR_EXIT, did_you_mean

    command, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(f"sae-factory {__version__}")
        return 0
    if command not in COMMANDS:
        print(
            f"Error: unknown command '{command}': use one of {', '.join(COMMANDS)}.{did_you_mean(command, COMMANDS)}",
            file=sys.stderr,
        )
        return USER_ERROR_EXIT
    module, function = COMMANDS[command][0].split(":")
    return getattr(importlib.import_module(module), function)(arguments)


def program() -> NoReturn:
    """The installed command: behind a Ctrl-C it does not wait for the exit hooks of libraries."""
    from dictionary_learning.stopping import end_process

    end_process(main)


if __name__ == "__main__":
    program()
