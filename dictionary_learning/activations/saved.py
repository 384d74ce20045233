"""Activations without a language model: tensors that someone else made, or that lie on the disk.

In: an iterable of tensors (`TensorStream`), or a file or folder of saved activations (`SavedActivations`). Out: the
`ActivationBatch`es that the buffer eats, as from a language model but without provenance.

Files are mapped into memory and read a block of rows at a time, so that a folder larger than the memory needs little of
it. A seed permutes the blocks and the rows within each: a block is read in one piece, the buffer mixes the blocks, and
the number of the next block is all that a resume needs.
"""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.types import ActivationBatch
from dictionary_learning.errors import UserError, did_you_mean


class TensorStream:
    """An `ActivationSource` over tensors [N, d], or dicts of hook point -> [N, d], from any iterable.

    The first batch is read at once, to learn what is coming; a later batch with more rows is handed out in parts.

    Args:
        batches: to resume from a one-shot iterator, pass a fresh one that repeats the stream from its start.
        name: of the hook point, where the batches are tensors.
        widths: hook point -> d, as expected; None accepts those of the first batch.

    Raises:
        UserError: no rows; here or while iterating, a batch that is not 2-D, or of other hook points, width or dtype.
    """

    def __init__(
        self,
        batches: Iterable[Tensor | Mapping[str, Tensor]],
        name: str = "activations",
        widths: dict[str, int] | None = None,
    ) -> None:
        self._source, self._name = batches, name
        self.widths: dict[str, int] = widths or {}
        self.max_rows = 0
        self._start()

    def _start(self) -> None:
        parts = self._parts()
        first = next(parts, None)
        if first is None:
            raise UserError("The stream of activations holds no rows.")
        self.dtype = next(iter(first.values())).dtype
        self._ahead = itertools.chain([first], parts)
        self._taken = 0  # parts handed out

    def _parts(self) -> Iterator[dict[str, Tensor]]:
        described = None
        for number, batch in enumerate(self._source):
            named = dict(batch) if isinstance(batch, Mapping) else {self._name: batch}
            found = _described(named, f"Batch {number} of the activations")
            described = described or (self.widths or found[0], found[1])
            if found != described:
                raise UserError(f"Batch {number} of the activations has {_shown(found)}, expected {_shown(described)}.")
            self.widths = found[0]
            self.max_rows = self.max_rows or _rows(named)
            for at in range(0, _rows(named), max(self.max_rows, 1)):
                yield {name: acts[at : at + self.max_rows] for name, acts in named.items()}

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        part = next(self._ahead)
        self._taken += 1
        return ActivationBatch(part)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip what was handed out. Raises UserError where a one-shot iterator is past it, or the stream too short."""
        if iter(self._source) is not self._source:  # it can be read again
            self._start()
        if self._taken > state["batches"]:
            raise UserError("The stream of activations is past the saved position: pass a fresh iterator to resume.")
        while self._taken < state["batches"]:
            if next(self, None) is None:
                raise UserError(f"The stream of activations ends before the {state['batches']} batches used up.")


class _Block(NamedTuple):
    file: Path
    start: int
    stop: int


class SavedActivations:
    """An `ActivationSource` over saved rows: a .safetensors file, a .pt file, or a folder of .safetensors shards.

    A file holds one tensor [N, d], or one for each hook point with equal N. The rows of a folder are those of its
    shards in the order of file names; every shard has the same hook points, widths and dtype.

    Args:
        batch_rows: rows of a block, which is what is read and handed out at once (`max_rows`).
        seed: permutes the blocks of each epoch, and the rows within a block; None keeps the order of the files.
        epochs: passes over the rows; None repeats them for ever.

    Raises:
        UserError: nothing there or no rows in it, an unreadable file, shards that do not fit together, a tensor that
            is not 2-D; while iterating, a row that is not finite.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        batch_rows: int = 4096,
        seed: int | None = None,
        epochs: int | None = 1,
    ) -> None:
        if batch_rows < 1 or (epochs is not None and epochs < 1):
            raise UserError(f"batch_rows and epochs must be at least 1, got {batch_rows} and {epochs}.")
        self.max_rows, self.seed, self.epochs = batch_rows, seed, epochs
        self._blocks: list[_Block] = []
        self._opened: tuple[Path | None, dict[str, Any]] = (None, {})
        self.rows = 0
        described = None
        for file in _files(Path(path).expanduser()):
            found = _described(self._open(file), f"'{file}'")
            described = described or found
            if found != described:
                raise UserError(f"'{file}' has {_shown(found)}, the shards before it {_shown(described)}.")
            rows = _rows(self._open(file))
            self._blocks += [_Block(file, at, min(at + batch_rows, rows)) for at in range(0, rows, batch_rows)]
            self.rows += rows
        if described is None or not self.rows:
            raise UserError(f"The saved activations '{path}' hold no rows.")
        self.widths, self.dtype = described
        self._taken = 0  # blocks handed out, in all epochs

    def _open(self, file: Path) -> dict[str, Any]:
        """Hook point -> what can be sliced by rows. The last file stays open."""
        if self._opened[0] != file:
            self._opened = (file, _tensors(file))
        return self._opened[1]

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        epoch, number = divmod(self._taken, len(self._blocks))
        if self.epochs is not None and epoch >= self.epochs:
            raise StopIteration
        if self.seed is not None:
            number = int(np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks))[number])
        block = self._blocks[number]
        acts = {name: tensor[block.start : block.stop] for name, tensor in self._open(block.file).items()}
        for name, rows in acts.items():
            _check_finite(rows, name, block)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch, number]).permutation(block.stop - block.start)
            acts = {name: rows[torch.from_numpy(order)] for name, rows in acts.items()}
        self._taken += 1
        return ActivationBatch(acts)

    def state_dict(self) -> dict[str, Any]:
        return {"blocks": self._taken, "rows": self.rows, "batch_rows": self.max_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the files or `batch_rows` changed: the saved position would be another place."""
        if (state["rows"], state["batch_rows"]) != (self.rows, self.max_rows):
            raise UserError(
                f"The saved position is in {state['rows']:,} rows read {state['batch_rows']:,} at a time, "
                f"but now there are {self.rows:,} rows, {self.max_rows:,} at a time."
            )
        self._taken = state["blocks"]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        shards = sorted(path.glob("*.safetensors"))
        if not shards:
            raise UserError(f"The folder '{path}' holds no .safetensors shard of activations.")
        return shards
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"The saved activations '{path}' do not exist.{did_you_mean(path.name, beside)}")
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"The saved activations '{path}' are neither .safetensors nor .pt nor a folder of shards.")
    return [path]


def _tensors(file: Path) -> dict[str, Any]:
    """Hook point -> tensor, or slice of a file, of which only the rows asked for are read."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"The saved activations '{file}' are not readable: {str(error).splitlines()[0]}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"The saved activations '{file}' hold something else than tensors.") from error
    return dict(loaded) if isinstance(loaded, Mapping) else {"activations": loaded}


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())


