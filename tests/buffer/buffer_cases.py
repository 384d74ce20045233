"""Sources with numbered rows, buffers over them, and states through a file."""

from __future__ import annotations

import io

import numpy as np
import torch

from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.buffer import ActivationBuffer

WIDTH = 4


class NumberedRows:
    """A source whose row n is [n, n, n, n] at its first hook point and [-n, ...] at the second, in context n // 8.

    It gives between 1 and `max_rows` rows at a time, as a language model does whose special tokens are left out.
    """

    def __init__(self, rows: int, max_rows: int = 32, points: tuple[str, ...] = ("a",), context: int = 8) -> None:
        self.rows, self.max_rows, self.context = rows, max_rows, context
        self.widths = dict.fromkeys(points, WIDTH)
        self.dtype = torch.float32
        self.given = 0

    def __iter__(self):
        return self

    def __next__(self) -> ActivationBatch:
        if self.given >= self.rows:
            raise StopIteration
        count = 1 + int(np.random.default_rng(self.given).integers(self.max_rows))
        numbers = torch.arange(self.given, min(self.given + count, self.rows))
        self.given += len(numbers)
        signs = (1.0, -1.0, 2.0)
        acts = {p: (s * numbers[:, None]).repeat(1, WIDTH) for p, s in zip(self.widths, signs, strict=False)}
        return ActivationBatch(
            acts, Provenance(numbers // 16, numbers % 16, numbers * 7, numbers % 3, numbers // self.context)
        )

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def buffer_of(rows=1000, *, max_rows=32, capacity=128, batch=16, points=("a",), context=8, **settings):
    source = NumberedRows(rows, max_rows, points, context)
    return ActivationBuffer(None, source, n_ctxs=capacity // 8, ctx_len=8, out_batch_size=batch, **settings)


def numbers_of(batch) -> list[int]:
    assert (batch == batch[:, :1]).all()
    return batch[:, 0].long().tolist()


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def iter_draw(buffer):
    try:
        yield buffer.draw()
    except StopIteration:
        return
