"""Streamed statistics are the same wherever batches end, chunks end, or a pass is put down and taken up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statistics_cases import CORPORA, DICTIONARIES, SETTINGS, assert_equal, run, stream

from dictionary_learning import storage
from dictionary_learning.analysis import coactivation, statistics
from dictionary_learning.analysis.statistics import StatisticsPass
from dictionary_learning.analysis.types import Examples, Probes
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError


@pytest.fixture(params=DICTIONARIES)
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    return DICTIONARIES[request.param]()


@given(st.lists(st.integers(0, 380), max_size=6), st.integers(0, 3))
def test_counts_samples_and_sums_do_not_depend_on_where_batches_end(places: list[int], seed: int) -> None:
    dictionary, data = DICTIONARIES["jumprelu"](), stream(seed=seed)
    whole, parts = (run(dictionary, data.cut(*cuts), seed=seed) for cuts in ([], sorted(places)))
    for name, value in vars(whole).items():
        if not isinstance(value, Examples | Probes):
            np.testing.assert_array_equal(getattr(parts, name), value, name)
    for field in ("value_FE", "document_FE", "position_FE", "corpus_FE"):
        np.testing.assert_array_equal(getattr(parts.samples, field), getattr(whole.samples, field))


def test_a_stretch_of_text_that_no_chunk_holds_is_cut_and_counted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, data = DICTIONARIES["jumprelu"](), stream()
    whole = run(dictionary, data.cut())
    monkeypatch.setattr(statistics, "CHUNK_CODES", {"cpu": 1})
    monkeypatch.setattr(statistics, "SEGMENT_ROWS", 5)
    parts = run(dictionary, data.cut())
    for name, value in vars(whole).items():
        if not isinstance(value, Examples | Probes):
            np.testing.assert_array_equal(getattr(parts, name), value, name)
    np.testing.assert_array_equal(parts.top.value_FE[:, 0], whole.top.value_FE[:, 0])
    assert ((parts.top.token_FEW >= 0).sum(axis=2) <= 5).all()


@pytest.mark.parametrize("stop", [0, 1, 150, 250, 379])
def test_a_resumed_pass_ends_bit_for_bit_as_an_unbroken_one(
    dictionary: Dictionary, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coactivation, "CHOICE_ROWS", 200)  # chosen before some of the stops, after others
    data = stream()
    unbroken = run(dictionary, data.cut(stop))
    before, after = data.cut(stop)
    first = StatisticsPass(dictionary, **SETTINGS)
    first.update(*before)
    storage.save_state(tmp_path, 1, first.state_dict())
    first.update(*after)  # which must not reach into the state that was saved
    second = StatisticsPass(dictionary, **SETTINGS)
    second.load_state_dict(storage.load_newest_state(tmp_path)[1])
    assert second.rows == len(before.x_ND)
    second.update(*after)
    assert_equal(second.finish(CORPORA), unbroken)
    assert_equal(first.finish(CORPORA), unbroken)


def test_looking_at_the_statistics_on_the_way_changes_nothing() -> None:
    dictionary, data = DICTIONARIES["top_k"](), stream()
    streamed = StatisticsPass(dictionary, **SETTINGS)
    for batch in data.cut(100, 200):
        streamed.update(*batch)
        assert_equal(streamed.finish(CORPORA), streamed.finish(CORPORA))
    assert_equal(streamed.finish(CORPORA), run(dictionary, data.cut(100, 200)))


def test_a_state_of_other_settings_is_refused() -> None:
    dictionary = DICTIONARIES["top_k"]()
    state = StatisticsPass(dictionary, top=4).state_dict()
    with pytest.raises(UserError, match="begun with top 4, not 5"):
        StatisticsPass(dictionary, top=5).load_state_dict(state)
