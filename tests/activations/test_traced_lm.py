from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor, nn

from dictionary_learning.activations.hook_points import SITES
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.errors import UserError

from .conftest import VOCAB, Family, build, by_torch_hooks


def test_every_site_equals_plain_torch_hooks(family: Family, tokens_CL: Tensor):
    points = {
        f"{site}_layer_{layer}": (family.path(site, layer), io)
        for site, (_, io) in SITES.items()
        for layer in (0, 2, 3)
    }
    expected = by_torch_hooks(family.lm.module, points, input_ids=tokens_CL)
    got = family.lm.capture(tokens_CL, list(points))
    assert list(got) == list(points)
    for name in points:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def test_residual_stream_equals_output_hidden_states(family: Family, tokens_CL: Tensor):
    with torch.no_grad():
        hidden = family.lm.module(tokens_CL, output_hidden_states=True).hidden_states
    got = family.lm.capture(tokens_CL, [f"resid_pre_layer_{i}" for i in range(4)] + ["resid_post_layer_2"])
    for layer in range(4):
        torch.testing.assert_close(got[f"resid_pre_layer_{layer}"], hidden[layer], rtol=0, atol=0)
    # hidden[4] is taken behind the final norm, so block 2 is the last that can be compared.
    torch.testing.assert_close(got["resid_post_layer_2"], hidden[3], rtol=0, atol=0)


def test_hook_points_may_be_asked_for_in_any_order_and_come_back_in_it(lm: TracedLM, tokens_CL: Tensor):
    backwards = ["resid_post_layer_3", "mlp_out_layer_1", "attn_in_layer_1", "resid_pre_layer_0"]
    got = lm.capture(tokens_CL, backwards)
    assert list(got) == backwards
    for name in backwards:
        torch.testing.assert_close(got[name], lm.capture(tokens_CL, name)[name], rtol=0, atol=0)


def count_starts(module: nn.Module) -> tuple[list[int], Any]:
    """How often a module starts; one that the trace stops in never gets as far as its forward hooks."""
    calls: list[int] = []
    return calls, module.register_forward_pre_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize(
    ("last", "runs", "does_not"),
    [
        ("resid_post_layer_1", "{blocks}.1.{mlp}", "{blocks}.2"),
        ("resid_pre_layer_2", "{blocks}.1.{mlp}", "{blocks}.2.{attn}"),
        ("attn_out_layer_3", "{blocks}.3.{attn}", "{blocks}.3.{mlp}"),
    ],
)
def test_the_forward_stops_after_the_last_hook_point(
    family: Family, tokens_CL: Tensor, last: str, runs: str, does_not: str
):
    lm = family.lm
    lm.resolve(last)  # the probe is a whole forward, and happens once
    watched = [
        lm.module.get_submodule(runs.format(**family._asdict())),
        lm.module.get_submodule(does_not.format(**family._asdict())),
        lm.module.get_output_embeddings(),
    ]
    counts, handles = zip(*map(count_starts, watched), strict=True)
    lm.capture(tokens_CL, ["resid_pre_layer_0", last])
    seen = [len(c) for c in counts]
    lm.logits(tokens_CL)
    for handle in handles:
        handle.remove()
    assert seen == [1, 0, 0]
    assert [len(c) for c in counts] == [2, 1, 1]  # the counters do count


def test_widths_orders_layers_and_tuples_come_from_one_probe(families: dict[str, Family]):
    for family in families.values():
        calls, handle = count_starts(family.lm.module)
        fresh = TracedLM.load(family.lm.module)
        points = fresh.resolve(["resid_post_layer_3", "attn_out_layer_1", f"{family.blocks}.1.{family.mlp}:in"])
        fresh.resolve("mlp_out_layer_0")
        handle.remove()
        assert len(calls) == 1
        assert [p.width for p in points] == [32, 32, 32]
        assert [p.layer for p in points] == [3, 1, 1]
        assert points[1].order < points[2].order < points[0].order
    slots = {
        name: [p.slot for p in f.lm.resolve(["attn_out_layer_1", "resid_post_layer_1"])] for name, f in families.items()
    }
    assert slots["gpt2"] == slots["gemma2"] == [0, None] and slots["falcon"] == [0, 0]  # tuples and bare tensors


