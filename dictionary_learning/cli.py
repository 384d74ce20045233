"""`sae-factory`: one command, a subcommand a job. Each is a dataclass whose field docstrings are its help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

USAGE = """usage: sae-factory COMMAND [OPTIONS]

  prep      medical QA records -> one table of texts (also: python -m data_prep)
  train     text -> activations -> many trained dictionaries (also: python dictionary_learning/demo.py)

sae-factory COMMAND --help lists the options of a command."""


def _prep(arguments: Sequence[str]) -> int:
    from data_prep.__main__ import main

    return main(arguments)


def _train(arguments: Sequence[str]) -> int:
    from dictionary_learning.demo import main

    return main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"prep": _prep, "train": _train}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code."""
    from dictionary_learning import __version__
    from dictionary_learning.errors import USER_ERROR_EXIT, did_you_mean

    command, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
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
    return COMMANDS[command](arguments)


if __name__ == "__main__":
    sys.exit(main())
