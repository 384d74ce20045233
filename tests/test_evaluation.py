"""Pooled metrics against brute force, and losses against plain torch hooks on the model."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dictionary_learning import TracedLM
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK, Dictionary, IdentityDict, JumpReluAutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.evaluation import (
    EvalResult,
    PooledMetrics,
    evaluate,
    evaluate_dictionaries,
    sorted_along_front,
    write_summary,
)
from dictionary_learning.packing import ContextPacker, TokenBatch

D, F = 16, 48
LAYER_1, LAYER_2 = "resid_post_layer_1", "mlp_out_layer_2"
LOUD = "~"  # the token whose embedding makes activations of extreme norm
TEXTS = [
    "The left ventricle pumps blood into the aorta.",
    "Metformin lowers hepatic glucose production.",
    "A man presents with crushing chest pain ~ radiating to the left arm.",
    "Which nerve innervates the deltoid? The axillary nerve.",
]


def random_dictionaries(seed: int = 0) -> list[Dictionary]:
    """One of each kind, with biases, so that codes are sparse and reconstructions bad."""
    torch.manual_seed(seed)
    dictionaries: list[Dictionary] = [AutoEncoder(D, F), AutoEncoderTopK(D, F, 5), JumpReluAutoEncoder(D, F)]
    with torch.no_grad():
        for dictionary in dictionaries:
            dictionary.decoder_bias.normal_(0, 0.3)
            for name, bias in dictionary.named_parameters():
                if name in ("encoder.bias", "b_enc"):
                    bias.normal_(-0.5, 0.5)
    return dictionaries


def activations(rows: int = 90) -> Tensor:
    """Correlated, off centre, with norms from 1 to 1,000."""
    g = torch.Generator().manual_seed(3)
    scale = torch.logspace(0, 2.5, rows)[:, None]
    x = (torch.randn(rows, 6, generator=g) @ torch.randn(6, D, generator=g) + 2.0) * scale
    return x[torch.randperm(rows, generator=g)]


def brute_force(dictionary: Dictionary, x: Tensor) -> dict[str, float]:
    """The formulas of EvalResult's docstring on the whole set, in float64 and one row at a time."""
    x = x.double()
    dictionary = copy.deepcopy(dictionary).double()
    f, x_hat, mean = dictionary.encode(x).detach(), dictionary(x).detach(), x.mean(0)
    rows = list(zip(x, x_hat, f, strict=True))
    n = len(rows)
    return {
        "l0": sum(int((codes != 0).sum()) for _, _, codes in rows) / n,
        "frac_variance_explained": 1
        - (sum(((a - b) @ (a - b)).item() for a, b, _ in rows) / sum(((a - mean) @ (a - mean)).item() for a in x)),
        "mse": sum(((a - b) @ (a - b)).item() for a, b, _ in rows) / (n * x.shape[1]),
        "cossim": sum(((a @ b) / (a.norm() * b.norm())).item() for a, b, _ in rows) / n,
        "l2_ratio": sum((b.norm() / a.norm()).item() for a, b, _ in rows) / n,
        "relative_reconstruction_bias": sum((b @ b).item() for _, b, _ in rows)
        / sum((a @ b).item() for a, b, _ in rows),
        "frac_alive": sum(bool((f[:, i] != 0).any()) for i in range(f.shape[1])) / f.shape[1],
        "tokens": n,
    }


# ---------------------------------------------------------------------------------------------- pooled metrics


@pytest.mark.parametrize("kind", range(3))
def test_pooled_metrics_equal_brute_force_on_the_whole_set(kind: int) -> None:
    dictionary = random_dictionaries()[kind]
    measured = evaluate(dictionary.double(), activations().double().split(17))
    assert measured == pytest.approx(brute_force(dictionary, activations()), rel=1e-10)
    assert 0 < measured["frac_alive"] <= 1 and 0 < measured["l0"] < F


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_metrics_do_not_depend_on_how_the_set_is_cut_into_batches(cuts: list[int]) -> None:
    x, dictionary = activations().double(), random_dictionaries()[0].double()
    ends = [0, *itertools.accumulate(cuts), len(x)]
    batches = [x[start:end] for start, end in itertools.pairwise(ends)]  # some of no rows
    assert evaluate(dictionary, batches) == pytest.approx(evaluate(dictionary, [x]), rel=1e-12)


def test_a_known_dictionary_gives_the_numbers_of_the_formulas() -> None:
    """x_hat = x / 2 through an identity dictionary whose last two latents never fire."""
    dictionary = AutoEncoder(4, 4)
    with torch.no_grad():
        dictionary.encoder.weight.copy_(torch.eye(4))
        dictionary.decoder.weight.copy_(torch.eye(4) / 2)
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    result = evaluate(dictionary, [x[:1], x[1:]])
    assert result == pytest.approx(
        {
            "l0": 4 / 3,
            "frac_variance_explained": 1 - (30 / 4) / (30 - (4**2 + 6**2) / 3),
            "mse": (30 / 4) / 12,
            "cossim": 1.0,
            "l2_ratio": 0.5,
            "relative_reconstruction_bias": (30 / 4) / (30 / 2),  # shrunk by half: 1 would be unbiased
            "frac_alive": 0.5,
            "tokens": 3,
        }
    )


