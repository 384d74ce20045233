"""What passes from an activation source to the buffer.

A source is anything that yields `ActivationBatch`es: a language model, saved shards, any iterator of tensors. The
buffer knows only this file, so a new kind of source changes nothing downstream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Provenance(NamedTuple):
    """Where each row of a batch comes from: five int64 tensors of shape [N], on the CPU.

    `document_N` numbers documents in the order of the stream, `position_N` is the token's place in its document
    (-1 for tokens that the packer added, such as BOS), `token_N` the token id, `corpus_N` indexes the list of
    corpora, `context_N` numbers contexts in the order of the stream.
    """

    document_N: Tensor
    position_N: Tensor
    token_N: Tensor
    corpus_N: Tensor
    context_N: Tensor


class ActivationBatch(NamedTuple):
    """Activations of N tokens at one or more hook points.

    `acts[name]` is [N, d], d being the width at that hook point; row i is the same token in every tensor.
    """

    acts: dict[str, Tensor]
    provenance: Provenance | None = None


class Launched(NamedTuple):
    """A batch whose forward was given to the device and may still be running.

    All its N rows are there; those of `keep_N` (bool, on the device; None: all) count, which the host learns from
    `kept()`: a bool tensor [N] on the CPU, or None. That waits until the forward is done.
    """

    batch: ActivationBatch
    keep_N: Tensor | None = None
    kept: Callable[[], Tensor | None] = lambda: None


@runtime_checkable
class ActivationSource(Protocol):
    """A stream of activation batches that can be put down and taken up again.

    `widths` maps each hook point to its width d, `max_rows` bounds the rows of one batch, and
    `load_state_dict(state_dict())` makes the stream go on with the batch that would have come next. A source that picks
    rows on the device may besides have `launch() -> Launched`, in the place of `next()`, to pick them without waiting.
    """

    widths: dict[str, int]
    dtype: torch.dtype
    max_rows: int

    def __iter__(self) -> Iterator[ActivationBatch]: ...

    def __next__(self) -> ActivationBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
