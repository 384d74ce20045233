"""Several corpora as one stream of texts, of which any first part holds all of them, and the texts by their number.

In: corpora as a command line names them. Out: a `TextStream`. The next text always comes from the corpus that has given
least so far, counted in characters where rows are tokens and in texts where they are texts: however few rows are asked
for, every corpus gives about the same number of them, until it is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dictionary_learning.corpus import Corpus, Text, TextStream, open_corpus
from dictionary_learning.errors import UserError
from dictionary_learning.untrusted import shown, spellable

TEXT_CHARACTERS = 4000  # of a text that is kept to be shown
MOST_LABELS = 32  # corpora told apart: statistics grow with each, and a file may name one for every text
OTHERS = "(others)"


class NamedCorpus(NamedTuple):
    """A corpus, and the name that all its texts go by; without one each goes by its own `source_dataset`."""

    corpus: Corpus
    label: str | None

    @property
    def name(self) -> str:
        return self.label or self.corpus.name


def open_corpora(
    corpora: Sequence[str],
    against: Sequence[str] = (),
    commits: Callable[[str], Mapping[str, str] | None] = lambda spec: None,
) -> list[NamedCorpus]:
    """The corpora of a command line, each as `open_corpus` takes it, or as NAME=the same.

    Texts of those in `against` go by one name for each; `commits` says of each where on the Hub it is read.

    Raises:
        UserError: see `open_corpus`; two of one name.
    """
    opened: list[NamedCorpus] = []
    for index, spec in enumerate([*corpora, *against]):
        name, equals, rest = spec.partition("=")
        named = bool(equals and name.strip()) and not set("/\\:") & set(name)
        place = rest if named else spec
        corpus = open_corpus(place, commits=commits(place))
        given = name.strip() if named else None
        opened.append(NamedCorpus(corpus, given or (corpus.name if index >= len(corpora) else None)))
    names = [entry.name for entry in opened]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two corpora are called '{name}': name one of them otherwise, as in --against other=PATH.")
    return opened


class MixedTexts(TextStream):
    """The texts of several corpora, each once, taken from whichever has given least so far.

    Args:
        corpora: at least one; of equal ones the first begins.
        by_text: count what a corpus has given in texts, not in characters.
        keep: remember the texts themselves, by their number in the stream, until `forget` is called.
        settings: of each corpus' `TextStream` (split, heldout_fraction, seed).

    Attributes:
        kept: {number of a document: (label, the beginning of its text)}.
        origin: {label: number of the corpus it was first met in}. Of texts that name their own corpus, those of
            further names than `MOST_LABELS` are counted under `OTHERS`.

    Raises:
        UserError: while iterating, where a corpus has no text, or its texts go by the name given to another corpus.
    """

    def __init__(
        self, corpora: Sequence[NamedCorpus], *, by_text: bool = False, keep: bool = False, **settings: Any
    ) -> None:
        super().__init__(corpora[0].corpus, **settings)
        self.corpora, self.by_text, self.keep = list(corpora), by_text, keep
        self.streams = [TextStream(entry.corpus, **settings) for entry in corpora]
        self.given = [0] * len(corpora)
        self.ended = [False] * len(corpora)
        self.documents = 0
        self.kept: dict[int, tuple[str, str]] = {}
        self.origin: dict[str, int] = {}

    def __next__(self) -> Text:
        while not all(self.ended):
            here = min((i for i, ended in enumerate(self.ended) if not ended), key=self.given.__getitem__)
            text = next(self.streams[here], None)
            if text is None:
                self.ended[here] = True
                continue
            self.given[here] += 1 if self.by_text else len(text.text)
            label = self.corpora[here].label
            text = text._replace(corpus=self._counted_under(label, text))
            first = self.origin.setdefault(text.corpus, here)
            if first != here and text.corpus in (label, self.corpora[first].label):
                raise UserError(
                    f"'{shown(text.corpus)}' is the name of a corpus and of texts in another: name it otherwise, as in "
                    "--against other=PATH."
                )
            if self.keep:
                self.kept[self.documents] = (text.corpus, _beginning(text.text))
            self.documents += 1
            return text
        raise StopIteration

    def _counted_under(self, label: str | None, text: Text) -> str:
        """The label of a text, which becomes a key of JSON and a column's name: that of its corpus, or its own as long
        as there is room beside those of corpora."""
        if label is not None:
            return spellable(label)
        own = spellable(text.corpus)
        names = {spellable(entry.label) for entry in self.corpora if entry.label is not None}
        full = len(names | set(self.origin)) >= MOST_LABELS - 1
        return OTHERS if full and own not in self.origin and own not in names else own

    def forget(self, before: int, but: Iterable[int]) -> None:
        """Drop the kept texts of documents below `before`, but for those of the given numbers."""
        wanted = set(but)
        self.kept = {number: text for number, text in self.kept.items() if number >= before or number in wanted}

    def state_dict(self) -> dict[str, Any]:
        return {
            "streams": [stream.state_dict() for stream in self.streams],
            "given": list(self.given),
            "ended": list(self.ended),
            "documents": self.documents,
            "origin": dict(self.origin),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(saved)
        self.given, self.ended, self.documents = list(state["given"]), list(state["ended"]), state["documents"]
        self.origin = dict(state["origin"])


def _beginning(text: str) -> str:
    return spellable(text if len(text) <= TEXT_CHARACTERS else text[: TEXT_CHARACTERS - 1] + "…")
