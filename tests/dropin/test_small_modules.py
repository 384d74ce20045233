"""The field's helpers: compressed texts, gradient pursuit, and first looks at a latent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dictionary_learning import ActivationBuffer, TracedLM
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.grad_pursuit import grad_pursuit
from dictionary_learning.interp import examine_dimension, feature_effect, feature_umap
from dictionary_learning.utils import zst_to_generator

zstandard = pytest.importorskip("zstandard")

# ------------------------------------------------------------------------------------------------------ .jsonl.zst


def compressed(path: Path, text: str, frames: int = 1) -> Path:
    parts = [text[len(text) * i // frames : len(text) * (i + 1) // frames] for i in range(frames)]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part.encode()) for part in parts))
    return path


@pytest.mark.parametrize("frames", [1, 3])
def test_the_texts_of_a_compressed_file_are_read_one_at_a_time(frames: int, tmp_path: Path) -> None:
    texts = ["The aorta.", "Zwei\nZeilen – ä", ""] * 40
    lines = "".join(json.dumps({"text": text, "meta": 1}, ensure_ascii=False) + "\n" for text in texts)
    assert list(zst_to_generator(compressed(tmp_path / "a.jsonl.zst", lines, frames))) == texts


def test_a_compressed_file_that_cant_be_read_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file .*absent.zst"):
        zst_to_generator(tmp_path / "absent.zst")
    for text, line in (('{"text": "a"}\n{"txt": "b"}\n', 2), ("[1]\n", 1), ('{"text": "a"}\n{"te', 2)):
        reading = zst_to_generator(compressed(tmp_path / "b.zst", text))
        with pytest.raises(UserError, match=f"line {line}, is not a JSON object with a"):
            list(reading)
    (tmp_path / "c.zst").write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match="not readable as .jsonl.zst"):
        list(zst_to_generator(tmp_path / "c.zst"))


# ------------------------------------------------------------------------------------------------- gradient pursuit


def test_gradient_pursuit_finds_orthogonal_latents_exactly() -> None:
    directions_DF = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    codes = torch.zeros(5, 12, dtype=torch.float64)
    for row in range(5):
        codes[row, torch.randperm(12)[:3]] = torch.rand(3, dtype=torch.float64) + 0.5
    found = grad_pursuit(codes @ directions_DF.t(), directions_DF, target_l0=12)
    torch.testing.assert_close(found, codes)


def test_gradient_pursuit_follows_the_papers_steps_one_row_at_a_time() -> None:
    """Each row by itself, in plain vectors: best inner product, exact line search, clipped at zero."""
    directions_DF, signal_BD = torch.randn(10, 40, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    found = grad_pursuit(signal_BD, directions_DF, target_l0=7)
    for signal_D, codes_F in zip(signal_BD, found, strict=True):
        wanted, chosen = torch.zeros(40, dtype=torch.float64), set()
        for _ in range(7):
            residual = signal_D - directions_DF @ wanted
            chosen.add(int((directions_DF.t() @ residual).argmax()))
            gradient = torch.zeros(40, dtype=torch.float64)
            for latent in chosen:
                gradient[latent] = directions_DF[:, latent] @ residual
            step = directions_DF @ gradient
            wanted = (wanted + (step @ residual) / (step @ step) * gradient).clamp(min=0)
        torch.testing.assert_close(codes_F, wanted)
    assert (found != 0).sum(1).max() <= 7 and (found >= 0).all()


def test_gradient_pursuit_of_nothing_is_nothing_and_bad_shapes_are_named() -> None:
    directions = torch.randn(4, 9)
    assert not grad_pursuit(torch.zeros(3, 4), directions).any()
    assert not grad_pursuit(torch.randn(3, 4), directions, target_l0=0).any()
    with pytest.raises(UserError, match=r"got \[3, 5\] and \[4, 9\]"):
        grad_pursuit(torch.randn(3, 5), directions)
    with pytest.raises(UserError, match="target_l0 must be at least 0"):
        grad_pursuit(torch.randn(3, 4), directions, target_l0=-1)


# ------------------------------------------------------------------------------------------------ looks at a latent

D, LAYER, SITE = 16, 1, "mlp_out_layer_1"
TEXTS = ["The aorta carries blood.", "Which nerve? The ulnar.", "No pain.", "Fever and cough, 3 days."]


@pytest.fixture(scope="module")
def lm(tokenizer_bos_eos_pad: Any) -> TracedLM:
    import transformers

    torch.manual_seed(1)
    ids: dict[str, Any] = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_embd=D, n_head=2, n_positions=64, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return TracedLM.load(model.eval(), tokenizer_bos_eos_pad)


@pytest.fixture(scope="module")
def dictionary() -> AutoEncoder:
    torch.manual_seed(4)
    return AutoEncoder(D, 40)


def by_hook(lm: TracedLM, text: str, edit: Any) -> Tensor:
    """Log-probabilities of the token behind a text, with the MLP's output edited by a plain hook."""
    handle = lm.module.get_submodule(f"transformer.h.{LAYER}.mlp").register_forward_hook(lambda m, args, out: edit(out))
    try:
        with torch.no_grad():
            ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
            return lm.module(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
    finally:
        handle.remove()


@pytest.mark.parametrize("add_residual", [True, False])
@pytest.mark.parametrize("largest", [True, False])
def test_the_effect_of_a_latent_is_what_its_ablation_takes(
    lm: TracedLM, dictionary: AutoEncoder, add_residual: bool, largest: bool
) -> None:
    codes = dictionary.encode(lm.capture(torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]]), SITE)[SITE])
    feature = int(codes[0, -1].argmax())

    def edited(ablate: bool) -> Any:
        def edit(x: Tensor) -> Tensor:
            f = dictionary.encode(x).clone()
            rest = x - dictionary.decode(f) if add_residual else torch.zeros_like(x)
            if ablate:
                f[:, -1, feature] = 0
            return dictionary.decode(f) + rest

        return edit

    wanted = torch.stack([by_hook(lm, text, edited(False)) - by_hook(lm, text, edited(True)) for text in TEXTS]).mean(0)
    tokens, values = feature_effect(
        lm, SITE, dictionary, feature, TEXTS, add_residual=add_residual, k=5, largest=largest
    )
    top = wanted.topk(5, largest=largest)
    torch.testing.assert_close(values, top.values, rtol=1e-3, atol=1e-4)
    assert tokens.tolist() == top.indices.tolist() and values[0].abs() > 0.01


