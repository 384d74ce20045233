"""The stream of a sentence encoder's activations: texts in, one row a text out, or one row a token.

Texts are read a window of several batches at a time and batched by length within it, so that little padding is
computed; their rows are handed out in the order of the texts.

A window follows from the position of the text stream where it began. That position and the number of batches handed
out since are the state: a resumed stream reads and encodes one window again, and goes on within it bit for bit.
Embeddings of texts that were seen before can be kept, because a small corpus is read many times. Those are part of the
state, since the last bits of an embedding depend on the lengths it was batched with.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dictionary_learning.activations.sentence_model import SENTENCE, TOKENS, SentenceEncoder
from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.corpus import Text, TextStream, as_text_stream
from dictionary_learning.errors import UserError, did_you_mean

__all__ = ["LEVELS", "SENTENCE", "TOKENS", "SentenceActivations", "SentenceEncoder"]

LEVELS = ("text", "token")
WINDOW_BATCHES = 8  # batches of texts that are ordered by length together


class SentenceActivations:
    """An `ActivationSource` over the texts of a corpus.

    Args:
        encoder: a `SentenceEncoder`, or what its `load` takes: a Hub id, a local folder, a `SentenceTransformer`.
        texts: strings, `Text`s, dicts with a `text`, a path, a `TextStream` (which has epochs and a held-out part).
        level: "text" gives one embedding a text, "token" the states of its tokens.
        hook_points: of the tokens, where their states are read: "token_embeddings" (the default: the last hidden layer,
            as pooling takes it), names as "resid_post_layer_3", or paths in the transformer.
        batch_texts: texts in one forward, and of one `ActivationBatch`.
        max_length: tokens at which a text is cut; None leaves what the model says. It is set on the model.
        prompt: put before every text; None takes the model's own default, "" none.
        normalize: scale embeddings to unit length, whether or not the model does. Of texts only.
        remove_special: leave out the states of special tokens. Of tokens only; those of the prompt always are.
        keep_mb: megabytes of embeddings to keep, so that a later epoch does not encode their texts again. Of texts
            only.

    Attributes:
        widths, dtype, max_rows: as `ActivationSource` has them. texts: the stream. corpora: their names.
        rows_seen, texts_encoded: so far.

    The provenance of a row is its text (`document_N` and `context_N`, in the order of the stream) and corpus, and of a
    token its id and place in the text (-1 for a special token); the embedding of a text has `token_N` -1.

    Raises:
        UserError: see `SentenceEncoder.load` and `resolve`; an option of the other level, an unknown level.
    """

    def __init__(
        self,
        encoder: Any,
        texts: Iterable[Any],
        *,
        level: str = "text",
        hook_points: str | Sequence[str] | None = None,
        batch_texts: int = 64,
        max_length: int | None = None,
        prompt: str | None = None,
        normalize: bool = False,
        remove_special: bool = True,
        keep_mb: float = 0.0,
    ) -> None:
        check_level(level, normalize=normalize, hook_points=hook_points)
        if level == "token" and keep_mb:
            raise UserError("keep_mb keeps embeddings of texts: with level='token' leave it out.")
        if level == "text" and not remove_special:
            raise UserError("remove_special is about token states: with level='text' leave it out.")
        if batch_texts < 1:
            raise UserError(f"batch_texts must be at least 1, got {batch_texts}.")
        self.encoder = SentenceEncoder.load(encoder)
        if max_length is not None:
            self.encoder.cut_at(max_length)
        self.texts: TextStream = as_text_stream(texts)
        self.level, self.batch_texts, self.prompt, self.normalize = level, batch_texts, prompt, normalize
        self.remove_special = remove_special
        if hook_points is None:
            hook_points = SENTENCE if level == "text" else TOKENS
        self.hook_points = self.encoder.resolve(hook_points)
        self.widths = {point.name: point.width for point in self.hook_points}
        self.dtype = self.encoder.dtype
        if level == "token" and self.encoder.max_positions is None:
            raise UserError(f"{self.encoder.name} does not say at how many tokens it cuts a text: give max_length.")
        self.max_rows = batch_texts * (1 if level == "text" else self.encoder.max_positions or 1)
        row_bytes = sum(self.widths.values()) * self.dtype.itemsize
        self._kept = KeptRows(int(keep_mb * 1e6) // row_bytes) if keep_mb else None
        self.corpora: list[str] = []
        self.documents = self.rows_seen = self.texts_encoded = 0
        self._window = self._position()  # where the window began
        self._parts: list[ActivationBatch] = []
        self._taken = 0  # parts handed out

    # ------------------------------------------------------------------------------------------- reading

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        while True:  # a batch of nothing but special tokens has no rows to give
            if self._taken >= len(self._parts):
                self._window, self._taken = self._position(), 0
                self._parts = self._read_window()
                if not self._parts:
                    raise StopIteration
            part = self._parts[self._taken]
            self._taken += 1
            rows = len(next(iter(part.acts.values())))
            self.rows_seen += rows
            if rows:
                return part

    def _read_window(self) -> list[ActivationBatch]:
        """The next texts of the stream, encoded, as one batch for every `batch_texts` of them."""
        texts = list(itertools.islice(self.texts, WINDOW_BATCHES * self.batch_texts))
        if not texts:
            return []
        first, self.documents = self.documents, self.documents + len(texts)
        corpus = torch.tensor([self._corpus_index(text.corpus) for text in texts])
        document = torch.arange(first, self.documents)
        if self.level == "text":
            rows = self._embeddings(texts)
            parts = zip(rows.split(self.batch_texts), document.split(self.batch_texts), strict=True)
            corpora = corpus.split(self.batch_texts)
            return [
                ActivationBatch(
                    {self.hook_points[0].name: acts},
                    Provenance(number, torch.zeros_like(number), torch.full_like(number, -1), which, number),
                )
                for (acts, number), which in zip(parts, corpora, strict=True)
            ]
        states = self.encoder.token_states(
            [text.text for text in texts],
            list(self.widths),
            batch_texts=self.batch_texts,
            prompt=self.prompt,
            remove_special=self.remove_special,
        )
        self.texts_encoded += len(texts)
        counts = torch.tensor([len(state.token_T) for state in states])
        batches = []
        for start in range(0, len(texts), self.batch_texts):
            part = slice(start, start + self.batch_texts)
            number = document[part].repeat_interleave(counts[part])
            provenance = Provenance(
                number,
                torch.cat([state.position_T for state in states[part]]),
                torch.cat([state.token_T for state in states[part]]),
                corpus[part].repeat_interleave(counts[part]),
                number,
            )
            acts = {name: torch.cat([state.acts[name] for state in states[part]]) for name in self.widths}
            batches.append(ActivationBatch(acts, provenance))
        return batches

    def _embeddings(self, texts: Sequence[Text]) -> Tensor:
        """Embeddings [texts, d]: those kept, and the others encoded."""
        if self._kept is None:
            self.texts_encoded += len(texts)
            return self._encode([text.text for text in texts])
        keys = [hashlib.blake2b(t.text.encode("utf-8", "replace"), digest_size=16).digest() for t in texts]
        new = {key: text.text for key, text in zip(keys, texts, strict=True) if key not in self._kept}
        encoded = {}
        if new:
            self.texts_encoded += len(new)
            rows = self._encode(list(new.values())).cpu()
            self._kept.put(list(new), rows)
            encoded = dict(zip(new, rows, strict=True))
        return torch.stack([encoded[key] if key in encoded else self._kept[key] for key in keys])

    def _encode(self, texts: list[str]) -> Tensor:
        return self.encoder.embed(texts, batch_texts=self.batch_texts, prompt=self.prompt, normalize=self.normalize)

    def _corpus_index(self, corpus: str) -> int:
        if corpus not in self.corpora:
            self.corpora.append(corpus)
        return self.corpora.index(corpus)

    # ------------------------------------------------------------------------------------------- state

    def _position(self) -> dict[str, Any]:
        return {"texts": self.texts.state_dict(), "documents": self.documents, "corpora": list(self.corpora)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": self._window,
            "taken": self._taken,
            "rows_seen": self.rows_seen,
            "texts_encoded": self.texts_encoded,
            "kept": None if self._kept is None else self._kept.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Encodes the window in which the state was saved again, unless its embeddings were kept."""
        if (self._kept is None) != (state["kept"] is None):
            raise UserError("The saved stream kept embeddings and this one does not, or the other way round.")
        if self._kept is not None:
            self._kept.load_state_dict(state["kept"])
        window = state["window"]
        self.texts.load_state_dict(window["texts"])
        self.documents, self.corpora = window["documents"], list(window["corpora"])
        self._window, self._taken = window, state["taken"]
        self._parts = self._read_window() if state["taken"] else []
        self.rows_seen, self.texts_encoded = state["rows_seen"], state["texts_encoded"]


