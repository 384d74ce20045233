"""How a command reads its arguments: from a dataclass, whose field docstrings are the help.

`parse` is tyro with the help kept to what a reader needs: an option that may be left out has no `{None}|` before its
type and no `(default: None)` behind its sentence, a switch no `(default: False)`, and a positional argument has a name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

Command = TypeVar("Command")


def parse(command: type[Command], argv: Sequence[str] | None, prog: str | None = None) -> Command:
    """The arguments of a command (None: those of this process). SystemExit with 0 behind its help, and with 2 where an
    argument is wrong, which stderr says."""
    _describe(command)  # type: ignore[arg-type]  # a class is hashable
    names = (tyro.conf.PositionalMetavarFromFieldName,)
    return tyro.cli(command, args=argv, prog=prog, use_underscores=True, config=names)


@functools.cache
def _describe(command: Any) -> None:
    """Annotates the fields with what the help is to say of their defaults, and of None as a value."""
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        marks = [tyro.conf.arg(help_behavior_hint=_default)] + [tyro.conf.DisallowNone] * (field.default is None)
        command.__annotations__[field.name] = Annotated[hints[field.name], *marks]


def _default(shown: str) -> str:
    return "" if shown in ("", "None", "False") else f"(default: {shown})"
