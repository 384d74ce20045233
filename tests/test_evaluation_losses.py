"""The loss of a model that reads through a dictionary, against plain torch hooks on the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_evaluation import D, F, brute_force, random_dictionaries
from torch import Tensor, nn

from dictionary_learning import TracedLM
from dictionary_learning.dictionary import AutoEncoder, Dictionary, IdentityDict
from dictionary_learning.errors import UserError
from dictionary_learning.evaluation import EvalResult, evaluate_dictionaries
from dictionary_learning.packing import ContextPacker, TokenBatch

LAYER_1, LAYER_2 = "resid_post_layer_1", "mlp_out_layer_2"
LOUD = "~"  # the token whose embedding makes activations of extreme norm
TEXTS = [
    "The left ventricle pumps blood into the aorta.",
    "Metformin lowers hepatic glucose production.",
    "A man presents with crushing chest pain ~ radiating to the left arm.",
    "Which nerve innervates the deltoid? The axillary nerve.",
]


@pytest.fixture(scope="module")
def lm(tokenizer: Any) -> TracedLM:
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_layer=3, n_embd=D, n_head=2, n_positions=32, bos_token_id=256, eos_token_id=256
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that positions differ, and what is done to one shows in others
        model.transformer.wte.weight[tokenizer(LOUD)["input_ids"][0]] *= 60
    return TracedLM.load(model, tokenizer)


def contexts(tokenizer: Any, **options: Any) -> list[TokenBatch]:
    return list(ContextPacker(TEXTS, tokenizer, **{"ctx_len": 16, "batch_contexts": 4, **options}))


@pytest.fixture(scope="module")
def batches(tokenizer: Any) -> list[TokenBatch]:
    made = contexts(tokenizer)
    assert len(made) > 2 and not made[-1].real_CL.all(), "the last context should be padded"
    return made


def run_with_hook(lm: TracedLM, tokens_CL: Tensor, path: str, edit: Any) -> tuple[Tensor, Tensor]:
    """(logits, activation before the edit) by a plain torch forward hook."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())
        new = edit(seen[0].clone())
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = lm.module.get_submodule(path).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return lm.module(input_ids=tokens_CL, use_cache=False).logits, seen[0]
    finally:
        handle.remove()


def by_hand(
    lm: TracedLM, batches: list[TokenBatch], path: str, dictionary: Dictionary, masks: list[Tensor]
) -> dict[str, float]:
    """Losses and KL with `dictionary` spliced in at `path` wherever `masks` say, position by position."""
    sums, count = {"loss_original": 0.0, "loss_reconstructed": 0.0, "loss_zero": 0.0, "kl": 0.0}, 0

    def splice(mask: Tensor, function: Any) -> Any:
        def edit(x: Tensor) -> Tensor:
            for c, position in mask.nonzero().tolist():
                x[c, position] = function(x[c, position])
            return x

        return edit

    for batch, mask in zip(batches, masks, strict=True):
        edits = {
            "loss_original": lambda x: x,
            "loss_reconstructed": splice(mask, dictionary),
            "loss_zero": splice(mask, torch.zeros_like),
        }
        log_p = {
            name: run_with_hook(lm, batch.tokens_CL, path, edit)[0].double().log_softmax(-1)
            for name, edit in edits.items()
        }
        for c, position in mask.nonzero().tolist():
            if position + 1 == mask.shape[1] or not batch.keep_CL[c, position + 1]:
                continue
            count += 1
            target = batch.tokens_CL[c, position + 1]
            for name in edits:
                sums[name] -= log_p[name][c, position, target].item()
            p, q = log_p["loss_original"][c, position], log_p["loss_reconstructed"][c, position]
            sums["kl"] += (p.exp() * (p - q)).sum().item()
    means = {name: value / count for name, value in sums.items()}
    gap = means["loss_zero"] - means["loss_original"]
    return means | {"frac_recovered": (means["loss_zero"] - means["loss_reconstructed"]) / gap}