def _rows(tensors: Mapping[str, Any]) -> int:
    return _shape(next(iter(tensors.values())))[0]


def _shown(described: tuple[dict[str, int], torch.dtype]) -> str:
    return f"widths {described[0]} in {described[1]}"


def _described(tensors: Mapping[str, Any], where: str) -> tuple[dict[str, int], torch.dtype]:
    """Widths and dtype of activations. Raises UserError for anything but 2-D floating-point tensors with equal rows."""
    widths, dtypes, counts = {}, set(), set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not hasattr(tensor, "get_shape"):
            raise UserError(f"{where}: '{name}' is {type(tensor).__name__}, expected a tensor [rows, width].")
        shape = _shape(tensor)
        if len(shape) != 2:
            raise UserError(f"{where}: '{name}' has shape {shape}, expected [rows, width].")
        # A slice of a file tells its type by a name; an empty piece of it is a tensor.
        dtypes.add(tensor.dtype if isinstance(tensor, Tensor) else tensor[:0].dtype)
        widths[str(name)] = shape[1]
        counts.add(shape[0])
    if len(counts) != 1 or len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise UserError(
            f"{where} should hold floating-point tensors of one type with equal numbers of rows, got "
            f"{', '.join(map(str, dtypes)) or 'nothing'} with {', '.join(map(str, counts)) or 'no'} rows."
        )
    return widths, dtypes.pop()


def _check_finite(rows: Tensor, name: str, block: _Block) -> None:
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"'{block.file}' has a NaN or an infinity in row {block.start + int(bad[0])} of '{name}' ({len(bad)} such "
            f"row{'s' if len(bad) > 1 else ''} of {len(rows)} read): leave it out and try again."
        )