def test_module_paths_reach_inside_an_mlp(gpt2: TracedLM, tokens_CL: Tensor):
    got = gpt2.capture(tokens_CL, ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj:in"])
    hidden = got["transformer.h.1.mlp.c_fc"]
    assert hidden.shape == (3, 11, 128)
    torch.testing.assert_close(got["transformer.h.1.mlp.c_proj:in"], gpt2.module.transformer.h[1].mlp.act(hidden))
    assert gpt2.resolve("transformer.wte")[0].layer is None


def test_captured_tensors_carry_no_graph_and_leave_no_trace_behind(gpt2: TracedLM, tokens_CL: Tensor):
    acts = gpt2.capture(tokens_CL, "resid_post_layer_1")["resid_post_layer_1"]
    assert not acts.requires_grad
    gone = weakref.ref(acts)
    del acts
    gc.collect()
    assert gone() is None
    # the model is usable as before, with and without hidden states
    with torch.no_grad():
        assert len(gpt2.module(tokens_CL, output_hidden_states=True).hidden_states) == 5
        assert gpt2.module(tokens_CL).hidden_states is None


def test_right_padding_needs_no_mask_and_left_padding_takes_one(lm: TracedLM, tokens_CL: Tensor):
    name = "resid_post_layer_3"
    short = lm.capture(tokens_CL[:, :6], name)[name]
    right = torch.cat([tokens_CL[:, :6], torch.full((3, 5), 2)], dim=1)
    torch.testing.assert_close(lm.capture(right, name)[name][:, :6], short, rtol=1e-4, atol=1e-4)
    left, mask = torch.cat([torch.full((3, 5), 2), tokens_CL[:, :6]], dim=1), torch.ones(3, 11, dtype=torch.long)
    mask[:, :5] = 0
    masked = lm.capture(left, name, attention_mask=mask)[name]
    expected = by_torch_hooks(
        lm.module, {name: (lm.resolve(name)[0].path, "out")}, input_ids=left, attention_mask=mask
    )[name]
    torch.testing.assert_close(masked, expected, rtol=0, atol=0)
    assert not torch.allclose(masked[:, 5:], lm.capture(left, name)[name][:, 5:], atol=1e-3)


# ---- logits, interventions ------------------------------------------------------------------------------------------


def test_logits_are_the_models_own(family: Family, tokens_CL: Tensor):
    logits, acts = family.lm.logits(tokens_CL)
    with torch.no_grad():
        torch.testing.assert_close(logits, family.lm.module(tokens_CL).logits, rtol=0, atol=0)
    assert acts == {} and logits.shape == (3, 11, VOCAB)


@pytest.mark.parametrize("site", SITES)
def test_replacing_activations_by_themselves_leaves_the_logits(family: Family, tokens_CL: Tensor, site: str):
    name = f"{site}_layer_1"
    clean, acts = family.lm.logits(tokens_CL, capture=[name])
    for value in (acts[name], lambda x: x.clone()):
        again, _ = family.lm.logits(tokens_CL, replace={name: value})
        torch.testing.assert_close(again, clean, rtol=0, atol=1e-5)
    ablated, _ = family.lm.logits(tokens_CL, replace={name: torch.zeros_like})
    assert (ablated - clean).abs().max() > 1e-2


@pytest.mark.parametrize("site", SITES)
def test_a_replacement_is_what_the_model_goes_on_with(family: Family, tokens_CL: Tensor, site: str):
    """The same intervention by plain torch hooks gives the same logits; tuples keep their rest."""
    name, io = f"{site}_layer_1", SITES[site][1]
    module = family.lm.module.get_submodule(family.path(site, 1))
    noise = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1))

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((args[0] + noise, *args[1:]), kwargs) if args else (
            args, {**kwargs, "hidden_states": kwargs["hidden_states"] + noise})  # fmt: skip

    def after(_: nn.Module, args: tuple, out: Any) -> Any:
        return (out[0] + noise, *out[1:]) if isinstance(out, tuple) else out + noise

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if io == "in"
        else module.register_forward_hook(after)
    )
    with torch.no_grad():
        expected = family.lm.module(tokens_CL, use_cache=False).logits
    handle.remove()
    got, _ = family.lm.logits(tokens_CL, replace={name: lambda x: x + noise})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_capture_and_replace_share_one_trace(lm: TracedLM, tokens_CL: Tensor):
    """What is captured at a replaced point is what the model computed there; points further on see the replacement."""
    clean = lm.capture(tokens_CL, ["resid_post_layer_1", "resid_post_layer_2"])
    new = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1))
    _, acts = lm.logits(
        tokens_CL,
        capture=["resid_post_layer_2", "resid_post_layer_1", "resid_pre_layer_2"],
        replace={"resid_post_layer_1": new},
    )
    torch.testing.assert_close(acts["resid_post_layer_1"], clean["resid_post_layer_1"])
    torch.testing.assert_close(acts["resid_pre_layer_2"], new)
    assert not torch.allclose(acts["resid_post_layer_2"], clean["resid_post_layer_2"], atol=1e-3)


