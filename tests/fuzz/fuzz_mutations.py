"""What a stranger's file may look like: a valid one, changed in its bytes or, knowing the format, in its parts.

In: bytes of a file, its kind, a generator. Out: other bytes. Structured changes keep the container whole (a header's
length, a zip's directory, a checksum that a target renews), so that what is behind it is reached; plain ones do not.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import fuzz_thrift

from dictionary_learning.untrusted import plain_yaml

MOST_BYTES = 1 << 18  # of a mutated file: slowness that begins beyond is of the size, not of the reader
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30)
# fmt: off
STRINGS = (
    "", "../../../escaped", "/escaped", "C:\\escaped", "~", ".", "a\x00b", "\x1b[2J\x07", "\ud800", "\u202e\ufdfa",
    "NaN", "-Infinity", "None", "true", "1e999", "hf://../..", "x" * 5000, "\n\r\t", "('", "{0}%s",
)
# fmt: on
VALUES: tuple[Any, ...] = (None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], {"": {}})
# fmt: off
TOKENS = (
    b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\r\n", b"\r", b"\n\n", b"\xc3\x28", b"\xed\xa0\x80", b"\xf0\x9f\x92\xa9",
    b'"', b"'", b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"1e999999", b"NaN", b"-Infinity", b"{}", b"null", b",",
    b"\\ud800", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x00" * 64, b"A" * 20_000, b"PK\x03\x04", b"\x1f\x8b",
    b"\xe2\x80\xa8",
)
# fmt: on
YAML = (
    "a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e]\n",
    "settings: &s {again: *s}\n",
    "<<: {version: 1}\n",
    "? [1, 2]\n: 3\n",
    "? {a: b}\n: 3\n",
    "!!python/object/apply:os.system ['touch ran']\n",
    "k: !!python/name:os.system\n",
    f"version: 0x{'f' * 6000}\n",
    f"0x{'f' * 6000}: 1\n",
    f"seed: 0b{'1' * 40000}\n",
    f"k: {':'.join(['59'] * 3000)}\n",
    "when: 2001-99-99\n",
    "when: 2001-12-14t21:59:43.10-05:00\n",
    "data: !!binary R0lGODlhDAAMAIQAAP\n",
    "set: !!set {a, b}\n",
    "pairs: !!pairs [a: 1]\n",
    "omap: !!omap [a: 1]\n",
    "x: !!int zz\n",
    "x: !!float zz\n",
    "x: !!timestamp zz\n",
    "---\na: 1\n---\nb: 2\n",
    "%YAML 9.9\n---\n",
    "\ta: 1\n",
    "- " * 400 + "x\n",
    "{" * 500,
    "[" * 2000,
    "a: |\n" + "  x\n" * 500,
    "? ? ? ?\n",
    "!<!> x\n",
    "&\n*\n",
    "settings: {when: 2001-12-14}\n",
    "settings: {x: .nan}\n",
    "sparsity: {k: .inf}\n",
    "=: =\n",
)

Rng = random.Random
Kind = Callable[[bytes, Rng], bytes]


def mutate(data: bytes, kind: str, rng: Rng, others: list[bytes]) -> bytes:
    """One file made of another: mostly by what is known of its kind, sometimes byte by byte, or spliced with others."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        choice = rng.random()
        if choice < 0.65 and kind in KINDS:
            try:
                data = KINDS[kind](data, rng)
                continue
            except Exception:  # no longer of its kind, so that only its bytes can be changed
                pass
        if choice > 0.95 and others:
            other = rng.choice(others)
            data = data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
        else:
            data = plain(data, rng)
    return data[:MOST_BYTES]


def plain(data: bytes, rng: Rng) -> bytes:
    """Change bytes, whatever they mean."""
    at = rng.randint(0, len(data))
    to = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 32, 500)))
    way = rng.randrange(7)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + data[to:]
    if way == 2:
        return data[:to] + data[at:to] * rng.choice((1, 2, 50)) + data[to:]
    if way == 3:
        return data[:at] + rng.choice(TOKENS) + data[at if rng.random() < 0.5 else to :]
    if way == 4:
        return data[:at] + rng.randbytes(to - at) + data[to:]
    if way == 5 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"", b"\n\n", b"\x0c")))


# ---------------------------------------------------------------------------------------------- text formats


def hostile(rng: Rng) -> Any:
    """A value that nobody writes."""
    way = rng.randrange(9)
    if way < 3:
        return rng.choice(NUMBERS)
    if way < 5:
        return rng.choice(STRINGS)
    if way == 5:
        return rng.choice(VALUES)
    if way == 6:
        return functools.reduce(lambda inner, _: [inner], range(rng.choice((3, 90, 300, 450, 850))), 0)
    if way == 7:
        return functools.reduce(lambda inner, _: {"a": inner}, range(rng.choice((3, 90, 300))), {})
    return [rng.choice(NUMBERS) for _ in range(rng.choice((1, 3, 3000)))]


