"""Files that anybody may have made, opened so that they run nothing and cost no more memory than their size warrants.

In: a path. Out: tensors, plain data, lines or rows. The libraries that read these formats check that a file is well
formed; what is added here is that it does not unfold. A few bytes can stand for a tensor of any shape (a stride of 0),
for gigabytes (a zip, a dictionary page), or for a tree that is never done being copied (YAML's aliases). What raises
here is turned into one sentence by the reader that knows what the file was to be.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dictionary_learning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ROOM, TIMES = 64 << 20, 20  # bytes that a file may unfold to: so many, and so many times its size besides
ROW_TIMES = 100  # of its size that a file's rows may have in characters: real text packs to a tenth
MOST_LINE = 16 << 20  # bytes of a line of text
VALUE = 128  # bytes of memory that a comma or a bracket in JSON may cost: {"a":0}, of 8 bytes takes 240
MOST_YAML = 256 << 10  # characters: PyYAML takes 15 seconds and 250 MB for a million of them
MOST_DEPTH = 64  # of nested plain data: deeper than any config, and far from the end of Python's stack
MOST_BITS = 1000  # of a whole number: less than the largest float


def allowance(file: Path) -> int:
    """Bytes that a file may unfold to."""
    return ROOM + TIMES * file.stat().st_size


# ---------------------------------------------------------------------------------------------- plain data


def plain_json(text: str) -> Any:
    """What `json.loads` gives. Raises ValueError, also for what is nested too deep, a number of no use or a key that is
    there twice, of which Python would take the last without a word."""
    try:
        return checked(json.loads(text, object_pairs_hook=_once))
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None


def plain_yaml(text: str) -> Any:
    """What `yaml.safe_load` gives, without aliases and keys that are there twice. Raises ValueError, or whatever PyYAML
    stumbles over."""
    import yaml

    if len(text) > MOST_YAML:
        raise ValueError(f"it is longer than {MOST_YAML >> 10} KiB, which takes YAML minutes: write it as JSON")

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"it has the alias *{self.peek_event().anchor}: write the value out")
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.MappingNode):
                _once([((key.tag, key.value), None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return node

    return checked(yaml.load(text, Loader))


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        key = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has '{shown(key[1] if isinstance(key, tuple) else key)}' twice in one place")
    return data


def checked(data: Any, bits: int | None = MOST_BITS) -> Any:
    """Plain data as it is. Raises ValueError where it is nested beyond `MOST_DEPTH`, or has a whole number beyond so
    many `bits` (which Python may refuse to print, or to divide)."""
    level = [data]
    for _ in range(MOST_DEPTH):
        if bits is not None and any(isinstance(value, int) and value.bit_length() > bits for value in level):
            raise ValueError(f"it has a whole number beyond 2^{bits}")
        level = [child for value in level for child in _children(value)]
        if not level:
            return data
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


def spellable(text: str) -> str:
    """Text that UTF-8 can hold: JSON can carry half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def shown(value: object, most: int = 60) -> str:
    """Text from a file for a message: cut, and nothing in it that breaks the line or moves a terminal's cursor."""
    text = str(value)
    text = text if len(text) <= most else f"{text[:most]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def listed(names: Sequence[object], most: int = 20) -> str:
    """Names from a file for a message: the first of them, as `shown`."""
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*map(shown, names[:most]), *more]) or "none"


def names_folder(value: object) -> bool:
    """Whether a value from a file can name a folder right below another one."""
    return isinstance(value, str) and value not in ("", ".", "..") and len(value) <= 100 and not set(value) & {*"/\\\0"}


def rows_allowance(file: Path) -> int:
    """Characters that the rows of a file may have: a reader may hold many of them at once, as to shuffle them."""
    return ROOM // 4 + ROW_TIMES * file.stat().st_size


