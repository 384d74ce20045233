"""Writes peer_signatures.json: what a script written for the `dictionary-learning` package may name.

Run by hand with a Python that has the package installed, from a folder where `dictionary_learning` is not ours:

    python <path to>/record_peer.py

In: the installed package. Out: its modules; their functions and classes with argument names, kinds and defaults; the
attributes that instances set and the keys of their `config`. Names and defaults only, which are facts; no code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = "dictionary_learning"
HERE = Path(__file__).resolve().parent


def shown(value: Any) -> str:
    """A default as text that is the same in both packages: a class by its name, everything else by its repr."""
    return value.__name__ if isinstance(value, type) else repr(value)


def parameters(function: Any) -> list[str]:
    """The arguments of a callable without `self`, as a signature writes them: "x", "k = None", "*", "**kwargs"."""
    found: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(entry.startswith("*") for entry in found):
            found.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        found.append(f"{stars}{parameter.name}{default}")
    return found


def members(cls: type) -> dict[str, Any]:
    """The methods and properties that a class itself defines, by name."""
    found: dict[str, Any] = {}
    for name, member in vars(cls).items():
        if name.startswith("_") and name not in ("__init__", "__iter__", "__next__"):
            continue
        if isinstance(member, property):
            found[name] = {"property": True}
        elif isinstance(member, (FunctionType, classmethod, staticmethod)):
            found[name] = {"parameters": parameters(getattr(cls, name))}
    return found


def assigned(tree: ast.Module) -> list[str]:
    """Public names that a module assigns values to (and does not import)."""
    bodies = [tree.body] + [part for node in tree.body if isinstance(node, ast.If) for part in (node.body, node.orelse)]
    targets = [target for body in bodies for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return sorted({t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("_")})


def attributes(tree: ast.Module) -> dict[str, list[str]]:
    """{class: public names that its methods assign to `self`}."""
    found = {}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        stores = (n for n in ast.walk(cls) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
        names = {n.attr for n in stores if isinstance(n.value, ast.Name) and n.value.id == "self"}
        found[cls.name] = sorted(name for name in names if not name.startswith("_"))
    return found


def config_keys(tree: ast.Module) -> dict[str, list[str]]:
    """{class: keys of the dict that its `config` returns}."""
    found = {}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for method in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "config"):
            dicts = [n.value for n in ast.walk(method) if isinstance(n, ast.Return) and isinstance(n.value, ast.Dict)]
            found[cls.name] = sorted(k.value for d in dicts for k in d.keys if isinstance(k, ast.Constant))
    return found


def record(module: ModuleType) -> dict[str, Any]:
    """What a module defines, and for a package what it hands on."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    stores, keys = attributes(tree), config_keys(tree)
    found: dict[str, Any] = {name: {"value": True} for name in assigned(tree)}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if name in getattr(module, "__all__", []):
            found[name] = {"from": value.__module__}
        elif getattr(value, "__module__", None) == module.__name__:
            if isinstance(value, type):
                found[name] = {"members": members(value)}
                found[name] |= {"attributes": stores[name]} if stores.get(name) else {}
                found[name] |= {"config": keys[name]} if name in keys else {}
            elif callable(value):
                found[name] = {"parameters": parameters(value)}
    return found


def main() -> None:
    package = importlib.import_module(PACKAGE)
    names = [PACKAGE, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."))]
    recorded = {
        "package": "dictionary-learning",
        "version": version("dictionary-learning"),
        "modules": {name: record(importlib.import_module(name)) for name in sorted(names)},
    }
    text = json.dumps(recorded, indent=1)
    text = re.sub(r"\[\s*([^\[\]{}]*?)\s*\]", lambda match: "[" + re.sub(r"\s*\n\s*", " ", match[1]) + "]", text)
    (HERE / "peer_signatures.json").write_text(text + "\n", encoding="utf-8")  # a list on one line
    print(f"{len(names)} modules of {recorded['package']} {recorded['version']} recorded")


if __name__ == "__main__":
    main()
