"""A packer whose texts break off gives back what it had read of the batch that it could not make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dictionary_learning.corpus import Corpus, Text
from dictionary_learning.errors import UserError
from dictionary_learning.packing import ContextPacker


@pytest.mark.parametrize("packing", [True, False])
def test_texts_that_break_off_are_read_again(packing: bool, tokenizer: Any) -> None:
    broken = [True]

    def read(start: int) -> Iterator[Text]:
        for number in range(start, 200):
            if number == 100 and broken[0]:
                raise UserError("line 100 is damaged")
            yield Text(f"text {number}", f"corpus {number // 90}")

    def packer() -> ContextPacker:
        return ContextPacker(Corpus("c", read, "f"), tokenizer, ctx_len=16, batch_contexts=4, packing=packing)

    one, got = packer(), []
    with pytest.raises(UserError, match="line 100"):
        got += list(_batches(one, got))
    broken[0] = False
    state = one.state_dict()
    resumed = packer()
    resumed.load_state_dict(state)
    _batches(resumed, got)
    whole: list[Any] = []
    _batches(packer(), whole)
    assert len(got) == len(whole)
    for a, b in zip(got, whole, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:6], b[:6], strict=True)) and a.first_context == b.first_context


def _batches(packer: ContextPacker, into: list[Any]) -> list[Any]:
    for batch in packer:
        into.append(batch)
    return []
