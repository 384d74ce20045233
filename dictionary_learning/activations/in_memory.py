"""Activations that fit into memory: epochs over them, and a held-out part of them.

In: a tensor or array of rows, or a list of batches. Out: batches for training, every row once an epoch in an order of
the epoch's own. An order is made from (seed, epoch), so the number of the next batch is all that a resume needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.devices import resolve_device
from dictionary_learning.errors import UserError
from dictionary_learning.streams import to_device


def as_rows(activations: Any) -> Tensor:
    """A tensor or array [N, ...], or a list of such batches, as one tensor.

    Raises:
        UserError: anything else, no rows, or batches of different shapes or types.
    """
    if isinstance(activations, np.ndarray):
        activations = torch.from_numpy(activations)
    if not isinstance(activations, Tensor):
        if not isinstance(activations, Sequence) or isinstance(activations, str):
            raise UserError(
                f"Activations are a tensor, an array or a list of batches, got {type(activations).__name__}."
            )
        batches = [torch.as_tensor(batch) for batch in activations]
        forms = {(tuple(batch.shape[1:]), batch.dtype) for batch in batches}
        if len(forms) > 1:
            shown = " and ".join(f"{list(shape)} in {dtype}" for shape, dtype in sorted(forms, key=str))
            raise UserError(f"The batches of activations have rows of different forms: {shown}.")
        activations = torch.cat(batches) if batches else torch.empty(0, 0)
    if not len(activations):
        raise UserError("The activations hold no rows.")
    if activations.ndim < 2 or not activations.is_floating_point():
        raise UserError(
            f"Activations must be floating-point rows [N, width], got {list(activations.shape)} in {activations.dtype}."
        )
    return activations.detach()


class InMemoryActivations:
    """Batches [B, ...] of rows [N, ...], every row once an epoch; the last batch of an epoch may be shorter.

    Args:
        activations: see `as_rows`; a transcoder's are [N, 2, D].
        batch_size: rows B of a batch.
        epochs: passes over the rows; None repeats them for ever.
        seed: of the orders of the epochs; None keeps the order of the rows.
        device: where the batches go ("auto": the best there is).

    Attributes:
        rows: N. steps: batches in all epochs, None where they never end.

    Raises:
        UserError: no such activations, or a number that can't be.
    """

    def __init__(
        self,
        activations: Any,
        batch_size: int,
        *,
        epochs: int | None = 1,
        seed: int | None = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number in (("batch_size", batch_size), ("epochs", 1 if epochs is None else epochs)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise UserError(f"{name} must be a positive integer, got {number!r}.")
        self._rows, self.out_batch_size, self.epochs, self.seed = as_rows(activations), batch_size, epochs, seed
        self.device = resolve_device(device)
        self.rows = len(self._rows)
        self._per_epoch = -(-self.rows // batch_size)
        self.steps = None if epochs is None else epochs * self._per_epoch
        self._taken = 0  # batches handed out, in all epochs
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # of the rows, in an epoch
        self._fingerprint = fingerprint(self._rows)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        epoch, number = divmod(self._taken, self._per_epoch)
        if self.epochs is not None and epoch >= self.epochs:
            raise StopIteration
        at = slice(number * self.out_batch_size, (number + 1) * self.out_batch_size)
        if self.seed is None:
            rows = self._rows[at]
        else:
            if self._order[0] != epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
                self._order = (epoch, torch.from_numpy(order))
            rows = self._rows[self._order[1][at].to(self._rows.device)]
        self._taken += 1
        return to_device(rows, self.device)

    @property
    def config(self) -> dict[str, Any]:
        """Settings, as config.json keeps them under "buffer"."""
        return {
            "d_submodule": self._rows.shape[-1],
            "out_batch_size": self.out_batch_size,
            "device": str(self.device),
            "rows": self.rows,
            "epochs": self.epochs,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "batches": self._taken,
            "batch_size": self.out_batch_size,
            "seed": self.seed,
            "activations": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where rows, batch size or seed changed: the saved position would be another place."""
        for name, value in self.state_dict().items():
            if name != "batches" and state[name] != value:
                raise UserError(
                    f"The saved position is in other activations: their {name} is {state[name]}, not {value}."
                )
        self._taken = state["batches"]


def split_rows(activations: Any, heldout_fraction: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows to train on, held-out rows), in their order.

    Equal rows, such as those of a text that occurs twice, all go to one side: none of the held-out rows is trained on.
    The fraction is that of the different rows.

    Raises:
        UserError: see `as_rows`; a fraction that is not between 0 and 1, or leaves one side without a row.
    """
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction must lie between 0 and 1, got {heldout_fraction!r}.")
    rows = as_rows(activations)
    different, which_N = row_hashes(rows).unique(return_inverse=True)
    wanted = round(heldout_fraction * len(different))
    if not 0 < wanted < len(different):
        raise UserError(
            f"heldout_fraction {heldout_fraction:g} of {len(different):,} different rows leaves no row to "
            f"{'measure' if not wanted else 'train'} on: give another fraction or more rows."
        )
    held_out = torch.zeros(len(different), dtype=torch.bool)
    held_out[torch.from_numpy(np.random.default_rng(seed).permutation(len(different))[:wanted])] = True
    held_out_N = held_out[which_N]
    return rows[~held_out_N.to(rows.device)], rows[held_out_N.to(rows.device)]


def row_hashes(rows: Tensor) -> Tensor:
    """[N] int64 on the CPU: equal rows have equal hashes, different ones do but once in 2^64 / N^2."""
    flat = rows.detach().cpu().flatten(1)
    flat = torch.where(flat == 0, 0.0, flat) + 0.0  # one zero, not two
    words = flat.contiguous().view(torch.uint8).view(len(flat), -1)
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % 4)).view(torch.int32)
    g = np.random.default_rng(0)
    factors = torch.from_numpy(g.integers(-(2**62), 2**62, words.shape[1]) * 2 + 1)
    hashes = torch.zeros(len(flat), dtype=torch.int64)
    for at in range(0, len(flat), 4096):  # int64 products take twice the memory of the rows
        mixed = words[at : at + 4096].long() * factors
        hashes[at : at + 4096] = (mixed ^ (mixed >> 29)).sum(1)  # wraps around, which is what is wanted
    return hashes


def fingerprint(rows: Tensor) -> str:
    """What tells these rows in this order from others."""
    hashes = row_hashes(rows)
    places = torch.arange(1, 2 * len(hashes), 2)
    return f"{len(rows)}x{'x'.join(map(str, rows.shape[1:]))}:{int((hashes * places).sum()) & (2**64 - 1):016x}"
