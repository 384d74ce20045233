"""Continuations against a plain loop with torch hooks: greedy, sampled, scopes, ends, and bad settings."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from steering_cases import FAMILIES, POINT, VOCAB, F, by_hand, dictionary, models, own

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.analysis import generation
from dictionary_learning.analysis.generation import choose, generate
from dictionary_learning.analysis.interventions import Intervention
from dictionary_learning.analysis.prompts import read_prompts
from dictionary_learning.errors import UserError
from tests.conftest import byte_tokenizer

PROMPTS = ["The heart pumps blood.", "Aspirin", "A 54-year-old man has chest pain."]
ALL = list(range(F))


@pytest.fixture(scope="module")
def lms() -> dict[str, TracedLM]:
    return models()


@pytest.fixture
def lm(lms: dict[str, TracedLM]) -> TracedLM:
    return lms["gpt2"]


def greedy_by_hand(lm: TracedLM, text: str, steps: int, change: dict[str, Any]) -> list[int]:
    """One prompt alone, the likeliest token each time, by plain hooks."""
    tokens_CL = read_prompts(lm, text).tokens_CL
    begin = tokens_CL.shape[1]
    for _ in range(steps):
        token = by_hand(lm, tokens_CL, change)[0, -1].argmax()
        if token == lm.tokenizer.eos_token_id:
            break
        tokens_CL = torch.cat([tokens_CL, token[None, None]], 1)
    return tokens_CL[0, begin:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_are_those_of_the_model_with_and_without_hooks(lms: dict[str, TracedLM], family: str) -> None:
    lm, sae = lms[family], dictionary()
    change = own(lambda x: x + 25 * sae.decoder_rows[3])
    found = generate(lm, PROMPTS, Intervention(POINT, sae, 3, "add", 25.0), max_new_tokens=8)
    for text, one in zip(PROMPTS, found, strict=True):
        assert one.original_ids == greedy_by_hand(lm, text, 8, {})
        assert one.modified_ids == greedy_by_hand(lm, text, 8, {POINT: change})
        assert one.original == lm.tokenizer.decode(one.original_ids)
    assert any(one.original_ids != one.modified_ids for one in found)


def logits_of(monkeypatch: pytest.MonkeyPatch, lm: TracedLM, cached: bool, **options: Any) -> tuple[Any, ...]:
    """Continuations, the logits behind each of their steps, and the number of tokens that went through the model."""
    seen: list[torch.Tensor] = []
    counted: list[int] = []

    def note(*given: Any) -> torch.Tensor:
        seen.append(next_logits(*given))
        return seen[-1]

    next_logits = generation._next_logits
    handle = lm.module.get_input_embeddings().register_forward_hook(lambda _, ids, __: counted.append(ids[0].numel()))
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_next_logits", note)
        if not cached:
            patch.setattr(TracedLM, "new_cache", lambda self: None)
        found = generate(lm, PROMPTS, **options)
    handle.remove()
    return found, seen, sum(counted)


@pytest.mark.parametrize("scope", ["prompt", "generated", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_neither_tokens_nor_logits(
    lms: dict[str, TracedLM], family: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, sae = lms[family], dictionary()
    lm.resolve(["resid_post_layer_0", POINT])  # the probe is a forward of its own
    options: dict[str, Any] = {
        "interventions": [
            Intervention(POINT, sae, 3, "add", 25.0, positions=slice(0, 2)),
            Intervention(("resid_post_layer_0", POINT), dictionary(seed=1), ALL, "amplify", 1.5, drop_error=True),
        ],
        "scope": scope,
        "max_new_tokens": 12,
    }
    cached, logits, few = logits_of(monkeypatch, lm, True, **options)
    whole, expected, many = logits_of(monkeypatch, lm, False, **options)
    assert cached == whole and any(one.original_ids != one.modified_ids for one in whole)
    assert len(logits) == len(expected)
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    longest = read_prompts(lm, PROMPTS).tokens_CL.shape[1]
    assert few <= 2 * len(PROMPTS) * (longest + 11) < many / 5, "each token goes through the model once"


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_cache_is_made_anew_where_all_positions_turn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a length long RoPE turns keys by other angles, and dynamic NTK by others at each length: also old ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 20, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=4,
        intermediate_size=64,
        num_attention_heads=4,
        max_position_embeddings=80 if kind == "longrope" else 20,
        rope_parameters=rope,
    )
    module = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    lm = TracedLM.load(module, byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"))
    monkeypatch.setattr(TracedLM, "max_positions", None)
    lm.resolve([POINT])
    one = Intervention(POINT, dictionary(), 3, "add", 25.0)
    cached, logits, few = logits_of(monkeypatch, lm, True, interventions=one, max_new_tokens=12)
    whole, expected, many = logits_of(monkeypatch, lm, False, interventions=one, max_new_tokens=12)
    assert cached == whole
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert few < many


def test_a_model_that_leaves_the_cache_empty_is_run_anew_each_time(lm: TracedLM) -> None:
    one = Intervention(POINT, dictionary(), 3, "add", 25.0)
    expected = generate(lm, PROMPTS, one, max_new_tokens=6)
    forward = lm.module.forward
    lm.module.forward = lambda *args, past_key_values=None, **kwargs: forward(*args, **{**kwargs, "use_cache": False})
    try:
        assert generate(lm, PROMPTS, one, max_new_tokens=6) == expected
    finally:
        lm.module.forward = forward


def test_where_one_side_ends_the_other_rows_are_as_they_were(lm: TracedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt, the only one with an intervention, ends at once on one side alone."""
    end = lm.tokenizer.eos_token_id
    sae = dictionary()
    prompts = ["Aspirin", "A 54-year-old man", "Pain"]
    only = Intervention(POINT, sae, 3, "add", 1e4, positions=re.compile("spirin"))
    seen: list[torch.Tensor] = []
    next_logits = generation._next_logits

    def note(lm: TracedLM, tokens_CL: torch.Tensor, placed: Any, past: Any) -> torch.Tensor:
        logits_CV = next_logits(lm, tokens_CL, placed, past)
        seen.append(logits_CV[1:].clone())
        logits_CV[0, end] = 1e9 if placed else -1e9
        logits_CV[1:, end] = -1e9
        return logits_CV

    monkeypatch.setattr(generation, "_next_logits", note)
    found = generate(lm, prompts, only, max_new_tokens=6, scope="prompt")
    assert found[0].modified_ids == [] and len(found[0].original_ids) == 6
    assert all(one.original_ids == one.modified_ids for one in found[1:])
    original, modified = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(original, modified, strict=True))


