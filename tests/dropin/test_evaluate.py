"""`evaluate`, `loss_recovered` and the buffers of the field's surface, on a toy model."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor, nn

from dictionary_learning import ActivationBuffer, TracedLM, trainSAE
from dictionary_learning.buffer_variants import HeadActivationBuffer, NNsightActivationBuffer
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK, IdentityDict
from dictionary_learning.errors import UserError
from dictionary_learning.evaluation import evaluate, evaluate_dictionaries, loss_recovered
from dictionary_learning.packing import ContextPacker
from dictionary_learning.trainers import TopKTrainer

D, HEADS, LAYER = 16, 4, 1
TEXTS = [f"{word} nerve {number} innervates the deltoid muscle." for number in range(60) for word in ("An", "No")]
PEER_KEYS = {
    *("l2_loss", "l1_loss", "l0", "frac_variance_explained", "cossim", "l2_ratio", "relative_reconstruction_bias"),
    *("loss_original", "loss_reconstructed", "loss_zero", "frac_recovered", "frac_alive"),
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request: Any, tokenizer_bos_eos_pad: Any) -> TracedLM:
    import transformers

    torch.manual_seed(1)
    shared: dict[str, Any] = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model: Any
    if request.param == "llama":
        sizes: dict[str, Any] = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3}
        llama = transformers.LlamaConfig(**sizes, num_attention_heads=HEADS, max_position_embeddings=64, **shared)
        model = transformers.LlamaForCausalLM(llama)
    else:
        gpt2 = transformers.GPT2Config(n_layer=3, n_embd=D, n_head=HEADS, n_positions=64, **shared)
        model = transformers.GPT2LMHeadModel(gpt2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return TracedLM.load(model.eval(), tokenizer_bos_eos_pad)


def dictionary() -> AutoEncoder:
    torch.manual_seed(3)
    made = AutoEncoder(D, 48)
    with torch.no_grad():
        made.encoder.bias.normal_(-0.5, 0.5)
    return made


def buffer(lm: Any, **options: Any) -> ActivationBuffer:
    sizes: dict[str, Any] = {"n_ctxs": 16, "ctx_len": 16, "refresh_batch_size": 4, "out_batch_size": 32}
    return ActivationBuffer(iter(TEXTS), lm, **{"submodule": f"mlp_out_layer_{LAYER}", **sizes, **options})


# -------------------------------------------------------------------------------------------------------- evaluate


def test_a_buffer_is_evaluated_with_every_key_of_the_package(lm: TracedLM) -> None:
    measured = evaluate(dictionary(), buffer(lm), 16, 8)
    assert set(measured) >= PEER_KEYS
    assert measured["tokens"] == 32, "n_batches is 1"
    assert evaluate(dictionary(), buffer(lm), n_batches=3)["tokens"] == 96
    gap = measured["loss_zero"] - measured["loss_original"]
    assert measured["frac_recovered"] == pytest.approx((measured["loss_zero"] - measured["loss_reconstructed"]) / gap)


def test_the_losses_are_on_the_texts_behind_the_batches(lm: TracedLM) -> None:
    read, twin = buffer(lm, add_special_tokens=False), buffer(lm, add_special_tokens=False)
    measured = evaluate(dictionary(), read, max_len=12, batch_size=3, n_batches=2)
    for _ in range(2):
        next(twin)
    contexts = ContextPacker(
        twin.text_batch(6), lm.tokenizer, ctx_len=12, batch_contexts=3, packing=False, add_special_tokens=False
    )
    wanted = evaluate_dictionaries(lm, contexts, [("mlp_out_layer_1", dictionary())], remove_special=False)[0]
    for name in ("loss_original", "loss_reconstructed", "loss_zero", "kl"):
        assert measured[name] == pytest.approx(getattr(wanted, name), rel=1e-6)
    assert next(read.source.contexts.texts) == next(twin.source.contexts.texts), "it read other texts"  # type: ignore[attr-defined]


def test_an_identity_recovers_everything(lm: TracedLM) -> None:
    for io in ("in", "out"):
        measured = evaluate(IdentityDict(D), buffer(lm, submodule=lm.module.get_submodule(mlp(lm)), io=io), io=io)
        assert measured["frac_recovered"] == pytest.approx(1, abs=1e-4)
        assert measured["l2_loss"] == 0 and measured["frac_variance_explained"] == 1


def mlp(lm: TracedLM) -> str:
    return lm.resolve(f"mlp_out_layer_{LAYER}")[0].path


class _ScaleAware(IdentityDict):
    """The identity that remembers the mean norm of what it was given."""

    def encode(self, x: Tensor) -> Tensor:
        self.norm = x.norm(dim=-1).mean().item()
        return x


def test_normalised_batches_have_a_mean_norm_of_sqrt_d_and_reconstructions_come_back_in_raw_units(lm: TracedLM) -> None:
    seen = _ScaleAware(D)
    x = 7 * torch.randn(40, D)
    raw = evaluate(dictionary(), [x * (D**0.5 / x.norm(dim=-1).mean())])
    assert evaluate(dictionary(), [x], normalize_batch=True) == pytest.approx(raw, rel=1e-5)
    evaluate(seen, [x], normalize_batch=True)
    assert seen.norm == pytest.approx(D**0.5, rel=1e-5)
    measured = evaluate(seen, buffer(lm), normalize_batch=True)
    assert seen.norm == pytest.approx(D**0.5, rel=1e-4), "the losses' activations were not normalised"
    assert measured["frac_recovered"] == pytest.approx(1, abs=1e-4)


def test_batches_of_contexts_are_measured_row_by_row() -> None:
    x = torch.randn(6, 5, D)
    assert evaluate(dictionary(), [x]) == evaluate(dictionary(), [x.flatten(0, 1)])


def test_a_used_up_stream_of_texts_is_told(lm: TracedLM) -> None:
    used = buffer(lm)
    list(used)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(dictionary(), used)
    nearly = ActivationBuffer(
        TEXTS[:12], lm, "mlp_out_layer_1", n_ctxs=40, ctx_len=16, refresh_batch_size=4, out_batch_size=32
    )
    with pytest.warns(UserWarning, match="texts of the buffer are used up"):
        assert "loss_original" not in evaluate(dictionary(), nearly)


def test_what_would_be_ignored_is_refused(lm: TracedLM) -> None:
    assert evaluate(dictionary(), [torch.randn(8, D)], tracer_args={"use_cache": False})["tokens"] == 8
    with pytest.raises(UserError, match="which always hold here, got scan=True"):
        evaluate(dictionary(), [torch.randn(8, D)], tracer_args={"scan": True})
    with pytest.raises(UserError, match="io is 'in', but the buffer delivers 'out'"):
        evaluate(dictionary(), buffer(lm), io="in")
    several = buffer(lm, submodule=["resid_post_layer_0", "resid_post_layer_1"])
    with pytest.raises(UserError, match="several hook points .resid_post_layer_0, resid_post_layer_1"):
        evaluate(dictionary(), several)


def test_the_dictionary_is_not_moved(lm: TracedLM) -> None:
    made = dictionary()
    measured = evaluate(made, [torch.randn(8, D)], device="cpu")
    assert measured["tokens"] == 8 and made.decoder_rows.device.type == "cpu"


# -------------------------------------------------------------------------------------------------- loss_recovered


def by_hooks(lm: TracedLM, text: str, edit: Any, end: str) -> float:
    """Mean next-token loss of one text, with an MLP's input or output edited by a plain torch hook."""
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    module = lm.module.get_submodule(mlp(lm))
    if end == "in":
        handle = module.register_forward_pre_hook(lambda m, args: (edit(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda m, args, out: edit(args[0] if end == "both" else out))
    try:
        with torch.no_grad():
            logits = lm.module(input_ids=torch.tensor([ids]), use_cache=False).logits
    finally:
        handle.remove()
    return nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:])).item()


