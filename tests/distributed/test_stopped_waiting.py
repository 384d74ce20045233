"""Ranks that are asked to end while the first one waits for text: all end at once, at the same place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stopped_rank
import torch
from rank_launching import run_ranks
from safetensors.torch import load_file

from dictionary_learning import demo
from dictionary_learning.distributed.reading import ReadByFirst
from dictionary_learning.errors import UserError
from dictionary_learning.stopping import StoppedWaiting

WORKER = Path(stopped_rank.__file__)
LIMIT = 900  # seconds, on a very busy machine
pytestmark = pytest.mark.timeout(LIMIT + 100)
ARGUMENTS = [
    *("--corpus", "hf://user/texts", "--device", "cpu", "--layers", "1", "--architectures", "top_k", "--seeds", "0"),
    *("--num_tokens", "5120", "--batch_size", "256", "--widths", "192", "--ctx_len", "32", "--buffer_contexts", "80"),
    *("--eval_tokens", "256", "--state_every", "0", "--log_steps", "1", "--no-report"),
]


class First:
    """The first of several ranks, and what it told the others."""

    first = True

    def __init__(self) -> None:
        self.told: list[Any] = []

    def of_first(self, own: Any) -> Any:
        self.told.append(own)
        return own


class Other:
    """Another one, which hears that."""

    first = False

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def of_first(self, own: Any) -> Any:
        return self.told.pop(0)


class Numbers:
    """0, 1, 2 ... 5; some of them are met with an error the first time."""

    def __init__(self, **errors: Exception) -> None:
        self.errors, self.given = {int(name[1:]): error for name, error in errors.items()}, 0

    def __next__(self) -> int:
        if (error := self.errors.pop(self.given, None)) is not None:
            raise error
        if self.given == 6:
            raise StopIteration
        self.given += 1
        return self.given - 1

    def state_dict(self) -> int:
        return self.given


def heard(reader: ReadByFirst) -> Iterator[Any]:
    for _ in range(6):
        try:
            yield [item for item, _ in reader.items(2)]
        except (StopIteration, StoppedWaiting, UserError) as error:
            yield type(error).__name__ if not isinstance(error, UserError) else str(error)


def test_all_ranks_hear_that_the_first_stopped_waiting_and_it_may_go_on() -> None:
    ranks: Any = First()
    source = Numbers(n2=StoppedWaiting(), n3=StoppedWaiting(), n5=UserError("the disk is gone."))
    first = list(heard(ReadByFirst(ranks, source)))
    # With 2 in hand the wait for 3 may end unheard: whoever is to end asks no more, and a later run waits anew.
    assert first == [[0, 1], "StoppedWaiting", [2], [3, 4], "the disk is gone.", [5]]
    other: Any = Other(list(ranks.told))
    assert list(heard(ReadByFirst(other, None))) == first


def test_a_signal_during_a_wait_ends_all_ranks_with_a_state_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    ended = run_ranks([str(WORKER), "7", *ARGUMENTS, "--save_dir", str(run)], 2, LIMIT)
    said = [rank.said for rank in ended]
    assert [rank.code for rank in ended] == [143, 143], "\n".join(said)
    asked = re.search(r"asked to end behind step (\d+)", said[0])
    assert asked is not None, said[0]
    record = json.loads((run / "run.json").read_text())
    # What was read before the wait may still make a step.
    assert record["status"] == "stopped: SIGTERM" and 0 <= record["steps_done"] - int(asked[1]) <= 1, said[0]

    monkeypatch.setattr(stopped_rank.sources, "open_hub_split", stopped_rank.rows)
    monkeypatch.setattr(stopped_rank.hub_corpus, "dataset_commits", lambda paths: {})
    assert demo.main([*ARGUMENTS, "--save_dir", str(run), "--resume"]) == 0
    assert demo.main([*ARGUMENTS, "--save_dir", str(tmp_path / "unbroken")]) == 0
    for number in range(4):
        file = Path(f"trainer_{number}") / "ae.safetensors"
        expected = load_file(tmp_path / "unbroken" / file)
        for name, values in load_file(run / file).items():
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)