def test_without_a_dictionary_the_modules_own_neurons_are_ablated(lm: TracedLM) -> None:
    def ablate(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -1, 3] = 0
        return x

    wanted = by_hook(lm, TEXTS[1], lambda x: x) - by_hook(lm, TEXTS[1], ablate)
    tokens, values = feature_effect(lm, SITE, None, 3, TEXTS[1], k=4)
    assert tokens.tolist() == wanted.topk(4).indices.tolist()
    with pytest.raises(UserError, match=f"no latent {D}: they are numbered 0 to {D - 1}"):
        feature_effect(lm, SITE, None, D, TEXTS[1])
    with pytest.raises(UserError, match="no inputs"):
        feature_effect(lm, SITE, None, 0, [])


def test_a_latents_profile_is_where_it_is_most_active(lm: TracedLM, dictionary: AutoEncoder) -> None:
    acts = {
        text: dictionary.encode(lm.capture(torch.tensor([lm.tokenizer(text)["input_ids"]]), SITE)[SITE])[0]
        for text in TEXTS
    }
    feature = int(torch.cat(list(acts.values())).amax(0).argmax())
    buffer = ActivationBuffer(TEXTS, lm, SITE, n_ctxs=20, ctx_len=16, refresh_batch_size=4, out_batch_size=8)
    profile = examine_dimension(lm, SITE, buffer, dictionary, n_inputs=4, dim_idx=feature, k=6)
    best = max(acts, key=lambda text: acts[text][:, feature].max().item())
    place = int(acts[best][:, feature].argmax())
    tokens, values = profile.top_contexts[0]
    assert "".join(tokens) == best[: place + 1]  # one token a byte
    torch.testing.assert_close(values, acts[best][: place + 1, feature].detach())
    peaks = [values[-1].item() for _, values in profile.top_contexts]
    assert peaks == sorted(peaks, reverse=True) and len(peaks) == 6
    means: dict[str, list[float]] = {}
    for text, f in acts.items():
        for character, value in zip(text, f[:, feature].tolist(), strict=True):
            means.setdefault(character, []).append(value)
    top = max(means, key=lambda character: sum(means[character]) / len(means[character]))
    assert profile.top_tokens[0][0] == top
    assert profile.top_tokens[0][1] == pytest.approx(sum(means[top]) / len(means[top]), rel=1e-4)
    assert len(profile.top_affected) == 6


def test_the_map_of_latents_is_drawn_by_umap_and_plotly(
    dictionary: AutoEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {}

    class UMAP:
        def __init__(self, **options: Any) -> None:
            calls["umap"] = options

        def fit_transform(self, rows: Any) -> Any:
            calls["rows"] = rows
            return rows[:, : calls["umap"]["n_components"]]

    def scatter(**options: Any) -> str:
        calls["scatter"] = options
        return f"picture of {len([axis for axis in options if axis in 'xyz'])}"

    monkeypatch.setitem(__import__("sys").modules, "umap", SimpleNamespace(UMAP=UMAP))
    express = SimpleNamespace(scatter=scatter, scatter_3d=scatter)
    monkeypatch.setitem(__import__("sys").modules, "plotly", SimpleNamespace(express=express))
    monkeypatch.setitem(__import__("sys").modules, "plotly.express", express)
    assert feature_umap(dictionary, min_dist=0.2, feat_idxs=3) == "picture of 2"
    assert calls["umap"] == {"n_neighbors": 15, "metric": "cosine", "min_dist": 0.2, "n_components": 2}
    assert calls["rows"].shape == (40, D) and calls["scatter"]["color"].index("red") == 3
    assert feature_umap(dictionary, "encoder", n_components=3, feat_idxs=[1, 2]) == "picture of 3"
    assert (calls["rows"] == dictionary.encoder.weight.detach().numpy()).all()
    assert calls["scatter"]["color"].count("red") == 2
    feature_umap(dictionary)
    assert calls["scatter"]["color"] is None


def test_what_the_map_cant_do_is_said(dictionary: AutoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="weight must be 'decoder' or 'encoder', got 'bias'"):
        feature_umap(dictionary, "bias")
    with pytest.raises(UserError, match="n_components must be 2 or 3, got 4"):
        feature_umap(dictionary, n_components=4)
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UserError, match="needs umap-learn and plotly"):
        feature_umap(dictionary)
