"""Corpora on the Hugging Face Hub, each read at one commit.

In: "user/name", or "medical_qa" for the six medical QA corpora. Out: a `Corpus` that waits out a network that is gone,
and whose fingerprint holds the commit. Whatever is pushed to the dataset while a run goes on, or before it is resumed,
the run reads what it began with: the Hub keeps every commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from dictionary_learning.corpus import Corpus, Text, as_text, checked_corpus, medical_corpus
from dictionary_learning.hub_client import dataset_commits


class HubTries(NamedTuple):
    """How often a read from the Hub is tried, and how many seconds apart."""

    number: int
    wait: float


HUB_TRIES = HubTries(100, 20.0)  # a run waits out half an hour without a network
FIRST_TRIES = HubTries(1, 0.0)  # a look before the run begins does not (the Hub client itself tries for 20 s)


def hub_corpus(name: str, split: str, commits: Mapping[str, str] | None = None) -> Corpus:
    """A dataset on the Hub, or the six of "medical_qa"; one of the six by itself is formatted as among them.

    Args:
        commits: {dataset: commit} to read at; None takes the newest, where the Hub tells it.

    Raises:
        UserError: the Hub can't be read, there is nothing in it, or no `text`.
    """
    from data_prep.sources import CORPORA

    chosen = [spec for spec in CORPORA.values() if name in ("medical_qa", spec.hub_path)]
    paths = [spec.hub_path for spec in chosen] or [name]
    commits = dataset_commits(paths) if commits is None else commits
    known = [commits.get(path, "") for path in paths]
    shown = known[0] if len(known) == 1 else hashlib.sha256(":".join(known).encode()).hexdigest()[:40]
    fingerprint = f"hub:{'hub' if name == 'medical_qa' else name}{'' if chosen else f':{split}'}"
    fingerprint += f":{shown}" if any(known) else ""
    corpora = [spec.name for spec in chosen]

    def corpus(tries: HubTries) -> Corpus:
        if chosen:
            reading = {"hub_retries": tries.number, "hub_wait": tries.wait, "commits": commits}
            return medical_corpus(name, "hub", fingerprint, corpora, **reading)
        return _any_dataset(name, split, fingerprint, tries, commits.get(name))

    checked_corpus(corpus(FIRST_TRIES))
    return replace(corpus(HUB_TRIES), commits=commits)


def _any_dataset(path: str, split: str, fingerprint: str, tries: HubTries, commit: str | None) -> Corpus:
    from data_prep.sources import hub_rows

    places: dict[int, Any] = {}

    def read(start: int) -> Iterator[Text]:
        rows = hub_rows(path, split, start=start, retries=tries.number, wait=tries.wait, places=places, commit=commit)
        for row, record in rows:
            yield as_text(record, path, f" in split '{split}', row {row}")

    return Corpus(path, read, fingerprint, places)
