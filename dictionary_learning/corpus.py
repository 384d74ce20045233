"""Text streams: whatever the user calls a corpus in, one text after another out, with a cursor.

A `Corpus` knows how to read itself from any document on; a `TextStream` walks it: epochs, a seeded shuffle, the
training or the held-out part. The shuffle permutes blocks of documents with a seed made of (seed, epoch, block), and
the held-out part is chosen by a hash of the text. Neither has a state of its own, so the whole cursor is two numbers,
and a resumed stream reads on exactly where it stopped, at the price of holding one block of texts in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.parquet_files import parquet_rows
from dictionary_learning.untrusted import bounded_lines, listed, spellable

log = logging.getLogger("dictionary_learning")

SHUFFLE_BLOCK = 50_000  # documents; about 50 MB of medical QA text
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".parquet", ".txt")


class Text(NamedTuple):
    """One document and the name of the corpus it belongs to. `key` decides its split (default: the text itself)."""

    text: str
    corpus: str
    key: str | None = None


@dataclass(frozen=True)
class Corpus:
    """A named, re-readable collection of texts: `read(start)` yields `Text`s from document number `start` on.

    `fingerprint` changes when the content does (file names, sizes, first and last bytes; on the Hub path and commit),
    so that a resumed run can tell that its corpus was exchanged.
    """

    name: str
    read: Callable[[int], Iterator[Text]]
    fingerprint: str
    places: dict[int, Any] | None = None
    """Of a Hub dataset: {document: what to tell it to go on there}, filled by reading; a part of a stream's state."""
    commits: Mapping[str, str] = field(default_factory=dict)
    """{dataset: the commit it is read at} of those on the Hub. Whatever is pushed meanwhile, a run reads one state."""