def bounded_lines(handle: IO[Any], file: Path | None = None) -> Iterator[Any]:
    """The lines that `handle` gives of a `file`, packed or not. Raises ValueError for one that is too long to be a
    record, has more JSON values than the file warrants, or where all are more than text unpacks to."""
    allowed, room = (math.inf, math.inf) if file is None else (rows_allowance(file), allowance(file))
    while line := handle.readline(MOST_LINE):
        allowed -= len(line)
        if len(line) == MOST_LINE:
            raise ValueError(f"a line is longer than {MOST_LINE >> 20} MiB")
        if allowed < 0:
            raise ValueError("it unpacks to more than text does")
        if VALUE * len(line) > room and VALUE * _values(line) > room:
            raise ValueError("a line has more values than a file of its size may")
        yield line


def _values(line: Any) -> int:
    """As many values as a line of JSON can have, or more."""
    return sum(line.count(mark) for mark in ((",", "[", "{") if isinstance(line, str) else (b",", b"[", b"{")))


# ---------------------------------------------------------------------------------------------- tensors


def read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file; pickled objects are never loaded. Raises UserError for one that unfolds, or whatever
    zipfile, numpy and zlib stumble over."""
    import numpy as np
    import torch

    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > allowance(file):
        raise UserError(f"'{file}' would unpack to {unpacked / 1e9:.1f} GB: it is no file of arrays.")
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}


# What torch.save writes of tensors in lists and dicts. A pickle of anything else is not looked into further.
_INSTRUCTIONS = frozenset(
    "PROTO STOP MARK POP EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 LIST DICT APPEND APPENDS SETITEM "
    "SETITEMS BUILD REDUCE GLOBAL BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 "
    "BININT2 LONG1 BINFLOAT BINUNICODE".split()
)
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
    }.items()
}


def read_pickled(file: Path) -> Any:
    """What `torch.save` wrote: tensors, mapped from the file, in lists, dicts and plain values.

    In place of `torch.load(..., weights_only=True)`, which inflates a compressed archive, makes a bytearray of any
    length, and takes any strides and shape for granted.

    Raises:
        pickle.UnpicklingError: it asks for anything but tensors. ValueError: it unfolds, or is damaged; so are the
            errors of zipfile, pickle and torch.
    """
    import torch

    if not zipfile.is_zipfile(file):
        raise pickle.UnpicklingError("no archive as PyTorch has written since 1.6")
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("its parts are compressed, which torch.save does not do")
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise ValueError("its parts overlap")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("it was written on a machine of another byte order")
        pickled = archive.open(entries["data.pkl"]).read()
    for instruction, argument, _ in pickletools.genops(pickled):
        if instruction.name not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"the instruction {instruction.name}")
        if instruction.name == "LONG_BINPUT" and (argument or 0) > len(pickled):
            raise ValueError("it numbers more values than it has")
    mapped = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    return checked(_TensorUnpickler(io.BytesIO(pickled), file, entries, mapped).load())


class _TensorUnpickler(pickle.Unpickler):
    """Calls nothing but the three functions below."""

    def __init__(self, pickled: IO[bytes], file: Path, entries: dict[str, zipfile.ZipInfo], mapped: Tensor) -> None:
        super().__init__(pickled)
        self._file, self._entries, self._mapped = file, entries, mapped

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("collections", "OrderedDict"): _ordered_dict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage of a record, as a tensor of one dimension."""
        import torch

        kind, dtype_name, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"a {kind}")
        dtype, entry = getattr(torch, dtype_name), self._entries[f"data/{key}"]
        with self._file.open("rb") as handle:  # the record's own header may be longer than the directory's
            handle.seek(entry.header_offset + 26)
            lengths = handle.read(4)
        start = entry.header_offset + 30 + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
        size = count * dtype.itemsize
        if not 0 <= size <= entry.file_size or start + size > len(self._mapped):
            raise ValueError(f"its record {key} is shorter than it says")
        record = self._mapped[start : start + size]
        return (record if start % dtype.itemsize == 0 else record.clone()).view(dtype)


def _ordered_dict() -> dict[Any, Any]:
    return collections.OrderedDict()


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """Its values, each once: a stride of 0 would make a tensor of any size of one value."""
    count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(storage) or min(0, offset, *size, *stride) < 0 or (count and last >= len(storage)):
        raise ValueError(f"a tensor of shape {list(size)[:4]} in a record of {len(storage)} values")
    return storage.as_strided(size, stride, offset + storage.storage_offset() if count else 0)


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor
