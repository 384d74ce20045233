"""What a latent does: logit effects, neighbours and ablation, against the same by hand in five model families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from steering_cases import FAMILIES, POINT, VOCAB, D, F, by_hand, dictionary, models
from torch import Tensor

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.analysis import effects
from dictionary_learning.analysis.effects import (
    ablation_losses,
    logit_effects,
    nearest_features,
    why_no_logit_effects,
)
from dictionary_learning.dictionary import AutoEncoder, SparseAutoencoder
from dictionary_learning.errors import UserError

KNOWN = 259  # tokens of the tokenizer; the model's vocabulary is padded


@pytest.fixture(scope="module")
def lms() -> dict[str, TracedLM]:
    return models()


@pytest.fixture
def lm(lms: dict[str, TracedLM]) -> TracedLM:
    return lms["gpt2"]


# ---- logit effects -----------------------------------------------------------------------------------------------


def direct(lm: TracedLM, directions_ND: Tensor, point: str = "resid_post_layer_3") -> Tensor:
    """[N, V] logits with only a direction behind the last block, less those with nothing there, by plain hooks."""
    x_ND = directions_ND * (D**0.5 / directions_ND.norm(dim=1, keepdim=True))
    tokens_CL = torch.ones(1, len(x_ND), dtype=torch.long)
    with_it = by_hand(lm, tokens_CL, {point: lambda x: x_ND[None]})
    logits_NV = (with_it - by_hand(lm, tokens_CL, {point: torch.zeros_like}))[0, :, :KNOWN]
    cap = getattr(lm.module.config, "final_logit_softcapping", None)  # gemma-2's, behind the unembedding
    return logits_NV if cap is None else cap * torch.atanh(logits_NV / cap)


@pytest.mark.parametrize("family", FAMILIES)
def test_logit_effects_are_the_models_own_norm_and_unembedding(lms: dict[str, TracedLM], family: str) -> None:
    lm, sae = lms[family], dictionary()
    logits_FV = direct(lm, sae.decoder_rows)
    found = logit_effects(lm, sae, POINT, k=7)
    top, bottom = logits_FV.topk(7), logits_FV.topk(7, largest=False)
    torch.testing.assert_close(torch.tensor(found.top_logits_Fk), top.values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(found.bottom_logits_Fk), bottom.values, atol=1e-4, rtol=1e-4)
    assert (found.top_tokens_Fk == top.indices.numpy()).mean() > 0.99  # ties to rounding aside
    assert (found.bottom_tokens_Fk == bottom.indices.numpy()).mean() > 0.99


def test_a_norm_behind_a_part_is_on_its_way_in_gemma_2_and_not_in_llama(lms: dict[str, TracedLM]) -> None:
    sae = dictionary()
    for family, site, norm in (
        ("gemma2", "mlp_out", "post_feedforward_layernorm"),
        ("gemma2", "attn_out", "post_attention_layernorm"),
        ("llama", "attn_out", None),
        ("gpt_neox", "mlp_out", None),
    ):
        lm, x_FD = lms[family], sae.decoder_rows
        if norm is not None:
            module: Any = lm.module.get_submodule(f"model.layers.1.{norm}")
            x_FD = module(x_FD * D**0.5 / x_FD.norm(dim=1, keepdim=True))
        expected = direct(lm, x_FD.detach()).topk(3).values
        found = torch.tensor(logit_effects(lm, sae, f"{site}_layer_1", k=3).top_logits_Fk)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_length_of_a_direction_does_not_enter(lm: TracedLM) -> None:
    short, sae = AutoEncoder(D, F), dictionary()
    with torch.no_grad():
        short.decoder_rows.copy_(sae.decoder_rows * 1e-3)
    one, other = logit_effects(lm, sae, POINT), logit_effects(lm, short, POINT)
    np.testing.assert_allclose(one.top_logits_Fk, other.top_logits_Fk, atol=1e-4)


def test_parts_of_vocabulary_and_latents_give_the_same(lm: TracedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = dictionary()
    whole = logit_effects(lm, sae, POINT, k=20)
    monkeypatch.setattr(effects, "VOCABULARY_PART", 13)
    monkeypatch.setattr(effects, "ELEMENTS", 60)
    parts = logit_effects(lm, sae, POINT, k=20)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    some = logit_effects(lm, sae, POINT, features=[5, 2], k=20)
    np.testing.assert_array_equal(some.top_tokens_Fk, whole.top_tokens_Fk[[5, 2]])


def test_no_more_logits_are_held_than_was_promised(lm: TracedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    topk = torch.Tensor.topk

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal largest
        largest = max(largest, self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(effects, "ELEMENTS", 500)
    monkeypatch.setattr(effects, "VOCABULARY_PART", 50)
    monkeypatch.setattr(torch.Tensor, "topk", watched)
    logit_effects(lm, dictionary(), POINT, k=3)
    nearest_features(dictionary(), 3)
    assert 0 < largest <= 500 < F * F < F * VOCAB


def test_tokens_that_the_tokenizer_does_not_have_are_left_out(lm: TracedLM) -> None:
    found = logit_effects(lm, dictionary(), POINT, k=VOCAB)
    assert found.top_tokens_Fk.shape == (F, KNOWN) and found.top_tokens_Fk.max() == KNOWN - 1


@pytest.mark.parametrize("point", ["mlp_in_layer_1", "attn_in_layer_2", "transformer.h.1.ln_1", "transformer.ln_f"])
def test_places_that_write_nothing_to_the_stream_have_no_logit_effects(lm: TracedLM, point: str) -> None:
    reason = why_no_logit_effects(lm, dictionary(), point)
    assert reason is not None and "residual stream" in reason
    with pytest.raises(UserError, match="residual stream"):
        logit_effects(lm, dictionary(), point)


def test_a_dictionary_of_another_width_and_bad_numbers_are_refused(lm: TracedLM) -> None:
    assert why_no_logit_effects(lm, dictionary(), POINT) is None
    with pytest.raises(UserError, match=r"width 32 does not fit the width 128 of 'transformer.h.1.mlp.c_fc'"):
        logit_effects(lm, dictionary(), "transformer.h.1.mlp.c_fc")
    with pytest.raises(UserError, match="no latent 48: they are numbered 0 to 47"):
        logit_effects(lm, dictionary(), POINT, features=[48])
    with pytest.raises(UserError, match="k must be a positive integer"):
        logit_effects(lm, dictionary(), POINT, k=0)


def test_a_transcoder_is_read_where_it_writes(lm: TracedLM) -> None:
    transcoder = dictionary(output_dim=D)
    found = logit_effects(lm, transcoder, ("mlp_in_layer_1", "mlp_out_layer_1"), k=3)
    expected = direct(lm, transcoder.decoder_rows).topk(3).values
    torch.testing.assert_close(torch.tensor(found.top_logits_Fk), expected, atol=1e-4, rtol=1e-4)


# ---- neighbours --------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_largest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = dictionary()
    with torch.no_grad():
        sae.decoder_rows[3] = sae.decoder_rows[7] * 2
        sae.decoder_rows[4] = -sae.decoder_rows[7]
        sae.decoder_rows[5] = 0
    rows = sae.decoder_rows.double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    cosines = rows @ rows.T / np.maximum(np.outer(norms, norms), 1e-30)
    np.fill_diagonal(cosines, -np.inf)
    monkeypatch.setattr(effects, "ELEMENTS", 100)
    found = nearest_features(sae, 5)
    np.testing.assert_allclose(found.cosines_Fk, -np.sort(-cosines, axis=1)[:, :5], atol=1e-5)
    assert found.indices_Fk[3, 0] == 7 and found.indices_Fk[7, 0] == 3
    assert 4 not in found.indices_Fk[7] and not found.cosines_Fk[5].any()
    assert nearest_features(sae, 1000).indices_Fk.shape == (F, F - 1)


# ---- ablation ----------------------------------------------------------------------------------------------------


def ablation_by_hand(lm: TracedLM, sae: Any, rows: list[list[int]], feature: int, read: str, written: str) -> float:
    """One window, one latent at a time, by plain hooks."""
    changes = []
    for ids in rows:
        if not ids:
            continue
        tokens_CL = torch.tensor([[lm.tokenizer.bos_token_id, *ids]])
        f_L = sae.encode(lm.capture(tokens_CL, read)[read])[0, :, feature]
        f_L[0] = 0
        term_LD = f_L[:, None] * sae.decoder_rows[feature]
        clean, ablated = (by_hand(lm, tokens_CL, change) for change in ({}, {written: lambda y, t=term_LD: y - t}))
        for place in range(1, len(ids)):
            if f_L[place] != 0:
                target = tokens_CL[0, place + 1]
                changes.append(float((clean.log_softmax(-1) - ablated.log_softmax(-1))[0, place, target]))
    return float(np.mean(changes)) if changes else float("nan")


def windows(seed: int = 0) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Of each latent three windows of up to nine tokens, cut off on the left or the right, one of them empty."""
    tokens_FEW = torch.randint(3, 250, (F, 3, 9), generator=torch.Generator().manual_seed(seed))
    tokens_FEW[:, 0, :2] = -1
    tokens_FEW[:, 1, 6:] = -1
    tokens_FEW[::2, 2] = -1
    rows = [[[t for t in row if t >= 0] for row in latent] for latent in tokens_FEW.tolist()]
    return tokens_FEW.int().numpy(), rows


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_the_decoder_term_subtracted_by_hand(lms: dict[str, TracedLM], family: str) -> None:
    lm, sae = lms[family], dictionary()
    tokens_FEW, rows = windows()
    features = [1, 17, 40, 7, 30]
    found = ablation_losses(lm, sae, POINT, tokens_FEW[features], features, logits_a_forward=5 * 10 * (VOCAB + F))
    expected = [ablation_by_hand(lm, sae, rows[feature], feature, POINT, POINT) for feature in features]
    assert np.isfinite(expected).sum() >= 2 and np.nanmax(np.abs(expected)) > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(ablation_losses(lm, sae, POINT, tokens_FEW)[features], expected, atol=1e-5)


