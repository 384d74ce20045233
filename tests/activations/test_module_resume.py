"""A torch module as a source is put down and taken up: the same rows follow, from loaders of three kinds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dictionary_learning import ModuleActivations
from dictionary_learning.errors import UserError

from .test_module import D, Net, batches, rows


def loader(**options: Any) -> DataLoader:
    """Shuffled anew in each epoch by a generator of its own."""
    x = torch.randn(14, 5, D, generator=torch.Generator().manual_seed(3))
    return DataLoader(x, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(11), **options)  # type: ignore[arg-type]


class StatefulLoader:
    """As torchdata's: goes on within a pass from its state, and counts what it reads."""

    def __init__(self, data: list[Tensor]) -> None:
        self.data, self.at, self.reads = data, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < len(self.data):
            self.at, self.reads = self.at + 1, self.reads + 1
            yield self.data[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("make", [loader, lambda: batches(5), lambda: StatefulLoader(batches(5))])
@pytest.mark.parametrize("taken", [0, 1, 4, 9, 23])
def test_a_resumed_source_goes_on_bit_for_bit(make: Any, taken: int) -> None:
    net = Net()

    def source() -> ModuleActivations:
        return ModuleActivations(net, make(), ["layers.0", "layers.1"], epochs=3, max_rows=7)

    unbroken = source()
    for _ in range(taken):
        next(unbroken)
    state = copy.deepcopy(unbroken.state_dict())
    resumed = source()
    resumed.load_state_dict(state)
    left, again = list(unbroken), list(resumed)
    assert len(left) == len(again) > 0
    for a, b in zip(left, again, strict=True):
        assert all(torch.equal(a.acts[name], b.acts[name]) for name in a.acts)
        assert a.provenance and b.provenance
        assert all(torch.equal(x, y) for x, y in zip(a.provenance, b.provenance, strict=True))
    assert resumed.examples == unbroken.examples


def test_a_loader_with_a_state_is_not_read_again() -> None:
    source = ModuleActivations(Net(), StatefulLoader(batches(6)), "layers.0")
    for _ in range(4):
        next(source)
    again = StatefulLoader(batches(6))
    resumed = ModuleActivations(Net(), again, "layers.0")
    resumed.load_state_dict(source.state_dict())
    assert len(list(resumed)) == 2
    assert again.reads == 3  # one when it was made, two behind the saved position


def test_skipped_batches_are_not_run() -> None:
    source = ModuleActivations(Net(), batches(6), "layers.0")
    for _ in range(5):
        next(source)
    net = Net()
    ModuleActivations(net, batches(6), "layers.0").load_state_dict(source.state_dict())
    assert net.layers[0].calls == 1


def test_a_position_that_cannot_be_reached_is_said() -> None:
    source = ModuleActivations(Net(), loader(), "layers.0")
    start = source.state_dict()
    list(source)
    with pytest.raises(UserError, match="past the saved position"):
        source.load_state_dict(start)
    with pytest.raises(UserError, match="end before the 4 that were used up"):
        ModuleActivations(Net(), batches(2), "layers.0").load_state_dict(source.state_dict())
    listed = ModuleActivations(Net(), batches(4), "layers.0")
    begin = listed.state_dict()
    first = rows(listed)["layers.0"]
    listed.load_state_dict(begin)  # a list can be read again
    assert torch.equal(rows(listed)["layers.0"], first)
    with pytest.raises(UserError, match="of the hook points"):
        ModuleActivations(Net(), batches(4), "layers.1").load_state_dict(begin)
