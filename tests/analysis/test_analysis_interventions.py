"""Interventions against plain torch hooks: exactness, modes, positions, several at once, comparison."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from steering_cases import FAMILIES, POINT, D, F, by_hand, dictionary, models, own
from torch import Tensor

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.analysis import interventions as module
from dictionary_learning.analysis.interventions import Comparison, Intervention, compare
from dictionary_learning.analysis.prompts import read_prompts
from dictionary_learning.dictionary import DICTIONARIES, IdentityDict, SparseAutoencoder
from dictionary_learning.errors import UserError

PROMPTS = ["The heart pumps blood.", "Aspirin", "A 54-year-old man has chest pain."]
ALL = list(range(F))


@pytest.fixture(scope="module")
def lms() -> dict[str, TracedLM]:
    return models()


@pytest.fixture
def lm(lms: dict[str, TracedLM]) -> TracedLM:
    return lms["gpt2"]


def kl_by_hand(lm: TracedLM, text: str, change: dict[str, Any]) -> Tensor:
    """[T] KL(original || changed by plain hooks), of one prompt alone."""
    tokens_CL = read_prompts(lm, text).tokens_CL
    p, q = (by_hand(lm, tokens_CL, hooks)[0, 1:].double().log_softmax(-1) for hooks in ({}, change))
    return (p.exp() * (p - q)).sum(-1)


def most_active(f_CLF: Tensor) -> int:
    """The latent that fires most behind BOS."""
    return int(f_CLF[0, 1:].abs().sum(0).argmax())


def assert_kl(found: Comparison, expected_T: Tensor) -> None:
    assert expected_T.max() > 1e-6, "the change changes nothing, which shows nothing"
    np.testing.assert_allclose(found.kl_T, expected_T.numpy(), atol=2e-5)


# ---- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["amplify", "suppress"])
def test_alpha_one_leaves_the_logits_unchanged(lms: dict[str, TracedLM], family: str, mode: str) -> None:
    lm, sae = lms[family], dictionary()
    read = read_prompts(lm, PROMPTS)
    one = Intervention(POINT, sae, ALL, mode, 1.0)
    replace, _ = module.replacements(module.place(lm, [one], [read.mask("all")]))
    original, modified = lm.logits(read.tokens_CL)[0], lm.logits(read.tokens_CL, replace=replace)[0]
    assert torch.equal(original, modified)  # more than the 1e-5 that are promised
    assert all(not found.kl_T.any() for found in compare(lm, PROMPTS, one))


@pytest.mark.parametrize("name", [name for name in DICTIONARIES if name != "IdentityDict"])
def test_in_every_architecture_alpha_one_changes_nothing_and_ablation_takes_the_decoder_term(
    lm: TracedLM, name: str
) -> None:
    sae = dictionary(name)
    tokens_CL = read_prompts(lm, PROMPTS[0]).tokens_CL
    f_CLF = sae.encode(lm.capture(tokens_CL, POINT)[POINT])
    feature = most_active(f_CLF)
    assert not compare(lm, PROMPTS[0], Intervention(POINT, sae, ALL, "amplify", 1.0))[0].kl_T.any()
    without = f_CLF.clone()
    without[..., feature] = 0

    def ablate(x: Tensor) -> Tensor:
        return x - sae.reconstruct(f_CLF, x) + sae.reconstruct(without, x)

    found = compare(lm, PROMPTS[0], Intervention(POINT, sae, feature, "ablate"))[0]
    assert_kl(found, kl_by_hand(lm, PROMPTS[0], {POINT: own(ablate)}))


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_equals_subtracting_the_decoder_term_by_hand(lms: dict[str, TracedLM], family: str) -> None:
    lm, sae = lms[family], dictionary()
    read = read_prompts(lm, PROMPTS)
    replace, _ = module.replacements(
        module.place(lm, [Intervention(POINT, sae, [3, 17], "ablate")], [read.mask("all")])
    )
    found = lm.logits(read.tokens_CL, replace=replace)[0]

    def subtract(x: Tensor) -> Tensor:
        f = sae.encode(x)
        return x - f[..., 3:4] * sae.decoder_rows[3] - f[..., 17:18] * sae.decoder_rows[17]

    expected = by_hand(lm, read.tokens_CL, {POINT: own(subtract)})
    for row, length in enumerate(read.lengths):
        torch.testing.assert_close(found[row, : length + 1], expected[row, : length + 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, lm.logits(read.tokens_CL)[0], atol=1e-4)


def test_with_the_error_dropped_alpha_one_is_the_plain_reconstruction(lms: dict[str, TracedLM]) -> None:
    for family in FAMILIES:
        sae = dictionary()
        one = Intervention(POINT, sae, [0], "amplify", 1.0, drop_error=True)
        assert_kl(compare(lms[family], PROMPTS[0], one)[0], kl_by_hand(lms[family], PROMPTS[0], {POINT: own(sae)}))


@pytest.mark.parametrize(
    ("mode", "value", "formula"),
    [
        ("amplify", 5.0, lambda f: 5 * f),
        ("suppress", 4.0, lambda f: f / 4),
        ("ablate", None, lambda f: 0 * f),
        ("negate", None, lambda f: -f),
        ("set", -3.0, lambda f: 0 * f - 3),
        ("add", 2.5, lambda f: f + 2.5),
    ],
)
@pytest.mark.parametrize("drop_error", [False, True])
def test_every_mode_is_its_formula(
    lms: dict[str, TracedLM], mode: str, value: float | None, formula: Any, drop_error: bool
) -> None:
    lm, sae = lms["gemma2"], dictionary()

    def change(x: Tensor) -> Tensor:
        f = sae.encode(x)
        new = f.clone()
        new[..., [2, 9]] = formula(f[..., [2, 9]])
        return sae.decode(new) if drop_error else x + (new - f) @ sae.decoder_rows

    found = compare(lm, PROMPTS[2], Intervention(POINT, sae, [2, 9], mode, value, drop_error=drop_error))[0]
    assert_kl(found, kl_by_hand(lm, PROMPTS[2], {POINT: own(change)}))
    np.testing.assert_allclose(found.after_Tn, formula(torch.tensor(found.before_Tn)), atol=1e-6)
    assert found.latents == [(POINT, 2), (POINT, 9)]


def test_values_can_be_multiples_of_each_latents_maximum(lm: TracedLM) -> None:
    found = compare(lm, PROMPTS[0], Intervention(POINT, dictionary(), [2, 9], "set", 2.0, unit=[3.0, 0.5]))[0]
    np.testing.assert_allclose(found.after_Tn, np.tile([6.0, 1.0], (len(found.tokens), 1)))


def test_a_transcoder_reads_at_one_place_and_acts_at_the_other(lm: TracedLM) -> None:
    transcoder = dictionary(output_dim=D, skip=True)
    with torch.no_grad():
        transcoder.W_skip.normal_()  # type: ignore[union-attr]
    tokens_CL = read_prompts(lm, PROMPTS[0]).tokens_CL
    x = lm.capture(tokens_CL, "mlp_in_layer_1")["mlp_in_layer_1"]
    f = transcoder.encode(x)
    feature = most_active(f)
    term = 4 * f[..., feature, None] * transcoder.decoder_rows[feature]
    site = ("mlp_in_layer_1", "mlp_out_layer_1")
    found = compare(lm, PROMPTS[0], Intervention(site, transcoder, feature, "amplify", 5.0))[0]
    assert_kl(found, kl_by_hand(lm, PROMPTS[0], {"mlp_out_layer_1": own(lambda y: y + term)}))
    dropped = compare(lm, PROMPTS[0], Intervention(site, transcoder, feature, "amplify", 5.0, drop_error=True))[0]
    plain = own(lambda y: transcoder(x) + term)
    assert_kl(dropped, kl_by_hand(lm, PROMPTS[0], {"mlp_out_layer_1": plain}))


def test_a_transcoder_can_not_act_before_it_reads(lm: TracedLM) -> None:
    site = ("mlp_in_layer_2", "mlp_out_layer_1")
    with pytest.raises(UserError, match="can't act at 'mlp_out_layer_1', which runs before 'mlp_in_layer_2'"):
        compare(lm, PROMPTS[0], Intervention(site, dictionary(output_dim=D), 7, "ablate"))


def test_a_dictionary_that_normalises_its_input_acts_in_units_of_the_input(lm: TracedLM) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, input_norm=True).requires_grad_(False)
    feature = most_active(sae.encode(lm.capture(read_prompts(lm, PROMPTS[2]).tokens_CL, POINT)[POINT]))

    def amplify(x: Tensor) -> Tensor:
        f = sae.encode(x)
        new = f.clone()
        new[..., feature] *= 3
        return x + sae.reconstruct(new, x) - sae.reconstruct(f, x)

    found = compare(lm, PROMPTS[2], Intervention(POINT, sae, feature, "amplify", 3.0))[0]
    assert_kl(found, kl_by_hand(lm, PROMPTS[2], {POINT: own(amplify)}))


def test_neurons_are_latents_of_the_identity(lm: TracedLM) -> None:
    def zero(x: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[-1]) != 5)

    point = "transformer.h.1.mlp.act:out"
    found = compare(lm, PROMPTS[0], Intervention(point, IdentityDict(128), 5, "ablate"))[0]
    assert_kl(found, kl_by_hand(lm, PROMPTS[0], {point: own(zero)}))


def test_in_bfloat16_alpha_one_changes_nothing_either() -> None:
    lm = TracedLM.load(models()["gemma2"].module.to(torch.bfloat16), models()["gemma2"].tokenizer)
    for drop_error in (False, True):
        found = compare(lm, PROMPTS, Intervention(POINT, dictionary(), ALL, "amplify", 1.0, drop_error=drop_error))
        assert any(one.kl_T.any() for one in found) == drop_error


# ---- several at once ---------------------------------------------------------------------------------------------


def test_a_later_hook_point_sees_what_the_earlier_one_did(lm: TracedLM) -> None:
    early, late = dictionary(seed=1), dictionary(seed=2)

    def add(x: Tensor) -> Tensor:
        return x + 6 * early.decoder_rows[3]

    def ablate(x: Tensor) -> Tensor:
        return x - late.encode(x)[..., 8:9] * late.decoder_rows[8]

    both = [
        Intervention("resid_post_layer_2", late, 8, "ablate"),
        Intervention("mlp_out_layer_0", early, 3, "add", 6.0),
    ]
    hooks = {"mlp_out_layer_0": own(add), "resid_post_layer_2": own(ablate)}
    found = compare(lm, PROMPTS[0], both)[0]
    assert_kl(found, kl_by_hand(lm, PROMPTS[0], hooks))
    assert found.latents == [("resid_post_layer_2", 8), ("mlp_out_layer_0", 3)]


def test_changes_at_one_hook_point_see_the_same_activations_and_add_up(lm: TracedLM) -> None:
    one, other = dictionary(seed=1), dictionary(seed=2)

    def change(x: Tensor) -> Tensor:
        return one(x) + 5 * one.decoder_rows[3] - other.encode(x)[..., 8:9] * other.decoder_rows[8]

    pair = [Intervention(POINT, one, 3, "add", 5.0, drop_error=True), Intervention(POINT, other, 8, "ablate")]
    expected = kl_by_hand(lm, PROMPTS[0], {POINT: own(change)})
    for order in (pair, pair[::-1]):
        assert_kl(compare(lm, PROMPTS[0], order)[0], expected)


def test_what_contradicts_itself_is_refused(lm: TracedLM) -> None:
    sae, other = dictionary(), dictionary(seed=1)
    twice = [Intervention(POINT, sae, [3, 4], "ablate"), Intervention(POINT, sae, 4, "set", 1.0)]
    with pytest.raises(UserError, match="Latent 4 at 'resid_post_layer_1' is changed by two interventions"):
        compare(lm, PROMPTS[0], twice)
    renamed = [twice[0], Intervention("transformer.h.1", sae, 4, "set", 1.0)]  # the same place by its path
    with pytest.raises(UserError, match="Latent 4 at 'resid_post_layer_1' is changed by two interventions"):
        compare(lm, PROMPTS[0], renamed)
    apart = [Intervention(POINT, sae, 4, "ablate", positions=0), Intervention(POINT, sae, 4, "negate", positions=1)]
    assert compare(lm, PROMPTS[0], apart)
    dropped = [Intervention(POINT, one, 4, "ablate", drop_error=True) for one in (sae, other)]
    with pytest.raises(UserError, match="Two dictionaries can't both replace"):
        compare(lm, PROMPTS[0], dropped)
    with pytest.raises(UserError, match="no intervention"):
        compare(lm, PROMPTS[0], [])


# ---- positions and prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("last", [21]),
        (0, [0]),
        (-2, [20]),
        ([3, -1], [3, 21]),
        (slice(2, 5), [2, 3, 4]),
        (slice(-2, None), [20, 21]),
        (re.compile(r"heart|ood"), [4, 5, 6, 7, 8, 18, 19, 20]),
    ],
)
def test_only_the_chosen_tokens_are_changed(lm: TracedLM, positions: Any, expected: list[int]) -> None:
    found = compare(lm, PROMPTS[0], Intervention(POINT, dictionary(), 3, "set", 9.0, positions=positions))[0]
    assert "".join(found.tokens) == PROMPTS[0]
    assert found.changed_T.nonzero()[0].tolist() == expected
    np.testing.assert_allclose(found.after_Tn[expected], 9)
    others = [place for place in range(22) if place not in expected]
    np.testing.assert_array_equal(found.after_Tn[others], found.before_Tn[others])
    assert not found.kl_T[: expected[0]].any() and found.kl_T[expected[0]] > 0


def test_special_tokens_are_left_out_of_all_and_bos_is_no_token_of_the_prompt(lm: TracedLM) -> None:
    found = compare(lm, "a<eos>b", Intervention(POINT, dictionary(), 3, "set", 9.0))[0]
    assert found.tokens == ["a", "<eos>", "b"] and found.changed_T.tolist() == [True, False, True]
    bos = lm.tokenizer.bos_token_id
    assert read_prompts(lm, "ab").tokens_CL[0].tolist() == [
        bos,
        *read_prompts(lm, "ab", bos=False).tokens_CL[0].tolist(),
    ]


def test_a_batch_of_prompts_gives_what_each_gives_alone(lm: TracedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = dictionary("BatchTopKSAE")
    one = Intervention(POINT, sae, [3, 5], "set", 4.0, positions="last")
    together = compare(lm, PROMPTS, one, k=5, watch=["x"])
    monkeypatch.setattr(module, "LOGITS_A_FORWARD", 1)
    for text, found, parted in zip(PROMPTS, together, compare(lm, PROMPTS, one, k=5, watch=["x"]), strict=True):
        alone = compare(lm, text, one, k=5, watch=["x"])[0]
        for other in (alone, parted):
            np.testing.assert_allclose(found.kl_T, other.kl_T, atol=1e-5)
            np.testing.assert_allclose(found.before_Tn, other.before_Tn, atol=1e-4)
            np.testing.assert_allclose(found.modified.probabilities_Tk, other.modified.probabilities_Tk, atol=1e-5)
            np.testing.assert_allclose(found.modified_Tw, other.modified_Tw, atol=1e-5)


def test_tables_and_watched_tokens_are_the_models_probabilities(lm: TracedLM) -> None:
    sae = dictionary()
    found = compare(lm, PROMPTS[0], Intervention(POINT, sae, 3, "add", 9.0), k=4, watch=["lung", 40])[0]
    tokens_CL = read_prompts(lm, PROMPTS[0]).tokens_CL
    for name, change in (("original", {}), ("modified", {POINT: own(lambda x: x + 9 * sae.decoder_rows[3])})):
        p_TV = by_hand(lm, tokens_CL, change)[0, 1:].softmax(-1)
        top = p_TV[-1].topk(4)
        assert [token for token, _ in found.table()[name]] == [lm.tokenizer.decode([i]) for i in top.indices]
        np.testing.assert_allclose([p for _, p in found.table()[name]], top.values, atol=1e-5)
        watched = [lm.tokenizer("l")["input_ids"][0], 40]
        np.testing.assert_allclose(getattr(found, f"{name}_Tw"), p_TV[:, watched], atol=1e-5)
    rows = found.to_dict()["positions"]
    assert [row["token"] for row in rows] == found.tokens and rows[-1]["kl"] == found.kl_T[-1]


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 48}, "no latent 48: they are numbered 0 to 47"),
        ({"features": -1}, "no latent -1: they are numbered 0 to 47"),
        ({"features": []}, "no latent to intervene on"),
        ({"features": [3, 3]}, "Latent 3 is given twice"),
        ({"mode": "amplfy"}, "Unknown mode 'amplfy': .* Did you mean 'amplify'?"),
        ({"value": None}, "Mode 'amplify' needs a value"),
        ({"value": float("nan")}, "must be a finite number, got nan"),
        ({"value": float("inf")}, "must be a finite number, got inf"),
        ({"value": 0.0}, "takes a positive factor, got 0.0; mode 'ablate' exists too"),
        ({"value": -2.0}, "takes a positive factor, got -2.0; mode 'negate' exists too"),
        ({"mode": "ablate"}, "Mode 'ablate' takes no value, got 2.0"),
        ({"mode": "set", "unit": [1.0, 2.0]}, "one for each of the 1 latents"),
        ({"mode": "set", "unit": 0.0}, "unit should be one positive number"),
    ],
)
def test_an_intervention_that_can_not_be_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"features": 3, "mode": "amplify", "value": 2.0, **options}
    with pytest.raises(UserError, match=message):
        Intervention(POINT, dictionary(), **given)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (22, "Position 22 is outside the prompt, which has 22 tokens: 0 to 21, or -22 to -1"),
        (-23, "Position -23 is outside"),
        ([1, 99], "Position 99 is outside"),
        (slice(30, 40), "The slice 30:40 holds no token"),
        ("al", "Did you mean 'all'?"),
        (re.compile("liver"), "The pattern 'liver' matches nothing in the prompt"),
        (1.5, "Positions are whole numbers, got 1.5"),
    ],
)
def test_positions_outside_the_prompt_are_refused(lm: TracedLM, positions: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compare(lm, PROMPTS[0], Intervention(POINT, dictionary(), 3, "set", 1.0, positions=positions))


def test_prompts_and_places_that_do_not_fit_are_refused(lm: TracedLM) -> None:
    one = Intervention(POINT, dictionary(), 3, "set", 1.0)
    for prompts, message in (
        ([], "There is no prompt"),
        ([""], "The prompt is empty"),
        (["a", ""], "Prompt 1 is empty"),
        (["a" * 64], "too long: 65 tokens, and .* has 64 positions; shorten it"),
        ([3], "should be a text, got int"),
    ):
        with pytest.raises(UserError, match=message):
            compare(lm, prompts, one)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Unknown site"):
        compare(lm, "a", Intervention("resid_pots_layer_1", dictionary(), 3, "set", 1.0))
    with pytest.raises(UserError, match="of width 32, but 'transformer.h.1.mlp.c_fc' .* has width 128"):
        compare(lm, "a", Intervention("transformer.h.1.mlp.c_fc", dictionary(), 3, "set", 1.0))
    with pytest.raises(UserError, match="There is no token 320"):
        compare(lm, "a", one, watch=[320])