class TextStream:
    """Iterates over the texts of a corpus.

    Args:
        epochs: passes over the corpus; None repeats it for ever.
        split: "all", "train" or "heldout". A text is held out when the hash of its key falls in `heldout_fraction`;
            equal texts therefore never stand on both sides.
        seed: shuffles documents within blocks of `block` documents; None keeps their order.

    Raises:
        UserError: an unknown split, `block` or `epochs` below 1; while iterating, when a whole pass yields no text.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        epochs: int | None = 1,
        split: str = "all",
        heldout_fraction: float = 0.05,
        seed: int | None = None,
        block: int = SHUFFLE_BLOCK,
    ) -> None:
        if split not in ("all", "train", "heldout"):
            raise UserError(f"Unknown split '{split}': use all, train or heldout.")
        if block < 1 or (epochs is not None and epochs < 1):
            raise UserError(f"The shuffle block and the epochs must be at least 1, got {block} and {epochs}.")
        self.corpus, self.epochs, self.split = corpus, epochs, split
        self.heldout_fraction, self.seed, self.block = heldout_fraction, seed, block
        self.epoch = 0
        self.position = 0  # documents of this epoch passed, in the order of reading
        self._iterator: Iterator[Text] | None = None

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> Text:
        if self._iterator is None:
            self._iterator = self._texts()
        return next(self._iterator)

    def _texts(self) -> Iterator[Text]:
        while self.epochs is None or self.epoch < self.epochs:
            found = self.position > 0
            for text in self._one_epoch():
                found = True
                yield text
            if not found:
                part = "" if self.split == "all" else f" in its {self.split} part"
                raise UserError(f"Corpus '{self.corpus.name}' holds no text{part}: give more texts or another corpus.")
            self.epoch, self.position = self.epoch + 1, 0

    def _one_epoch(self) -> Iterator[Text]:
        if self.seed is None:
            for text in self.corpus.read(self.position):
                self.position += 1
                if self._selected(text):
                    yield text
            return
        number = self.position // self.block
        texts = self.corpus.read(number * self.block)
        while block := list(itertools.islice(texts, self.block)):
            order = np.random.default_rng([self.seed, self.epoch, number]).permutation(len(block))
            for index in order[self.position - number * self.block :]:
                self.position += 1
                if self._selected(block[index]):
                    yield block[index]
            number += 1

    def _selected(self, text: Text) -> bool:
        if not text.text.strip():
            return False
        return self.split == "all" or (self.split == "heldout") == is_held_out(text, self.heldout_fraction)

    def state_dict(self) -> dict[str, Any]:
        """The cursor; of a Hub dataset also the last place from which it can be read on."""
        cursor = {"epoch": self.epoch, "position": self.position}
        begins = self.position if self.seed is None else self.position // self.block * self.block
        before = [document for document in list(self.corpus.places or ()) if document <= begins]
        return cursor if not before else cursor | {"place": list(self.corpus.places[max(before)])}  # type: ignore[index]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        if "place" in state and self.corpus.places is not None:
            from data_prep.sources import Place

            place = Place(*state["place"])
            self.corpus.places[place.row] = place
        self._iterator = None


def is_held_out(text: Text, fraction: float) -> bool:
    """Whether a text belongs to the held-out part: decided by a hash of its key, so the same in every run."""
    key = text.key if text.key is not None else text.text
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def as_text_stream(data: Any) -> TextStream:
    """A `TextStream` over anything a user may pass as `data`: a stream, a corpus, a list, a generator, a path."""
    if isinstance(data, TextStream):
        return data
    if isinstance(data, Corpus):
        return TextStream(data)
    if isinstance(data, str | os.PathLike):
        return TextStream(open_corpus(data))
    return TextStream(corpus_from_iterable(data))


def corpus_from_iterable(data: Iterable[Any], name: str = "texts") -> Corpus:
    """A corpus over strings, `Text`s or dicts with a `text`. A one-shot iterator can be read, and resumed, once."""
    if not isinstance(data, Iterable):
        raise UserError(f"A corpus must be texts or a path, got {type(data).__name__}.")

    def read(start: int) -> Iterator[Text]:
        items = data[start:] if isinstance(data, Sequence) else itertools.islice(iter(data), start, None)
        for item in items:
            yield as_text(item, name)

    if not isinstance(data, Sequence):
        return Corpus(name, read, "stream")
    digest = hashlib.sha256(repr([len(data), data[:100], data[-100:]]).encode("utf-8", "replace"))
    return Corpus(name, read, digest.hexdigest())


def as_text(item: Any, corpus: str, where: str = "") -> Text:
    """The text of a string, a record with a `text`, or a `Text`. Raises UserError for anything else, saying `where`."""
    if isinstance(item, Text):
        return item
    if isinstance(item, str):
        return Text(spellable(item), corpus)
    if isinstance(item, dict):
        text = item.get("text")
        if isinstance(text, str):
            source = item.get("source_dataset")
            return Text(spellable(text), spellable(source) if isinstance(source, str) and source else corpus)
        if "text" in item and text is None:
            return Text("", corpus)
        if "text" in item:
            raise UserError(f"Corpus '{corpus}' has a 'text'{where} that is {type(text).__name__}, not a string.")
        raise UserError(
            f"Corpus '{corpus}' has no 'text'{where}: its fields are {listed(list(item))}; rename one "
            f"to 'text', or use raw records of the medical QA corpora.{did_you_mean('text', item)}"
        )
    raise UserError(f"Corpus '{corpus}' yields {type(item).__name__}{where} where a text is expected.")


def open_corpus(
    spec: str | os.PathLike[str], *, hub_split: str = "train", commits: Mapping[str, str] | None = None
) -> Corpus:
    """The corpus that a command line names.

    Args:
        spec: "embedded" (the sample records of this project), "medical_qa" (the six corpora on the Hub), a file or
            folder (.jsonl, .parquet, .txt with a `text` each; or raw records of the six corpora), or a Hub dataset as
            "user/name" or "hf://user/name".
        commits: {dataset: commit} to read those on the Hub at; None takes the newest.

    Raises:
        UserError: nothing there, nothing in it, or no `text`.
    """
    from dictionary_learning.hub_corpus import hub_corpus

    spec = os.fspath(spec)
    if not spec.strip():
        raise UserError("The corpus has no name: give a file, a folder, a Hub dataset, 'embedded' or 'medical_qa'.")
    path = Path(spec).expanduser()
    name = path.resolve().name
    if spec == "embedded":
        from data_prep.embedded import SAMPLES_DIR

        return medical_corpus("embedded", "embedded", _fingerprint(_files_below(SAMPLES_DIR)))
    if spec == "medical_qa" and not path.exists():
        return hub_corpus(spec, hub_split, commits)
    if path.is_dir():
        from data_prep.sources import looks_like_raw_records

        if looks_like_raw_records(path):
            return checked_corpus(medical_corpus(name, str(path), _fingerprint(_files_below(path))))
        files = _files_below(path)
        if not files:
            raise UserError(f"Corpus folder '{spec}' holds no {', '.join(TEXT_SUFFIXES)} file.")
        return checked_corpus(_file_corpus(name, files))
    if path.is_file():
        if not name.endswith(TEXT_SUFFIXES):
            raise UserError(f"Corpus file '{spec}' is none of {', '.join(TEXT_SUFFIXES)}.")
        return checked_corpus(_file_corpus(name, [path]))
    if spec.startswith("hf://") or _looks_like_hub_path(spec):
        return hub_corpus(spec.removeprefix("hf://"), hub_split, commits)
    raise UserError(
        f"Corpus '{spec}' not found: give an existing file or folder, a Hub dataset as hf://user/name, 'embedded' or "
        f"'medical_qa'.{did_you_mean(path.name, [*_siblings(path), 'embedded', 'medical_qa'])}"
    )


def _looks_like_hub_path(spec: str) -> bool:
    """Whether `spec` reads as "user/name" and not as a misspelt local path, which nobody should look up on the Hub."""
    local = spec.endswith(TEXT_SUFFIXES) or Path(spec).parent.exists()
    return not local and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec) is not None


def checked_corpus(corpus: Corpus) -> Corpus:
    """The corpus, once its first text was read: an empty or unreadable one is refused before a run begins."""
    if next((text for text in corpus.read(0) if text.text.strip()), None) is None:
        raise UserError(f"Corpus '{corpus.name}' is empty: it holds no text.")
    return corpus


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def _files_below(folder: Path) -> list[Path]:
    """Files of text in a folder, in order of name; neither hidden ones nor the list of what data_prep left out."""
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and path.name.endswith(TEXT_SUFFIXES) and path.name != "skipped.jsonl" and not hidden:
            files.append(path)
    return files


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as handle:
            head = handle.read(1 << 16)
            handle.seek(max(0, size - (1 << 16)))
            tail = handle.read()
        for part in (file.name.encode(), str(size).encode(), head, tail):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def medical_corpus(
    name: str, source: str, fingerprint: str, corpora: list[str] | None = None, **reading: Any
) -> Corpus:
    """Raw records of the six medical QA corpora (or of `corpora`), formatted on the way by data_prep, which takes
    `reading` too.

    A record that can't be formatted is left out, each time with a warning that says why (data_prep can list them).
    """

    def read(start: int) -> Iterator[Text]:
        from data_prep.sources import SkippedRecord, stream_texts

        def skipped(record: SkippedRecord) -> None:
            log.warning("Corpus '%s': %s is left out: %s.", name, record.where, record.reason)

        for row in stream_texts(source, corpora, start=start, skipped=skipped, **reading):
            yield Text(row["text"], row["source_dataset"], row["question_key"])

    return Corpus(name, read, fingerprint)


def _file_corpus(name: str, files: Sequence[Path]) -> Corpus:
    def read(start: int) -> Iterator[Text]:
        rows = ((row, file, number) for file in files for number, row in enumerate(_rows(file), 1))
        for row, file, number in itertools.islice(rows, start, None):
            yield as_text(row, file.parent.name if len(files) > 1 else name, f" in {file.name}, record {number}")

    return Corpus(name, read, _fingerprint(files))


def _rows(file: Path) -> Iterator[Any]:
    """Records of one file: a dict a JSON line or parquet row, a string a line of text."""
    if file.suffix == ".parquet":
        rows = parquet_rows(file, ("text", "source_dataset"))
        try:
            yield from rows
        except Exception as error:  # pyarrow's own, a file that is gone, and those of what a column may hold
            why = " ".join(str(error).split())[:200]
            raise UserError(f"Corpus file '{file}' is not readable as parquet: {why.rstrip('.')}.") from error
        return
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(bounded_lines(lines, file), 1):
                if line.strip():
                    yield line.rstrip("\n") if file.suffix == ".txt" else _parsed(line, file, number)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"Corpus file '{file}' is not readable: {error}.") from error


def _parsed(line: str, file: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"Corpus file '{file}', line {number}, is not valid JSON: {why}.") from error