def losses(result: EvalResult) -> dict[str, float]:
    names = ("loss_original", "loss_reconstructed", "loss_zero", "kl", "frac_recovered")
    return {name: getattr(result, name) for name in names}


def zero_dictionary() -> AutoEncoder:
    dictionary = AutoEncoder(D, F)
    for parameter in dictionary.parameters():
        parameter.data.zero_()
    return dictionary


@pytest.mark.parametrize("hook_point", [LAYER_1, LAYER_2])
def test_an_identity_recovers_all_of_the_loss_and_a_zero_none(
    lm: TracedLM, batches: list[TokenBatch], hook_point: str
) -> None:
    identity, zero = evaluate_dictionaries(
        lm, batches, [(hook_point, IdentityDict(D)), (hook_point, zero_dictionary())]
    )
    assert identity.loss_reconstructed == pytest.approx(identity.loss_original, abs=1e-6)
    assert identity.frac_recovered == pytest.approx(1, abs=1e-6) and identity.kl == pytest.approx(0, abs=1e-6)
    assert zero.loss_reconstructed == zero.loss_zero and zero.frac_recovered == 0
    assert zero.loss_zero is not None and zero.loss_original is not None
    assert abs(zero.loss_zero - zero.loss_original) > 0.05 and zero.kl is not None and zero.kl > 0.05


@pytest.mark.parametrize(("hook_point", "path"), [(LAYER_1, "transformer.h.1"), (LAYER_2, "transformer.h.2.mlp")])
@pytest.mark.parametrize("kind", [0, 1])
def test_losses_equal_plain_hooks_on_the_model(
    lm: TracedLM, batches: list[TokenBatch], hook_point: str, path: str, kind: int
) -> None:
    dictionary = random_dictionaries()[kind]
    result = evaluate_dictionaries(lm, batches, [(hook_point, dictionary)])[0]
    masks = [batch.keep_CL for batch in batches]
    assert losses(result) == pytest.approx(by_hand(lm, batches, path, dictionary, masks), rel=1e-4)
    acts = [run_with_hook(lm, batch.tokens_CL, path, lambda x: x)[1][batch.keep_CL] for batch in batches]
    pooled = {name: value for name, value in result.to_dict().items() if name not in losses(result)}
    assert pooled == pytest.approx(brute_force(dictionary, torch.cat(acts)), rel=1e-4)


def test_special_tokens_are_measured_too_when_they_are_not_removed(lm: TracedLM, batches: list[TokenBatch]) -> None:
    dictionary = random_dictionaries()[0]
    kept, every = (
        evaluate_dictionaries(lm, batches, [(LAYER_1, dictionary)], remove_special=flag)[0] for flag in (True, False)
    )
    masks = [batch.real_CL for batch in batches]
    assert every.tokens == sum(int(mask.sum()) for mask in masks) > kept.tokens
    assert losses(every) == pytest.approx(by_hand(lm, batches, "transformer.h.1", dictionary, masks), rel=1e-4)


def test_special_tokens_and_padding_keep_their_activation(lm: TracedLM, batches: list[TokenBatch]) -> None:
    dictionary, batch = random_dictionaries()[0], batches[-1]
    clean = lm.capture(batch.tokens_CL, LAYER_1)[LAYER_1]
    inputs: list[Tensor] = []
    hook = lm.module.get_submodule("transformer.h.2").register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    try:
        evaluate_dictionaries(lm, [batch], [(LAYER_1, dictionary)])
    finally:
        hook.remove()
    keep = batch.keep_CL
    original, zeroed, replaced = inputs
    assert torch.equal(original, clean)
    assert torch.equal(zeroed[~keep], clean[~keep]) and not zeroed[keep].any()
    assert torch.equal(replaced[~keep], clean[~keep])
    torch.testing.assert_close(replaced[keep], dictionary(clean[keep]).detach())