def test_a_cache_goes_on_from_what_was_read_and_replaced_before(family: Family, tokens_CL: Tensor):
    """In pieces of any lengths, as in one pass; two of the models' layers have a sliding window of 4."""
    noise = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1))
    name, later = "attn_out_layer_1", "resid_post_layer_3"
    expected, acts = family.lm.logits(tokens_CL, capture=[later], replace={name: lambda x: x + noise})
    past = family.lm.new_cache()
    for begin, stop in ((0, 6), (6, 7), (7, 8), (8, 11)):
        piece = slice(begin, stop)
        found, passed = family.lm.logits(
            tokens_CL[:, piece], capture=[later], replace={name: lambda x, piece=piece: x + noise[:, piece]}, past=past
        )
        torch.testing.assert_close(found, expected[:, piece], rtol=0, atol=1e-4)
        torch.testing.assert_close(passed[later], acts[later][:, piece], rtol=0, atol=1e-4)
        assert past.get_seq_length() == stop


def test_what_a_cache_holds_counts_as_positions(gpt2: TracedLM):
    past, tokens = gpt2.new_cache(), torch.ones(1, 60, dtype=torch.long)
    gpt2.logits(tokens, past=past)
    with pytest.raises(UserError, match="A context of 65 tokens is longer than the 64 positions of GPT2LMHeadModel."):
        gpt2.logits(tokens[:, :5], past=past)
    assert gpt2.logits(tokens[:, :4], past=past)[0].shape == (1, 4, VOCAB)


def test_a_model_with_states_that_are_no_keys_and_values_has_no_cache():
    import transformers as t

    ids: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    mamba = t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **ids))
    hybrid = t.BambaForCausalLM(
        t.BambaConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
                      num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
                      **ids)
    )  # fmt: skip
    for module in (mamba, hybrid):
        assert TracedLM.load(module.eval()).new_cache() is None


def test_a_replacement_that_works_in_place_does_not_change_what_was_captured(gpt2: TracedLM, tokens_CL: Tensor):
    clean, acts = gpt2.logits(tokens_CL, capture="resid_post_layer_1")
    ablated, after = gpt2.logits(
        tokens_CL, capture="resid_post_layer_1", replace={"resid_pre_layer_2": lambda x: x.zero_()}
    )
    torch.testing.assert_close(after["resid_post_layer_1"], acts["resid_post_layer_1"])
    assert (ablated - clean).abs().max() > 1e-2


def test_replacements_in_two_places_both_count(lm: TracedLM, tokens_CL: Tensor):
    one, _ = lm.logits(tokens_CL, replace={"mlp_out_layer_2": torch.zeros_like})
    both, acts = lm.logits(
        tokens_CL,
        capture=["mlp_in_layer_2"],
        replace={"mlp_out_layer_2": torch.zeros_like, "attn_out_layer_0": torch.zeros_like},
    )
    assert not torch.allclose(one, both, atol=1e-3) and acts["mlp_in_layer_2"].shape == (3, 11, 32)


def test_a_module_such_as_a_dictionary_can_be_the_replacement_in_its_own_dtype(tokens_CL: Tensor):
    lm = TracedLM.load(build("gpt2"), dtype="bfloat16")

    class Dictionary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() * 1.0

    clean, _ = lm.logits(tokens_CL)
    through, _ = lm.logits(tokens_CL, replace={"resid_post_layer_1": Dictionary()})
    assert through.dtype == torch.bfloat16
    torch.testing.assert_close(through, clean, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.zeros(3, 11, 31), r"\(3, 11, 31\)"), (lambda x: None, "NoneType"), (lambda x: x[0], r"\(11, 32\)")],
)
def test_a_replacement_of_the_wrong_shape_is_refused_and_the_model_goes_on_working(
    gpt2: TracedLM, tokens_CL: Tensor, value: Any, got: str
):
    with pytest.raises(UserError, match=rf"replacement at 'resid_post_layer_1' .* \(3, 11, 32\), got {got}"):
        gpt2.logits(tokens_CL, replace={"resid_post_layer_1": value})
    assert gpt2.logits(tokens_CL)[0].shape == (3, 11, VOCAB)


# ---- places given as objects ----------------------------------------------------------------------------------------


