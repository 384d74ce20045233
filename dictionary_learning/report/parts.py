"""The lazy parts of the page: bytes that a browser unpacks when they are asked for.

In: JSON values and arrays. Out: inert script elements that hold base64 of gzip, which no text can break out of.

Numbers are columns, and the bytes of a column are transposed (all first bytes, then all second bytes, ...), since the
high bytes of neighbouring numbers are alike: gzip then takes half of the room that it takes for plain arrays. JSON of
the same numbers would be three times as long and slower to read.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

LEVEL = 5  # of gzip: 6 takes twice as long for 1 % less
TYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "f2": np.float16, "f4": np.float32}


def packed_json(value: Any) -> bytes:
    """JSON as the parts hold it: ASCII only, so that lone surrogates survive, and strict."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def packed_columns(meta: Any, columns: Mapping[str, np.ndarray]) -> bytes:
    """Arrays of any shape, flattened, behind what describes them: [length of the JSON, u32][JSON][columns].

    Args:
        meta: JSON that goes with them.
        columns: arrays of the types in `TYPES`.
    """
    names = {np.dtype(kind): name for name, kind in TYPES.items()}
    described, payload = [], []
    for name, array in columns.items():
        flat = np.ascontiguousarray(array).ravel()
        described.append([name, names[flat.dtype], flat.size])
        payload.append(flat.view(np.uint8).reshape(flat.size, flat.itemsize).T.tobytes())
    head = packed_json({"meta": meta, "columns": described})
    return b"".join([np.uint32(len(head)).tobytes(), head, *payload])


def compressed(parts: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Part name -> base64 of its gzip. zlib lets go of the interpreter, so two threads do it in half the time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(pool.map(_compress, parts))


def _compress(part: tuple[str, bytes]) -> tuple[str, str]:
    name, data = part
    return name, base64.b64encode(gzip.compress(data, LEVEL, mtime=0)).decode("ascii")


def element(name: str, text: str) -> str:
    """The element of a part. Its name is ours (`d0/table`), its text base64: neither needs escaping."""
    return f'<script type="text/plain" id="{name}">{text}</script>\n'
