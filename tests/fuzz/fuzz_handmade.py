"""Files that no change of a valid one is likely to hit on: made by someone who knows the format and means harm.

Out: `HANDMADE`, target -> a function that makes such files. All are small; what they ask for is not.
"""

from __future__ import annotations

import collections
import gzip
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import fuzz_thrift
import torch
from torch import Tensor


class _Code:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code ran",)


def _pt(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def _with(name: str, tensor: Any) -> dict[Any, Any]:
    """A TopK dictionary's tensors, as `fuzz_seeds` has them, one of them another."""
    sizes = {"encoder.weight": (10, 6), "encoder.bias": (10,), "decoder.weight": (6, 10), "b_dec": (6,)}
    state: dict[Any, Any] = {key: torch.ones(size) for key, size in sizes.items()}
    return state | {"k": torch.tensor(3), "threshold": torch.tensor(0.5), name: tensor}


def _repacked(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return out.getvalue()


def _lying_count(name: str, content: bytes) -> bytes:
    """Storages said to be 50,000 times as long as their records."""
    old = b"K\x06tq"
    return content.replace(old, b"J\x00\x00\x10\x00tq") if name.endswith(".pkl") else content


def pickles() -> list[bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and what is deprecated is what a stranger takes
        return _pickles()


def _pickles() -> list[bytes]:
    once = torch.ones(1)
    good = _pt(_with("b_dec", torch.ones(6)))
    return [
        _pt(_with("encoder.weight", once.expand(30_000, 30_000))),
        _pt(_with("encoder.weight", torch.empty(10, 6, device="meta"))),
        _pt(_with("encoder.weight", torch.sparse_coo_tensor(torch.tensor([[0], [0]]), once, (100_000, 100_000)))),
        _pt(_with("encoder.weight", torch.quantize_per_tensor(torch.ones(10, 6), 0.1, 0, torch.qint8))),
        _pt(_with("encoder.weight", torch.nested.nested_tensor([once, torch.ones(3)]))),
        _pt(_with("encoder.weight", torch.ones(10, 6, dtype=torch.complex64))),
        _pt(_with("k", torch.tensor(3j))),
        _pt(_with("k", torch.ones(3))),
        _pt(_with("k", torch.tensor(float("nan")))),
        _pt(_with(7, torch.ones(6))),  # type: ignore[arg-type]
        _pt(_with("", torch.ones(6))),
        _pt(_with("encoder.weight", torch.nn.Parameter(torch.ones(10, 6)))),
        _pt(_with("encoder.weight", _Code())),
        _pt(collections.Counter({"encoder.weight": 3})),
        _pt([once]),
        _pt(once),
        _pt(once.expand(10**12, 4)),
        _pt({0: torch.ones(3, 2)}),
        _pt({"a": torch.ones(3, 2), "b": {"c": once}}),
        _pt(torch.ones(2**40 // 2**38, 0)),
        _pt(_with("b_dec", torch.ones(6)), _use_new_zipfile_serialization=False),
        _repacked(good, _lying_count),
        _repacked(good, lambda name, data: data + bytes(160 << 20) if "/data/" in name else data, zipfile.ZIP_DEFLATED),
        _repacked(good, lambda name, data: data + bytes(160 << 20) if "pkl" in name else data, zipfile.ZIP_DEFLATED),
        pickle.dumps(_Code()),
        pickle.dumps({"encoder.weight": _Code()}, protocol=2),
        b"\x80\x02c__builtin__\neval\nX\x08\x00\x00\x001+1+1+1+\x85R.",
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.",
    ]


def _npz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _npy(descr: str, shape: str, body: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def arrays() -> list[bytes]:
    """.npy files."""
    return [
        _npy("'<f4'", "(1000000000000, 8)"),
        _npy("'<f4'", f"({2**62}, 0)"),
        _npy("'<f4'", f"(0, {2**62})"),
        _npy("'<f4'", f"({10**30}, 4)"),
        _npy("'<f4'", "(-1, 4)", bytes(64)),
        _npy("'|O'", "(2, 2)", pickle.dumps(_Code())),
        _npy("'<U400000000'", "(1, 1)"),
        _npy("[('a', '<f4')]", "(2, 2)", bytes(16)),
        _npy("'<c8'", "(2, 2)", bytes(32)),
        _npy("'>f4'", "(2, 2)", bytes(16)),
        _npy("'<f4'", "()", bytes(4)),
        _npy("'<f4'", "(2,2)'", bytes(16)),
        _npy("(" * 400, "(2, 2)"),
    ]


def zipped_arrays() -> list[bytes]:
    """.npz files: each of the above, and bombs."""
    bomb = _npy("'<f4'", f"({40 << 20}, 1)", bytes(160 << 20))
    return [
        *(_npz({"W_enc.npy": array}) for array in arrays()),
        _npz({"W_enc.npy": bomb}),
        _npz({"acts.npy": bomb, "b.npy": bomb}),
        _npz({"../escaped.npy": _npy("'<f4'", "(2, 2)", bytes(16))}),
        _npz({"raw": pickle.dumps(_Code())}),
        pickle.dumps(_Code()),
    ]


def safetensors(tensors: dict[str, tuple[str, list[int], int]], metadata: Any = None) -> bytes:
    """A file of zeros: name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def tensor_files() -> list[bytes]:
    wide, thin = 40_000, {"threshold": ("F32", [], 4), "k": ("I32", [], 4)}
    long = {"encoder.bias": ("F32", [wide], 4 * wide), "b_dec": ("F32", [wide], 4 * wide)}
    return [
        safetensors({"a": ("F32", [2**62, 0], 0)}),
        safetensors({"a": ("F32", [0, 2**62], 0)}),
        safetensors({"a": ("F8_E8M0", [2, 2], 4)}),
        safetensors({"a": ("F4", [2, 2], 2)}),
        safetensors({"a": ("C64", [2, 2], 32)}),
        safetensors({"a": ("F32", [], 4)}),
        safetensors({}),
        safetensors({}, {"a": "b"}),
        safetensors({"\ud800": ("F32", [1, 1], 4)}),
        safetensors({"a\nb": ("F32", [1, 1], 4), "\x1b[2J": ("I8", [1], 1)}),
        safetensors({f"t{n}": ("F32", [0], 0) for n in range(3000)}),
        # a small file, and a matrix of 40,000 by 40,000 to be made for it
        safetensors({"encoder.weight": ("F32", [wide, 1], 4 * wide), "decoder.weight": ("F32", [wide, 1], 4 * wide)}),
        safetensors(
            {
                "encoder.weight": ("F32", [wide, 1], 4 * wide),
                "decoder.weight": ("F32", [wide, 1], 4 * wide),
                "transcodes_to": ("I64", [], 8),
                **long,
                **thin,
            }
        ),
        safetensors({"W_enc": ("F32", [1, wide], 4 * wide), "W_dec": ("F32", [1, wide], 4 * wide), **thin}),
        (2**62).to_bytes(8, "little") + b"{}",
        (99_999_999).to_bytes(8, "little") + b"{}",
        b"\x02\0\0\0\0\0\0\0{}" * 9,
    ]


def matryoshka_files() -> list[bytes]:
    groups = 60_000
    sizes = torch.ones(groups, dtype=torch.int64)
    state: dict[str, Tensor] = {"W_enc": torch.ones(1, groups), "W_dec": torch.ones(groups, 1)}
    state |= {"b_enc": torch.ones(groups), "b_dec": torch.ones(1), "k": torch.tensor(3), "threshold": torch.tensor(1.0)}
    from safetensors.torch import save

    return [save(state | {"group_sizes": sizes}), save(state | {"group_sizes": torch.tensor([2**62, 2**62])})]


def unfolding() -> list[bytes]:
    """YAML that is short, and long when it is read."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    merges = ["m0: &m0 {k: 1}"] + [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}, *m{n - 1}]}}" for n in range(1, 26)]
    spec = "dictionaries: [{architecture: top_k, hook_point: a, width: 8, sparsity: {k: 1}, settings: {a: *a11}}]"
    return ["\n".join([*lines, spec]).encode(), "\n".join([*merges, "k: 1"]).encode(), b"a: &a [*a]\nk: *a\n"]


WIDE = [b'{"text": "a", "x": [' + inner * 1_900_000 + b"0]}\n" for inner in (b"{},", b'{"a":0},', b"[[0]],")]


def compressed_lines() -> list[bytes]:
    zeros = bytes(200 << 20)
    return [
        *(gzip.compress(line, 9) for line in WIDE),
        gzip.compress(b'{"text": "' + zeros.replace(b"\0", b"a") + b'"}', 9),
        b"\x1f\x8b\x08\x00",
    ]


def zstandard_lines() -> list[bytes]:
    import zstandard

    wide = zstandard.ZstdCompressionParameters(window_log=30, write_content_size=False)
    return [
        zstandard.compress(b'{"text": "' + b"a" * (200 << 20) + b'"}', 1),
        zstandard.compress(b'{"text": "a"}\n' * 9_000_000, 1),
        zstandard.ZstdCompressor(compression_params=wide).compress(b'{"text": "a"}\n' * 99),
        *(zstandard.compress(line, 1) for line in WIDE),
        zstandard.compress(b'{"text": 5}\n{"text": "\\ud800"}'),
        zstandard.compress(b'{"text": "\\ud800"}\n{"text": "' + b"a" * 70_000),
    ]


def lines() -> list[bytes]:
    deep = "[" * 900 + "]" * 900
    return [
        b'{"text": "\\ud800 alone"}\n',
        b'{"text": "a", "source_dataset": ' + deep.encode() + b"}\n",
        b'{"text": "a", "source_dataset": "\\ud800"}\n',
        b'{"step": 9, "trainer": "trainer_0", "x": ' + b"[" * 100_000 + b"\n",
        b"[" * 100_000 + b"\n",
        b'{"text": 5}\n',
        b'{"texts": "' + b"x" * 50_000 + b'"}\n',
        ("{" + ", ".join(f'"text{n}": 1' for n in range(5000)) + "}\n").encode(),
    ]


def questions() -> list[bytes]:
    options = {"A": "a", "B": "b", "C": "c", "D": "d"}
    marks = "a" + "\u0300\u0316" * 60_000
    data = {"Question": marks, "Options": options, "Correct Option": "A", "Context": ["c"], "Long Answer": "l"}
    flat = {"question": marks, "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1, "exp": "(ref" + " " * 60_000}
    return [json.dumps({"id": "1", "data": data, **flat}).encode() + b"\n", *lines()]


def tables() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def made(columns: Any, **options: Any) -> bytes:
        out = io.BytesIO()
        parquet.write_table(pa.table(columns), out, **options)
        return out.getvalue()

    def humbled(columns: Any, **options: Any) -> bytes:
        return fuzz_thrift.humbled(made(columns, use_dictionary=False, **options))

    long = "x" * (1 << 20)
    lists = pa.ListArray.from_arrays(
        pa.array([0, 100_000], pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array([long])),
    )
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([long]))
    return [
        made({"text": repeated}, compression="zstd"),  # 3 GB in a few kilobytes
        made({"text": ["y" * (160 << 20)]}, compression="zstd", use_dictionary=False),
        made({"text": pa.nulls(3_000_000, pa.string())}),
        made({"text": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())}),
        made({"text": pa.array([2**62], pa.timestamp("us", tz="Mars/Olympus"))}),
        made({"data": pa.array([2**62], pa.timestamp("us"))}),
        # the same in other ways, by files whose footers call them small
        humbled({"text": ["y" * (160 << 20)]}, compression="zstd"),
        humbled({"text": [f"{long}{n % 7}" for n in range(300)]}, column_encoding={"text": "DELTA_BYTE_ARRAY"}),
        humbled({"data": pa.array([0] * 20_000_000, pa.int64())}, compression="zstd", data_page_size=1 << 30),
        fuzz_thrift.humbled(made({"text": repeated}, compression="zstd")),
        fuzz_thrift.humbled(made({"text": ["a"], "data": lists})),
    ]


HANDMADE: dict[str, Callable[[], list[bytes]]] = {
    "config_yaml": unfolding,
    "demo_config": unfolding,
    "sae_config": unfolding,
    "dictionary_pickle": pickles,
    "package_pickle": pickles,
    "activations_pickle": pickles,
    "activations_npy": arrays,
    "activations_npz": zipped_arrays,
    "gemma_scope_npz": zipped_arrays,
    "matryoshka_tensors": lambda: [*tensor_files(), *matryoshka_files()],
    "harvest_shard": tensor_files,
    "zscores": tensor_files,
    "corpus_gzip": compressed_lines,
    "corpus_jsonl": lines,
    "corpus_zst": zstandard_lines,
    "metrics_jsonl": lines,
    "corpus_parquet": tables,
    "records_parquet": tables,
    "analysis_table": tables,
    "analysis_examples": tensor_files,
    **{f"{name}_tensors": tensor_files for name in ("dictionary", "saelens", "sparsify", "activations", "state")},
    **{f"records_{name}": questions for name in ("medqa", "medmcqa", "pubmedqa", "mmlu_college_medicine")},
}
