"""What would make the host wait on a GPU, looked for on the CPU: reading a value or counting entries of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dictionary_learning.activations.language_model import LanguageModelActivations
from dictionary_learning.activations.mask_checks import no_mask_checks
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.packing import TokenBatch
from dictionary_learning.streams import InTurn

from .conftest import FAMILIES, Contexts, Family, build


class Waits(TorchDispatchMode):
    """Counts the operations that copy a value to the host or whose result has a size that only the values tell."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "nanmedian", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        if name in self.NAMES or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_asks_nothing_of_its_tokens(families: dict[str, Family], tokens_CL: Tensor, name: str):
    lm = families[name].lm
    points = lm.resolve(["resid_post_layer_2", "mlp_out_layer_1"])
    with Waits() as checks:
        lm._inputs(tokens_CL, None)  # looks whether the ids are the model's while they are on the CPU
    with Waits() as waits:
        lm.capture(tokens_CL, points)
    assert waits.seen == checks.seen


def test_without_the_shortcut_it_does_and_the_values_are_the_same(gpt2: TracedLM, tokens_CL: Tensor):
    assert gpt2.module.config.pad_token_id is not None
    with torch.no_grad(), Waits() as waits:
        plain = gpt2.module(input_ids=tokens_CL, use_cache=False).logits
    assert len(waits.seen) >= 2
    with torch.no_grad(), no_mask_checks():
        assert torch.equal(gpt2.module(input_ids=tokens_CL, use_cache=False).logits, plain)


def test_the_shortcut_is_for_its_block_only_also_when_blocks_are_nested(gpt2: TracedLM):
    """Outside, position ids that restart part a row into sequences, as ever."""
    tokens_CL = torch.arange(3, 11)[None]
    restarted = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])

    def forward() -> Tensor:
        with torch.no_grad():
            return gpt2.module(input_ids=tokens_CL, position_ids=restarted, use_cache=False).logits

    parted = forward()
    with no_mask_checks():
        with no_mask_checks():
            pass
        assert not torch.allclose(forward(), parted)
    assert torch.equal(forward(), parted)


def test_dropping_rows_by_their_norm_asks_nothing_of_the_device(lm: TracedLM):
    x = {"a": torch.randn(40, 8), "b": torch.randn(40, 8)}
    with Waits() as waits:
        LanguageModelActivations._usual_rows(x, 1.5)
    assert waits.seen == []


@pytest.mark.parametrize("n", [1, 2, 7, 8])
@pytest.mark.parametrize("nans", [0, 1, 5, 8])
def test_the_median_is_torchs_own(n: int, nans: int):
    x_N = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x_N[torch.randperm(n, generator=torch.Generator().manual_seed(nans))[:nans]] = torch.nan
    norm = x_N[:, None].abs()
    expected = norm[:, 0] <= 1.2 * norm.nanmedian()
    assert torch.equal(LanguageModelActivations._usual_rows({"a": norm}, 1.2), expected)


class Known(Contexts):
    """Contexts without special tokens or padding, whose rows need no choosing on the host."""

    def batch(self, number: int) -> TokenBatch:
        batch = super().batch(number)
        ones = torch.ones_like(batch.real_CL)
        return batch._replace(keep_CL=ones, real_CL=ones)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self


class Beside(InTurn):
    overlaps = True


@pytest.mark.parametrize("multiple", [None, 2.0])
def test_drawing_and_beginning_the_next_forward_ask_nothing_of_the_device(multiple: float | None):
    lm = TracedLM.load(build("gpt2"))
    source = LanguageModelActivations(lm, Known(100), "resid_post_layer_1", max_activation_norm_multiple=multiple)
    buffer = ActivationBuffer(None, source, n_ctxs=16, ctx_len=8, out_batch_size=16)
    buffer._side = Beside()
    for _ in range(3):
        buffer.draw()
    tokens_CL = Known().batch(0).tokens_CL
    with Waits() as on_host:  # looks at the ids, and lists the rows wanted, both on the CPU
        lm._inputs(tokens_CL, None)
        torch.ones(16).nonzero()
    for _ in range(10):
        buffer.refresh()
        begun = source.contexts.at
        with Waits() as waits:
            buffer.draw()
        assert sorted(waits.seen) == sorted(on_host.seen * (source.contexts.at - begun))
    assert source.contexts.at > 10
