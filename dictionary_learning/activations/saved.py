"""Activations without a language model: tensors that someone else made, or that lie on the disk.

In: an iterable of tensors (`TensorStream`), or a file, a folder or a Hub dataset of saved activations
(`SavedActivations`). Out: the `ActivationBatch`es that the buffer eats, as from a language model.

Files are mapped into memory and read a block of rows at a time, so that a folder larger than the memory needs little of
it. The blocks of a harvest are the batches that it harvested: a buffer over them is filled as it was from the model. A
seed permutes the blocks and the rows within each: a block is read in one piece, the buffer mixes the blocks, and the
number of the next block is all that a resume needs.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.loader import ActivationLoader
from dictionary_learning.activations.shards import COLUMNS, described_tensors, open_shards, rows_of, shown
from dictionary_learning.activations.statistics import RunningMoments, ZScore
from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.errors import UserError

BLOCK_ROWS = 4096  # of files that do not say how they were harvested


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
            found = described_tensors(named, f"Batch {number} of the activations")
            described = described or (self.widths or found[0], found[1])
            if found != described:
                raise UserError(f"Batch {number} of the activations has {shown(found)}, expected {shown(described)}.")
            self.widths = found[0]
            self.max_rows = self.max_rows or _rows_of(named)
            for at in range(0, _rows_of(named), max(self.max_rows, 1)):
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
    shard: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class SavedActivations:
    """An `ActivationSource` over saved rows: a .safetensors, .pt, .npy or .npz file, a folder of shards, or those in a
    dataset on the Hub.

    A file holds one tensor [N, d], or one for each hook point with equal N. The rows of a folder are those of its
    shards in the order of file names (of a harvest: in that of its manifest); every shard has the same hook points,
    widths and dtype. Rows of a harvest come with their provenance.

    Args:
        path: a file, a folder, or `hf://user/name[@revision]`, of which a shard is downloaded when it is first read.
        batch_rows: rows of a block, which is what is read and handed out at once (`max_rows`). None takes the batches
            as they were harvested, or 4,096 rows where the files don't say.
        seed: permutes the blocks of each epoch, and the rows within a block; None keeps the order of the files.
        epochs: passes over the rows; None repeats them for ever.
        first_rows: only the first so many rows, in the order of the files.
        non_finite: what to do with a row that holds a NaN or an infinity at any hook point: "error" names it, "drop"
            leaves it out and counts it in `rows_not_finite`.
        verify: compare each shard of a harvest with its checksum when it is first opened.

    Attributes:
        widths, dtype, max_rows: as `ActivationSource` has them. rows: in one epoch.
        manifest: of the harvest, or None. revision: the commit of a Hub dataset, or None.
        rows_not_finite: {hook point: rows of it left out so far}.

    Raises:
        UserError: nothing there or no rows in it, an unreadable file, shards that do not fit together, a tensor that
            is not 2-D; while iterating, a row that is not finite, or a checksum that does not hold.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        batch_rows: int | None = None,
        seed: int | None = None,
        epochs: int | None = 1,
        first_rows: int | None = None,
        non_finite: str = "error",
        verify: bool = True,
    ) -> None:
        for name, count in (("batch_rows", batch_rows), ("epochs", epochs), ("first_rows", first_rows)):
            if count is not None and count < 1:
                raise UserError(f"{name} must be at least 1, got {count}.")
        if non_finite not in ("error", "drop"):
            raise UserError(f"non_finite is 'error' or 'drop', got '{non_finite}'.")
        found = open_shards(path)
        self.seed, self.epochs, self.non_finite, self.verify = seed, epochs, non_finite, verify
        self.widths, self.dtype = found.widths, found.dtype
        self.manifest, self.revision = found.manifest, found.revision
        self.max_rows = batch_rows or found.max_rows or BLOCK_ROWS
        self._shards = found.shards
        blocks = []
        for number, shard in enumerate(found.shards):
            cuts = [0, *itertools.accumulate(shard.batches)]
            if batch_rows is not None or not shard.batches:
                cuts = [*range(0, shard.rows, self.max_rows), shard.rows]
            blocks += [_Block(number, start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]
        rows = sum(block.rows for block in blocks)
        if not rows:
            raise UserError(f"The saved activations '{path}' hold no rows.")
        if first_rows is not None and first_rows > rows:
            raise UserError(f"The saved activations '{path}' hold {rows:,} rows, fewer than the {first_rows:,} asked.")
        self._verified: set[int] = set()  # shards whose checksums hold; shared with the parts of a split
        self._zscores: dict[str, ZScore] = {}
        self._set_blocks(_cut(blocks, [first_rows or rows])[0])

    def _set_blocks(self, blocks: list[_Block]) -> None:
        self._blocks = blocks
        self.rows = sum(block.rows for block in blocks)
        self.rows_not_finite = dict.fromkeys(self.widths, 0)
        self._taken = 0  # blocks handed out, in all epochs
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))  # of the blocks, in an epoch
        self._opened: tuple[int, dict[str, Any], dict[str, Any]] = (-1, {}, {})  # shard, its rows, their provenance
        place = ([(shard.rows, shard.sha256) for shard in self._shards], [tuple(block) for block in blocks])
        self._fingerprint = hashlib.sha256(repr(place).encode()).hexdigest()[:16]

    def _copy(self, blocks: list[_Block]) -> SavedActivations:
        other = copy.copy(self)
        other._set_blocks(blocks)
        return other

    # ------------------------------------------------------------------------------------------- reading

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        for _ in range(len(self._blocks) + 1):  # a block all of whose rows are dropped has nothing to give
            epoch, number = divmod(self._taken, len(self._blocks))
            if self.epochs is not None and epoch >= self.epochs:
                raise StopIteration
            number = self._number(epoch, number)
            block = self._blocks[number]
            acts, provenance = self._read(block)
            keep = None
            if self.seed is not None:
                order = np.random.default_rng([self.seed, epoch, number]).permutation(block.rows)
                keep = torch.from_numpy(order)
            finite = self._finite_rows(acts, block)
            if not finite.all():
                keep = finite.nonzero().flatten() if keep is None else keep[finite[keep]]
            self._taken += 1
            if keep is not None and not len(keep):
                continue
            if keep is not None:
                acts = {name: rows[keep] for name, rows in acts.items()}
                provenance = None if provenance is None else Provenance(*(column[keep] for column in provenance))
            for name, zscore in self._zscores.items():
                acts[name] = zscore.apply(acts[name])
            return ActivationBatch(acts, provenance)
        raise UserError(f"None of the {self.rows:,} saved rows is finite: there is nothing to read.")

    def _number(self, epoch: int, number: int) -> int:
        """The block that is read as `number` of an epoch."""
        if self.seed is None:
            return number
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks)))
        return int(self._order[1][number])

    def _read(self, block: _Block) -> tuple[dict[str, Tensor], Provenance | None]:
        if self._opened[0] != block.shard:  # the last shard stays open
            shard, verify = self._shards[block.shard], self.verify and block.shard not in self._verified
            rows = shard.open(verify)
            found, wanted = described_tensors(rows, f"'{shard.name}'"), (self.widths, self.dtype)
            if rows_of(rows) != shard.rows:  # what the manifest says
                raise UserError(f"The shard '{shard.name}' has {rows_of(rows):,} rows, expected {shard.rows:,}.")
            if found != wanted:
                raise UserError(f"The shard '{shard.name}' has {shown(found)}, expected {shown(wanted)}.")
            tokens = {} if shard.tokens is None else shard.tokens.open(verify)
            lengths = {tuple(t.get_shape()) for t in tokens.values()}
            whole = {t.get_dtype() for t in tokens.values()} <= {"I64", "I32"}
            if shard.tokens is not None and (set(tokens) != set(COLUMNS) or lengths != {(shard.rows,)} or not whole):
                raise UserError(f"The shard '{shard.tokens.name}' is not the provenance of {shard.rows:,} rows.")
            self._opened = (block.shard, rows, tokens)
            self._verified.add(block.shard)
        _, rows, tokens = self._opened
        acts = {name: rows[name][block.start : block.stop] for name in self.widths}
        if not tokens:
            return acts, None
        return acts, Provenance(*(tokens[name][block.start : block.stop].long() for name in COLUMNS))

    def _finite_rows(self, acts: dict[str, Tensor], block: _Block) -> Tensor:
        """Which rows are finite at every hook point [N]; the others are counted, or named in an error."""
        everywhere = torch.ones(block.rows, dtype=torch.bool)
        for name, rows in acts.items():
            finite = torch.isfinite(rows).all(dim=1)
            bad = (~finite).nonzero().flatten()
            if len(bad) and self.non_finite == "error":
                shard, row = self._shards[block.shard].name, block.start + int(bad[0])
                raise UserError(
                    f"'{shard}' has a NaN or an infinity in row {row} of '{name}' (rows like it: {len(bad)} of "
                    f"{len(rows)} read): leave them out with non_finite='drop' (--drop_non_finite)."
                )
            self.rows_not_finite[name] += len(bad)
            everywhere &= finite
        return everywhere

    # ------------------------------------------------------------------------------------------- what to make of it

    def loader(
        self, batch_size: int, *, device: torch.device | str = "cpu", drop_last: bool = False
    ) -> ActivationLoader:
        """Plain batches [B, d] on a device, pinned on their way to a GPU: data for `trainSAE`."""
        return ActivationLoader(self, batch_size, device=device, drop_last=drop_last)

    def split(self, fractions: Mapping[str, float], *, seed: int = 0) -> dict[str, SavedActivations]:
        """Disjoint parts, as `split({"train": 0.9, "validation": 0.1})`, which together are all rows.

        Whole blocks (neighbours in text) go to one part, chosen by the seed; where a fraction ends within a block, that
        block is cut, so that every part has its share of the rows to the row.

        Raises:
            UserError: fractions that are not positive or do not sum to 1; a part without a row.
        """
        named = ", ".join(f"{name} {fraction:g}" for name, fraction in fractions.items())
        if not all(fraction > 0 for fraction in fractions.values()) or not math.isclose(
            sum(fractions.values()), 1.0, abs_tol=1e-6
        ):
            total = sum(fractions.values())
            raise UserError(
                f"The fractions of a split must be positive and sum to 1: {named or 'none'} sum to {total:g}."
            )
        order = np.random.default_rng(seed).permutation(len(self._blocks))
        ends = [round(share * self.rows) for share in itertools.accumulate(fractions.values())]
        ends[-1] = self.rows
        sizes = [stop - start for start, stop in itertools.pairwise([0, *ends])]
        for name, size in zip(fractions, sizes, strict=True):
            if size < 1:
                raise UserError(
                    f"The part '{name}' of {self.rows:,} rows has no row: give it a larger fraction ({named})."
                )
        parts = _cut([self._blocks[number] for number in order], sizes)
        return {name: self._copy(sorted(part)) for name, part in zip(fractions, parts, strict=True)}

    def measure(self) -> dict[str, RunningMoments]:
        """Mean and variance of every hook point over one pass of these rows, which does not move this source.

        Rows that are not finite at some hook point are left out, dimensions that never change are found; either is said
        in a warning.
        """
        rows = self._copy(self._blocks)
        rows.seed, rows.epochs, rows.non_finite = None, 1, "drop"
        moments = {name: RunningMoments(width) for name, width in self.widths.items()}
        for batch in rows:
            for name, acts in batch.acts.items():
                moments[name].update(acts)
        for name, count in rows.rows_not_finite.items():
            moments[name].rows_not_finite += count
            if said := moments[name].report(name):
                warnings.warn(f"Activations of {said}", stacklevel=2)
        return moments

    def normalized(self, zscores: Mapping[str, ZScore]) -> SavedActivations:
        """The same rows from their start, each hook point by its z-score: `train.normalized({n: m.zscore() for n, m in
        train.measure().items()})`. A validation part takes the z-scores of the training part.

        Raises:
            UserError: z-scores of other hook points or widths; rows that are normalised already.
        """
        if self._zscores:
            raise UserError("These activations are normalised already.")
        widths = {name: len(zscore.mean_D) for name, zscore in zscores.items()}
        if widths != self.widths:
            raise UserError(f"The z-scores have widths {widths}, the saved activations {self.widths}.")
        other = self._copy(self._blocks)
        other._zscores = dict(zscores)
        return other

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": self._taken,
            "rows": self.rows,
            "batch_rows": self.max_rows,
            "files": self._fingerprint,
            "rows_not_finite": dict(self.rows_not_finite),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where files, split or `batch_rows` changed: the saved position would be another place."""
        if (state["rows"], state["batch_rows"]) != (self.rows, self.max_rows):
            raise UserError(
                f"The saved position is in {state['rows']:,} rows read {state['batch_rows']:,} at a time, "
                f"but now there are {self.rows:,} rows, {self.max_rows:,} at a time."
            )
        if state["files"] != self._fingerprint:
            raise UserError("The saved position is in other files, or in another part of them, than these activations.")
        self._taken, self.rows_not_finite = state["blocks"], dict(state["rows_not_finite"])


def _rows_of(tensors: Mapping[str, Tensor]) -> int:
    return len(next(iter(tensors.values())))


def _cut(blocks: list[_Block], sizes: list[int]) -> list[list[_Block]]:
    """Consecutive parts of `sizes` rows, cutting a block where a part ends within it; rows beyond are left out."""
    parts: list[list[_Block]] = []
    queue = list(reversed(blocks))
    for size in sizes:
        part: list[_Block] = []
        while size:
            shard, start, stop = queue.pop()
            end = min(stop, start + size)
            part.append(_Block(shard, start, end))
            size -= end - start
            if end < stop:
                queue.append(_Block(shard, end, stop))
        parts.append(part)
    return parts
