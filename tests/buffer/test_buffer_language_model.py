"""A buffer over a language model: its rows, the field's surface, reading ahead."""

from __future__ import annotations

import pytest
import torch
from buffer_cases import iter_draw, saved_and_loaded

from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError

TEXTS = [f"Patient {i} was given {i * i} mg of aspirin{'.' * (i % 9)}" for i in range(60)]
SETTINGS = {"n_ctxs": 40, "ctx_len": 16, "refresh_batch_size": 4, "out_batch_size": 32}


@pytest.fixture(scope="module")
def lm(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    from dictionary_learning.activations import TracedLM

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_layer=2, n_embd=8, n_head=2, n_positions=32, bos_token_id=256, eos_token_id=256
    )
    return TracedLM.load(GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.mark.parametrize("remove_bos", [False, True])
def test_the_rows_are_the_models_activations_at_the_place_their_provenance_names(lm, tokenizer, remove_bos):
    from dictionary_learning.packing import ContextPacker

    buffer = ActivationBuffer(
        iter(TEXTS), lm, "resid_post_layer_1", **SETTINGS, remove_bos=remove_bos, provenance=True, seed=1
    )
    assert buffer.d_submodule == 8
    found = {}
    for acts, where in iter(lambda: next(iter_draw(buffer), None), None):
        for row, document, position, context in zip(
            *acts.values(), where.document_N.tolist(), where.position_N.tolist(), where.context_N.tolist(), strict=True
        ):
            found.setdefault((context, document, position), []).append(row)
    expected = 0
    for tokens in ContextPacker(TEXTS, tokenizer, ctx_len=16, batch_contexts=4):
        with torch.no_grad():
            hidden = lm.module.transformer(
                tokens.tokens_CL, output_hidden_states=True, use_cache=False
            ).last_hidden_state
            outputs = lm.capture(tokens.tokens_CL, "resid_post_layer_1")["resid_post_layer_1"]
        torch.testing.assert_close(lm.module.transformer.ln_f(outputs), hidden)
        wanted = tokens.keep_CL if remove_bos else tokens.real_CL
        for c, at in wanted.nonzero().tolist():
            key = (tokens.first_context + c, int(tokens.document_CL[c, at]), int(tokens.position_CL[c, at]))
            assert any(torch.allclose(row, outputs[c, at], atol=1e-5) for row in found[key])
            expected += 1
    assert buffer.rows_drawn == expected == sum(map(len, found.values()))


def test_code_for_the_fields_library_runs_unchanged(lm, tokenizer):
    from nnsight import NNsight

    model = NNsight(lm.module)
    model.tokenizer = tokenizer
    submodule = model.transformer.h[1]
    buffer = ActivationBuffer((text for text in TEXTS), model, submodule, 8, "out", 40, 16, 4, 32, "cpu", True)
    assert next(buffer).shape == (32, 8)
    both = ActivationBuffer(TEXTS, model, submodule, io="in_and_out", **SETTINGS)
    assert next(both).shape == (32, 2, 8)
    several = ActivationBuffer(TEXTS, model, [submodule, model.transformer.h[0]], **SETTINGS)
    assert [acts.shape for acts in next(several).values()] == [(32, 8), (32, 8)]


def test_config_is_what_config_json_keeps(lm):
    import json

    buffer = ActivationBuffer(TEXTS, lm, "resid_post_layer_0", **SETTINGS, remove_bos=True, seed=3)
    config = json.loads(json.dumps(buffer.config))
    assert config == {
        "d_submodule": 8,
        "io": "out",
        **SETTINGS,
        "device": "cpu",
        "remove_bos": True,
        "add_special_tokens": True,
        "packing": True,
        "max_activation_norm_multiple": None,
        "seed": 3,
    }


def test_texts_and_tokens_can_be_taken_from_the_stream(lm):
    buffer = ActivationBuffer(TEXTS, lm, "resid_post_layer_0", **SETTINGS)
    assert buffer.text_batch() == TEXTS[:4] and buffer.text_batch(2) == TEXTS[4:6]
    tokens = buffer.tokenized_batch(3)
    assert tokens["input_ids"].shape == (3, 16) == tokens["attention_mask"].shape
    assert lm.tokenizer.decode(tokens["input_ids"][0]) == TEXTS[6][:16]
    with pytest.raises(StopIteration):
        buffer.text_batch(100)
    buffer.close()


def test_a_missing_hook_point_or_text_is_named(lm):
    with pytest.raises(UserError, match="needs a hook point"):
        ActivationBuffer(TEXTS, lm, **SETTINGS)
    with pytest.raises(UserError, match="texts or a path, got NoneType"):
        ActivationBuffer(None, lm, "resid_post_layer_0", **SETTINGS)
    with pytest.raises(UserError, match="Corpus 'nowhere' not found"):
        ActivationBuffer("nowhere", lm, "resid_post_layer_0", **SETTINGS)


def test_a_language_model_buffer_resumes_in_the_middle_of_a_document(lm):
    def make():
        return ActivationBuffer(list(TEXTS), lm, "resid_post_layer_0", **SETTINGS, seed=2)

    whole, broken, resumed = list(make()), make(), make()
    for _ in range(10):
        next(broken)
    resumed.load_state_dict(saved_and_loaded(broken.state_dict()))
    rest = list(resumed)
    assert len(rest) == len(whole) - 10 > 10
    assert all(map(torch.equal, rest, whole[10:]))


@pytest.mark.parametrize("read_ahead", [1, 3])
def test_reading_ahead_changes_no_batch_and_no_resume(lm, read_ahead):
    def make(read_ahead):
        return ActivationBuffer(list(TEXTS), lm, "resid_post_layer_0", **SETTINGS, seed=2, read_ahead=read_ahead)

    whole, broken, resumed, in_turn = list(make(0)), make(read_ahead), make(read_ahead), make(0)
    assert all(map(torch.equal, [next(broken) for _ in range(10)], whole))
    state = saved_and_loaded(broken.state_dict())
    for other in (resumed, in_turn):
        other.load_state_dict(state)
        rest = list(other)
        assert len(rest) == len(whole) - 10 and all(map(torch.equal, rest, whole[10:]))
    reading = broken.source.contexts._thread
    assert reading.is_alive()
    broken.close()
    assert not reading.is_alive()


def test_texts_taken_from_the_stream_are_those_behind_the_ones_read_ahead(lm):
    """Packed one document a context, four contexts a forward: ten forwards fill the buffer, two are read ahead."""
    buffer = ActivationBuffer(TEXTS, lm, "resid_post_layer_0", **SETTINGS, packing=False, read_ahead=2)
    next(buffer)
    forwards = buffer.source.contexts.state_dict()["contexts"] // 4
    assert buffer.text_batch(1) == [TEXTS[4 * (forwards + 2)]]
    with pytest.raises(StopIteration):
        buffer.text_batch(100)
    buffer.close()