def test_submodules_and_nnsight_envoys_are_hook_points(families: dict[str, Family], tokens_CL: Tensor, tokenizer: Any):
    """As in `ActivationBuffer(data, model, submodule)` of the dictionary_learning library."""
    wrapper = nnsight.TransformersModel(families["gpt2"].lm.module, tokenizer=tokenizer, task="text-generation")
    lm = TracedLM.load(wrapper)
    expected = lm.capture(tokens_CL, "resid_post_layer_2")["resid_post_layer_2"]
    for place in (wrapper.transformer.h[2], lm.module.transformer.h[2], lm.model.transformer.h[2]):
        point = lm.resolve(place)[0]
        assert (point.name, point.layer) == ("transformer.h.2:out", 2)
        torch.testing.assert_close(lm.capture(tokens_CL, place)[point.name], expected, rtol=0, atol=0)
    both = lm.resolve([wrapper.transformer.h[2].mlp], io="in") + lm.resolve(wrapper.transformer.h[2].mlp)
    got = lm.capture(tokens_CL, both)
    assert list(got) == ["transformer.h.2.mlp:in", "transformer.h.2.mlp:out"]
    torch.testing.assert_close(got["transformer.h.2.mlp:in"], lm.capture(tokens_CL, "mlp_in_layer_2")["mlp_in_layer_2"])
    assert lm.tokenizer is wrapper.tokenizer
    # the user's wrapper still traces
    with torch.no_grad(), wrapper.trace(tokens_CL):
        mine = wrapper.transformer.h[2].output.save()
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_two_threads_can_share_a_model(gpt2: TracedLM, tokens_CL: Tensor):
    expected = gpt2.capture(tokens_CL, "resid_post_layer_2")["resid_post_layer_2"]
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(5):
            results.append(gpt2.capture(tokens_CL, "resid_post_layer_2")["resid_post_layer_2"])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 10 and all(torch.equal(x, expected) for x in results)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("resid_post_layer_4", "Layer 4 of 'resid_post_layer_4' is out of range: GPT2LMHeadModel has layers 0 to 3."),
        ("mlp_in_layer_-1", "Layer -1 of 'mlp_in_layer_-1' is out of range: GPT2LMHeadModel has layers 0 to 3."),
        ("transformer.h.1.mpl", "GPT2LMHeadModel has no module 'transformer.h.1.mpl'. "
         "Did you mean 'transformer.h.1.mlp'?"),
        ("resid_post_0", "GPT2LMHeadModel has no module 'resid_post_0'. Did you mean 'resid_post_layer_0'?"),
        ("transformer.h", "'transformer.h' does not run in a forward pass of GPT2LMHeadModel."),
        ("transformer.wte:in", "'transformer.wte:in' takes (2, 5), not a tensor [contexts, tokens, width]."),
        ([], "No hook point given; name at least one, such as 'resid_post_layer_0'."),
    ],
)  # fmt: skip
def test_a_hook_point_that_is_not_there_is_one_sentence(gpt2: TracedLM, place: Any, sentence: str):
    with pytest.raises(UserError) as error:
        gpt2.resolve(place)
    assert str(error.value) == sentence


def test_a_module_of_another_model_is_refused(gpt2: TracedLM):
    with pytest.raises(UserError, match="The Linear given as hook point is not a submodule of GPT2LMHeadModel"):
        gpt2.resolve(nn.Linear(2, 2))


def test_a_module_that_runs_twice_is_refused_instead_of_read_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layers[0](self.layers[0](self.embed(input_ids)))

    lm = TracedLM.load(Twice())
    with pytest.raises(UserError, match="runs 2 times in one forward pass of Twice, not once"):
        lm.resolve("resid_post_layer_0")
    # Otherwise any module that takes input_ids will do, and a bare tensor as result.
    assert lm.capture(torch.ones(2, 3, dtype=torch.long), "embed")["embed"].shape == (2, 3, 4)
    assert lm.logits(torch.ones(2, 3, dtype=torch.long))[0].shape == (2, 3, 4)


def test_flattened_expert_inputs_come_back_as_contexts():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(10, 4), nn.Linear(4, 6)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.fc(self.embed(input_ids).flatten(0, 1)).unflatten(0, input_ids.shape)

    lm, tokens = TracedLM.load(Flat()), torch.arange(6).reshape(2, 3)
    logits, acts = lm.logits(tokens, capture=["fc"], replace={"fc": lambda x: x * 2})
    assert acts["fc"].shape == (2, 3, 6)
    torch.testing.assert_close(logits, acts["fc"] * 2)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.zeros(5, dtype=torch.long), "Tokens should be integers [contexts, tokens], got torch.int64 (5,)."),
        (torch.zeros(1, 5), "Tokens should be integers [contexts, tokens], got torch.float32 (1, 5)."),
        (torch.zeros(1, 65, dtype=torch.long), "A context of 65 tokens is longer than the 64 positions of "
         "GPT2LMHeadModel."),
        (torch.full((1, 5), VOCAB), f"Token id {VOCAB} is outside the {VOCAB} tokens of GPT2LMHeadModel; is the "
         "tokenizer the model's own?"),
    ],
)  # fmt: skip
def test_tokens_the_model_cannot_take_are_one_sentence(gpt2: TracedLM, tokens: Tensor, sentence: str):
    with pytest.raises(UserError) as error:
        gpt2.capture(tokens, "resid_post_layer_0")
    assert str(error.value) == sentence
