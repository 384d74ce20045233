"""LanguageModelActivations: rows, masks, the norm filter, provenance, state."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dictionary_learning.activations.language_model import LanguageModelActivations
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.activations.types import ActivationSource
from dictionary_learning.errors import UserError
from dictionary_learning.packing import ContextPacker

from .conftest import TEXT, Contexts, build

POINTS = ["resid_post_layer_2", "mlp_in_layer_1"]


def test_it_is_an_activation_source_that_says_what_it_gives(gpt2: TracedLM):
    source = LanguageModelActivations(gpt2, Contexts(), [*POINTS, "transformer.h.0.mlp.c_fc"])
    assert isinstance(source, ActivationSource)
    assert source.widths == {"resid_post_layer_2": 32, "mlp_in_layer_1": 32, "transformer.h.0.mlp.c_fc": 128}
    assert source.dtype == torch.float32 and source.max_rows == 16
    for batch in source:
        assert {name: x.shape[1] for name, x in batch.acts.items()} == source.widths
        assert all(x.dtype == source.dtype and len(x) <= source.max_rows for x in batch.acts.values())
        assert batch.provenance is None


@pytest.mark.parametrize(("remove_special", "rows"), [(True, 16 - 2 - 1 - 3), (False, 16 - 3)])
def test_padding_is_always_dropped_and_special_tokens_on_request(gpt2: TracedLM, remove_special: bool, rows: int):
    contexts = Contexts()
    batches = list(LanguageModelActivations(gpt2, contexts, POINTS, remove_special=remove_special))
    assert len(batches) == 3
    for number, batch in enumerate(batches):
        tokens = contexts.batch(number)
        wanted = tokens.keep_CL & tokens.real_CL if remove_special else tokens.real_CL
        expected = gpt2.capture(tokens.tokens_CL, POINTS)
        for name in POINTS:
            assert len(batch.acts[name]) == rows
            torch.testing.assert_close(batch.acts[name], expected[name][wanted], rtol=0, atol=0)


def test_provenance_says_of_each_row_which_token_it_is(lm: TracedLM):
    contexts = Contexts()
    for number, batch in enumerate(LanguageModelActivations(lm, contexts, POINTS, provenance=True)):
        tokens, rows = contexts.batch(number), batch.provenance
        assert rows is not None and all(x.dtype == torch.int64 and len(x) == 10 for x in rows)
        full = lm.capture(tokens.tokens_CL, POINTS[0])[POINTS[0]]
        for row in range(10):
            context = int(rows.context_N[row]) - tokens.first_context
            place = int(rows.position_N[row]) + 1
            assert int(rows.token_N[row]) == int(tokens.tokens_CL[context, place]) > 2
            assert int(rows.document_N[row]) == int(tokens.document_CL[context, place])
            assert int(rows.corpus_N[row]) == number % 2
            torch.testing.assert_close(batch.acts[POINTS[0]][row], full[context, place])


def test_provenance_leads_back_to_the_text(gpt2: TracedLM, tokenizer: Any):
    """With the real packer: the rows of one document, in order, are the tokens of its text."""
    packer = ContextPacker(TEXT, tokenizer, ctx_len=16, batch_contexts=2)
    batches = list(LanguageModelActivations(gpt2, packer, POINTS, provenance=True))
    tokens = torch.cat([b.provenance.token_N for b in batches])
    documents = torch.cat([b.provenance.document_N for b in batches])
    positions = torch.cat([b.provenance.position_N for b in batches])
    for number, text in enumerate(TEXT):
        own = tokens[documents == number]
        assert own.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        assert positions[documents == number].tolist() == list(range(len(own)))


class Sinks:
    """A model whose activations at chosen tokens are huge, by an embedding that is."""

    def __init__(self, tokens: list[int], factor: float = 1e4) -> None:
        module = build("gpt2")
        with torch.no_grad():
            module.transformer.wte.weight[tokens] *= factor
        self.lm = TracedLM.load(module)


def test_rows_of_extreme_norm_are_dropped_everywhere_and_counted():
    contexts = Contexts(n_batches=2)
    first = contexts.batch(0).tokens_CL
    loud = [int(first[0, 2]), int(first[1, 3])]
    lm = Sinks(loud).lm
    # The MLP's input is normalised, so only the residual stream is loud: its rows must go from both.
    points = ["resid_pre_layer_1", "mlp_in_layer_1"]
    source = LanguageModelActivations(lm, contexts, points, max_activation_norm_multiple=10, provenance=True)
    batch = next(source)
    assert (source.rows_seen, source.rows_dropped_by_norm) == (10, 2)
    assert batch.provenance is not None and not set(batch.provenance.token_N.tolist()) & set(loud)
    kept = contexts.batch(0)
    mask = kept.keep_CL & ~torch.isin(kept.tokens_CL, torch.tensor(loud))
    expected = lm.capture(kept.tokens_CL, points)
    for name in points:
        torch.testing.assert_close(batch.acts[name], expected[name][mask], rtol=0, atol=0)
    torch.testing.assert_close(batch.provenance.token_N, kept.tokens_CL[mask])
    next(source)
    assert source.rows_seen == 20


def test_the_median_is_over_real_kept_rows_only():
    """Padding and special tokens (0, 1, 2) are loud here; were they in the median, it would hide a loud row."""
    contexts = Contexts(n_batches=1, batch_contexts=1, ctx_len=8)
    tokens = contexts.batch(0)  # BOS, 3 words, separator, 3 pads
    loud = int(tokens.tokens_CL[0, 2])
    lm = Sinks([0, 1, 2, loud]).lm
    source = LanguageModelActivations(lm, contexts, "resid_pre_layer_1", max_activation_norm_multiple=10)
    assert len(next(source).acts["resid_pre_layer_1"]) == 2
    assert (source.rows_seen, source.rows_dropped_by_norm) == (3, 1)


def test_a_nan_row_is_dropped_without_taking_the_others_along():
    contexts = Contexts(n_batches=1)
    lm = Sinks([int(contexts.batch(0).tokens_CL[0, 7])], factor=float("nan")).lm
    # In front of the first block, because attention spreads a NaN over its context.
    source = LanguageModelActivations(lm, contexts, "resid_pre_layer_0", max_activation_norm_multiple=1000)
    batch = next(source)
    assert source.rows_dropped_by_norm == 1 and batch.acts["resid_pre_layer_0"].isfinite().all()


def test_a_filter_with_nothing_to_drop_changes_nothing(gpt2: TracedLM):
    plain = next(LanguageModelActivations(gpt2, Contexts(), POINTS))
    source = LanguageModelActivations(gpt2, Contexts(), POINTS, max_activation_norm_multiple=1e6)
    filtered = next(source)
    assert source.rows_dropped_by_norm == 0
    assert all(torch.equal(plain.acts[name], filtered.acts[name]) for name in POINTS)


def test_a_multiple_below_one_is_refused(gpt2: TracedLM):
    with pytest.raises(UserError, match="max_activation_norm_multiple counts medians and must be at least 1, got 0.5"):
        LanguageModelActivations(gpt2, Contexts(), POINTS, max_activation_norm_multiple=0.5)


def test_a_batch_without_rows_is_passed_over(gpt2: TracedLM):
    class Bare(Contexts):
        def batch(self, number: int) -> Any:
            batch = super().batch(number)
            return batch._replace(keep_CL=torch.zeros_like(batch.keep_CL)) if number == 1 else batch

    batches = list(LanguageModelActivations(gpt2, Bare(), POINTS, provenance=True))
    assert [int(b.provenance.context_N[0]) for b in batches] == [0, 4]


def test_rows_do_not_share_memory_with_later_batches(gpt2: TracedLM):
    source = LanguageModelActivations(gpt2, Contexts(), POINTS, remove_special=False)
    first = next(source).acts[POINTS[0]]
    copy = first.clone()
    next(source)
    assert torch.equal(first, copy)


def test_state_round_trip_goes_on_with_the_next_batch(gpt2: TracedLM):
    def source() -> LanguageModelActivations:
        return LanguageModelActivations(gpt2, Contexts(4), POINTS, max_activation_norm_multiple=1.2, provenance=True)

    unbroken = source()
    broken = source()
    for _ in range(2):
        next(unbroken), next(broken)
    state = json.loads(json.dumps(broken.state_dict()))
    resumed = source()
    resumed.load_state_dict(state)
    expected, got = list(unbroken), list(resumed)
    assert len(expected) == len(got) == 2
    for a, b in zip(expected, got, strict=True):
        assert all(torch.equal(a.acts[name], b.acts[name]) for name in POINTS)
        assert all(torch.equal(x, y) for x, y in zip(a.provenance, b.provenance, strict=True))
    assert resumed.state_dict() == unbroken.state_dict() and resumed.rows_dropped_by_norm > 0


def test_bfloat16_activations_reach_the_stream():
    lm = TracedLM.load(build("gemma2"), dtype="bfloat16")
    source = LanguageModelActivations(lm, Contexts(), POINTS, max_activation_norm_multiple=10)
    assert source.dtype == torch.bfloat16 and next(source).acts[POINTS[0]].dtype == torch.bfloat16
