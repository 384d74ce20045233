"""Packing tiles the token stream exactly, masks what was added, and knows where every token comes from."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dictionary_learning.corpus import Text, TextStream, corpus_from_iterable
from dictionary_learning.errors import UserError
from dictionary_learning.packing import ContextPacker, TokenBatch
from tests.conftest import byte_tokenizer

GPT2_LIKE = byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
TOKENIZERS = {
    "bos is eos": GPT2_LIKE,
    "bos eos pad": byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"),
    "bos only": byte_tokenizer(bos_token="<bos>"),
    "eos only": byte_tokenizer(eos_token="<eos>"),
    "none": byte_tokenizer(),
}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)

documents = st.lists(st.text(min_size=1, max_size=40).filter(lambda t: t.strip()), min_size=1, max_size=150)
lengths = st.integers(2, 17)
batches = st.integers(1, 5)


def ids_of(tokenizer, text: str) -> list[int]:
    cleaned = text.encode("utf-8", "replace").decode()
    return tokenizer(cleaned, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def joined(found: list[TokenBatch]) -> TokenBatch:
    """All contexts in one batch."""
    return TokenBatch(*(torch.cat([batch[i] for batch in found]) for i in range(6)), first_context=0)


def same(a: list[TokenBatch], b: list[TokenBatch]) -> bool:
    return len(a) == len(b) and all(
        x.first_context == y.first_context and all(map(torch.equal, x[:6], y[:6])) for x, y in zip(a, b, strict=True)
    )


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------- packed


@each_tokenizer
@given(texts=documents, ctx_len=lengths, batch_contexts=batches)
def test_contexts_tile_the_token_stream_exactly(name, texts, ctx_len, batch_contexts):
    tokenizer = TOKENIZERS[name]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    separator = [token for token in (eos, bos) if token is not None][:1]
    stream = [token for text in texts for token in [*ids_of(tokenizer, text), *separator]]

    found = list(ContextPacker(texts, tokenizer, ctx_len=ctx_len, batch_contexts=batch_contexts))
    tokens, keep, real, document, position, corpus, _ = joined(found)

    body = slice(None) if bos is None else slice(1, None)
    assert tokens[:, body][real[:, body]].tolist() == stream
    assert tokens.shape[1] == ctx_len
    if bos is not None:
        assert (tokens[:, 0] == bos).all() and real[:, 0].all() and not keep[:, 0].any()
    # Only the end of the last context is padding, and it is less than a context.
    padding = (~real).flatten()
    assert padding.sum() < ctx_len and (padding.sum() == 0 or padding[-int(padding.sum()) :].all())
    # What is kept is what the documents hold, at the place that the provenance says.
    added = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids)) | ~real
    assert torch.equal(keep, ~added) and torch.equal(position == -1, added)
    where = zip(document[keep].tolist(), position[keep].tolist(), strict=True)
    ids = [ids_of(tokenizer, text) for text in texts]
    assert tokens[keep].tolist() == [ids[d][p] for d, p in where]
    assert not corpus.any()
    # Batches are full but for the last one, and count their contexts.
    sizes = [len(batch.tokens_CL) for batch in found]
    assert all(size == batch_contexts for size in sizes[:-1]) and 0 < sizes[-1] <= batch_contexts
    assert [batch.first_context for batch in found] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_a_packed_stream_by_hand(tokenizer_bos_eos_pad):
    t = tokenizer_bos_eos_pad
    texts = [Text("abc", "x"), Text("de", "y"), Text("f", "x")]
    packer = ContextPacker(texts, t, ctx_len=4, batch_contexts=10)
    (batch,) = packer
    shown = [" ".join(t.convert_ids_to_tokens(row.tolist())) for row in batch.tokens_CL]
    assert shown == ["<bos> a b c", "<bos> <eos> d e", "<bos> <eos> f <eos>"]
    assert batch.keep_CL.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]]
    assert batch.document_CL.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 2, 2]]
    assert batch.position_CL.tolist() == [[-1, 0, 1, 2], [-1, -1, 0, 1], [-1, -1, 0, -1]]
    assert [[packer.corpora[i] for i in row] for row in batch.corpus_CL.tolist()][1:] == [list("xxyy"), list("yyxx")]
    assert batch.real_CL.all()

    (batch,) = ContextPacker(texts, t, ctx_len=6, batch_contexts=10)
    shown = [" ".join(t.convert_ids_to_tokens(row.tolist())) for row in batch.tokens_CL]
    assert shown == ["<bos> a b c <eos> d", "<bos> e <eos> f <eos> <pad>"]
    assert batch.real_CL.int().tolist() == [[1] * 6, [1, 1, 1, 1, 1, 0]]
    assert batch.document_CL[1].tolist() == [1, 1, 1, 2, 2, 2]  # padding goes with the last document


@each_tokenizer
def test_kept_tokens_decode_back_to_their_documents(name):
    texts = [Text(f"Fièvre à {i} °C — 発熱 🤒\n" * (i % 7 + 1), f"corpus {i % 3}") for i in range(200)]
    packer = ContextPacker(texts, TOKENIZERS[name], ctx_len=50, batch_contexts=7)
    tokens, keep, _, document, position, corpus, _ = joined(list(packer))
    for number in (0, 1, 63, 64, 65, 199):
        mine = keep & (document == number)
        assert position[mine].tolist() == list(range(int(mine.sum())))
        assert TOKENIZERS[name].decode(tokens[mine].tolist()) == texts[number].text
        assert {packer.corpora[i] for i in corpus[mine].tolist()} == {texts[number].corpus}


def test_a_document_much_longer_than_a_context_runs_through_many():
    text = "0123456789" * 500
    tokens, keep, *_, first = joined(list(ContextPacker([text], GPT2_LIKE, ctx_len=16, batch_contexts=3)))
    assert GPT2_LIKE.decode(tokens[keep].tolist()) == text and len(tokens) == -(-5001 // 15)


@pytest.mark.parametrize("packing", [True, False])
@each_tokenizer
def test_special_tokens_spelt_out_in_a_text_stay_text(name, packing):
    text = "before<|endoftext|><bos><eos><pad>after"
    (batch,) = ContextPacker([text], TOKENIZERS[name], ctx_len=64, packing=packing)
    assert TOKENIZERS[name].decode(batch.tokens_CL[batch.keep_CL].tolist()) == text


@pytest.mark.parametrize("packing", [True, False])
def test_a_lone_surrogate_does_not_stop_the_stream(packing):
    (batch,) = ContextPacker(["a\ud800b", "c"], GPT2_LIKE, packing=packing)
    assert GPT2_LIKE.decode(batch.tokens_CL[batch.keep_CL].tolist()) == "a\ufffdbc"


@pytest.mark.parametrize("packing", [True, False])
def test_without_special_tokens_nothing_is_added(packing):
    (batch,) = ContextPacker(["ab", "cd"], GPT2_LIKE, ctx_len=4, packing=packing, add_special_tokens=False)
    assert batch.keep_CL.all() and batch.real_CL.all()
    assert GPT2_LIKE.decode(batch.tokens_CL.flatten().tolist()) == "abcd"


# ---------------------------------------------------------------------------------------------- one document a context


@each_tokenizer
@given(texts=documents, ctx_len=lengths, batch_contexts=batches)
def test_unpacked_each_document_is_one_context_cut_and_padded_on_the_right(name, texts, ctx_len, batch_contexts):
    tokenizer = TOKENIZERS[name]
    bos = [token for token in (tokenizer.bos_token_id,) if token is not None]
    found = list(ContextPacker(texts, tokenizer, ctx_len=ctx_len, batch_contexts=batch_contexts, packing=False))
    number = 0
    for batch in found:
        longest = 0
        assert batch.first_context == number
        for row in range(len(batch.tokens_CL)):
            expected = [*bos, *ids_of(tokenizer, texts[number])][:ctx_len]
            real = batch.real_CL[row]
            n = int(real.sum())
            assert batch.tokens_CL[row, real].tolist() == expected and real[:n].all()
            assert batch.position_CL[row].tolist() == [-1] * len(bos) + list(range(n - len(bos))) + [-1] * (
                len(real) - n
            )
            assert torch.equal(batch.keep_CL[row], batch.position_CL[row] >= 0)
            assert (batch.document_CL[row] == number).all()
            longest, number = max(longest, n), number + 1
        assert batch.tokens_CL.shape[1] == longest
    assert number == len(texts)
    assert all(len(batch.tokens_CL) == batch_contexts for batch in found[:-1])


def test_unpacked_padding_is_the_pad_token(tokenizer_bos_eos_pad):
    t = tokenizer_bos_eos_pad
    (batch,) = ContextPacker(["abc", "d"], t, ctx_len=8, packing=False)
    shown = [" ".join(t.convert_ids_to_tokens(row.tolist())) for row in batch.tokens_CL]
    assert shown == ["<bos> a b c", "<bos> d <pad> <pad>"]


# ---------------------------------------------------------------------------------------------- ends and errors


@pytest.mark.parametrize("packing", [True, False])
def test_a_finished_packer_stays_finished(packing):
    packer = ContextPacker(["a", "b"], GPT2_LIKE, packing=packing)
    assert len(list(packer)) == 1 and list(packer) == []


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_without_a_text_raises(packing):
    with pytest.raises(UserError, match="holds no text"):
        next(ContextPacker(["", "  "], GPT2_LIKE, packing=packing))


def test_wrong_sizes_are_named():
    with pytest.raises(UserError, match="at least 2 tokens.*got 1"):
        ContextPacker(["a"], GPT2_LIKE, ctx_len=1)
    with pytest.raises(UserError, match="at least 1, got 0"):
        ContextPacker(["a"], GPT2_LIKE, batch_contexts=0)


# ---------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("packing", [True, False])
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=100),
    ctx_len=lengths,
    batch_contexts=batches,
    seed=st.none() | st.integers(0, 3),
    data=st.data(),
)
def test_a_packer_resumed_anywhere_goes_on_bit_for_bit(packing, sizes, ctx_len, batch_contexts, seed, data):
    corpus = corpus_from_iterable([Text(f"{i}:" + "x" * size, f"c{i % 3}") for i, size in enumerate(sizes)])

    def packer():
        texts = TextStream(corpus, seed=seed, block=32)
        return ContextPacker(texts, GPT2_LIKE, ctx_len=ctx_len, batch_contexts=batch_contexts, packing=packing)

    unbroken = packer()
    whole = list(unbroken)
    broken = packer()
    stop = data.draw(st.integers(0, len(whole)), label="stop")
    begun = [next(broken) for _ in range(stop)]
    resumed = packer()
    resumed.load_state_dict(saved_and_loaded(broken.state_dict()))
    assert same(begun + list(resumed), whole)
    assert resumed.corpora == unbroken.corpora
    assert (resumed.documents, resumed.contexts) == (unbroken.documents, unbroken.contexts)


def test_a_saved_state_does_not_change_when_the_packer_goes_on():
    packer = ContextPacker([f"document {i}" for i in range(200)], GPT2_LIKE, ctx_len=8, batch_contexts=2)
    next(packer)
    state = packer.state_dict()
    rest = list(packer)
    packer.load_state_dict(state)
    assert same(list(packer), rest)