@pytest.mark.parametrize(("io", "end"), [("out", "out"), ("in", "in"), ("in_and_out", "both")])
def test_the_three_losses_equal_plain_hooks(lm: TracedLM, io: str, end: str) -> None:
    made, text = dictionary(), TEXTS[7]
    found = loss_recovered(text, lm, lm.module.get_submodule(mlp(lm)), made, io=io)
    wanted = [
        by_hooks(lm, text, lambda x: x, "out"),
        by_hooks(lm, text, made, end),
        by_hooks(lm, text, torch.zeros_like, end),
    ]
    assert [loss.item() for loss in found] == pytest.approx(wanted, rel=1e-4)
    assert len({round(value, 3) for value in wanted}) == 3


def test_texts_are_cut_and_padding_changes_nothing(lm: TracedLM) -> None:
    made, site = dictionary(), f"mlp_out_layer_{LAYER}"
    together = [x.item() for x in loss_recovered([TEXTS[0], "Hi there."], lm, site, made)]
    alone = [[x.item() for x in loss_recovered(text, lm, site, made)] for text in (TEXTS[0], "Hi there.")]
    sizes = [len(lm.tokenizer(text)["input_ids"]) for text in (TEXTS[0], "Hi there.")]
    wanted = [(sizes[0] * a + sizes[1] * b) / sum(sizes) for a, b in zip(*alone, strict=True)]
    assert together == pytest.approx(wanted, rel=1e-4)
    cut = loss_recovered(TEXTS[0], lm, site, made, max_len=9)
    assert cut == loss_recovered(TEXTS[0][:8], lm, site, made)  # BOS and eight bytes


