"""Thrift's compact protocol, as far as parquet's footer and page headers use it: for files that lie about themselves.

In: bytes. Out: `Struct`s, dicts of a field's number to its (type, value), that can be changed and written again.
"""

from __future__ import annotations

import random
from typing import Any

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
Struct = dict[int, tuple[int, Any]]
NUMBERS = (0, 1, -1, 2, 7, 100, 65_536, 2**31 - 1, -(2**31), 2**32, 2**62, -(2**63))


def footer(data: bytes) -> Struct:
    """The FileMetaData of a parquet file."""
    length = int.from_bytes(data[-8:-4], "little")
    return struct(data[:-8], len(data) - 8 - length)[0]


def with_footer(data: bytes, new: Struct) -> bytes:
    """A parquet file with other FileMetaData."""
    old = int.from_bytes(data[-8:-4], "little")
    text = written(new)
    return data[: -8 - old] + text + len(text).to_bytes(4, "little") + data[-4:]


def chunks(meta: Struct) -> list[Struct]:
    """The ColumnMetaData of every chunk."""
    return [chunk[3][1] for group in meta[4][1][1] for chunk in group[1][1][1] if 3 in chunk]


def humbled(data: bytes) -> bytes:
    """A parquet file whose footer says that everything is small."""
    meta = footer(data)
    for group in meta[4][1][1]:
        group[2] = (6, 10)  # total_byte_size
    for chunk in chunks(meta):
        chunk[6] = (6, 10)  # total_uncompressed_size
        chunk.pop(12, None)  # statistics
    return with_footer(data, meta)


def lying(data: bytes, rng: random.Random) -> bytes:
    """A parquet file with one number or word of its footer, or of a page's header, exchanged."""
    meta = footer(data)
    if rng.random() < 0.5:
        _change(meta, rng)
        return with_footer(data, meta)
    chunk = rng.choice(chunks(meta))
    places = [field for field in (9, 11) if field in chunk]  # data_page_offset, dictionary_page_offset
    start, length = min(chunk[field][1] for field in places), chunk[7][1]
    field = rng.choice(places)
    at = chunk[field][1]
    header, body = struct(data, at)
    _change(header, rng)
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    moved = end + at - start  # the chunk again, with that page, behind all others
    new = data[:end] + data[start:at] + written(header) + data[body : start + length] + data[end:]
    for other in places:
        chunk[other] = (6, end + chunk[other][1] - start if other != field else moved)
    chunk[7] = (6, length + len(written(header)) - (body - at))
    if rng.random() < 0.5:
        chunk[5] = (6, rng.choice(NUMBERS))  # num_values
    return with_footer(new, meta)


def _change(value: Struct, rng: random.Random) -> None:
    holder, key = rng.choice(list(_leaves(value)))
    kind, old = holder[key]
    if kind == BINARY:
        holder[key] = (kind, rng.choice((b"", b"\xff\xfe", b"x" * 5000, old * 2, b"text")))
    elif kind == DOUBLE:
        holder[key] = (kind, rng.randbytes(8))
    elif kind == LIST:
        inner, items = old
        holder[key] = (kind, (inner, rng.choice((items[:-1], items * 2, (items * 300)[:3000]))))
    elif kind in (TRUE, FALSE):
        holder[key] = (TRUE + FALSE - kind, None)
    else:
        holder[key] = (kind, rng.choice((*NUMBERS, *range(12), old + 1, old * 1000)))
    if rng.random() < 0.1:
        del holder[key]


def _leaves(value: Struct) -> Any:
    for key, (kind, inner) in value.items():
        if kind == STRUCT:
            yield from _leaves(inner)
            continue
        yield value, key
        if kind == LIST and inner[0] == STRUCT:
            for item in inner[1]:
                yield from _leaves(item)


# ---------------------------------------------------------------------------------------------- reading


def struct(data: bytes, at: int) -> tuple[Struct, int]:
    """(the struct that begins there, the place behind it)."""
    found: Struct = {}
    field = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            number, at = _varint(data, at)
            field = _signed(number)
        value, at = _value(head & 15, data, at)
        found[field] = (head & 15, value)
    return found, at + 1


def _value(kind: int, data: bytes, at: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return None, at
    if kind == BYTE:
        return data[at], at + 1
    if kind == DOUBLE:
        return data[at : at + 8], at + 8
    if kind == BINARY:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind in (LIST, SET):
        head, at = data[at], at + 1
        count = head >> 4
        if count == 15:
            count, at = _varint(data, at)
        items = []
        for _ in range(count):
            item, at = (data[at], at + 1) if head & 15 in (TRUE, FALSE) else _value(head & 15, data, at)
            items.append(item)
        return (head & 15, items), at
    if kind == STRUCT:
        return struct(data, at)
    number, at = _varint(data, at)
    return _signed(number), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return number, at


def _signed(number: int) -> int:
    return (number >> 1) ^ -(number & 1)


# ---------------------------------------------------------------------------------------------- writing


def written(value: Struct) -> bytes:
    """The struct in bytes."""
    out = bytearray()
    last = 0
    for field, (kind, inner) in sorted(value.items()):
        step = field - last
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + _number(field)
        out += _bytes(kind, inner)
        last = field
    return bytes(out) + b"\0"


def _bytes(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE):
        return b""
    if kind == BYTE:
        return bytes([value & 255])
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _unsigned(len(value)) + value
    if kind in (LIST, SET):
        inner, items = value
        head = bytes([len(items) << 4 | inner]) if len(items) < 15 else bytes([240 | inner]) + _unsigned(len(items))
        return head + b"".join(bytes([v]) if inner in (TRUE, FALSE) else _bytes(inner, v) for v in items)
    return written(value) if kind == STRUCT else _number(value)


def _number(value: int) -> bytes:
    return _unsigned((value << 1 ^ value >> 63) & (2**64 - 1))


def _unsigned(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])
