"""The report in a real browser: a reader finds a latent and its texts, with any device, and nothing leaves the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dictionary_learning.report import write_report
from tests.report.conftest import GATED, HOSTILE_LABEL, PHONE, settled, until
from tests.report.report_cases import make_run

Open = Callable[..., Any]


def first_cells(page: Any, column: str) -> list[str]:
    return page.locator(f".body .c-{column}").all_inner_texts()


def test_embedded_run_opens_without_errors_or_requests(opened: Open, embedded: Path) -> None:
    page = opened(embedded)
    settled(page)
    assert page.locator("#run-status").inner_text() == "complete"
    assert page.locator("#front-recovered .mark").count() == page.locator("#dictionaries tbody tr").count() == 4
    assert page.locator("#curves .curve").count() == 4
    assert page.locator("#histograms .density").count() == 2
    assert page.locator("#feature .examples .t.peak").count() >= 1
    assert page.log.errors == []
    assert page.log.requests == [embedded.as_uri()]


def test_search_finds_a_latent_of_a_real_run_and_a_click_shows_its_texts(opened: Open, embedded: Path) -> None:
    page = opened(embedded)
    settled(page)
    labelled = page.locator(".body .row:has(.words):not(.on)").first
    number, word = labelled.get_attribute("data-feature"), labelled.locator(".words").inner_text().split(",")[0]
    page.fill("#search", word)
    until(page, "document.getElementById('count').textContent.includes(' of 256 latents')")
    page.locator(f".body .row[data-feature='{number}']").click()
    until(page, "(n) => document.querySelector('#feature .path b').textContent === n", arg=number)
    peak = page.locator("#feature .examples .peak").first
    assert peak.evaluate("node => getComputedStyle(node).backgroundColor") not in ("rgba(0, 0, 0, 0)", "transparent")
    shown = float(page.locator("#feature .example .act").first.inner_text())
    peak.hover()
    tip = page.locator("#tip:not([hidden])")
    until(page, lambda: "activation " in tip.inner_text())
    told = float(tip.inner_text().rpartition("activation ")[2])
    assert told == pytest.approx(shown, rel=0.006)  # the same number, with a digit more


def test_tooltip_tells_token_and_activation_of_every_token(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/8")
    settled(page)
    example = page.locator("#feature .example").first
    example.locator(".t:not([class*=' h']):text-matches('^ (the|with|acute|renal|failure|was)')").first.hover()
    tip = page.locator("#tip:not([hidden])")
    until(page, lambda: "does not fire here" in tip.inner_text())
    example.focus()
    page.keyboard.press("ArrowRight")  # the tokens that it fires on, without a mouse
    until(page, lambda: "activation" in tip.inner_text() and "activation" in page.locator("#said").inner_text())


def test_search_is_over_labels_tokens_descriptions_and_numbers(opened: Open, small: Path) -> None:
    page = opened(small)
    settled(page)
    page.fill("#search", "11")
    until(page, "document.querySelector('.body .row')?.dataset.feature === '11'")
    page.fill("#search", "zzzz")
    until(page, "document.getElementById('count').textContent.startsWith('No latent matches.')")
    page.fill("#search", "")
    page.select_option("#status", label="dead")
    until(page, "document.getElementById('count').textContent === '1 of 96 latents'")
    until(page, lambda: first_cells(page, "feature") == ["3"])
    page.select_option("#status", label="all latents")
    page.select_option("#corpus", index=1)
    until(page, lambda: set(first_cells(page, "corpus")) == {"pubmedqa"})


@pytest.mark.parametrize("column", ["density", "feature", "max"])
def test_sorting_goes_both_ways(opened: Open, small: Path, column: str) -> None:
    page = opened(small)
    settled(page)
    head = page.locator(f"#table .c-{column}[role=columnheader]")
    first = []
    for way in ("descending", "ascending"):
        head.locator("button").click()
        page.locator(f"#table .c-{column}[role=columnheader][aria-sort={way}]").wait_for()
        texts = [text.strip().replace("−", "-") for text in first_cells(page, column)]
        values = [float(text) for text in texts if text != "–"]
        assert len(values) > 10 and values == sorted(values, reverse=way == "descending")
        first.append(values[0])
    assert first[0] > first[1]


def test_dictionaries_are_chosen_in_chart_and_table_and_sorted(opened: Open, small: Path) -> None:
    page = opened(small)
    settled(page)
    page.locator("#front-explained .mark[data-dictionary='1']").click()
    until(page, "document.querySelector('#feature .path').textContent.startsWith('trainer_1')")
    until(page, lambda: page.locator("#dictionaries tr.on").inner_text().startswith("trainer_1"))
    until(page, "location.hash.startsWith('#trainer_1')")
    page.locator("#front-recovered .mark[data-dictionary='2']").hover()
    until(page, lambda: "0.9600" in page.locator("#tip:not([hidden])").inner_text())
    for first in ("trainer_2", "trainer_0"):
        page.locator("#dictionaries thead [data-key=l0] button").click()
        until(page, lambda name=first: page.locator("#dictionaries tbody tr").first.inner_text().startswith(name))
    page.locator("#dictionaries tbody tr").last.click()
    until(page, "document.getElementById('count').textContent.startsWith('This dictionary was not analysed.')")


def test_keyboard_alone_reaches_everything(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/0")
    settled(page)
    number = "document.querySelector('#feature .path b').textContent"
    page.keyboard.press("/")
    until(page, "document.activeElement.id === 'search'")
    page.keyboard.type("t")  # a letter, while typing, not a command
    until(page, "document.activeElement.value === 't'")
    page.keyboard.press("Escape")
    until(page, "document.activeElement.value === ''")
    page.keyboard.press("Escape")
    until(page, "document.activeElement.id === 'table'")
    until(page, "getComputedStyle(document.activeElement).outlineStyle === 'solid'")
    for key, expected in (("j", "1"), ("ArrowDown", "2"), ("k", "1"), ("End", "95"), ("Home", "0"), ("ArrowUp", "0")):
        page.keyboard.press(key)
        until(page, f"{number} === '{expected}'")
        until(page, f"document.getElementById('table').getAttribute('aria-activedescendant') === 'row-{expected}'")
        page.locator(f"#row-{expected}").wait_for()
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'feature'")
    page.keyboard.press("]")
    until(page, "document.querySelector('#feature .path').textContent.startsWith('trainer_1')")
    page.keyboard.press("?")
    until(page, lambda: "search" in page.locator("#help[open]").inner_text())
    page.keyboard.press("Escape")
    page.locator("#help").wait_for(state="hidden")
    page.locator("#front-recovered .mark[data-dictionary='0']").focus()
    until(page, lambda: "loss recovered" in page.locator("#tip:not([hidden])").inner_text())
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#feature .path').textContent.startsWith('trainer_0')")


def test_address_leads_to_a_latent_and_follows(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_1/42")
    settled(page)
    until(page, "document.querySelector('#feature .path').textContent.startsWith('trainer_1/42')")
    page.locator("#row-42").wait_for()
    page.locator("#feature .links a").first.click()
    until(page, "location.hash !== '#trainer_1/42'")
    until(page, "document.querySelector('#feature .path b').textContent === location.hash.split('/')[1]")
    for wrong in ("#trainer_9/1", "#trainer_0/5000", "#%zz", "#trainer_0/-1", "#__proto__/1"):
        other = opened(small, wrong)
        settled(other)
        assert other.log.errors == []


def test_hostile_texts_and_names_are_shown_as_text(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/7")
    settled(page)
    assert page.locator("#run-name").inner_text() == "run <b>&amp;"
    assert page.title().startswith("run <b>&amp;")
    heading = page.locator("#feature h3")
    assert heading.inner_text() == HOSTILE_LABEL.replace("\u202e", "U+202E").replace("\u202c", "U+202C")
    assert "<i>medmcqa</i>" in page.locator("#feature .corpora").inner_text()
    page.select_option("#corpus", label="medU+202Eqa")
    seen = ""
    for feature in range(8, 20):
        page.evaluate(f"location.hash = '#trainer_0/{feature}'")
        until(page, "(n) => document.querySelector('#feature .path b').textContent === n", arg=str(feature))
        for group in page.locator("#feature details").all():
            group.evaluate("node => { node.open = true; }")
        seen += page.locator("#feature").inner_text()
    for shown in (
        "<script>window.hacked=1</script>",
        "onerror=window.hacked=2>",
        "U+202Egnp.exeU+202C",
        "a␀b␇c␛[31m",
        "U+D800",
        "👩‍⚕️",
        "مرحبا",
        "⏎⇥␍",
        "\"'`&amp;",
    ):
        assert shown in seen.replace("\n", ""), shown
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main b > i, main i").count() == 0
    assert not any(ord(c) in (0, 7, 27, 0x202E, 0x202C) for c in page.evaluate("document.body.innerText"))
    isolated = page.locator("#feature .text").first.evaluate("node => [getComputedStyle(node).unicodeBidi, node.dir]")
    assert isolated[0] in ("isolate", "plaintext") and isolated[1] == "auto"
    assert page.log.errors == [] and len(page.log.requests) == 1


CONTRAST = """
(selectors) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (css) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    const d = canvas.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255]; };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const colour = (node) => rgba(getComputedStyle(node).backgroundColor);
  const ground = (node) => { const seen = []; for (let n = node; n; n = n.parentElement) seen.push(colour(n));
    return seen.reverse().reduce((under, top) => over(top, under), [255, 255, 255]); };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  return selectors.map((selector) => { const node = document.querySelector(selector); const under = ground(node);
    const a = light(over(rgba(getComputedStyle(node).color), under)), b = light(under);
    return [selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; });
}
"""
READ = [
    "h1",
    "#facts dt",
    "#facts dd",
    ".hint",
    "#dictionaries td",
    ".body .c-label",
    ".body .c-feature",
    ".row.on .c-feature",
]
READ += [
    "#feature .text",
    "#feature .peak",
    "#feature .where",
    "#feature .stats dt",
    "#feature .link b",
    ".tok",
    ".badge",
    ".note",
    "#run-status",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(opened: Open, small: Path, scheme: str) -> None:
    page = opened(small, "#trainer_0/8", color_scheme=scheme)
    settled(page)
    page.evaluate("document.getElementById('notes').innerHTML = '<p class=\"note warning\">note</p>'")
    measured = page.evaluate(CONTRAST, READ)
    assert {selector: round(ratio, 2) for selector, ratio in measured if ratio < 4.5} == {}
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.click("#theme")
    until(page, f"{ground} !== '{before}'")
    assert all(ratio >= 4.5 for _, ratio in page.evaluate(CONTRAST, READ))
    page.reload()
    page.wait_for_selector("body[data-ready]", state="attached")
    until(page, f"{ground} !== '{before}'")  # the choice is kept


def test_phone_has_no_horizontal_scroll(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/8")
    page.set_viewport_size(PHONE)
    settled(page)
    wide = "[...document.querySelectorAll('#front .chart svg, #curves svg, #feature, .browse, .filters *')]"
    until(page, f"{wide}.every(n => n.getBoundingClientRect().right <= 391)")  # charts are drawn again for the width
    until(page, "document.documentElement.scrollWidth === 390 && innerWidth === 390")
    page.locator(".body .row").nth(2).click()
    until(page, "document.getElementById('feature').getBoundingClientRect().top < 200")


def test_paper_has_the_charts_and_the_latent_but_no_controls(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/8", color_scheme="dark")
    settled(page)
    page.emulate_media(media="print")
    for hidden in (".top", ".browse", "#metric", "footer"):
        page.locator(hidden).wait_for(state="hidden")
    for shown in ("#front-recovered svg", "#dictionaries", "#curves svg", "#feature .examples"):
        page.locator(shown).first.wait_for()
    until(page, "getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    pane = "document.getElementById('feature')"
    until(page, f"getComputedStyle({pane}).overflowY === 'visible' && {pane}.scrollHeight <= {pane}.clientHeight + 1")
    assert page.pdf()[:4] == b"%PDF"


def test_rows_of_a_long_table_exist_only_in_sight(opened: Open, small: Path) -> None:
    page = opened(small)
    settled(page)
    assert 0 < page.locator(".body .row").count() < 60
    assert page.get_attribute("#table", "aria-rowcount") == "97"
    page.evaluate("document.querySelector('.rows').scrollTop = 1e6")
    until(page, "Boolean(document.getElementById('row-95'))")


def test_charts_work_without_an_analysis_and_of_a_broken_off_run(opened: Open, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", status="stopped: SIGTERM", stopped_dictionaries={"trainer_1": "its loss is not a number"}
    )
    for name in ("trainer_0", "trainer_1", "trainer_2"):
        (run / name / "eval_results.json").unlink()
    page = opened(write_report(run))
    notes = page.locator("#notes").inner_text()
    assert "stopped (SIGTERM)" in notes and "sae-factory analyze run" in notes and "its loss is not a number" in notes
    assert page.locator("#front-explained .mark.hollow").count() == 3
    assert "No dictionary has a loss recovered" in page.locator("#front-recovered").inner_text()
    assert not page.locator("#features").is_visible() and not page.locator("#densities").is_visible()
    page.locator("#metric [data-metric=explained]").click()
    until(page, lambda: page.locator("#metric [aria-pressed=true]").inner_text() == "Explained variance")
    assert page.log.errors == []


def test_whole_texts_are_shown_as_they_are(opened: Open, tmp_path: Path) -> None:
    from tests.report.report_cases import make_whole_texts

    run = make_run(tmp_path / "run")
    make_whole_texts(run, ["short <b>text</b>", "long " * 400, "\u202ereversed"])
    page = opened(write_report(run), "#trainer_0/0")
    settled(page)
    texts = page.locator("#feature .examples .text").all_inner_texts()
    assert any("short <b>text</b>" in text for text in texts) and any("U+202Ereversed" in text for text in texts)
    long = page.locator("#feature .text:has(.more)").first
    short = len(long.inner_text())
    long.locator(".more").click()
    lengths = "[...document.querySelectorAll('#feature .text')].map(n => n.textContent.length)"
    until(page, f"Math.max(...{lengths}) > {short} + 1000")
    assert page.log.errors == []


def test_frame_of_a_notebook_shows_a_latent_and_leaks_nothing(opened: Open, tmp_path: Path, small: Path) -> None:
    from dictionary_learning.report.notebook import show_feature, show_run

    run = small.parent
    shown = show_feature(run, "trainer_1", 9)._repr_html_() + show_run(run)._repr_html_()
    host = tmp_path / "notebook.html"
    host.write_text(
        f"<!doctype html><meta charset=utf-8><style>h1{{color:rgb(1,2,3)}}</style><h1>cell</h1>{shown}",
        encoding="utf-8",
    )
    page = opened(host, ready="iframe >> nth=1")
    one, whole = page.frame_locator("iframe >> nth=0"), page.frame_locator("iframe >> nth=1")
    for frame in (one, whole):
        frame.locator("#feature .stats").wait_for()
    assert one.locator("#feature .path").text_content().startswith("trainer_1/9")
    one.locator(".browse").wait_for(state="hidden")
    whole.locator(".browse").wait_for()
    assert page.locator("h1").evaluate("node => getComputedStyle(node).color") == "rgb(1, 2, 3)"
    assert page.locator("body").evaluate("node => getComputedStyle(node).margin") == "8px"
    assert page.log.errors == []
    assert len(show_feature(run, "trainer_1", 9).page) < 0.6 * len(show_run(run).page)


def test_sixteen_thousand_latents_open_by_what_is_in_sight_alone(opened: Open, tmp_path: Path) -> None:
    from tests.report.report_cases import make_analysis

    run = make_run(tmp_path / "run", dictionaries=1, width=16_384)
    make_analysis(run, ["trainer_0"], features=16_384, top=10, samples=0, window=16)
    path = write_report(run)
    assert path.stat().st_size < 60e6
    page = opened(path, script=GATED)
    settled(page)
    assert page.evaluate("unpacked") == 5  # what the page knows, vocabulary, table, a chunk of latents, one of texts
    assert page.evaluate("document.querySelectorAll('*').length") < 4000
    page.fill("#search", "16383")
    until(page, "document.querySelector('.body .row')?.dataset.feature === '16383'")
