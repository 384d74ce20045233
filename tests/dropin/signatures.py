"""How our public surface differs from what `record_peer.py` recorded of the `dictionary-learning` package.

In: peer_signatures.json and docs/differences.md. Out: `differences()`, each with a name, what is ours and what the
peer's; and the rows of the table that are meant to explain them. A name reads `module.Class.method(argument)`,
`module.Class.attribute` or `module.Class.config:key`, without the package's own name in front.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "dictionary_learning"
RECORDED = Path(__file__).with_name("peer_signatures.json")
TABLE = Path(__file__).resolve().parents[2] / "docs" / "differences.md"
ABSENT = "–"


class Difference(NamedTuple):
    """One place where ours is not the peer's."""

    name: str
    ours: str
    peer: str


class Row(NamedTuple):
    """One line of the table; `name`, `ours` and `peer` may hold * for anything."""

    name: str
    ours: str
    peer: str
    why: str

    def explains(self, difference: Difference) -> bool:
        pairs = zip((difference.name, difference.ours, difference.peer), self[:3], strict=True)
        return all(fnmatchcase(value, pattern) for value, pattern in pairs)


def table_rows(text: str) -> list[Row]:
    """The rows of the first table headed `name | ours | peer | why`; cells may stand in backticks."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if cells == ["name", "ours", "peer", "why"]:
            inside = True
        elif inside and len(cells) == 4:
            if not set(cells[0]) <= set("-: "):
                rows.append(Row(*(cell.strip("`").replace("\\|", "|") for cell in cells[:3]), why=cells[3]))
        elif inside:
            break
    return rows


def differences(
    recorded: Mapping[str, Any], load: Callable[[str], Any], make: Callable[[type], Any]
) -> Iterator[Difference]:
    """Compare the recorded modules with ours.

    Args:
        load: our module of a name; raises ModuleNotFoundError where there is none.
        make: an instance of one of our classes, whose attributes and config are looked at.
    """
    for module_name, names in recorded.items():
        short = module_name.removeprefix(PACKAGE).lstrip(".")
        try:
            module = load(module_name)
        except ModuleNotFoundError:
            yield Difference(short, ABSENT, "module")
            continue
        for name, entry in names.items():
            where = f"{short}.{name}".lstrip(".")
            ours = getattr(module, name, None)
            if ours is None:
                yield Difference(where, ABSENT, _kind(entry))
            elif "from" in entry and getattr(load(entry["from"]), name, None) is not ours:
                yield Difference(where, "another", entry["from"])
            elif "members" in entry:
                yield from _of_class(where, ours, entry, make)
            elif "parameters" in entry:
                yield from _of_call(where, ours, entry["parameters"])


def _kind(entry: Mapping[str, Any]) -> str:
    kinds = {"from": "name", "members": "class", "property": "property", "parameters": "function", "value": "value"}
    return next(word for key, word in kinds.items() if key in entry)


def _of_class(where: str, cls: type, entry: Mapping[str, Any], make: Callable[[type], Any]) -> Iterator[Difference]:
    for name, member in entry["members"].items():
        place = where if name == "__init__" else f"{where}.{name}"
        ours = getattr(cls, name, None)
        if ours is None:
            yield Difference(place, ABSENT, "property" if "property" in member else "method")
        elif "property" in member:
            if callable(ours):
                yield Difference(place, "method", "property")
        else:
            yield from _of_call(place, ours, member["parameters"])
    if "attributes" in entry or "config" in entry:
        instance = make(cls)
        for name in entry.get("attributes", ()):
            if not hasattr(instance, name):
                yield Difference(f"{where}.{name}", ABSENT, "attribute")
        for key in entry.get("config", ()):
            if key not in instance.config:
                yield Difference(f"{where}.config:{key}", ABSENT, "key")


def _of_call(where: str, function: Any, recorded: list[str]) -> Iterator[Difference]:
    """Every call that the peer's signature allows must mean the same to ours."""
    ours = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    by_name = {p.name: p for p in ours}
    peers = [entry.partition(" = ") for entry in recorded if not entry.startswith("*")]
    peer_names = {name for name, _, _ in peers}
    renamed = set()
    for position, (name, has_default, default) in enumerate(peers):
        place = f"{where}({name})"
        parameter = by_name.get(name)
        if parameter is None:
            here = ours[position] if position < len(ours) else None
            if here is not None and here.kind is here.POSITIONAL_OR_KEYWORD and here.name not in peer_names:
                renamed.add(here.name)
                yield Difference(place, f"named {here.name}", "argument")
            else:
                yield Difference(place, ABSENT, default if has_default else "argument")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            yield Difference(place, "by keyword", f"position {position}")
        elif ours.index(parameter) != position:
            yield Difference(place, f"position {ours.index(parameter)}", f"position {position}")
        our_default = "required" if parameter.default is parameter.empty else shown(parameter.default)
        if has_default and our_default != default:
            yield Difference(place, our_default, default)
    for parameter in ours:
        stars = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not stars and parameter.default is parameter.empty and parameter.name not in peer_names | renamed:
            yield Difference(f"{where}({parameter.name})", "required", ABSENT)


def shown(value: Any) -> str:
    """A default as `record_peer.py` writes it."""
    return value.__name__ if isinstance(value, type) else repr(value)


def recorded_modules() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))["modules"]


def load_ours(name: str) -> Any:
    return importlib.import_module(name)
