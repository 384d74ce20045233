"""From medical records to the token contexts that the embedded language model trains on.

In: the records of `stream_texts`. Out: texts split by question, a byte-level BPE tokenizer trained on the training
side alone, and contexts [C, L] laid out as `dictionary_learning/packing.py` lays them out: <|endoftext|> first, then
documents separated by <|endoftext|>, cut wherever the context ends. A document cut in two goes on in the next context,
so that no token is spent on padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from data_prep.sources import CORPORA, stream_texts
from data_prep.splits import split_of
from dictionary_learning.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Corpus(NamedTuple):
    """Texts split by question, and how many records each corpus gave to (training, held-out) text."""

    train: list[str]
    held_out: list[str]
    records: dict[str, tuple[int, int]]


class TokenText(NamedTuple):
    """A corpus in tokens."""

    tokenizer: Tokenizer
    end: int  # the id of <|endoftext|>
    train: list[np.ndarray]  # the documents, int32
    held_out_CL: Tensor  # packed once, in the order of the records
    bytes_per_token: float  # UTF-8 bytes of a held-out token

    @property
    def train_tokens(self) -> int:
        return sum(map(len, self.train))

    def unigram_loss(self) -> float:
        """Held-out nats a token from token frequencies alone (add-one smoothed): a model that sees no context."""
        counts = np.bincount(np.concatenate(self.train), minlength=self.tokenizer.get_vocab_size()) + 1.0
        counts[self.end] += len(self.train)  # the separators
        return float(-np.log(counts / counts.sum())[self.held_out_CL[:, 1:].numpy()].mean())


def read_corpus(sources: Sequence[str], corpora: Sequence[str] | None, held_out: float) -> Corpus:
    """The texts of all `sources`, the fraction `held_out` of the questions apart, by the hash of `prep --split`.

    Raises UserError where a side of the split is empty, and what `stream_texts` raises.
    """
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    counts: Counter[tuple[str, str]] = Counter()
    for source in sources:
        for record in stream_texts(source, corpora):
            split = split_of(record["question_key"], (1 - held_out, held_out, 0.0))
            texts[split].append(record["text"])
            counts[record["source_dataset"], split] += 1
    if not texts["train"] or not texts["validation"]:
        raise UserError(f"{sum(counts.values())} records are too few to hold {held_out:g} of the questions out.")
    records = {name: (counts[name, "train"], counts[name, "validation"]) for name in CORPORA}
    return Corpus(texts["train"], texts["validation"], {name: n for name, n in records.items() if any(n)})


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's: any string round-trips; <|endoftext|> is token 0, added nowhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenized(corpus: Corpus, vocab_size: int, context: int) -> TokenText:
    """Train a tokenizer on the training texts, encode both sides, pack the held-out one."""
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    end = cast(int, tokenizer.token_to_id(END_OF_TEXT))
    held_out = encode(tokenizer, corpus.held_out)
    bytes_per_token = sum(len(text.encode()) for text in corpus.held_out) / sum(map(len, held_out))
    return TokenText(tokenizer, end, encode(tokenizer, corpus.train), pack(held_out, context, end), bytes_per_token)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int32. A text that spells "<|endoftext|>" gets its letters, not the separator."""
    tokenizer.encode_special_tokens = True
    try:
        return [np.array(encoding.ids, dtype=np.int32) for encoding in tokenizer.encode_batch(list(texts))]
    finally:
        tokenizer.encode_special_tokens = False


def pack(documents: Sequence[np.ndarray], context: int, end: int) -> Tensor:
    """Contexts [C, context], each `end` followed by a stretch of the documents, which `end` separates.

    What does not fill a last context is left off: with documents in a new order each epoch it is other text each time.
    """
    separator = np.array([end], dtype=np.int32)
    stream = np.concatenate([part for document in documents for part in (document, separator)])[:-1]
    full = len(stream) // (context - 1)
    if not full:
        raise UserError(f"{len(stream)} tokens do not fill one context of {context}: give more text.")
    rows = stream[: full * (context - 1)].reshape(full, context - 1)
    return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=end).astype(np.int64))


def batches(
    documents: Sequence[np.ndarray], context: int, end: int, batch_size: int, generator: np.random.Generator
) -> Iterator[Tensor]:
    """Endless batches [B, context]: each epoch packs the documents in a new order and draws each context once."""
    while True:
        tokens_CL = pack([documents[i] for i in generator.permutation(len(documents))], context, end)
        order = generator.permutation(len(tokens_CL))
        size = min(batch_size, len(order))
        for start in range(0, len(order) - size + 1, size):
            yield tokens_CL[order[start : start + size]]
