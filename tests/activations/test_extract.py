from __future__ import annotations

from typing import Any

import pytest
import torch

from dictionary_learning.activations.extract import extract
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.errors import UserError

from .conftest import build

TEXT = "The axillary nerve."


@pytest.fixture(scope="module")
def lm(tokenizer: Any) -> TracedLM:
    return TracedLM.load(build("gpt2"), tokenizer)


def test_one_text_gives_its_tokens_and_a_row_for_each(lm: TracedLM):
    sample = extract(TEXT, lm, ["resid_post_layer_1", "mlp_out_layer_0"])
    assert sample.tokens[0] == "<bos>" and "".join(sample.tokens[1:]) == TEXT
    assert sample.token_ids == lm.tokenizer(TEXT).input_ids
    expected = lm.capture(torch.tensor([sample.token_ids]), ["resid_post_layer_1", "mlp_out_layer_0"])
    for name, x in sample.acts.items():
        assert x.shape == (len(sample.token_ids), 32)
        torch.testing.assert_close(x, expected[name][0])


def test_special_tokens_and_length_can_be_chosen(lm: TracedLM):
    sample = extract(TEXT, lm, "resid_post_layer_1", add_special_tokens=False, max_tokens=3)
    assert len(sample.tokens) == len(sample.acts["resid_post_layer_1"]) == 3
    assert TEXT.startswith("".join(sample.tokens))


def test_a_bare_module_with_a_tokenizer_will_do(tokenizer: Any, lm: TracedLM):
    sample = extract(TEXT, lm.module, "resid_post_layer_1", tokenizer=tokenizer)
    torch.testing.assert_close(sample.acts, extract(TEXT, lm, "resid_post_layer_1").acts)


def test_a_text_without_tokens_or_beyond_the_positions_is_refused(lm: TracedLM):
    with pytest.raises(UserError, match="The text gives no tokens"):
        extract("", lm, "resid_post_layer_1", add_special_tokens=False)
    with pytest.raises(UserError, match=r"A context of \d+ tokens is longer than the 64 positions"):
        extract(TEXT * 50, lm, "resid_post_layer_1")
    assert len(extract(TEXT * 50, lm, "resid_post_layer_1", max_tokens=64).tokens) == 64
