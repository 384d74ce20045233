"""The report as its readers use it: back and forth, by keyboard, by a link, in a notebook, on paper and on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dictionary_learning.report import write_report
from dictionary_learning.report.data import read_run
from dictionary_learning.report.figures import curves_figure, front_figure
from tests.report.conftest import PHONE, point, settled, until
from tests.report.report_cases import make_run, make_whole_texts

Open = Callable[..., Any]
NUMBER = "document.querySelector('#feature .path b').textContent"
TIP = "document.querySelector('#tip:not([hidden])')"
DENSITY = "#histograms .density svg"


def place(selector: str, right: str, down: str) -> str:
    """JavaScript: a place in a picture, scrolled to the middle of the window; `box` is the picture's."""
    into = f"const node = document.querySelector('{selector}'); node.scrollIntoView({{block: 'center'}});"
    return f"(() => {{ {into} const box = node.getBoundingClientRect(); return [box.x + {right}, box.y + {down}]; }})()"


def evaluated(run: Path, name: str, **values: float) -> None:
    """Change what was measured of a dictionary."""
    path = run / name / "eval_results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_columns_are_sorted_from_the_keyboard_and_keep_the_focus(opened: Open, small: Path) -> None:
    page = opened(small)
    settled(page)
    page.focus("#table")
    for _ in range(3):
        page.keyboard.press("Tab")
    for way in ("descending", "ascending"):
        page.keyboard.press("Enter")
        head = "document.activeElement.parentNode"
        until(page, f"{head}.textContent === 'Density' && {head}.getAttribute('aria-sort') === '{way}'")


def test_back_returns_to_the_latent_that_a_link_was_followed_from(opened: Open, small: Path) -> None:
    page = opened(small)
    settled(page)
    start = page.evaluate(NUMBER)
    assert page.evaluate("[location.hash, scrollY]") == ["", 0]
    link = page.locator("#feature .links a:not([href$='/0'])").first
    target = link.locator("b").inner_text()
    link.click()
    until(page, f"{NUMBER} === '{target}'")
    until(page, f"location.hash.endsWith('/{target}')")
    page.go_back()
    until(page, f"{NUMBER} === '{start}'")
    until(page, f"document.querySelector('.body .row.on').dataset.feature === '{start}'")
    page.go_forward()
    until(page, f"{NUMBER} === '{target}'")


