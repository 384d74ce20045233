"""A browser, and reports to open in it: of a small made-up run, and of a real embedded one.

The machine may be busy, and a page does much of its work later than the call that caused it (frames, scroll events,
unpacking): tests wait for what they expect with `until`, and never read it only once.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dictionary_learning.report import write_report
from tests.report.report_cases import HOSTILE, make_analysis, make_run, vocabulary

ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 240.0  # seconds: an end to waiting for what never happens, and no measure of anything
HOSTILE_LABEL = f"{HOSTILE[0]} {HOSTILE[2]} label"

# Counts the parts that are unpacked, and holds them back until `gate` is kept, as a slow machine would.
GATED = """{
  const Stream = window.DecompressionStream;
  Object.assign(window, {unpacked: 0, gate: Promise.resolve()});
  window.shut = () => { window.gate = new Promise((open) => { window.release = open; }); };
  window.DecompressionStream = class {
    constructor(kind) {
      const inner = new Stream(kind);
      window.unpacked += 1;
      this.writable = inner.writable;
      this.readable = inner.readable.pipeThrough(new TransformStream({flush: () => window.gate}));
    }
  };
}"""


def until(page: Any, condition: str | Callable[[], Any], arg: Any = None) -> None:
    """Wait for a condition: a function, or JavaScript (which Playwright's own way evaluates in the page, whose policy
    forbids that). What it raises means not yet: the page may be about to show what it looks for."""
    deadline = time.monotonic() + PATIENCE
    while True:
        failed: Exception | None = None
        try:
            if condition() if callable(condition) else page.evaluate(condition, arg):
                return
        except Exception as error:
            failed = error
        if time.monotonic() > deadline:
            raise AssertionError(f"still not: {condition}") from failed
        page.wait_for_timeout(20)


def settled(page: Any) -> None:
    """Wait until the table and the chosen latent are shown."""
    until(page, "Boolean(document.querySelector('.body .row') && document.querySelector('#feature .stats'))")


def point(page: Any, place: str, condition: str) -> None:
    """Put the pointer at a place (JavaScript: [x, y]) and wait; it is moved again only where the place has moved."""
    at = None

    def met() -> bool:
        nonlocal at
        now = page.evaluate(place)
        if now != at:
            at = now
            page.mouse.move(*now)
        return bool(page.evaluate(condition))

    until(page, met)


def works(command: str) -> bool:
    """Whether there is such a browser; Ubuntu's package of that name is a script that says where to get one."""
    return bool(shutil.which(command)) and subprocess.run([command, "--version"], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium of the machine; nothing is downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(works, ("chromium", "chromium-browser", "google-chrome")), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which(path), args=ARGUMENTS, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """opened(path, hash, ready, script, **options of the context): a page that is ready, with `errors` and `requests`;
    the script runs before the page's own."""
    contexts = []

    def open_page(path: Path, hash: str = "", ready: str = "body[data-ready]", script: str = "", **options: Any) -> Any:
        context = chromium.new_context(**({"viewport": WIDE} | options))
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        log = SimpleNamespace(errors=[], requests=[])
        page.on("console", lambda message: log.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: log.errors.append(str(error)))
        page.on("request", lambda request: log.requests.append(request.url))
        page.goto(path.as_uri() + hash)
        page.wait_for_selector(ready, state="attached")
        page.log = log
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a made-up run with three dictionaries, two of them analysed; its names and texts are hostile."""
    run = make_run(tmp_path_factory.mktemp("report") / "run <b>&amp;", dictionaries=3)
    strings = vocabulary() | {400 + i: text for i, text in enumerate(HOSTILE)}
    rng = np.random.default_rng(1)
    text_DT = np.where(
        rng.random((60, 120)) < 0.1, rng.integers(400, 409, (60, 120)), (rng.zipf(1.3, (60, 120)) - 1) % 400
    )
    corpora = ["pubmedqa", "<i>medmcqa</i>", "med\u202eqa"]
    make_analysis(run, text_DT=text_DT, strings=strings, corpora=corpora, labels={7: HOSTILE_LABEL})
    return write_report(run)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a tiny sweep on the embedded model, trained and analysed here."""
    from dictionary_learning.analysis.job import analyze
    from dictionary_learning.analysis.one_pass import Measures
    from dictionary_learning.demo import main

    folder = tmp_path_factory.mktemp("embedded") / "run"
    sizes = "--layers 1 --num_tokens 20000 --batch_size 512 --widths 256 --buffer_contexts 48 --eval_tokens 400".split()
    sweep = "--architectures top_k --log_steps 10 --state_every 0 --no-report".split()
    assert main(["--save_dir", str(folder), *sizes, *sweep]) == 0
    analyze(folder, measures=Measures(tokens=10_000, samples=6, ablate=0), dictionaries=["trainer_0", "trainer_1"])
    return write_report(folder)
