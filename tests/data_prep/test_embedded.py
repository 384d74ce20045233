"""The embedded language model is what its card says, and the script that made it makes such models."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import stream_texts
from data_prep.embedded import MODEL_DIR, SAMPLES_DIR
from data_prep.embedded.contexts import (
    END_OF_TEXT,
    TokenText,
    batches,
    encode,
    pack,
    read_corpus,
    tokenized,
    train_tokenizer,
)
from data_prep.embedded.model_card import command, longest_recited
from data_prep.embedded.train_model import (
    PROMPTS,
    TrainModelConfig,
    evaluate,
    load,
    main,
    next_token_loss,
    train_model,
)
from dictionary_learning.errors import UserError

LOSS_BOUND = 4.0  # nats a token; random weights: 8.3, token frequencies alone: 6.8
REAL_RECORDS = Path(__file__).parents[3] / "shared" / "data" / "medical_qa"


@functools.cache
def loaded():
    return load(MODEL_DIR)


@pytest.fixture
def embedded():
    return loaded()


def small(out: Path, **changes) -> TrainModelConfig:
    """A run of seconds on the embedded samples."""
    settings = dict(steps=3, vocab_size=400, n_layer=1, n_embd=32, n_head=2, context=64, learning_rate=1e-2)
    return TrainModelConfig(out=out, threads=torch.get_num_threads(), **(settings | changes))


def sample_contexts(tokenizer, count: int) -> torch.Tensor:
    documents = [np.array(tokenizer(record["text"]).input_ids) for record in stream_texts("embedded")]
    contexts_CL = pack(documents, 256, tokenizer.bos_token_id)
    return contexts_CL[:: max(1, len(contexts_CL) // count)][:count]


# ---------------------------------------------------------------------------------------------- the model in the box


def test_model_and_tokenizer_fit_in_8_megabytes():
    files = [file for file in MODEL_DIR.iterdir() if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= {
        file.name for file in files
    }
    assert sum(file.stat().st_size for file in files) <= 8e6


def test_loads_as_float32_gpt2_with_one_special_token(embedded):
    model, tokenizer = embedded
    assert model.config.model_type == "gpt2" and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert tokenizer.all_special_tokens == [END_OF_TEXT]
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.bos_token_id}
    assert ids == {tokenizer.convert_tokens_to_ids(END_OF_TEXT)}
    assert tokenizer("fever").input_ids == tokenizer("fever", add_special_tokens=False).input_ids


def test_a_load_without_a_dtype_gives_float32():
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(MODEL_DIR).dtype == torch.float32
    assert json.loads((MODEL_DIR / "config.json").read_text())["dtype"] == "float32"


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trips_any_text(text):
    tokenizer = loaded()[1]
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True).input_ids) == text


@pytest.mark.parametrize(
    "text",
    ["ΔΨm ≥ 5 µg/dL", "👩🏽‍⚕️🧬", "  two  spaces\n\ttab\r\n", "".join(map(chr, range(256))), "中文 العربية", "a\u0301"],
)
def test_tokenizer_round_trips_symbols_emoji_and_white_space(embedded, text):
    tokenizer = embedded[1]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_medical_text_costs_few_tokens(embedded):
    """Trained on this kind of text: it packs more bytes into a token than bytes or letters would."""
    texts = [record["text"] for record in stream_texts("embedded")]
    tokens = sum(len(ids) for ids in embedded[1](texts).input_ids)
    assert sum(len(text.encode()) for text in texts) / tokens > 3


def test_loss_on_the_samples_is_far_below_a_model_that_knows_only_frequencies(embedded):
    model, tokenizer = embedded
    contexts_CL = sample_contexts(tokenizer, 24)
    with torch.no_grad():
        loss = float(next_token_loss(model, contexts_CL))
        shuffled_CL = contexts_CL.clone()
        shuffled_CL[:, 1:] = contexts_CL[:, 1 + torch.randperm(255, generator=torch.Generator().manual_seed(0))]
        shuffled = float(next_token_loss(model, shuffled_CL))
    assert loss < LOSS_BOUND
    assert shuffled > loss + 2  # the same tokens out of order: it is the order that the model has learned


@pytest.mark.skipif(not REAL_RECORDS.is_dir(), reason="the records that the model was trained on are not here")
def test_the_held_out_loss_on_the_card_is_the_measured_one(embedded):
    """It fails too when the split moves, as by other rules in `splits.py`: then the card speaks of other questions."""
    corpus = read_corpus([str(REAL_RECORDS), "embedded"], None, 0.05)
    model, tokenizer = embedded
    documents = encode(tokenizer.backend_tokenizer, corpus.held_out)
    contexts_CL = pack(documents, 256, tokenizer.bos_token_id)
    loss = evaluate(model, TokenText(tokenizer.backend_tokenizer, tokenizer.bos_token_id, [], contexts_CL, 1.0)).loss
    assert not model.training
    on_card = re.search(r"\*\*this model\*\* \| \*\*([\d.]+)\*\*", (MODEL_DIR / "README.md").read_text())
    assert on_card and loss == pytest.approx(float(on_card.group(1)), abs=0.02)


def test_the_card_names_licence_use_and_training():
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    for expected in ("license: mit", "not medical advice", "data_prep.embedded.train_model", "perplexity", "dropout"):
        assert expected in card
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work)/", card)


# ---------------------------------------------------------------------------------------------- the script


def test_twenty_steps_lower_the_loss_and_leave_a_loadable_model_with_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.embedded.train_model.PROMPTS", PROMPTS[:1])  # the card is written 20 times
    out = tmp_path / "lm"
    assert main(_arguments(small(out, steps=20, eval_minutes=1e-6))) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    curve = [float(row) for row in re.findall(r"^\| \d+ \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|$", card, re.MULTILINE)]
    assert len(curve) == 20
    assert curve[-1] < curve[0] - 0.3
    model, tokenizer = load(out)
    text = tokenized(read_corpus(["embedded"], None, 0.05), 400, 64)
    assert tokenizer.get_vocab() == text.tokenizer.get_vocab()
    assert evaluate(model, text).loss == pytest.approx(min(curve), abs=2e-3)  # kept the best; float16 costs no more
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_model(small(tmp_path / name, seed=seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_command_on_the_card_repeats_the_settings():
    config = small(Path("lm"), samples=False, corpora=("medqa", "pubmedqa"))
    words = command(config).split()
    assert words[:3] == ["python", "-m", "data_prep.embedded.train_model"]
    assert tyro.cli(TrainModelConfig, args=words[3:]) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "no/such/folder"}, "no/such/folder"),
        ({"corpora": ("medmcq",)}, "medmcqa"),
        ({"steps": 0}, "--steps"),
        ({"minutes": -1.0}, "--minutes"),
        ({"vocab_size": 100}, "257"),
        ({"n_embd": 33}, "--n_embd 33"),
        ({"held_out": 1.0}, "--held_out"),
        ({"held_out": 1e-9}, "too few"),
        ({"context": 1}, "--context"),
    ],
)
def test_bad_settings_end_in_one_sentence_and_exit_code_2(tmp_path, capsys, changes, said):
    assert main(_arguments(small(tmp_path / "lm", **changes))) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and "\n" not in message


def test_an_out_that_is_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "lm").write_text("occupied")
    with pytest.raises(UserError, match="--out"):
        train_model(small(tmp_path / "lm"))
    assert (tmp_path / "lm").read_text() == "occupied"


def _arguments(config: TrainModelConfig) -> list[str]:
    return ["--out", str(config.out), *command(config).split()[5:]]


# ---------------------------------------------------------------------------------------------- its text


def test_no_question_is_on_both_sides_of_the_split():
    corpus = read_corpus(["embedded"], None, 0.2)
    keys = {record["text"]: record["question_key"] for record in stream_texts(SAMPLES_DIR)}
    assert not {keys[text] for text in corpus.train} & {keys[text] for text in corpus.held_out}
    assert len(corpus.train) + len(corpus.held_out) == sum(a + b for a, b in corpus.records.values())
    assert 0.1 < len(corpus.held_out) / len(keys) < 0.3


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1, max_size=20), st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_contexts_hold_the_documents_in_order_after_a_leading_end_token(documents, context):
    stream = [token for document in documents for token in [*document, 0]][:-1]
    if len(stream) < context - 1:
        with pytest.raises(UserError, match="do not fill"):
            pack([np.array(d) for d in documents], context, 0)
        return
    contexts_CL = pack([np.array(d) for d in documents], context, 0)
    assert (contexts_CL[:, 0] == 0).all()
    unpacked = contexts_CL[:, 1:].flatten().tolist()
    assert unpacked == stream[: len(unpacked)] and len(stream) - len(unpacked) < context - 1


def test_an_epoch_draws_each_context_once_and_the_next_one_in_another_order():
    documents = [np.full(3, number) for number in range(1, 13)]  # 12 documents of 3 and their separators: 47 tokens
    drawn = batches(documents, 5, 0, 1, np.random.default_rng(0))
    first, second = (torch.cat([next(drawn) for _ in range(11)]) for _ in range(2))
    for epoch in (first, second):
        assert torch.bincount(epoch[epoch > 0]).max() == 3  # nothing twice
    assert not torch.equal(first, second)


def test_text_that_spells_the_end_token_is_not_a_separator():
    tokenizer = train_tokenizer(["fever and chills"] * 3, 300)
    end = tokenizer.token_to_id(END_OF_TEXT)
    (ids,) = encode(tokenizer, [f"fever {END_OF_TEXT} chills"])
    assert end not in ids
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == f"fever {END_OF_TEXT} chills"


def test_longest_recited_counts_whole_words_in_a_row():
    text = "the patient has a fever.\nTreatment is rest"
    assert longest_recited("she has a fever. Treatment was given".split(), text) == 4
    assert longest_recited("patients hav".split(), text) == 0
    assert longest_recited([], text) == 0
