"""Everybody else's formats, both ways: `FORMATS` maps a name to how its folders look and who reads and writes them.

dictionary, config = formats.read("some/folder")           # detected by its files
remarks = formats.write(dictionary, config, Path("out"), "saelens")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.formats import dictionary_learning as _dictionary_learning
from dictionary_learning.formats import gemma_scope, saelens, sparsify
from dictionary_learning.formats.coder import CannotHold

__all__ = ["FORMATS", "CannotHold", "Format", "detect", "find_dictionaries", "format_named", "read", "write"]


class Format(NamedTuple):
    """One layout of a folder that holds one dictionary.

    Attributes:
        files: sets of file names, any of which says that a folder is of this format; the first is what is written.
        read: (folder or file) -> (dictionary, config in our form). Raises UserError.
        write: (dictionary, config in our form, folder) -> remarks for the reader. Raises CannotHold.
        loading: how a written folder is loaded in the library it is for.
    """

    name: str
    files: tuple[frozenset[str], ...]
    read: Callable[[str | os.PathLike[str]], tuple[Dictionary, dict[str, Any]]]
    write: Callable[[Dictionary, Mapping[str, Any], Path], list[str]]
    loading: str


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "saelens",
            (frozenset({saelens.CONFIG, saelens.WEIGHTS}),),
            saelens.read,
            saelens.write,
            'sae_lens.SAE.load_from_disk("{folder}")',
        ),
        Format(
            "sparsify",
            (frozenset({sparsify.CONFIG, sparsify.WEIGHTS}),),
            sparsify.read,
            sparsify.write,
            'sparsify.SparseCoder.load_from_disk("{folder}")',
        ),
        Format(
            "gemma_scope",
            (frozenset({gemma_scope.WEIGHTS}),),
            gemma_scope.read,
            gemma_scope.write,
            'numpy.load("{folder}/params.npz")',
        ),
        Format(
            "dictionary_learning",
            (frozenset({"config.json", "ae.pt"}), frozenset({"config.json", "ae.safetensors"})),
            _dictionary_learning.read,
            _dictionary_learning.write,
            'dictionary_learning.utils.load_dictionary("{folder}", device="cpu")',
        ),
    )
}


def format_named(name: str) -> Format:
    """The format of a name. Raises UserError when there is none."""
    if name not in FORMATS:
        raise UserError(f"Unknown format '{name}': use one of {', '.join(FORMATS)}.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def detect(path: str | os.PathLike[str]) -> Format | None:
    """The format of a folder, or of the one that a file lies in, by the files in it; None for none of ours.

    Raises:
        UserError: the folder holds the files of several formats.
    """
    given = Path(path).expanduser()
    folder = given if given.is_dir() else given.parent
    if not folder.is_dir():
        return None
    present = {entry.name for entry in folder.iterdir() if entry.is_file()}
    found = [entry for entry in FORMATS.values() if any(needed <= present for needed in entry.files)]
    if len(found) > 1:
        names = " and ".join(entry.name for entry in found)
        raise UserError(f"'{folder}' holds the files of {names}: say which with --format.")
    return found[0] if found else None


def find_dictionaries(
    path: str | os.PathLike[str], wanted: Format | None = None, below: Path | None = None
) -> list[tuple[Path, Path, Format]]:
    """(folder or file, its path relative to `path`, format) of every dictionary at or below `path`.

    Args:
        wanted: look for this format alone.
        below: a folder that is left out with all that is in it (where the output goes).

    Raises:
        UserError: there is no such path, or no dictionary in it.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"There is nothing at '{root}': give a dictionary's folder, or one with dictionaries in it.")
    if root.is_file():
        entry = wanted or detect(root)
        found = [(root, Path("."), entry)] if entry is not None else []
    else:
        left_out = None if below is None else below.expanduser().resolve()
        found = []
        for name, folders, _ in os.walk(root):
            folder = Path(name)
            folders[:] = sorted(f for f in folders if (folder / f).resolve() != left_out)
            present = {child.name for child in folder.iterdir() if child.is_file()}
            if wanted is not None:
                entry = wanted if any(needed <= present for needed in wanted.files) else None
            else:
                entry = detect(folder)
            if entry is not None:
                found.append((folder, folder.relative_to(root), entry))
    if not found:
        shown = wanted.files[0] if wanted else None
        expected = " and ".join(sorted(shown)) if shown else f"one of the formats {', '.join(FORMATS)}"
        raise UserError(f"'{root}' holds no dictionary: expected {expected}.")
    return found


def read(path: str | os.PathLike[str], name: str | None = None) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary in a folder of any format, and its config in our form.

    Raises:
        UserError: the format is unknown or can't be told, or see its `read`.
    """
    entry = format_named(name) if name is not None else detect(path)
    if entry is None:
        raise UserError(f"'{path}' is of no known format ({', '.join(FORMATS)}): give the folder of a dictionary.")
    return entry.read(path)


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path, name: str) -> list[str]:
    """Write a dictionary in a format; remarks for the reader.

    Raises:
        UserError: the format is unknown. CannotHold: it has no place for this dictionary.
    """
    return format_named(name).write(dictionary, config, folder)
