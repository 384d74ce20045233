"""The help of `train` is in boxes that a reader finds an option by, and reads the same arguments as one flat list."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dictionary_learning.command_line import parse
from dictionary_learning.demo_args import DemoArgs


@dataclasses.dataclass(kw_only=True)
class Place:
    """Where."""

    site: str = "here"
    """Where in a layer; and a sentence that goes on behind
    'a quoted word' of the next line."""
    owner: str = ""
    """Whose."""


@dataclasses.dataclass
class Args(Place):
    """Do a thing.

    It goes on.
    """

    run: Path
    """Folder."""


def boxes(command: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Title of a box -> its text."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as left:
        parse(command, ["--help"], "sae-factory thing")
    assert left.value.code == 0
    found: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        if title := re.fullmatch(r"(?:╭─)? ((?:\w+ )?options)[ ─╮]*", line):
            found[title[1]] = ""
        elif found:
            found[list(found)[-1]] += line.strip("│╰─╯ ") + " "
    return {title: " ".join(text.split()) for title, text in found.items()}


def test_the_options_of_a_base_have_a_box_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = boxes(Args, capsys, monkeypatch)
    assert list(found) == ["options", "place options"]
    assert "--run PATH Folder. (required)" in found["options"] and "--site" not in found["options"]
    said = "--site STR Where in a layer; and a sentence that goes on behind 'a quoted word' of the next line. (default:"
    assert said in found["place options"] and found["place options"].endswith("Whose.")
    given = ["--run", "a", "--site", "there"]
    assert parse(Args, given) == Args(Path("a"), site="there")  # and no name with the box before it
    with pytest.raises(SystemExit) as left:
        parse(Args, ["--run", "a", "--place.site", "there"])
    assert left.value.code == 2


def test_every_option_of_train_stands_in_one_box(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = boxes(DemoArgs, capsys, monkeypatch)
    kinds = ("model", "data", "dictionary", "training", "evaluation", "saving", "logging", "hub")
    assert list(found) == ["options", *(f"{kind} options" for kind in kinds)]
    for field in dataclasses.fields(DemoArgs):
        places = [title for title, text in found.items() if re.search(rf"--{field.name}(?= [A-Z{{]|, --no_)", text)]
        assert len(places) == 1, field.name
    assert "--hf_repo_id" in found["hub options"] and "--layers" in found["model options"]


def test_the_options_of_train_are_read_as_before() -> None:
    given = [
        "--layers",
        "1",
        "2",
        "--num_tokens",
        "9",
        "--no-report",
        "--resume",
        "--hf_repo_id",
        "a/b",
        "--save-dir",
        "x",
    ]
    args = parse(DemoArgs, given)
    assert args == DemoArgs(Path("x"), layers=(1, 2), num_tokens=9, report=False, resume=True, hf_repo_id="a/b")
