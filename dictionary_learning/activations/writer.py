"""Writing activations as shards: batches in, a folder with a manifest out, whole after every shard.

    manifest.json                    model, hook points, corpus, settings, and of each shard its rows and SHA-256
    shard-00000.safetensors          one tensor [rows, width] for each hook point
    tokens/shard-00000.safetensors   document, position, token, corpus and context of the same rows
    README.md                        a dataset card, written at the end

A shard is written when it is full, always at the end of a batch, and the manifest after it, with the state of the
stream at that place. Whatever moment the process is killed at, the manifest on disk describes whole shards, and a
harvest that goes on from it writes the same bytes as one that was never interrupted. So that this can be tested to the
byte, nothing in the folder depends on the time or the machine.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dictionary_learning import storage
from dictionary_learning.activations.shards import (
    COLUMNS,
    COMPLETE,
    HARVESTING,
    MANIFEST,
    TOKENS,
    file_sha256,
    manifest_files,
)
from dictionary_learning.activations.types import ActivationBatch
from dictionary_learning.errors import UserError
from dictionary_learning.untrusted import shown

_PROVENANCE_DTYPES = dict.fromkeys(COLUMNS, torch.int32) | {"document": torch.int64}
BYTES_OF_PROVENANCE = sum(torch.empty((), dtype=dtype).element_size() for dtype in _PROVENANCE_DTYPES.values())
MOST_PENDING = 64 << 20  # bytes of tokens read and not handed out: those of one document are kept
_ROOM = 64 * 2**20  # bytes that a disk should have left beyond a shard


class ShardWriter:
    """Collects batches into shards of at least `shard_rows` rows (of whole batches) in `folder`.

    Args:
        header: the part of the manifest that is known before the first row, "max_rows" among it.
        manifest: that of an earlier, unfinished harvest in `folder` to go on with, whose files are there.

    Attributes:
        rows, documents: of what was added. state: of the stream behind the last shard, or None.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], shard_rows: int, manifest: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.shard_rows = folder, shard_rows
        self._header = dict(header)
        self._shards: list[dict[str, Any]] = list(manifest["shards"]) if manifest else []
        self.rows = sum(shard["rows"] for shard in self._shards)
        self.documents = manifest["documents"] if manifest else 0
        self.state = unpack_state(manifest["state"]) if manifest and self._shards else None
        self._acts: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._batches: list[int] = []
        if manifest is None:
            self._write_manifest(HARVESTING, None)
        for leftover in (
            *folder.glob(".*.safetensors.*"),
            *folder.glob(f"{TOKENS}/.*"),
            *folder.glob(f".{MANIFEST}.*"),
        ):
            leftover.unlink()  # of a process that was killed while it wrote

    def add(self, batch: ActivationBatch) -> None:
        """Append the rows of a batch, which must carry their provenance.

        Raises:
            UserError: a row is not finite.
        """
        assert batch.provenance is not None
        columns = dict(zip(COLUMNS, batch.provenance, strict=True))
        start = sum(self._batches)
        stop = start + len(batch.provenance.document_N)
        for name, acts in batch.acts.items():
            if not torch.isfinite(acts).all():
                bad = int((~torch.isfinite(acts).all(dim=1)).nonzero()[0])
                raise UserError(
                    f"The activations of '{name}' hold a NaN or an infinity (document "
                    f"{int(batch.provenance.document_N[bad])}, position {int(batch.provenance.position_N[bad])}): "
                    "harvest in another --dtype, or drop such rows with --max_activation_norm_multiple."
                )
        for buffers, given in ((self._acts, batch.acts), (self._tokens, columns)):
            for name, rows in given.items():
                if name not in buffers:  # allocated once; a batch that overfills a shard must fit behind it
                    most = self.shard_rows + self._header["max_rows"]
                    dtype = _PROVENANCE_DTYPES[name] if buffers is self._tokens else rows.dtype
                    buffers[name] = torch.empty((most, *rows.shape[1:]), dtype=dtype)
                buffers[name][start:stop].copy_(rows)
        self._batches.append(stop - start)
        self.rows += stop - start
        self.documents = max(self.documents, int(batch.provenance.document_N.max()) + 1)

    @property
    def full(self) -> bool:
        """Whether the shard should be written now."""
        return sum(self._batches) >= self.shard_rows

    def flush(self, state: Mapping[str, Any]) -> None:
        """Write the collected rows as a shard, and the manifest with the state of the stream behind them.

        Raises:
            UserError: the disk is full or can't be written.
        """
        rows = sum(self._batches)
        if rows:
            name = f"shard-{len(self._shards):05d}.safetensors"
            tensors = {key: buffer[:rows] for key, buffer in self._acts.items()}
            tokens = {key: buffer[:rows] for key, buffer in self._tokens.items()}
            needed = sum(t.nbytes for t in (*tensors.values(), *tokens.values())) + _ROOM
            with said_of(self.folder):
                if shutil.disk_usage(self.folder).free < needed:
                    raise UserError(
                        f"The disk of '{self.folder}' is full after {self.rows - rows:,} saved rows: free some space "
                        "and run the same command again, and it goes on."
                    )
                storage.write_tensors(self.folder / TOKENS / name, tokens)
                storage.write_tensors(self.folder / name, tensors)
                entry = {"file": name, "rows": rows, **_facts(self.folder / name), "batches": self._batches}
            self._shards.append({**entry, "tokens": _facts(self.folder / TOKENS / name)})
            self._batches = []
        self._write_manifest(HARVESTING, state)

    def finish(self, state: Mapping[str, Any], corpora: list[str]) -> dict[str, Any]:
        """Write what is left and mark the harvest as complete; its manifest."""
        if self._batches:
            self.flush(state)
        return self._write_manifest(COMPLETE, None, corpora)

    def _write_manifest(
        self, status: str, state: Mapping[str, Any] | None, corpora: list[str] | None = None
    ) -> dict[str, Any]:
        manifest = {
            **self._header,
            "status": status,
            "rows": sum(shard["rows"] for shard in self._shards),
            "documents": self.documents,
            "corpora": corpora,
            "shards": self._shards,
            "state": None if state is None else pack_state(state),
        }
        with said_of(self.folder):
            storage.write_json(self.folder / MANIFEST, manifest)
        return manifest


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def pack_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of `LanguageModelActivations` as JSON: its one tensor (tokens read, not handed out) compressed."""
    pending = state["contexts"]["pending"]
    data = base64.b64encode(zlib.compress(pending.numpy().astype("<i8").tobytes(), 9)).decode()
    return {**state, "contexts": {**state["contexts"], "pending": {"shape": list(pending.shape), "zlib": data}}}


def unpack_state(packed: Mapping[str, Any]) -> dict[str, Any]:
    """What `pack_state` packed. Raises UserError where it is damaged."""
    try:
        pending = packed["contexts"]["pending"]
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(pending["zlib"]), MOST_PENDING)
        if inflater.unconsumed_tail:
            raise ValueError(f"its tokens unpack to more than {MOST_PENDING >> 20} MiB")
        numbers = np.frombuffer(data, dtype="<i8")
        tensor = torch.from_numpy(numbers.astype(np.int64).reshape(pending["shape"]))
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
        why = shown(error, 200)
        raise UserError(f"The state in {MANIFEST} is damaged ({why}): harvest into a new folder.") from error
    return {**packed, "contexts": {**packed["contexts"], "pending": tensor}}


# ---------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def said_of(folder: Path) -> Iterator[None]:
    """Turn the system's refusals inside the block into one sentence about `folder`."""
    from safetensors import SafetensorError  # as which a disk that is full comes out of save_file

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{folder}' can't be written ({getattr(error, 'strerror', None) or error}).") from error


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """See that the files of an unfinished harvest are there in full.

    Raises:
        UserError: names the first that is not.
    """
    for name, size in manifest_files(manifest).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(
                f"'{file}' is missing or cut, and the harvest can't go on: restore it, or give a new folder."
            )