class KeptRows:
    """Rows by the digest of their text, up to `max_rows` of them.

    A batch of rows is kept whole or not at all: whether a text is encoded again must not depend on where in a window a
    run was resumed.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._place: dict[bytes, tuple[int, int]] = {}
        self._parts: list[Tensor] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __getitem__(self, key: bytes) -> Tensor:
        part, row = self._place[key]
        return self._parts[part][row]

    def put(self, keys: Sequence[bytes], rows: Tensor) -> None:
        if len(self._place) + len(keys) > self.max_rows:
            return
        self._place |= {key: (len(self._parts), row) for row, key in enumerate(keys)}
        self._parts.append(rows)

    def state_dict(self) -> dict[str, Any]:
        keys = np.frombuffer(b"".join(self._place), dtype=np.uint8).reshape(-1, 16)  # in the order of the rows
        return {"keys": torch.from_numpy(keys.copy()), "rows": torch.cat(self._parts) if self._parts else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._place, self._parts = {}, []
        if state["rows"] is not None:
            self._place = {bytes(key): (0, row) for row, key in enumerate(state["keys"].numpy())}
            self._parts = [state["rows"]]


def check_level(level: str, *, normalize: bool = False, hook_points: Any = None) -> None:
    """Raises UserError for an unknown level, or an option that belongs to the other one."""
    if level not in LEVELS:
        raise UserError(
            f"Unknown level '{level}': use text (one embedding a text) or token.{did_you_mean(level, LEVELS)}"
        )
    names = [hook_points] if isinstance(hook_points, str) else list(hook_points or [])
    if level == "text" and any(name != SENTENCE for name in names):
        raise UserError(
            f"An embedding of a text has no hook point but {SENTENCE}: for '{names[0]}' take level='token'."
        )
    if level == "token" and SENTENCE in names:
        raise UserError(f"'{SENTENCE}' is one row a text: take level='text', or hook points of the tokens.")
    if level == "token" and normalize:
        raise UserError("normalize scales embeddings of texts: with level='token' leave it out.")