def test_an_identity_is_perfect_and_update_returns_the_reconstruction() -> None:
    x = activations()
    pooled = PooledMetrics(IdentityDict(D))
    assert torch.equal(pooled.update(x), x)
    result = pooled.result()
    assert (result.frac_variance_explained, result.mse) == (1.0, 0.0)
    assert [result.cossim, result.l2_ratio, result.relative_reconstruction_bias] == pytest.approx([1, 1, 1])


def test_rows_of_zeros_do_not_blow_up_the_ratios() -> None:
    dictionary, x = random_dictionaries()[0], activations()
    with_zeros = evaluate(dictionary, [torch.cat([x, torch.zeros(3, D)])])
    alone = evaluate(dictionary, [x])
    assert with_zeros["tokens"] == alone["tokens"] + 3
    assert [with_zeros[name] for name in ("cossim", "l2_ratio")] == pytest.approx(
        [alone[name] for name in ("cossim", "l2_ratio")], rel=1e-5
    )


def test_bfloat16_activations_are_measured_in_the_precision_of_the_dictionary() -> None:
    x = activations().bfloat16()
    assert evaluate(random_dictionaries()[0], [x]) == evaluate(random_dictionaries()[0], [x.float()])


def test_no_activations_are_an_error_in_one_sentence() -> None:
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(random_dictionaries()[0], [])
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(random_dictionaries()[0], [torch.empty(0, D)])


def test_n_batches_limits_what_is_read() -> None:
    batches = iter(activations().split(10))
    assert evaluate(random_dictionaries()[0], batches, n_batches=3)["tokens"] == 30
    assert len(list(batches)) == 6


@pytest.mark.parametrize("rows", [torch.ones(5, D), torch.full((1, D), 0.1), torch.zeros(4, D)])
def test_activations_that_do_not_vary_have_no_variance_to_explain(rows: Tensor) -> None:
    measured = evaluate(random_dictionaries()[0], [rows])
    assert math.isnan(measured["frac_variance_explained"])
    assert math.isfinite(measured["mse"]) and "loss_original" not in measured


def test_results_are_strict_json_whatever_they_hold() -> None:
    pooled = PooledMetrics(random_dictionaries()[0])
    pooled.update(torch.full((3, D), float("nan")))
    values = json.loads(json.dumps(pooled.result(loss_original=math.inf, kl=0.25).to_dict(), allow_nan=False))
    assert values["tokens"] == 3 and values["kl"] == 0.25
    assert {name for name, value in values.items() if value is None} >= {
        *("frac_variance_explained", "mse", "cossim", "l2_ratio", "loss_original", "loss_zero"),
    }


# ---------------------------------------------------------------------------------------------- through the model


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


# ---------------------------------------------------------------------------------------------- the summary


def row(
    name: str, l0: float, recovered: float | None, hook_point: str = "a", fve: float | None = 0.5
) -> dict[str, Any]:
    qualities = {"frac_recovered": recovered, "frac_variance_explained": fve}
    return {"trainer": name, "hook_point": hook_point, "l0": l0, **qualities}


def test_the_front_holds_the_best_trade_offs_of_each_hook_point() -> None:
    rows = [
        row("dense", 60, 0.99),
        row("worse than sparser", 40, 0.80),
        row("sparse", 20, 0.90),
        row("other place", 50, 0.10, "b"),
        row("same l0, worse", 32, 0.91),
        row("same l0, better", 32, 0.95),
    ]
    given_order = [dict(r) for r in rows]
    ordered = sorted_along_front(rows)
    assert [(r["trainer"], r["front"]) for r in ordered] == [
        ("sparse", True),
        ("same l0, better", True),
        ("same l0, worse", False),
        ("worse than sparser", False),
        ("dense", True),
        ("other place", True),
    ]
    assert rows == given_order, "the rows passed in were changed"


def test_without_a_loss_the_front_goes_by_variance_explained_and_what_is_not_finite_is_never_on_it() -> None:
    rows = [
        row("diverged", 1, None, fve=None),
        row("poor", 30, None, fve=0.2),
        row("good", 20, None, fve=0.8),
    ]
    assert [(r["trainer"], r["front"]) for r in sorted_along_front(rows)] == [
        ("diverged", False),
        ("good", True),
        ("poor", False),
    ]
    assert sorted_along_front([]) == []


def test_the_summary_is_a_plain_csv_file_that_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    path.write_text("old")
    rows = sorted_along_front([row("a, or 'b'", 32.0, 0.5), row("c", 1.0, None)])
    write_summary(path, rows)
    assert b"\r" not in path.read_bytes()
    with path.open(newline="") as handle:
        read = list(csv.DictReader(handle))
    assert [r["trainer"] for r in read] == ["c", "a, or 'b'"]
    assert read[0]["frac_recovered"] == "" and float(read[1]["l0"]) == 32.0
    assert list(tmp_path.iterdir()) == [path]
