"""Keeps transformers from looking into every batch of tokens for padding and packing.

A model of transformers that is given no attention mask asks in each forward whether its position ids restart (several
sequences in one row) and, where its config names a pad token, whether one stands at an end. Both questions are
answered by reading from the device, which makes the host wait for it, and an all-ones mask only adds a third one.
`TracedLM` passes no position ids, so they never restart, and masks by itself: the answers are known. Inside
`no_mask_checks()` they are given at once, in the thread that asks and nowhere else; the forward's values are the same.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

_here = threading.local()


@contextlib.contextmanager
def no_mask_checks() -> Iterator[None]:
    """Inside, forwards of this thread don't look for padding or packing. They must have neither."""
    _install()
    before, _here.known = getattr(_here, "known", False), True
    try:
        yield
    finally:
        _here.known = before


@functools.cache
def _install() -> None:
    """Put the shortcut in front of the two questions, where this version of transformers has them."""
    with contextlib.suppress(ImportError):
        from transformers import masking_utils, modeling_utils

        places = (
            (masking_utils, "find_packed_sequence_indices"),
            (modeling_utils.PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
        )
        for owner, name in places:
            if hasattr(owner, name):
                setattr(owner, name, _answered(getattr(owner, name)))


def _answered(ask: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ask)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return None if getattr(_here, "known", False) else ask(*args, **kwargs)

    return answer
