"""What once failed fails no more, and a little new of each kind: the full fuzzing is `run_fuzz.py`.

`found/` holds every file that a reader once tripped over, as `<target>-<digest>`.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import fuzz_mutations
import pytest
from fuzz_oracle import Box, Finding, Target
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dictionary_learning.errors import UserError
from dictionary_learning.weights_and_biases import read_marker

FOUND = sorted((Path(__file__).parent / "found").iterdir())
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)  # a seed has no simpler one
FINE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
SHORT = settings(max_examples=8, phases=WITHOUT_SHRINKING, suppress_health_check=FINE)
every_target = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture
def box(name: str, tmp_path: Path) -> Iterator[Box]:
    yield Box(TARGETS[name], tmp_path)


@every_target
def test_a_valid_file_is_read(box: Box, name: str) -> None:
    assert box.run((box.inner / box.target.file).read_bytes()) is None


@every_target
def test_what_once_failed_is_read_or_refused(box: Box, name: str) -> None:
    for file in FOUND:
        if file.name.rpartition("-")[0] == name:
            box.run(file.read_bytes())


@every_target
def test_changed_files_are_read_or_refused(box: Box, name: str) -> None:
    seeds = [(box.inner / box.target.file).read_bytes()]

    @SHORT
    @given(st.integers(0, 2**32))
    def changed(seed: int) -> None:
        box.run(fuzz_mutations.mutate(seeds[0], box.target.kind, random.Random(seed), seeds))

    changed()


@pytest.mark.parametrize("name", ["../other", "/etc", "..", "a/b", "a\\b", "C:x", "x" * 300, "", "\x1b[2J"])
def test_a_marker_of_wandb_names_no_folder_elsewhere(name: str, tmp_path: Path) -> None:
    """The files in a folder of that name would be sent."""
    marker = {"group": "g", "runs": {name: {"id": "a", "step": 1, "sent": {}}}}
    (tmp_path / "wandb.json").write_text(json.dumps(marker))
    with pytest.raises(UserError, match="is damaged: delete it"):
        read_marker(tmp_path)


def test_every_found_file_is_of_a_target() -> None:
    assert {file.name.rpartition("-")[0] for file in FOUND} <= set(TARGETS)
    assert all(file.stat().st_size < 1 << 20 for file in FOUND)


@pytest.mark.parametrize(
    ("read", "match"),
    [
        (lambda folder: [][1], "IndexError"),
        (lambda folder: bytearray(200 << 20), "memory: (19|2.). MB"),
        (lambda folder: [None for _ in itertools.count()], "hang: over"),
        (lambda folder: Path("escaped").touch(), "files made or removed"),
        (lambda folder: (folder / "file").unlink(), "files made or removed"),
    ],
)
def test_the_oracle_sees_what_it_is_for(
    read: object, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz_oracle.SECONDS", 0.05 if "hang" in match else 5.0)
    target = Target("t", "file", "text", lambda folder: (folder / "file").touch(), read)  # type: ignore[arg-type]
    with pytest.raises(Finding, match=match):
        Box(target, tmp_path).run(b"")
