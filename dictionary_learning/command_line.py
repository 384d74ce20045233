"""How a command reads its arguments: from a dataclass, whose field docstrings are the help.

`parse` is tyro with the help kept to what a reader needs: an option that may be left out has no `{None}|` before its
type and no `(default: None)` behind its sentence, a switch no `(default: False)`, and a positional argument has a name.
A dataclass that is put together from others (its bases) shows the options of each in a box with that class's name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

Command = TypeVar("Command")


def parse(command: type[Command], argv: Sequence[str] | None, prog: str | None = None) -> Command:
    """The arguments of a command (None: those of this process). SystemExit with 0 behind its help, and with 2 where an
    argument is wrong, which stderr says."""
    names = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.OmitArgPrefixes)
    form: Any = _form(command)  # type: ignore[arg-type]  # a class is hashable
    about = inspect.getdoc(command)
    given = vars(tyro.cli(form, args=argv, prog=prog, description=about, use_underscores=True, config=names))
    for group in _groups(command):
        given |= vars(given.pop(group.__name__))
    return command(**given)


@functools.cache
def _form(command: Any) -> Any:
    """A dataclass of the command's own fields, with what the help is to say of them, of their defaults and of None as a
    value, and with a nested one for each of its groups: tyro gives these a box each."""
    hints = get_type_hints(command, include_extras=True)
    docs = {said.arg_name: said.description or "" for said in docstring_parser.parse_from_object(command).params}
    grouped = {field.name for group in _groups(command) for field in dataclasses.fields(group)}
    fields: list[Any] = []
    for field in dataclasses.fields(command):
        if field.name not in grouped:
            said = tyro.conf.arg(help=" ".join(docs.get(field.name, "").split()), help_behavior_hint=_default)
            marks = [said] + [tyro.conf.DisallowNone] * (field.default is None)
            defaults: Any = {"default": field.default, "default_factory": field.default_factory}
            fields.append((field.name, Annotated[hints[field.name], *marks], dataclasses.field(**defaults)))
    for group in _groups(command):
        box = tyro.conf.arg(name=group.__name__.lower(), help="")
        fields.append((group.__name__, Annotated[_form(group), box]))
    return dataclasses.make_dataclass(command.__name__, fields, kw_only=True)


def _groups(command: Any) -> list[Any]:
    return [base for base in command.__bases__ if dataclasses.is_dataclass(base)]


def _default(shown: str) -> str:
    return "" if shown in ("", "''", "None", "False") else f"(default: {shown})"