def test_link_to_a_latent_shows_it_without_scrolling(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_1/42")
    settled(page)
    until(page, "document.getElementById('features').getBoundingClientRect().top < 100")
    page.evaluate("scrollTo(0, 0)")
    until(page, "scrollY === 0")
    page.reload()
    settled(page)
    assert page.evaluate("scrollY") == 0  # who loads it again stays where they were


def test_name_of_a_latent_can_be_copied(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_1/42", permissions=["clipboard-read"])
    settled(page)
    page.bring_to_front()  # only what has the focus may use the clipboard
    page.keyboard.press("c")
    until(page, "document.getElementById('said').textContent === 'copied trainer_1/42'")
    until(page, "async () => (await navigator.clipboard.readText()) === 'trainer_1/42'")
    assert page.log.errors == []


def test_links_lead_to_latents_in_the_frame_of_a_notebook(opened: Open, tmp_path: Path, small: Path) -> None:
    from dictionary_learning.report.notebook import show_run

    host = tmp_path / "notebook.html"
    host.write_text(f"<!doctype html><meta charset=utf-8>{show_run(small.parent)._repr_html_()}", encoding="utf-8")
    page = opened(host, ready="iframe")
    frame = page.frame_locator("iframe")
    link = frame.locator("#feature .links a:not([href$='/0'])").first
    target = link.locator("b").inner_text()
    link.click()
    until(page, lambda: frame.locator("#feature .path b").inner_text() == target)


def test_tooltips_of_charts_tell_the_place_of_the_pointer(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/0")
    settled(page)
    page.locator("#metric [data-metric=l0]").click()  # 8 all the time, of trainer_0
    for share, tokens in ((0.005, "1,250"), (0.995, "50,000")):
        at = place("#curves .curve.on path:not(.reach):not(.end)", f"{share} * box.width", "0")
        point(page, at, f"{TIP}?.textContent.endsWith('8 at {tokens} activations')")
    point(page, place(DENSITY, "5", "60"), f"{TIP}?.textContent === 'never fired: 1 latent'")
    bars = f"[...document.querySelectorAll('{DENSITY} .bar')]"
    bar = f"({bars}.at(-1).getBoundingClientRect().left - box.left + 2)"  # the dense one
    point(page, place(DENSITY, bar, "60"), f"{TIP}?.textContent === 'log10 −0.50 to −0.25: 1 latent'")


def test_a_tooltip_stays_with_a_resting_pointer_and_goes_with_what_it_tells_of(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/0")
    settled(page)
    point(page, place(DENSITY, "5", "60"), f"Boolean({TIP})")
    scrolled = "new Promise((done) => { addEventListener('scroll', done, {once: true}); scrollBy(0, %s); })"
    page.evaluate(scrolled % "-1")  # as a late event does that the pointer overtook
    page.evaluate("new Promise((done) => setTimeout(done))")
    assert page.evaluate(f"{TIP}?.textContent") == "never fired: 1 latent"
    page.evaluate(scrolled % "-200")
    until(page, f"!{TIP}")
    point(page, place(DENSITY, "6", "60"), f"Boolean({TIP})")


def test_a_tooltip_of_the_keyboard_outlives_a_page_that_moves_below_the_pointer(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/0")
    settled(page)
    page.evaluate("scrollTo(0, 1e6)")
    page.mouse.move(600, 450)
    page.locator("#front-recovered .mark").first.focus()  # scrolls to it, so that another thing is below the pointer
    until(page, f"Boolean({TIP}?.textContent.includes('loss recovered'))")
    rest = "new PointerEvent('pointerover', {bubbles: true, clientX: 600, clientY: 450})"
    page.evaluate(f"document.getElementById('run-name').dispatchEvent({rest})")  # what a browser tells then, or later
    assert page.evaluate(f"{TIP}?.textContent.includes('loss recovered')")
    page.mouse.move(5, 5)
    until(page, f"!{TIP}")


def test_a_dictionary_that_was_not_analysed_says_so_in_little_room(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_2")
    until(page, "document.getElementById('count').textContent.startsWith('This dictionary was not analysed.')")
    until(page, lambda: "(not analysed)" in page.locator("#dictionary option:checked").inner_text())
    until(page, "document.getElementById('explorer').getBoundingClientRect().height < 100")


def test_what_was_not_evaluated_is_on_no_front_of_what_was(tmp_path: Path, opened: Open) -> None:
    run = make_run(tmp_path / "run")
    (run / "trainer_1" / "eval_results.json").unlink()  # whose last batch has the best explained variance
    data = read_run(run)
    assert [d["front_explained"] for d in data.dictionaries] == [True, False, True]
    assert data.notes[-1]["text"].startswith("Not every dictionary was evaluated")
    page = opened(write_report(run))
    assert page.locator("#dictionaries .star").count() == 2
    assert "not evaluated" in page.locator("#legend").inner_text()
    points = front_figure(data).axes[1].collections
    faces = [points[i].get_facecolor()[0].tolist() for i in range(3)]
    assert [face == [1, 1, 1, 1] for face in faces] == [False, True, False]  # hollow, as on the page
    for name in ("trainer_0", "trainer_2"):
        (run / name / "eval_results.json").unlink()
    data = read_run(run)
    assert data.notes[-1]["text"].startswith("No dictionary was evaluated") and data.best == "trainer_0"


def test_a_very_bad_dictionary_does_not_flatten_the_front(tmp_path: Path, opened: Open) -> None:
    run = make_run(tmp_path / "run")
    evaluated(run, "trainer_1", frac_recovered=-30.0)
    page = opened(write_report(run))
    marks = "[0, 1, 2].map((i) => document.querySelector(`#front-recovered [data-dictionary='${i}'] path`))"
    boxes = f"[document.querySelector('#front-recovered svg'), ...{marks}].map((node) => node.getBoundingClientRect())"
    until(page, f"(([all, ...at]) => at[1].y > at[0].y && at[0].y > at[2].y + 0.5 * all.height)({boxes})")
    assert "at the lower edge" in page.locator("#front-recovered").inner_text()
    assert "at the lower edge" not in page.locator("#front-explained").inner_text()
    low, high = front_figure(read_run(run)).axes[0].get_ylim()
    assert 0.88 < low < 0.9 and 0.96 < high < 1


@pytest.mark.parametrize(("least", "most"), [(15.9, 16.2), (16, 32), (8, 400), (0.4, 30_000)])
def test_logarithmic_axes_of_figures_have_ticks_that_fit(tmp_path: Path, least: float, most: float) -> None:
    run = make_run(tmp_path / "run")
    evaluated(run, "trainer_0", l0=least)
    evaluated(run, "trainer_2", l0=most)
    evaluated(run, "trainer_1", l0=least)
    for axes in front_figure(read_run(run)).axes:
        low, high = axes.get_xlim()
        assert low < least < most < high
        assert 2 <= sum(low <= tick <= high for tick in axes.xaxis.get_majorticklocs()) <= 9
        assert len(axes.xaxis.get_minorticklocs()) == 0


def test_lines_of_figures_can_be_told_apart_without_colour(tmp_path: Path) -> None:
    axes = curves_figure(read_run(make_run(tmp_path / "run"))).axes[0]
    assert len({line.get_marker() for line in axes.lines}) == 3


def test_numbers_of_a_column_have_equal_digits(opened: Open, small: Path) -> None:
    page = opened(small)
    settled(page)
    for text in page.locator(".body .c-density").all_inner_texts():
        digits = text.strip().split("e")[0].replace(".", "").lstrip("0")
        assert text.strip() == "0" or len(digits) == 2, text


def test_paper_has_the_samples_that_were_opened(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/8")
    settled(page)
    page.emulate_media(media="print")
    page.locator(".piece:has(.band)").wait_for(state="hidden")
    page.locator(".band").nth(1).evaluate("node => { node.open = true; }")
    until(page, lambda: [band.is_visible() for band in page.locator(".band").all()[:3]] == [False, True, False])


def test_phone_has_no_horizontal_scroll_of_long_names(opened: Open, tmp_path: Path) -> None:
    from tests.report.report_cases import make_analysis

    run = make_run(tmp_path / ("a_run_with_a_long_name_" * 3), dictionaries=2)
    for i in range(2):
        path = run / f"trainer_{i}" / "config.json"
        config = json.loads(path.read_text())
        config["trainer"] |= {"architecture": "matryoshka_batch_top_k", "submodule_name": f"model.layers.{i}.self_attn"}
        path.write_text(json.dumps(config))
    make_analysis(run, ["trainer_0"])
    page = opened(write_report(run))
    page.set_viewport_size(PHONE)
    settled(page)
    until(page, "document.documentElement.scrollWidth === 390")


def test_phone_shows_the_corpora_in_full(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/8")
    page.set_viewport_size(PHONE)
    settled(page)
    scroll = "document.querySelector('.scroll:has(.corpora)')"
    until(page, f"innerWidth === 390 && {scroll}.scrollWidth <= {scroll}.clientWidth")


def test_latents_of_texts_are_told_by_texts(opened: Open, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    make_whole_texts(run, ["one text", "another text"])
    page = opened(write_report(run), "#trainer_0/0")
    settled(page)
    assert "Jaccard index of the texts" in page.locator("#feature").inner_text()
    page.locator("#feature .where").first.hover()
    until(page, f"{TIP}?.textContent === 'document 0'")


def test_search_ranks_names_before_tokens_and_says_why_it_found_what_is_named_otherwise(
    opened: Open, tmp_path: Path
) -> None:
    from tests.report.report_cases import make_analysis

    run = make_run(tmp_path / "run")
    folder = make_analysis(run, ["trainer_0"], labels=dict.fromkeys(range(96), "other") | {90: "kidney"})
    promoted = folder.table("trainer_0")["top_tokens"]
    page = opened(write_report(run))
    settled(page)
    page.fill("#search", "kidney")
    until(page, "document.querySelector('.body .row')?.dataset.feature === '90'")
    rows = page.locator(".body .row:not([data-feature='90'])")
    kinds = []
    for row in rows.all():
        tokens = row.locator(".c-label .tok")
        assert all("kidney" in token for token in tokens.all_inner_texts()) and tokens.count() >= 1
        quiet = "quiet" in tokens.first.get_attribute("class")
        if quiet:
            assert any("kidney" in token for token in promoted[int(row.get_attribute("data-feature"))])
        kinds.append(quiet)
    assert kinds == sorted(kinds) and {False, True} <= set(kinds)  # fires on it, then promotes it


def test_what_never_fired_has_no_numbers_of_firing(opened: Open, small: Path) -> None:
    page = opened(small, "#trainer_0/3")
    settled(page)
    assert page.locator("#feature .stats dt").all_inner_texts() == ["Density", "Fired"]
    assert "never fired" in page.locator("#feature").inner_text() and page.locator("#feature .corpora").count() == 0
