"""Every command and every flag that the documentation names is one that the real parsers take."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import pytest
import torch.distributed.run
import tyro
from pages import PAGES, commands, prose, text_of

from benchmarks.__main__ import Command
from dictionary_learning.cli import COMMANDS, main

PROGRAMS = ("sae-factory", "python", "torchrun")
OURS = {"dictionary_learning/demo.py": ["train"], "data_prep": ["prep"], "dictionary_learning": []}
OTHERS = {"--kills", "--minutes", "--target", "--hookpoints"}  # of tests/faults, tests/fuzz, and of sparsify


class Parsed(BaseException):
    """Takes the arguments of a command out of it, before it does anything."""


def inline_commands(page: str) -> list[list[str]]:
    """`sae-factory ...` within a sentence, where it is whole."""
    found = [shlex.split(code.replace("\n", " ")) for code in re.findall(r"`(sae-factory [^`]* [^`]*)`", prose(page))]
    return [words for words in found if not words[2].startswith("-") and "…" not in words]


def our_commands() -> list[tuple[str, list[str]]]:
    """(page, the command line) of everything that runs this project."""
    found = []
    for page in PAGES:
        for words in commands(page) + inline_commands(page):
            start = next((i for i, word in enumerate(words) if word in PROGRAMS), None)
            if start is not None and words[start:] != ["python", "-"]:
                found.append((page, words[start:]))
    return found


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], Any]:
    """What the parser of `sae-factory ...` makes of its arguments; it exits where they are not its own."""
    real = tyro.cli

    def only_parse(*given: Any, **options: Any) -> Any:
        raise Parsed(real(*given, **options))

    def parsed(arguments: Sequence[str]) -> Any:
        with monkeypatch.context() as patch, pytest.raises(Parsed) as found:
            patch.setattr(tyro, "cli", only_parse)
            main(arguments)
        return found.value.args[0]

    return parsed


@pytest.mark.parametrize(("page", "line"), [(page, shlex.join(words)) for page, words in our_commands()])
def test_the_command_is_understood(page: str, line: str, parse: Callable[[Sequence[str]], Any]) -> None:
    assert read(line, parse) is not None


def read(line: str, parse: Callable[[Sequence[str]], Any]) -> Any:
    """What the parsers that are in charge of a command line make of it; variables of the shell stand for a 2."""
    program, *arguments = [re.sub(r"\$\w+", "2", word) for word in shlex.split(line) if word.lower() != "$resume"]
    if program == "torchrun":
        rest = torch.distributed.run.get_args_parser().parse_args(arguments)
        assert rest.module and rest.training_script == "dictionary_learning"
        return parse(rest.training_script_args)
    if program == "sae-factory":
        return parse(arguments)
    what, *arguments = arguments[1:] if arguments[0] == "-m" else arguments
    if what == "benchmarks":
        return tyro.cli(Command, args=arguments, use_underscores=False)
    if what == "dictionary_learning.distributed":  # torchrun's options, then the command
        rest = torch.distributed.run.get_args_parser().parse_args(arguments)
        return parse([rest.training_script, *rest.training_script_args])
    return parse(OURS[what] + arguments)


def test_a_made_up_flag_is_refused(parse: Callable[[Sequence[str]], Any]) -> None:
    with pytest.raises(SystemExit):
        parse(["train", "--save_dir", "runs/first", "--frobnicate"])


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """{command: its flags}, from the dataclass that its parser is made of."""
    found = {}

    def take(settings: Any, **options: Any) -> Any:
        raise Parsed(settings)

    for command in COMMANDS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as parsed:
            patch.setattr(tyro, "cli", take)
            main([command])
        found[command] = flags_of(parsed.value.args[0])
    return found


def flags_of(settings: Any) -> set[str]:
    """Those of a dataclass, and of the dataclasses in it."""
    found = set()
    marked = get_type_hints(settings, include_extras=True)
    for name, kind in get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            found |= flags_of(kind)
        elif "Positional" not in str(marked[name]):
            found |= {f"--{name}", f"--no_{name}"} if kind is bool else {f"--{name}"}
    return found


def test_every_flag_in_the_text_is_one_of_a_command(flags: dict[str, set[str]]) -> None:
    torchrun = {o for action in torch.distributed.run.get_args_parser()._actions for o in action.option_strings}
    known = set().union(*flags.values(), torchrun, OTHERS)
    unknown = []
    for page in PAGES:
        for code in re.findall(r"`([^`]*)`", prose(page)):
            named = re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", code)
            if page == "docs/performance.md" and not known.issuperset(named):
                tyro.cli(Command, args=["run", *code.replace(" N", " 2").split()], use_underscores=False)
                continue
            unknown += [f"{page}: {flag}" for flag in named if flag not in known and spelled(flag) not in known]
    assert unknown == []


def spelled(flag: str) -> str:
    """Both spellings are taken; the parsers have underscores."""
    return "--" + flag[2:].replace("-", "_")


def test_the_page_on_harvests_names_every_flag(flags: dict[str, set[str]]) -> None:
    text = text_of("docs/activations.md")
    assert [flag for flag in flags["harvest"] if flag not in text and not flag.startswith("--no_")] == []