def test_an_nnsight_model_and_token_ids_do_too(lm: TracedLM) -> None:
    wrapped = nnsight.NNsight(lm.module)
    ids = torch.tensor([[256, *range(65, 85)], [256, *range(66, 86)]])
    found = loss_recovered(ids, wrapped, wrapped.get(mlp(lm)), dictionary())
    with torch.no_grad():
        logits = lm.module(input_ids=ids, use_cache=False).logits
    wanted = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found[0].item() == pytest.approx(wanted.item(), rel=1e-5)
    with pytest.raises(UserError, match="io must be 'in', 'out' or 'in_and_out', got 'both'"):
        loss_recovered(ids, wrapped, wrapped.get(mlp(lm)), dictionary(), io="both")


def test_a_transcoder_is_evaluated_at_its_output(lm: TracedLM) -> None:
    module = lm.module.get_submodule(mlp(lm))
    data = buffer(lm, submodule=module, io="in_and_out")
    torch.manual_seed(0)
    made = AutoEncoderTopK(D, 32, 4, output_dim=D)
    batch = next(data)
    assert isinstance(batch, Tensor)
    measured = evaluate(made, [batch], io="in_and_out")
    y, x_hat = batch[:, 1], made(batch[:, 0])
    wanted = 1 - (y - x_hat).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert measured["frac_variance_explained"] == pytest.approx(wanted.item(), rel=1e-4)
    assert set(evaluate(made, data)) >= PEER_KEYS


# ------------------------------------------------------------------------------------------- the field's other buffers


def test_a_buffer_of_token_ids_delivers_every_position_of_every_row(lm: TracedLM) -> None:
    rows = torch.randint(0, 256, (24, 8), generator=torch.Generator().manual_seed(0))
    for io in ("out", "in_and_out"):
        made = NNsightActivationBuffer(
            (row.tolist() for row in rows), nnsight.NNsight(lm.module), lm.module.get_submodule(mlp(lm)), io=io,
            n_ctxs=6, ctx_len=8, refresh_batch_size=2, out_batch_size=16,
        )  # fmt: skip
        found = torch.cat([batch for batch in made])  # type: ignore[misc]
        ends = [lm.resolve(mlp(lm), io=end)[0] for end in (("in", "out") if io == "in_and_out" else ("out",))]
        acts = lm.capture(rows, ends)
        wanted = torch.stack([x.flatten(0, 1) for x in acts.values()], dim=1)
        found = found if io == "in_and_out" else found[:, None]
        assert found.shape == wanted.shape == (24 * 8, len(ends), D)
        torch.testing.assert_close(found.flatten(1).sort(0).values, wanted.flatten(1).sort(0).values)


