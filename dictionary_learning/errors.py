"""Errors made for the person who typed the command.

Whatever a user can get wrong raises a `UserError`: one sentence that names the thing, what was expected and the
remedy. The command line prints that sentence alone and exits with `USER_ERROR_EXIT`; a notebook shows it as a
ValueError. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

USER_ERROR_EXIT = 2


class UserError(ValueError):
    """Input that can't be used, said in one sentence."""


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """` Did you mean 'x'?` for the nearest of the `known` names, or an empty string when none is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