def changed(value: Any, rng: Rng) -> Any:
    """Plain data with one of its parts exchanged, dropped, doubled or renamed; `value` itself is changed."""
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return hostile(rng)
    holder, key = rng.choice(places)
    way = rng.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice(STRINGS)] = holder.pop(key)
    elif way == 2:
        other, at = rng.choice(places)
        holder[key] = other[at]
    elif way == 3 and isinstance(holder, list):
        holder.extend([holder[key]] * rng.choice((1, 2, 100)))
    elif way == 4:
        holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, str(holder[key])[:100]))
    else:
        holder[key] = hostile(rng)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _json(data: bytes, rng: Rng) -> bytes:
    text = json.dumps(changed(json.loads(data), rng), ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.1 and text.startswith("{") and '": ' in text:  # the same key twice
        key = rng.choice(re.findall(r'"[^"]*": ', text))
        text = "{" + key + json.dumps(hostile(rng)) + ", " + text[1:]
    if rng.random() < 0.05:
        text = re.sub(r"\d+", lambda m: rng.choice((m[0], "1e400", "-0", "9" * 4400, "0.1e-999")), text, count=3)
    return text.encode("utf-8", "surrogatepass")


def _yaml(data: bytes, rng: Rng) -> bytes:
    import yaml

    if rng.random() < 0.4:
        text, token = data.decode(), rng.choice(YAML)
        lines = text.splitlines(keepends=True)
        at = rng.randint(0, len(lines))
        return "".join([*lines[:at], token, *lines[at:]]).encode("utf-8", "surrogatepass")
    return yaml.safe_dump(changed(plain_yaml(data.decode()), rng)).encode("utf-8", "surrogatepass")


def _jsonl(data: bytes, rng: Rng) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng) + rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"", b"\n\x00\n"))
    return b"".join(lines)


def _csv(data: bytes, rng: Rng) -> bytes:
    cells = re.split(rb"([,\n])", data)
    at = rng.randrange(len(cells))
    cells[at] = str(rng.choice((*NUMBERS, *STRINGS, *VALUES))).encode("utf-8", "replace")
    return b"".join(cells)


# ---------------------------------------------------------------------------------------------- containers


def _safetensors(data: bytes, rng: Rng) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    way, name = rng.randrange(5), rng.choice(list(header))
    if way == 0:
        header[name]["shape"] = [rng.choice((*NUMBERS, 3, 12)) for _ in range(rng.choice((0, 1, 2, 3)))]
    elif way == 1:
        header[name]["dtype"] = rng.choice(
            "BOOL U8 I8 F8_E5M2 F8_E8M0 F4 F6_E2M3 I16 U16 F16 BF16 I32 U32 F32 C64 I64".split()
        )
    elif way == 2:  # a tensor of other sizes that fits where it lies
        items = (header[name]["data_offsets"][1] - header[name]["data_offsets"][0]) // 4
        header[name] |= {"dtype": "F32", "shape": rng.choice(([items], [items, 1], [1, items], [0, 2**62], [2**62, 0]))}
        if 0 in header[name]["shape"]:
            header[name]["data_offsets"][1] = header[name]["data_offsets"][0]
    else:
        header = changed(header, rng)
    text = json.dumps(header).encode()
    said = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return said.to_bytes(8, "little") + text + body


def _npy(data: bytes, rng: Rng) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    if rng.random() < 0.6:
        sizes = ", ".join(str(rng.choice((*NUMBERS, 3, 12))) for _ in range(rng.randint(0, 3)))
        header = re.sub(r"'shape': \([^)]*\)", f"'shape': ({sizes},)", header)
    else:
        kinds = "|O >f4 <f2 <i8 <c8 <U9999999 |V8 <M8[s] |b1 <f16 zz".split()
        others = ["[('a', '<f4')]", "[('a', '|O')]", "(" * 300, "1" * 5000]
        header = re.sub(r"'descr': '[^']*'", f"'descr': {rng.choice([repr(k) for k in kinds] + others)}", header)
    header = header.replace("False", rng.choice(("False", "True", "2")))
    return data[:8] + len(header.encode("latin1")).to_bytes(2, "little") + header.encode("latin1") + body


@functools.cache
def _zeros(megabytes: int) -> bytes:
    return bytes(megabytes << 20)