def test_a_buffer_of_token_ids_hands_out_ids_and_can_be_resumed(lm: TracedLM) -> None:
    def fresh() -> NNsightActivationBuffer:
        rows = ([number] * 8 for number in range(40))
        return NNsightActivationBuffer(
            rows, lm, "mlp_out_layer_1", n_ctxs=6, ctx_len=8, refresh_batch_size=2, out_batch_size=16, seed=5
        )

    made = fresh()
    next(made)
    ids = made.token_batch(3)
    assert ids.shape == (3, 8) and torch.equal(ids[0] + 1, ids[1])
    assert torch.equal(made.text_batch(2)[0], ids[2] + 1)
    assert set(made.tokenized_batch(1)) == {"input_ids", "attention_mask"}
    state = made.state_dict()
    again = fresh()
    again.load_state_dict(state)
    for _ in range(4):
        assert torch.equal(next(made), next(again))  # type: ignore[arg-type]
    assert "loss_original" in evaluate(dictionary(), made, batch_size=2)
    sizes: dict[str, Any] = {"n_ctxs": 8, "ctx_len": 8, "refresh_batch_size": 2, "out_batch_size": 4}
    uneven = NNsightActivationBuffer([[1] * 8, [1] * 7], lm, "mlp_out_layer_1", **sizes)
    with pytest.raises(UserError, match=r"one length, got lengths \[7, 8\]"):
        next(uneven)


@pytest.mark.parametrize("apply_W_O", [False, True])
def test_heads_add_up_to_what_the_attention_writes(lm: TracedLM, apply_W_O: bool) -> None:
    made = HeadActivationBuffer(
        TEXTS, lm, LAYER, n_ctxs=16, ctx_len=16, refresh_batch_size=4, out_batch_size=32, apply_W_O=apply_W_O
    )
    batch = next(made)
    assert batch.shape == (32, HEADS, D if apply_W_O else D // HEADS)
    assert made.activations.shape == (16 * 16, HEADS, D // HEADS)
    attention = lm.module.get_submodule(lm.resolve(f"attn_out_layer_{LAYER}")[0].path)
    projection: Any = getattr(attention, "o_proj", None) or attention.c_proj
    if not apply_W_O:
        head = torch.zeros_like(batch)
        head[:, 2] = batch[:, 2]
        weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.t()
        start = 2 * made.head_dim
        alone = batch[:, 2] @ weight[:, start : start + made.head_dim].t()
        torch.testing.assert_close(projection(head.flatten(1)) - projection(torch.zeros(1, D)), alone)
        return
    twin = HeadActivationBuffer(TEXTS, lm, LAYER, n_ctxs=16, ctx_len=16, refresh_batch_size=4, out_batch_size=32)
    written = projection(next(twin).flatten(1)) - projection(torch.zeros(1, D))
    torch.testing.assert_close(batch.sum(1), written.detach(), rtol=1e-4, atol=1e-5)


def test_a_buffer_of_heads_trains_a_dictionary_a_head(lm: TracedLM) -> None:
    made = HeadActivationBuffer(TEXTS, lm, LAYER, n_ctxs=16, ctx_len=16, refresh_batch_size=4, out_batch_size=32)
    config = {"trainer": TopKTrainer, "activation_dim": D // HEADS, "dict_size": 8, "k": 2, "device": "cpu"}
    trained = trainSAE(made, [config] * HEADS, 4, activations_split_by_head=True, normalize_activations=True)
    assert len(trained) == HEADS
    assert made.config["layer"] == LAYER
    with pytest.raises(UserError, match="remote=True is not offered"):
        HeadActivationBuffer(TEXTS, lm, LAYER, remote=True)