def test_the_scope_says_which_tokens_are_changed(lm: TracedLM) -> None:
    sae = dictionary()
    direction = 25 * sae.decoder_rows[3]
    length = read_prompts(lm, PROMPTS[0]).tokens_CL.shape[1]
    inside = [1, 2]

    def at(acts_at: Any) -> Any:
        return lambda x: x + direction * torch.tensor([acts_at(place) for place in range(x.shape[1])])[:, None]

    for scope, acts_at in (
        ("prompt", lambda place: place in inside),
        ("generated", lambda place: place >= length),
        ("both", lambda place: place in inside or place >= length),
    ):
        one = Intervention(POINT, sae, 3, "add", 25.0, positions=slice(0, 2))
        found = generate(lm, PROMPTS[0], one, max_new_tokens=8, scope=scope)[0]
        assert found.modified_ids == greedy_by_hand(lm, PROMPTS[0], 8, {POINT: at(acts_at)}), scope


def test_sampling_repeats_with_its_seed_and_both_sides_draw_alike(lm: TracedLM) -> None:
    sae = dictionary()
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    unchanged = Intervention(POINT, sae, ALL, "amplify", 1.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (generate(lm, PROMPTS, unchanged, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state()), "the default generator was touched"
    assert first == again and first != other
    assert all(one.original_ids == one.modified_ids for one in first)
    likeliest = generate(lm, PROMPTS, unchanged, max_new_tokens=12)
    assert generate(lm, PROMPTS, unchanged, max_new_tokens=12, temperature=1.5, top_p=1e-9, seed=7) == likeliest


def test_tokens_are_drawn_by_their_probabilities_within_the_nucleus() -> None:
    draws_C = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    p_V = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    for top_p, expected in (
        (1.0, p_V),
        (0.5, torch.tensor([0, 4, 0, 3, 0]) / 7),
        (0.39, torch.tensor([0, 1, 0, 0, 0])),
    ):
        drawn = choose((2 * p_V.log()).expand(len(draws_C), -1), draws_C, temperature=2.0, top_p=top_p)
        torch.testing.assert_close(drawn.bincount(minlength=5) / 10_000, expected.float(), atol=2e-4, rtol=0)


def test_the_end_of_text_token_ends_a_continuation(lm: TracedLM) -> None:
    head: Any = lm.module.get_output_embeddings()
    end = lm.tokenizer.eos_token_id
    handle = head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([end]), 1e9))
    try:
        found = generate(lm, PROMPTS, Intervention(POINT, dictionary(), 3, "ablate"), max_new_tokens=5)
    finally:
        handle.remove()
    assert [one.original_ids for one in found] == [[], [], []] and found[0].modified == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be a positive integer, got -1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"seed": -1}, "seed must be"),
        ({"scope": "promt"}, "Did you mean 'prompt'?"),
    ],
)
def test_generation_settings_that_can_not_be_are_refused(lm: TracedLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        generate(lm, "a", Intervention(POINT, dictionary(), 3, "set", 1.0), **options)


def test_a_prompt_and_its_continuation_must_fit(lm: TracedLM) -> None:
    with pytest.raises(UserError, match="60 tokens and 10 new ones, .* ask for fewer new tokens"):
        generate(lm, "a" * 59, Intervention(POINT, dictionary(), 3, "set", 1.0), max_new_tokens=10)
    assert generate(lm, "a" * 59, Intervention(POINT, dictionary(), 3, "set", 1.0), max_new_tokens=4)
