"""README.md and docs/*.md as the tests of this folder see them: pages with snippets, commands, flags and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def snippets(page: str, language: str = "python") -> list[str]:
    """The blocks of a language, in their order."""
    return [block for name, block in _BLOCK.findall(text_of(page)) if name == language]


def commands(page: str) -> list[list[str]]:
    """The lines of the bash blocks as words: without comments, bodies of here-documents, `[]` and `...`."""
    found = []
    for block in snippets(page, "bash"):
        block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        for line in re.sub(r"[\[\]]|\.\.\.", "", block).splitlines():
            if words := shlex.split(line, comments=True):
                found.append(words)
    return found


def prose(page: str) -> str:
    """The page without its blocks."""
    return _BLOCK.sub("", text_of(page))
