"""A buffer resumed anywhere goes on bit for bit; its settings are the field's, and checked."""

from __future__ import annotations

import inspect

import pytest
import torch
from buffer_cases import NumberedRows, buffer_of, iter_draw, saved_and_loaded

from dictionary_learning.activations.types import ActivationSource
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError


@pytest.mark.parametrize("stop", [0, 1, 7, 30, 58, 63])
def test_a_buffer_resumed_anywhere_goes_on_bit_for_bit(stop):
    def make():
        return buffer_of(1000, points=("a", "b"), provenance=True, seed=5)

    unbroken, broken, resumed = make(), make(), make()
    for _ in range(stop):
        unbroken.draw()
        broken.draw()
    state = saved_and_loaded(broken.state_dict())
    for _ in range(min(3, 62 - stop)):  # the saved state is a copy, and the other buffer's past is forgotten
        resumed.draw()
        broken.draw()
    resumed.load_state_dict(state)
    batches = 0
    for expected in iter(lambda: next(iter_draw(unbroken), None), None):
        found = resumed.draw()
        assert all(torch.equal(found.acts[name], acts) for name, acts in expected.acts.items())
        assert all(map(torch.equal, found.provenance, expected.provenance))
        assert resumed.mixing() == unbroken.mixing()
        batches += 1
    assert batches == 63 - stop
    assert resumed.rows_drawn == 1000
    with pytest.raises(StopIteration):
        resumed.draw()


def test_a_buffer_that_went_on_to_its_end_can_be_set_back():
    buffer = buffer_of(300, points=("a", "b"), provenance=True)
    next(buffer)
    state = buffer.state_dict()
    rest = list(buffer)
    buffer.load_state_dict(state)
    again = list(buffer)
    assert len(again) == len(rest) > 10
    assert all(torch.equal(x["b"], y["b"]) for x, y in zip(again, rest, strict=True))


def test_a_state_of_another_buffer_is_refused():
    state = buffer_of().state_dict()
    for other in (buffer_of(capacity=256), buffer_of(points=("b",)), buffer_of(points=("a", "b"))):
        with pytest.raises(UserError, match="another size or other hook points"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="kept no provenance"):
        buffer_of(provenance=True).load_state_dict(state)


def test_the_constructor_takes_what_the_field_knows_in_its_order():
    parameters = inspect.signature(ActivationBuffer).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    required = inspect.Parameter.empty
    assert list(positional.items()) == [
        ("data", required),
        ("model", required),
        ("submodule", None),
        ("d_submodule", None),
        ("io", "out"),
        ("n_ctxs", 3e4),
        ("ctx_len", 128),
        ("refresh_batch_size", 512),
        ("out_batch_size", 8192),
        ("device", "cpu"),
        ("remove_bos", False),
        ("add_special_tokens", True),
        ("max_activation_norm_multiple", None),
    ]
    assert isinstance(NumberedRows(1), ActivationSource)


def test_a_buffer_that_is_too_small_says_what_would_do():
    with pytest.raises(UserError, match=r"= 40 rows must hold one forward \(32 rows\) and one batch \(16\)") as caught:
        buffer_of(capacity=40)
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert len(next(buffer_of(capacity=enough * 8))) == 16
    with pytest.raises(UserError):
        buffer_of(capacity=enough * 8 - 8)


def test_wrong_settings_are_named():
    for wrong, said in (
        ({"io": "both"}, "in, out, in_and_out, got 'both'"),
        ({"batch": 0}, "at least 1, got 0"),
        ({"d_submodule": 5}, r"d_submodule is 5, but the activations have width \[4\]"),
        ({"remove_bos": True}, "remove_bos"),
        ({"max_activation_norm_multiple": 10.0}, "max_activation_norm_multiple"),
        ({"read_ahead": 2}, "read_ahead"),
    ):
        with pytest.raises(UserError, match=said):
            buffer_of(**wrong)
    with pytest.raises(UserError, match="data and submodule must be None"):
        ActivationBuffer(["text"], NumberedRows(10))
    with pytest.raises(UserError, match="not texts"):
        buffer_of().text_batch()
