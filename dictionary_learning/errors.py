"""Errors made for the person who typed the command.

Whatever a user can get wrong raises a `UserError`: one sentence that names the thing, what was expected and the
remedy. The command line prints that sentence alone and exits with `USER_ERROR_EXIT`; a notebook shows it as a
ValueError. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator

USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 130
LONGEST = 2000  # characters of a sentence on the terminal


class UserError(ValueError):
    """Input that can't be used, said in one sentence."""


class CommitError(UserError):
    """A dataset on the Hub that can't be read at the commit that a run began with; `why`, without a full stop."""

    def __init__(self, why: str, instead: str = "--override takes the newest") -> None:
        super().__init__(f"{why}; where that commit is gone, {instead}.")
        self.why = why


@contextlib.contextmanager
def instead_of_commit(advice: str) -> Iterator[None]:
    """Inside a command that has no --override, a `CommitError` gives this advice in its place."""
    try:
        yield
    except CommitError as error:
        raise CommitError(error.why, advice) from error


def exit_code(command: Callable[[], int | None], interrupted: str = "Interrupted.") -> int:
    """Run a command of the command line: its exit code (None is 0), 2 behind the sentence of a `UserError`, 130 behind
    that of a Ctrl-C. The sentences go to stderr, so that stdout holds results only."""
    try:
        return command() or 0
    except UserError as error:
        print_error(error)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED_EXIT


def print_error(error: object) -> None:
    """Its sentence to stderr, as `plain` as a terminal needs it."""
    print(f"Error: {plain(str(error))}", file=sys.stderr)


def plain(sentence: str) -> str:
    """A sentence that may quote a file: cut, with nothing in it that moves a terminal's cursor or sets its colours."""
    cut = sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]}..."
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in cut)


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """` Did you mean 'x'?` for the nearest of the `known` names, or an empty string when none is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
