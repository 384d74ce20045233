"""`sae-factory export` and `sae-factory import`: dictionaries to and from the formats of other libraries.

Each dictionary goes to a folder of its own, at the same relative path as it came from; no name from inside a file
decides where anything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dictionary_learning import storage
from dictionary_learning.command_line import parse
from dictionary_learning.errors import LONGEST, UserError, exit_code
from dictionary_learning.formats import FORMATS, CannotHold, Format, files, find_dictionaries, format_named
from dictionary_learning.untrusted import shown


@dataclass
class ExportArgs:
    """Write the dictionaries of a run, or one of them, in another library's format."""

    source: tyro.conf.Positional[Path]
    """A run, or the folder of one dictionary."""
    format: str
    """saelens, sparsify, gemma_scope or dictionary_learning."""
    out: Path
    """Folder to write to: one folder a dictionary, at the same relative path as in the run."""


@dataclass
class ImportArgs:
    """Read dictionaries of another library and save them as ours (config.json and ae.safetensors)."""

    source: tyro.conf.Positional[Path]
    """A dictionary's folder or file, or a folder with dictionaries in it."""
    out: Path
    """Folder to write to: one folder a dictionary, at the same relative path as in the source."""
    format: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """saelens, sparsify, gemma_scope or dictionary_learning; left out, it is told by the files."""


def export_dictionaries(source: Path, format_name: str, out: Path) -> None:
    """The export command; prints what it writes.

    A dictionary that the format has no place for is left out with the reason, where others can be written.

    Raises:
        UserError: no dictionary, a damaged one, a used output folder, or none that the format can hold.
    """
    entry = format_named(format_name)
    found = find_dictionaries(source, FORMATS["dictionary_learning"], below=out)
    _check_free(out, [relative for _, relative, _ in found])
    corpus = _corpus_of(source)

    def convert(path: Path, folder: Path, _: Format) -> list[str]:
        dictionary, config = FORMATS["dictionary_learning"].read(path)
        return entry.write(dictionary, config | ({"corpus": corpus} if corpus else {}), folder)

    written = _convert_all(found, out, convert)
    print(f"Exported {len(written)} of {len(found)} as {entry.name} to {out}.")
    print(f"Load one with: {entry.loading.format(folder=written[0])}")


def import_dictionaries(source: Path, out: Path, format_name: str | None = None) -> None:
    """The import command; prints what it writes.

    Raises:
        UserError: no dictionary, a damaged one, one that computes what no dictionary here does, a used output folder.
    """
    found = find_dictionaries(source, format_named(format_name) if format_name is not None else None, below=out)
    _check_free(out, [relative for _, relative, _ in found])

    def convert(path: Path, folder: Path, entry: Format) -> list[str]:
        dictionary, config = entry.read(path)
        files.save_ours(dictionary, storage.finite(config), folder)
        return [f"Read as {type(dictionary).__name__} from {entry.name}."]

    written = _convert_all(found, out, convert)
    print(f"Imported {len(written)} of {len(found)} to {out}.")
    print(f'Load one with: dictionary_learning.load_dictionary("{written[0]}")')


def _convert_all(
    found: Sequence[tuple[Path, Path, Format]], out: Path, convert: Callable[[Path, Path, Format], list[str]]
) -> list[Path]:
    """Convert each; the folders written. What a format can't hold is left out, unless that is all there is."""
    written: list[Path] = []
    refused: list[CannotHold] = []
    said: set[str] = set()
    for path, relative, entry in found:
        folder = out.expanduser() / relative
        try:
            remarks = convert(path, folder, entry)
        except CannotHold as reason:
            if len(found) == 1:
                raise
            refused.append(reason)
            print(f"Left out {shown(path, LONGEST)}: {shown(reason, LONGEST)}", file=sys.stderr)
            continue
        except OSError as error:
            raise UserError(f"'{folder}' can't be written ({error.strerror or error}): give another --out.") from error
        written.append(folder)
        print(f"{shown(path, LONGEST)} -> {shown(folder, LONGEST)}")
        for remark in remarks:
            if remark not in said:
                print(f"  {shown(remark, LONGEST)}")
        said.update(remarks)
    if not written:
        raise refused[0]
    return written


def _check_free(out: Path, relatives: Iterable[Path]) -> None:
    """Refuse to mix formats in a folder, or to write over what is there, before anything is written."""
    root = out.expanduser()
    if root.exists() and not root.is_dir():
        raise UserError(f"--out '{out}' is a file: give a folder.")
    for relative in relatives:
        folder = root / relative
        if folder.is_dir() and any(child.is_file() for child in folder.iterdir()):
            raise UserError(f"'{folder}' holds files already: give a new or empty folder as --out.")


def _corpus_of(source: Path) -> str | None:
    """The corpus of the run that `source` is, or lies in; None where nothing says it."""
    for folder in (source.expanduser(), *source.expanduser().absolute().parents[:1]):
        if (folder / "run.json").is_file():
            config: Any = files.read_config(folder / "run.json").get("config")
            corpus = config.get("corpus") if isinstance(config, dict) else None
            return corpus if isinstance(corpus, str) else None
    return None


def export_main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 for what the user can mend (one sentence)."""
    args = parse(ExportArgs, argv, "sae-factory export")
    return exit_code(lambda: export_dictionaries(args.source, args.format, args.out))


def import_main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 for what the user can mend (one sentence)."""
    args = parse(ImportArgs, argv, "sae-factory import")
    return exit_code(lambda: import_dictionaries(args.source, args.out, args.format))
