"""Packing: a stream of texts in, fixed-length token contexts with masks and provenance out.

Packed (the default), documents follow each other without padding: every context begins with the BOS token, documents
are parted by a separator (EOS, or BOS where there is no EOS), and a document that does not fit goes on in the next
context. A BOS in front of every context costs one position in `ctx_len` and buys a known place for the model's
attention sink, whose activations can be a hundred times the median norm and which `keep_CL` therefore masks. Unpacked,
each document is one context, cut at `ctx_len` and padded on the right, which changes nothing for the real positions of
a causal model.

The packer is an iterator with `state_dict()`: the position of the text stream plus the tokens read but not yet handed
out, so that a resumed stream continues in the middle of a document. `ReadAhead` runs it in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.corpus import TextStream, as_text_stream
from dictionary_learning.errors import UserError

DOCUMENTS_PER_READ = 64  # tokenised in one call, so that a fast tokenizer can use its threads

# Columns of the token table: what is known of every token on its way into a context.
TOKEN, KEEP, DOCUMENT, POSITION, CORPUS = range(5)


class TokenBatch(NamedTuple):
    """C contexts of L tokens, and where each token comes from.

    Shapes are [C, L]. `real_CL` is False at padding; `keep_CL` is False at padding and at special tokens (BOS, EOS,
    separators). `document_CL` numbers documents in stream order, `position_CL` is the token's place in its document
    (-1 for tokens the packer added), `corpus_CL` indexes `ContextPacker.corpora`.
    """

    tokens_CL: Tensor
    keep_CL: Tensor
    real_CL: Tensor
    document_CL: Tensor
    position_CL: Tensor
    corpus_CL: Tensor
    first_context: int


class ContextPacker:
    """Iterates over `TokenBatch`es of `batch_contexts` contexts of `ctx_len` tokens (the last one may hold fewer).

    Args:
        texts: strings, `Text`s, or dicts with a `text` (a list, a generator, a `TextStream`).
        tokenizer: a transformers tokenizer.
        add_special_tokens: put BOS before each context and a separator behind each document, where the tokenizer
            has such tokens.

    Raises:
        UserError: `ctx_len` or `batch_contexts` too small, or a text stream that holds no text.
    """

    def __init__(
        self,
        texts: Iterable[Any],
        tokenizer: Any,
        *,
        ctx_len: int = 128,
        batch_contexts: int = 32,
        packing: bool = True,
        add_special_tokens: bool = True,
    ) -> None:
        if ctx_len < 2:
            raise UserError(f"ctx_len must be at least 2 tokens (one is the BOS token), got {ctx_len}.")
        if batch_contexts < 1:
            raise UserError(f"The batch of contexts must be at least 1, got {batch_contexts}.")
        self.texts: TextStream = as_text_stream(texts)
        self.tokenizer = tokenizer
        self.ctx_len = int(ctx_len)
        self.batch_contexts = int(batch_contexts)
        self.packing = packing
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.bos = bos if add_special_tokens else None
        self.separator = (eos if eos is not None else bos) if add_special_tokens else None
        pads = (tokenizer.pad_token_id, eos, bos, 0)
        self.pad = next(token for token in pads if token is not None)
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self.corpora: list[str] = []
        self.documents = 0
        self.contexts = 0
        self._pending = np.empty((5, 0), dtype=np.int64)
        self._exhausted = False

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        before = self.texts.state_dict(), self.documents, list(self.corpora)
        try:
            batch = self._next_packed() if self.packing else self._next_unpacked()
        except BaseException:  # the texts of a batch that was not handed out are read again
            self.texts.load_state_dict(before[0])
            self.documents, self.corpora = before[1:]
            raise
        if batch is None:
            raise StopIteration
        self.contexts += len(batch.tokens_CL)
        return batch

    def _next_packed(self) -> TokenBatch | None:
        body = self.ctx_len - (self.bos is not None)
        wanted = body * self.batch_contexts
        tables = [self._pending]
        have = self._pending.shape[1]
        while have < wanted and not self._exhausted:
            for table in self._read_documents(DOCUMENTS_PER_READ):
                tables.append(table)
                have += table.shape[1]
        table = np.concatenate(tables, axis=1)
        self._pending = table[:, wanted:].copy()
        table = table[:, :wanted]
        if table.shape[1] == 0:
            return None
        real = np.ones(table.shape[1], dtype=bool)
        short = -table.shape[1] % body
        if short:  # only the last context of the stream
            padding = np.tile(np.array([[self.pad], [0], [0], [-1], [0]]), short)
            padding[[DOCUMENT, CORPUS]] = table[[DOCUMENT, CORPUS], -1:]
            table, real = np.concatenate([table, padding], axis=1), np.pad(real, (0, short))
        return self._to_batch(table.reshape(5, -1, body), real.reshape(-1, body))

    def _next_unpacked(self) -> TokenBatch | None:
        body = self.ctx_len - (self.bos is not None)
        documents: list[np.ndarray] = []
        while len(documents) < self.batch_contexts and not self._exhausted:
            documents += self._read_documents(self.batch_contexts - len(documents))
        if not documents:
            return None
        length = min(body, max(d.shape[1] for d in documents))
        table = np.zeros((5, len(documents), length), dtype=np.int64)
        table[TOKEN], table[POSITION] = self.pad, -1
        real = np.zeros((len(documents), length), dtype=bool)
        for row, document in enumerate(documents):
            n = min(length, document.shape[1])
            table[:, row, :n] = document[:, :n]
            table[DOCUMENT, row, n:], table[CORPUS, row, n:] = document[DOCUMENT, 0], document[CORPUS, 0]
            real[row, :n] = True
        return self._to_batch(table, real)

    def _to_batch(self, table: np.ndarray, real: np.ndarray) -> TokenBatch:
        """Table of [5, C, body] and its real mask -> a TokenBatch with BOS in front of each context."""
        if self.bos is not None:
            first = table[:, :, :1].copy()
            first[TOKEN], first[KEEP], first[POSITION] = self.bos, 0, -1
            table = np.concatenate([first, table], axis=2)
            real = np.pad(real, ((0, 0), (1, 0)), constant_values=True)
        t = torch.from_numpy(np.ascontiguousarray(table))
        real_CL = torch.from_numpy(np.ascontiguousarray(real))
        return TokenBatch(t[TOKEN], t[KEEP].bool(), real_CL, t[DOCUMENT], t[POSITION], t[CORPUS], self.contexts)

    def _read_documents(self, count: int) -> list[np.ndarray]:
        """Up to `count` further documents as token tables of [5, tokens]; empty texts give none."""
        texts = []
        for text in self.texts:
            texts.append(text)
            if len(texts) == count:
                break
        else:
            self._exhausted = True
        if not texts:
            return []
        # A document that spells out "<|endoftext|>" must not become a special token; a lone surrogate is no text.
        encoded = self.tokenizer(
            [t.text.encode("utf-8", "replace").decode() for t in texts],
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
        tables = []
        for text, ids in zip(texts, encoded, strict=True):
            number, self.documents = self.documents, self.documents + 1
            if not ids:
                continue
            if self.separator is not None and self.packing:
                ids = [*ids, self.separator]
            table = np.empty((5, len(ids)), dtype=np.int64)
            table[TOKEN] = ids
            table[KEEP] = ~np.isin(table[TOKEN], self._special)
            table[DOCUMENT] = number
            table[POSITION] = np.arange(len(ids))
            table[CORPUS] = self._corpus_index(text.corpus)
            if self.separator is not None and self.packing:
                table[POSITION, -1] = -1
            tables.append(table)
        return tables

    def _corpus_index(self, corpus: str) -> int:
        if corpus not in self.corpora:
            self.corpora.append(corpus)
        return self.corpora.index(corpus)

    def state_dict(self) -> dict[str, Any]:
        return {
            "texts": self.texts.state_dict(),
            "pending": torch.from_numpy(self._pending.copy()),
            "documents": self.documents,
            "contexts": self.contexts,
            "corpora": list(self.corpora),
            "exhausted": self._exhausted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts.load_state_dict(state["texts"])
        self._pending = state["pending"].numpy().copy()
        self.documents, self.contexts = state["documents"], state["contexts"]
        self.corpora, self._exhausted = list(state["corpora"]), state["exhausted"]
