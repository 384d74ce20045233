"""Search in the example texts: it finds what they hold, says how far it is, can be stopped; late parts do no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dictionary_learning.report import write_report
from tests.report.conftest import GATED, PHONE, settled, until
from tests.report.report_cases import make_analysis, make_run, make_whole_texts, vocabulary

Open = Callable[..., Any]
FEATURES = 24  # whose rows are all in sight
SHOWN = "[...document.querySelectorAll('.body .row')].map((row) => Number(row.dataset.feature))"
BY_TEXTS = "[...document.querySelectorAll('.body .row:has(.found)')].map((row) => Number(row.dataset.feature))"
COUNT = "document.getElementById('count').textContent"
NUMBER = "document.querySelector('#feature .path b').textContent"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[str]]]:
    """A report, and the texts of the examples of each latent of its first dictionary, in lower case."""
    run = make_run(tmp_path_factory.mktemp("texts") / "run", dictionaries=2)
    strings = vocabulary() | {2: " Acute"}
    labels = dict.fromkeys(range(FEATURES), "other") | {20: "kidney"}
    folder = make_analysis(run, features=FEATURES, top=3, samples=2, strings=strings, labels=labels)
    texts: dict[int, list[str]] = {f: [] for f in range(FEATURES)}
    for part in folder.examples("trainer_0"):
        for feature, document in zip(*(part.document_FE >= 0).nonzero(), strict=True):
            window = part.token_FEW[feature, document]
            texts[int(feature)].append("".join(strings[int(t)] for t in window if t >= 0).lower())
    return write_report(run), texts


def search(page: Any, text: str) -> tuple[set[int], set[int]]:
    """(all that are shown, those found by their texts alone), once the texts are read."""
    page.fill("#search", text)
    until(page, f"!{COUNT}.includes('reading')")  # which it says at once
    return set(page.evaluate(SHOWN)), set(page.evaluate(BY_TEXTS))


def test_latents_whose_texts_hold_the_words_are_found(
    opened: Open, searched: tuple[Path, dict[int, list[str]]]
) -> None:
    path, texts = searched

    def holding(word: str) -> set[int]:
        return {f for f, each in texts.items() if any(word in text for text in each)}

    page = opened(path, "#trainer_0", script=GATED)
    settled(page)
    named, by_texts = search(page, "kidney")
    assert 20 in named and by_texts == set()
    page.get_by_label("in texts").check()
    shown, by_texts = search(page, "KIDNEY")
    assert shown == named | holding("kidney") and by_texts == shown - named and 0 < len(by_texts) < FEATURES
    times = {f: sum("kidney" in text for text in texts[f]) for f in by_texts}
    order = [f for f in page.evaluate(SHOWN) if f in by_texts]  # many before few
    assert order == sorted(by_texts, key=lambda f: (-times[f], f)) and len(set(times.values())) > 1
    told = page.locator(".body .found").all_inner_texts()
    assert told == [f"in {times[f]} text{'s' if times[f] > 1 else ''}" for f in order]
    assert page.evaluate(SHOWN)[0] == 20  # what is called so stands before what says so
    assert f"{len(shown)} of {FEATURES} latents, {len(by_texts)} by their texts" == page.evaluate(COUNT)
    read = page.evaluate("unpacked")
    longest = max((word for each in texts.values() for text in each for word in text.split()), key=len)
    inner = longest[1:-1]  # from within a token, over others, to within another
    assert not any(inner in string for string in vocabulary().values())
    assert search(page, inner)[1] == holding(inner) != set()
    for text in ("acute", "xylophone", "acute kidney", "rena"):
        shown, by_texts = search(page, text)
        each = [holding(word) for word in text.split()]
        assert set.intersection(*each) <= shown and by_texts <= set.union(*each), text
        if text != "acute kidney":  # words of which the names may hold one, the texts the other
            assert by_texts <= set.intersection(*each), text
    assert page.evaluate("unpacked") == read  # the texts are read once
    assert page.log.errors == []


def test_reading_the_texts_says_how_far_it_is_and_stops(
    opened: Open, searched: tuple[Path, dict[int, list[str]]]
) -> None:
    page = opened(searched[0], "#trainer_0", script=GATED)
    settled(page)
    page.evaluate("shut()")
    page.fill("#search", "kidney")
    named = page.evaluate(SHOWN)
    page.get_by_label("in texts").check()
    until(page, f"{COUNT}.endsWith('latents · reading their texts, 0 %')")
    assert page.evaluate(SHOWN) == named  # what the table knows is there meanwhile
    page.get_by_label("in texts").uncheck()
    page.evaluate("release()")
    until(page, f"!{COUNT}.includes('texts')")
    before = page.evaluate("unpacked")
    page.get_by_label("in texts").check()
    until(page, f"{COUNT}.endsWith('by their texts')")
    assert page.evaluate("unpacked") > before  # it had stopped before the rest
    assert len(page.evaluate(SHOWN)) > len(named)


def test_texts_of_the_dictionary_that_is_shown_are_searched(opened: Open, searched: tuple[Path, Any]) -> None:
    page = opened(searched[0], "#trainer_0", script=GATED)
    settled(page)
    page.evaluate("shut()")
    page.get_by_label("in texts").check()
    page.fill("#search", "insulin")
    until(page, f"{COUNT}.includes('reading')")
    page.select_option("#dictionary", index=1)
    page.evaluate("release()")
    until(page, f"{COUNT}.endsWith('by their texts')")
    assert page.evaluate(BY_TEXTS)
    shown = page.evaluate(SHOWN)
    page.select_option("#dictionary", index=0)
    until(page, f"JSON.stringify({SHOWN}) !== JSON.stringify({shown}) && {COUNT}.endsWith('by their texts')")


def test_whole_texts_are_searched(opened: Open, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    make_whole_texts(run, ["one text of Zebras", "another text"])
    page = opened(write_report(run))
    settled(page)
    assert search(page, "zebra") == (set(), set())
    assert "Tick “in texts”" in page.evaluate(COUNT)
    page.get_by_label("in texts").check()
    until(page, f"{COUNT}.endsWith('8 by their texts')")
    assert search(page, "zebrafish") == (set(), set())


def test_search_in_texts_is_in_reach_of_the_keyboard_and_on_a_phone(
    opened: Open, searched: tuple[Path, dict[int, list[str]]]
) -> None:
    page = opened(searched[0], viewport=PHONE)
    settled(page)
    box = page.get_by_label("in texts")
    for wanted in (True, False):
        page.keyboard.press("x")
        until(page, lambda wanted=wanted: box.is_checked() == wanted)
    page.focus("#search")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    until(page, box.is_checked)
    page.keyboard.press("?")
    until(page, lambda: "search their texts too" in page.locator("#help[open]").inner_text())
    label = "document.getElementById('in-texts-label').getBoundingClientRect()"
    until(page, f"{label}.right <= 390 && {label}.height >= 24")


def test_texts_that_cannot_be_read_are_told_of(opened: Open, searched: tuple[Path, Any], tmp_path: Path) -> None:
    cut = tmp_path / "cut.html"
    cut.write_text(searched[0].read_text(encoding="utf-8").replace('id="texts/0"', 'id="lost"'), encoding="utf-8")
    page = opened(cut)
    until(page, "Boolean(document.querySelector('.body .row'))")  # the latent itself has no texts to show
    page.fill("#search", "kidney")
    page.get_by_label("in texts").click()
    until(page, f"{COUNT}.endsWith('the texts can\\'t be searched: the file lacks its part texts/0.')")
    assert not page.get_by_label("in texts").is_checked() and page.evaluate(SHOWN)


def test_no_texts_no_search_in_them(opened: Open, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    make_analysis(run, ["trainer_0"], features=8, top=0, samples=0)
    page = opened(write_report(run))
    settled(page)
    assert not page.get_by_label("in texts").is_visible()
    assert search(page, "xylophone")[0] == set() and page.evaluate(COUNT) == "No latent matches."


def test_keys_choose_no_latent_of_a_dictionary_that_is_on_its_way(opened: Open, searched: tuple[Path, Any]) -> None:
    page = opened(searched[0], "#trainer_0/7", script=GATED)
    settled(page)
    page.evaluate("shut()")
    page.keyboard.press("]")
    for key in ("j", "j", "k"):
        page.keyboard.press(key)  # the rows are still those of the other dictionary
    page.locator(".body .row").nth(4).click()
    assert page.evaluate("location.hash") == "#trainer_1"
    page.evaluate("release()")
    until(page, f"document.querySelector('#feature .path').textContent.startsWith('trainer_1') && {NUMBER} === '0'")
    assert page.log.errors == []
