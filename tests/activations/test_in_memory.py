"""Epochs over rows in memory, an exact resume, and a held-out part that is never trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dictionary_learning.activations.in_memory import InMemoryActivations, fingerprint, row_hashes, split_rows
from dictionary_learning.errors import UserError


def rows(count: int = 50, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def as_set(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in x}


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    x = rows()
    batches = list(InMemoryActivations(x, 8, epochs=2, seed=3))
    assert [len(batch) for batch in batches] == 2 * (6 * [8] + [2])
    first, second = torch.cat(batches[:7]), torch.cat(batches[7:])
    assert as_set(first) == as_set(second) == as_set(x) and len(first) == len(second) == 50
    assert not torch.equal(first, second) and not torch.equal(first, x)


def test_the_seed_decides_the_order() -> None:
    x = rows()
    one, same, other = (torch.cat(list(InMemoryActivations(x, 8, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.cat(list(InMemoryActivations(x, 8, seed=None))), x)


def test_it_says_how_many_steps_it_has() -> None:
    data = InMemoryActivations(rows(), 8, epochs=3)
    assert data.steps == len(list(data)) == 21
    endless = InMemoryActivations(rows(), 8, epochs=None)
    assert endless.steps is None and sum(len(next(endless)) for _ in range(100)) > 700


def test_arrays_and_lists_of_batches_are_the_same_as_a_tensor() -> None:
    x = rows()
    wanted = torch.cat(list(InMemoryActivations(x, 8)))
    for form in (x.numpy(), list(x.split(7)), [part.numpy() for part in x.split(11)]):
        assert torch.equal(torch.cat(list(InMemoryActivations(form, 8))), wanted)


@pytest.mark.parametrize("taken", [0, 3, 7, 10])
def test_a_resume_goes_on_with_the_next_batch(taken: int) -> None:
    unbroken = list(InMemoryActivations(rows(), 8, epochs=2))
    first = InMemoryActivations(rows(), 8, epochs=2)
    for _ in range(taken):
        next(first)
    second = InMemoryActivations(rows(), 8, epochs=2)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == len(unbroken) - taken
    assert all(torch.equal(a, b) for a, b in zip(rest, unbroken[taken:], strict=True))


@pytest.mark.parametrize(
    "other",
    [
        {"activations": rows(seed=1)},
        {"activations": rows().flip(0)},
        {"batch_size": 9},
        {"seed": 1},
    ],
)
def test_a_resume_in_other_activations_is_refused(other: dict[str, Any]) -> None:
    settings = {"activations": rows(), "batch_size": 8, "seed": 0}
    state = InMemoryActivations(**settings).state_dict()
    with pytest.raises(UserError, match="saved position is in other activations"):
        InMemoryActivations(**(settings | other)).load_state_dict(state)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_split_is_a_partition_of_the_asked_size(fraction: float) -> None:
    x = rows(1000)
    train, heldout = split_rows(x, fraction, seed=1)
    assert len(heldout) == round(1000 * fraction) and len(train) + len(heldout) == 1000
    assert as_set(train) | as_set(heldout) == as_set(x) and not as_set(train) & as_set(heldout)


def test_the_seed_decides_the_split() -> None:
    x = rows(200)
    one, same, other = (split_rows(x, 0.2, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(one, same) and as_set(one) != as_set(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_no_held_out_row_is_trained_on_not_even_a_copy_of_it(dtype: torch.dtype, width: int) -> None:
    once = rows(40, width).to(dtype)
    once[0, 0] = 0.0
    x = torch.cat([once, once.flip(0), once])
    x[len(once) + 39, 0] = -0.0  # the same number as 0
    train, heldout = split_rows(x, 0.25)
    assert len(as_set(heldout.float())) >= 9 and not as_set(train.float()) & as_set(heldout.float())


def test_different_rows_have_different_hashes() -> None:
    grid = torch.cartesian_prod(*[torch.arange(-8.0, 8.0)] * 3)
    assert len(row_hashes(grid).unique()) == len(grid)
    assert len({fingerprint(x) for x in (grid, grid.flip(0), grid[1:], grid[:, :2], -grid)}) == 5


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (torch.zeros(0, 4), "hold no rows"),
        ([], "hold no rows"),
        (torch.zeros(5), r"floating-point rows \[N, width\], got \[5\]"),
        (torch.zeros(5, 2, dtype=torch.long), "floating-point rows"),
        ([torch.zeros(5, 2), torch.zeros(5, 3)], "different forms"),
        ([torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.float64)], "different forms"),
        ("acts.pt", "a tensor, an array or a list of batches, got str"),
        (iter([]), "got list_iterator"),
        (np.zeros((4, 2), dtype=np.int64), "floating-point rows"),
    ],
)
def test_what_are_no_activations_is_refused(activations: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InMemoryActivations(activations, 8)
    with pytest.raises(UserError, match=message):
        split_rows(activations, 0.5)


def test_numbers_that_cannot_be_are_refused() -> None:
    for settings in ({"batch_size": 0}, {"batch_size": 2.5}, {"batch_size": 8, "epochs": 0}):
        with pytest.raises(UserError, match="must be a positive integer"):
            InMemoryActivations(rows(), **settings)
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="heldout_fraction must lie between"):
            split_rows(rows(), fraction)
    with pytest.raises(UserError, match="leaves no row to measure on"):
        split_rows(rows(4), 0.05)
    with pytest.raises(UserError, match="leaves no row to train on"):
        split_rows(rows(4), 0.95)