def test_dictionaries_at_two_hook_points_share_one_clean_forward(lm: TracedLM, batches: list[TokenBatch]) -> None:
    wanted = [(LAYER_2, random_dictionaries()[0]), (LAYER_1, random_dictionaries()[1]), (LAYER_2, IdentityDict(D))]
    apart = [evaluate_dictionaries(lm, batches, [one])[0] for one in wanted]
    forwards: list[None] = []
    hook = lm.module.register_forward_pre_hook(lambda *_: forwards.append(None))
    try:
        together = evaluate_dictionaries(lm, batches, wanted)
    finally:
        hook.remove()
    assert together == apart
    assert len(forwards) == len(batches) * (1 + 2 + 3)  # clean, zeros at two hook points, three dictionaries


def test_activations_of_extreme_norm_are_left_alone(lm: TracedLM, batches: list[TokenBatch], tokenizer: Any) -> None:
    dictionary = random_dictionaries()[0]
    masks = []
    for batch in batches:
        norm = lm.capture(batch.tokens_CL, LAYER_1)[LAYER_1].norm(dim=-1)
        masks.append(batch.keep_CL & (norm <= 4 * norm[batch.keep_CL].median()))
    dropped = sum(int((batch.keep_CL & ~mask).sum()) for batch, mask in zip(batches, masks, strict=True))
    loud = tokenizer(LOUD)["input_ids"][0]
    assert dropped == sum(int((batch.tokens_CL == loud).sum()) for batch in batches) == 1
    result = evaluate_dictionaries(lm, batches, [(LAYER_1, dictionary)], max_activation_norm_multiple=4.0)[0]
    assert result.tokens == sum(int(mask.sum()) for mask in masks)
    assert losses(result) == pytest.approx(by_hand(lm, batches, "transformer.h.1", dictionary, masks), rel=1e-4)


def test_a_batch_of_nothing_but_special_tokens_changes_nothing(lm: TracedLM, batches: list[TokenBatch]) -> None:
    blank = batches[0]._replace(keep_CL=torch.zeros_like(batches[0].keep_CL))
    wanted = [(LAYER_1, random_dictionaries()[0])]
    for multiple in (None, 4.0):
        options: dict[str, Any] = {"max_activation_norm_multiple": multiple}
        with_blank = evaluate_dictionaries(lm, [blank, *batches], wanted, **options)
        assert with_blank == evaluate_dictionaries(lm, batches, wanted, **options)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate_dictionaries(lm, [blank], wanted)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate_dictionaries(lm, [], wanted)
    assert evaluate_dictionaries(lm, batches, []) == []


def test_max_tokens_stops_behind_the_batch_that_reaches_it(lm: TracedLM, batches: list[TokenBatch]) -> None:
    sizes = [int(batch.keep_CL.sum()) for batch in batches]
    source, progress = iter(batches), []
    result = evaluate_dictionaries(
        lm, source, [(LAYER_1, IdentityDict(D))], max_tokens=sizes[0] + 1, progress=progress.append
    )[0]
    assert result.tokens == sizes[0] + sizes[1]
    assert progress == [sizes[0], sizes[0] + sizes[1]]
    assert next(source) is batches[2]


def test_a_bfloat16_model_is_evaluated_with_float32_dictionaries(lm: TracedLM, batches: list[TokenBatch]) -> None:
    half = TracedLM.load(copy.deepcopy(lm.module).bfloat16(), lm.tokenizer)
    identity = evaluate_dictionaries(half, batches, [(LAYER_1, IdentityDict(D))])[0]
    assert identity.frac_recovered == 1 and identity.kl == 0
    bad = evaluate_dictionaries(half, batches, [(LAYER_1, random_dictionaries()[0])])[0]
    reference = evaluate_dictionaries(lm, batches, [(LAYER_1, random_dictionaries()[0])])[0]
    assert bad.loss_reconstructed == pytest.approx(reference.loss_reconstructed, rel=0.05)