def test_a_transcoder_is_read_at_one_place_and_ablated_at_the_other(lm: TracedLM) -> None:
    transcoder = dictionary(output_dim=D, skip=True)
    with torch.no_grad():
        transcoder.W_skip.normal_()  # type: ignore[union-attr]
    tokens_FEW, rows = windows()
    site = ("mlp_in_layer_1", "mlp_out_layer_2")
    found = ablation_losses(lm, transcoder, site, tokens_FEW)
    expected = [ablation_by_hand(lm, transcoder, rows[feature], feature, *site) for feature in (2, 9)]
    np.testing.assert_allclose(found[[2, 9]], expected, atol=1e-5)
    with pytest.raises(UserError, match="reads at one hook point and writes at another"):
        ablation_losses(lm, transcoder, "mlp_out_layer_2", tokens_FEW)


def test_a_dictionary_that_normalises_its_input_is_ablated_in_units_of_the_input(lm: TracedLM) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, activation="silu", input_norm=True).requires_grad_(False)
    tokens_FEW, _ = windows()
    found = ablation_losses(lm, sae, POINT, tokens_FEW[[5]], [5])
    changes = []
    for row in tokens_FEW[5]:
        ids = [int(t) for t in row if t >= 0]
        tokens_CL = torch.tensor([[lm.tokenizer.bos_token_id, *ids]])
        x = lm.capture(tokens_CL, POINT)[POINT]
        f = sae.encode(x)
        f[:, 0] = 0  # BOS keeps all
        without = f.clone()
        without[..., 5] = 0
        kept = x - sae.reconstruct(f, x) + sae.reconstruct(without, x)
        clean, ablated = by_hand(lm, tokens_CL, {}), by_hand(lm, tokens_CL, {POINT: lambda y, new=kept: new})
        difference = (clean.log_softmax(-1) - ablated.log_softmax(-1))[0, 1:-1]
        changes += difference.gather(1, tokens_CL[0, 2:, None]).flatten().tolist()
    assert found[0] == pytest.approx(np.mean(changes), abs=1e-5)


def test_a_latent_that_never_fires_has_no_ablation_loss(lm: TracedLM) -> None:
    sae = dictionary()
    sae.encoder_bias[11] = -1e6
    tokens_FEW, _ = windows()
    tokens_FEW[12] = -1  # no window at all
    found = ablation_losses(lm, sae, POINT, tokens_FEW)
    assert np.isnan(found[[11, 12]]).all() and np.isfinite(found[[10, 13]]).all()


def test_windows_and_dictionaries_that_do_not_fit_are_refused(lm: TracedLM) -> None:
    with pytest.raises(UserError, match=r"\[latents, windows, tokens\] of 48 latents, got \(2, 3, 9\)"):
        ablation_losses(lm, dictionary(), POINT, windows()[0][:2])
    with pytest.raises(UserError, match="of width 32, but 'transformer.h.1.mlp.c_fc' .* has width 128"):
        ablation_losses(lm, dictionary(), "transformer.h.1.mlp.c_fc", windows()[0])
