"""Every link and picture of the documentation leads to something, and every page is linked from the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, text_of

MORE = {name: ROOT / name for name in ("CHANGELOG.md", "benchmarks/RESULTS.md", "data_prep/embedded/model/README.md")}


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *MORE])
def test_links_and_pictures_lead_to_files_and_headings(page: str) -> None:
    path = (PAGES | MORE)[page]
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{page}: {target} is not there"
        assert there.is_relative_to(ROOT), f"{page}: {target} lies outside of the project"
        assert not anchor or anchor in headings(there), f"{page}: {target} has no such heading"


def test_the_readme_links_every_page() -> None:
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in text_of("README.md")] == []


@pytest.mark.parametrize("page", [*PAGES])
def test_files_that_are_named_in_the_text_exist(page: str) -> None:
    """`trainers/trainer.py` and the like, also below the package's folder; of paths only those that end in .py."""
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)`", text_of(page))
    places = [ROOT, ROOT / "dictionary_learning", ROOT / "dictionary_learning" / "analysis"]
    assert [name for name in named if not any((place / name).is_file() for place in places)] == []
