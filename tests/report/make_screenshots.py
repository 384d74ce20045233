"""The screenshots of docs/report.md, made again: `python -m tests.report.make_screenshots RUN trainer_4/108 lung`.

In: an analysed run, the latent to show, what to search for. Out: docs/images/report-*.png. Needs Chromium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from dictionary_learning.report import write_report
from tests.report.conftest import ARGUMENTS

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 780}


def take(browser: Any, report: Path, latent: str, search: str) -> None:
    """Write the images: what it starts with, the latents in light and dark, a phone."""

    def opened(scheme: str, size: dict[str, int]) -> Any:
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.goto(f"{report.as_uri()}#{latent}")
        page.wait_for_selector("#feature .example")
        page.wait_for_timeout(300)
        return page

    page = opened("light", WIDE)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=IMAGES / "report-front.png")
    for scheme in ("light", "dark"):
        page = opened(scheme, WIDE)
        page.fill("#search", search)
        page.evaluate("document.getElementById('features').scrollIntoView()")
        page.locator("#feature .example .peak").first.hover()
        page.wait_for_timeout(300)
        page.screenshot(path=IMAGES / f"report-latents-{scheme}.png")
    page = opened("light", PHONE)
    page.evaluate("document.getElementById('feature').scrollIntoView()")
    page.wait_for_timeout(300)
    page.screenshot(path=IMAGES / "report-phone.png")


def main(run: str, latent: str, search: str) -> None:
    from playwright.sync_api import sync_playwright

    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        copied = Path(folder) / "embedded"  # the name that the page shows
        shutil.copytree(run, copied, ignore=shutil.ignore_patterns("state", "report.html"))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        take(browser, write_report(copied), latent, search)
        browser.close()
    for path in sorted(IMAGES.glob("report-*.png")):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