def _zip(data: bytes, rng: Rng) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name, way = rng.choice(list(members)), rng.randrange(12)
    if way == 0:
        members["../escaped" if rng.random() < 0.5 else "/escaped"] = members.pop(name)
    elif way == 1 and rng.random() < 0.2:  # a bomb: it is slow to make
        members[name] = members[name][:128] + _zeros(160)
    elif way == 2:
        del members[name]
    elif way == 3:
        members[name] = members[rng.choice(list(members))]
    elif way < 9 and any(n.endswith((".npy", ".pkl")) for n in members):
        name = rng.choice([n for n in members if n.endswith((".npy", ".pkl"))])
        members[name] = _npy(members[name], rng) if name.endswith(".npy") else _pickle(members[name], rng)
    else:
        members[name] = plain(members[name], rng)
    out = io.BytesIO()
    deflate = rng.random() < 0.3 or any(len(content) > 1 << 20 for content in members.values())
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def _pickle(data: bytes, rng: Rng) -> bytes:
    """A pickle with one number, string or global exchanged, or an instruction besides."""
    import pickletools

    places = [(at, op.name, arg) for op, arg, at in pickletools.genops(data)]
    ends = dict(zip([at for at, _, _ in places], [at for at, _, _ in places[1:]] + [len(data)], strict=True))
    wanted = [
        place for place in places if place[1] in ("BININT1", "BININT2", "BININT", "BINUNICODE", "GLOBAL", "LONG1")
    ]
    at, name, arg = rng.choice(wanted)
    if name == "GLOBAL":
        new = b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
    elif name == "BINUNICODE" and rng.random() < 0.7:
        text = rng.choice((*STRINGS, "0", "1", "cuda", "meta", "cpu:9")).encode("utf-8", "replace")
        new = b"X" + len(text).to_bytes(4, "little") + text
    elif rng.random() < 0.15:
        new = rng.choice((b"N", b"K\x00", b"]", b"}", b")", b"\x88", b"0", b"(", b"G\x7f\xf0\0\0\0\0\0\0", b"Q", b"R"))
    else:
        number = rng.choice((*NUMBERS, 3, 12, 40)).to_bytes(16, "little", signed=True)
        new = b"\x8a\x10" + number
    return data[:at] + new + data[ends[at] :]


# fmt: off
GLOBALS = (
    "torch DoubleStorage", "torch ByteStorage", "torch BoolStorage", "torch ComplexFloatStorage",
    "torch.storage UntypedStorage", "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_nested_tensor",
    "torch._utils _rebuild_wrapper_subclass", "torch Size", "torch Tensor", "torch device", "collections Counter",
    "collections OrderedDict", "builtins bytearray", "builtins set", "builtins eval", "os system",
    "numpy.core.multiarray _reconstruct",
)
# fmt: on


def _gzip(data: bytes, rng: Rng) -> bytes:
    inner = gzip.decompress(data)
    if rng.random() < 0.02:
        return gzip.compress(b'{"text": "' + _zeros(160) + b'"}\n', 9)
    return gzip.compress(_jsonl(inner, rng) if rng.random() < 0.8 else plain(inner, rng), 1)


def _zst(data: bytes, rng: Rng) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as raw:
        inner = raw.read(MOST_BYTES)
    if rng.random() < 0.02:
        return zstandard.compress(b'{"text": "' + _zeros(160) + b'"}\n', 1)
    return zstandard.compress(_jsonl(inner, rng) if rng.random() < 0.8 else plain(inner, rng), 1)


def _parquet(data: bytes, rng: Rng) -> bytes:
    """A table that lies about itself, or one of columns of other types and names."""
    return fuzz_thrift.lying(data, rng) if rng.random() < 0.6 else _retyped(rng)


def _retyped(rng: Rng) -> bytes:
    """Written from nothing: to read what was changed already may take any memory."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = rng.choice((0, 1, 4))
    record = {"Question": "q", "Options": {"A": "a", "B": "b"}, "Correct Option": "A", "Correct Answer": "a"}
    columns = {"text": ["a"] * rows, "source_dataset": ["b"] * rows, "id": ["1"] * rows, "data": [record] * rows}
    name = rng.choice([*columns, "extra"])
    made: list[Callable[[], Any]] = [
        lambda: pa.array([rng.choice((None, 1, 2**62)) for _ in range(rows)], pa.int64()),
        lambda: pa.array([rng.choice((b"\xff\xfe", b"", None)) for _ in range(rows)], pa.binary()),
        lambda: pa.array([rng.choice((b"\xff\xfe", b"ok")) for _ in range(rows)], pa.binary()).view(pa.string()),
        lambda: pa.array([rng.choice((2**62, -(2**62), None)) for _ in range(rows)], pa.timestamp("us", tz="Mars/X")),
        lambda: pa.array([2**62] * rows, pa.duration("s")),
        lambda: pa.array([2**30] * rows, pa.date32()),
        lambda: pa.array([float("nan")] * rows, pa.float64()),
        lambda: pa.array([[{"a": rng.choice(STRINGS[:4])}]] * rows),
        lambda: pa.array([{"Question": None, "x": [1]}] * rows),
        lambda: pa.array([{}] * rows, pa.struct([])),
        lambda: pa.nulls(rows),
        lambda: pa.array([[("k", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(["x" * (1 << rng.choice((4, 12, 20)))] * rows).dictionary_encode(),
    ]
    columns[name] = rng.choice(made)()
    if rng.random() < 0.2:
        columns.pop(rng.choice(list(columns)))
    repeat = rng.choice((1, 1, 1, 300)) if rows else 1
    table = pa.concat_tables([pa.table(columns)] * repeat)
    out = io.BytesIO()
    parquet.write_table(table, out, compression=rng.choice(("none", "snappy", "gzip", "zstd", "lz4", "brotli")))
    return out.getvalue()


KINDS: dict[str, Kind] = {
    "json": _json,
    "yaml": _yaml,
    "jsonl": _jsonl,
    "csv": _csv,
    "safetensors": _safetensors,
    "npy": _npy,
    "zip": _zip,
    "gzip": _gzip,
    "parquet": _parquet,
    "zst": _zst,
}
