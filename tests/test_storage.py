"""Files that are whole or absent, states that come back bit for bit, damage that is noticed, folders that are safe."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dictionary_learning import storage
from dictionary_learning.errors import UserError


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal values of equal types, with NaN equal to itself; a tuple may have become a list."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and list(map(repr, a)) == list(map(repr, b)), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert isinstance(b, list) and len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    else:
        assert type(a) is type(b) and (a == b or a != a and b != b), where


def round_trip(folder: Path, tree: Any) -> Any:
    storage.save_state(folder, 1, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step, loaded = storage.load_newest_state(folder)
    assert step == 1
    return loaded


# ---------------------------------------------------------------------------------------------- files


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    storage.write_json(path, {"whole": True})
    with pytest.raises(RuntimeError, match="halfway"), storage.atomic_file(path) as handle:
        handle.write("half")
        handle.flush()
        assert json.loads(path.read_text()) == {"whole": True}, "the old file must stand until the new one is complete"
        raise RuntimeError("halfway")
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(path, {"bad": math.nan})
    with pytest.raises(TypeError):
        storage.write_json(path, {"bad": object()})
    assert json.loads(path.read_text()) == {"whole": True}
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_failing_writer_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), storage.atomic_path(tmp_path / "new" / "file") as name:
        name.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ae.safetensors"
    storage.write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ae.safetensors"]


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", [1])
    storage.write_tensors(tmp_path / "b.safetensors", {"a": torch.ones(2)})
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "b.safetensors")} == {0o644}


def test_tensors_are_written_in_their_logical_layout(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    w = torch.arange(6.0).reshape(2, 3)
    storage.write_tensors(tmp_path / "w.safetensors", {"w": w, "w.T": w.t().clone(memory_format=torch.preserve_format)})
    loaded = load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["w"], w) and torch.equal(loaded["w.T"], w.t())


@pytest.mark.parametrize("content", ["", "{", "NaNN", "[" * 100_000, "\x00", b"\xff\xfe"])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="config.json' is not a readable JSON file"):
        storage.read_json(path)


def test_an_absent_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.json' does not exist"):
        storage.read_json(tmp_path / "absent.json")
    with pytest.raises(UserError, match="not a readable JSON file"):
        storage.read_json(tmp_path)


def test_finite_replaces_what_json_lacks_at_any_depth() -> None:
    value = {"a": math.nan, "b": [1, math.inf, (2.5, -math.inf)], 3: {"c": True}, "d": "nan"}
    assert storage.finite(value) == {"a": None, "b": [1, None, [2.5, None]], 3: {"c": True}, "d": "nan"}


# ---------------------------------------------------------------------------------------------- states


def test_a_state_of_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(torch.randn(4, 2))
    tree = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "numpy": np.random.default_rng(0).bit_generator.state,  # integers of 128 bits
        "torch": torch.get_rng_state(),
        "aliases": [base, base.t(), base[1], base.view(-1)],
        "transposed": torch.randn(5, 3).t(),
        "parameter": parameter,
        "half": torch.randn(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(5),
        "not finite": torch.tensor([math.nan, math.inf]),
        "plain": [True, False, None, 0, 1.5, -0.0, "text", "\u2028é", "", [], {}, 2**200],
        "floats": [math.nan, math.inf, -math.inf, 1e-320, 0.1],
        "mixed keys": {1: "int", "1": "str", None: "none", 2.5: "float"},
    }
    assert_same({**tree, "parameter": parameter.data}, round_trip(tmp_path, tree))


def test_keys_never_collide_nor_pass_for_markers(tmp_path: Path) -> None:
    a, b, c = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    tree = {
        "a/b": a,
        "a": {"b": b, "c": {"__tensor__": c, "x": 1}},
        "numbers": {1: a, "1": b},
        "markers": [{"__tensor__": "0"}, {"__items__": [[1, 2]]}, {"__float__": "nan"}],
    }
    assert_same(tree, round_trip(tmp_path, tree))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.recursive(
    scalars | st.lists(st.integers(-5, 5), max_size=3).map(lambda x: torch.tensor(x, dtype=torch.int64)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@given(tree=trees)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_same(tree, round_trip(Path(folder), tree))


@pytest.mark.parametrize("bad", [object(), {1, 2}, np.float32(1), b"bytes", {(1, 2): 3}])
def test_what_a_state_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(TypeError, match=r"a state.*\(at /x/0\)"):
        storage.save_state(tmp_path, 5, {"x": [bad]})
    assert list(tmp_path.iterdir()) == []


def test_a_saved_state_does_not_follow_the_live_tensors(tmp_path: Path) -> None:
    live = torch.zeros(2)
    storage.save_state(tmp_path, 1, {"live": live})
    live += 1
    assert storage.load_newest_state(tmp_path)[1]["live"].tolist() == [0, 0]


def test_only_the_two_newest_states_are_kept(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1000):
        path = storage.save_state(tmp_path, step, {"step": step})
        assert path.name == f"step_{step:09d}"
    assert [p.name for p in storage.saved_states(tmp_path)] == ["step_000001000", "step_000000100"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000100", "step_000001000"]
    assert storage.load_newest_state(tmp_path) == (1000, {"step": 1000})


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for value in ("first", "second"):
        storage.save_state(tmp_path, 7, value)
    assert storage.load_newest_state(tmp_path) == (7, "second")
    assert len(list(tmp_path.iterdir())) == 1


def test_states_of_later_steps_do_not_outlive_the_run_that_began_anew(tmp_path: Path) -> None:
    for step in (100, 200):
        storage.save_state(tmp_path, step, "old run")
    storage.save_state(tmp_path, 50, "new run")
    assert storage.load_newest_state(tmp_path) == (50, "new run")


def test_what_a_killed_run_left_half_written_is_cleared_and_other_folders_are_let_be(tmp_path: Path) -> None:
    (tmp_path / ".step_000000009.x7").mkdir()
    (tmp_path / ".step_000000009.x7" / "state.json").write_text("{")
    for name in ("notes", "step_by_step"):
        (tmp_path / name).mkdir()
    for step in (10, 20, 30):
        storage.save_state(tmp_path, step, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_000000020", "step_000000030", "step_by_step"]
    assert storage.load_newest_state(tmp_path) == (30, 30)


def test_a_state_that_fails_to_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.save_state(tmp_path, 1, "whole")

    def full(path: Path, tensors: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        storage.save_state(tmp_path, 2, "half")
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000001"]
    assert storage.load_newest_state(tmp_path) == (1, "whole")


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        path = state / "manifest.json"
        manifest = json.loads(path.read_text())
        replaced = change(manifest)
        path.write_text(json.dumps(manifest if replaced is None else replaced))

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        data = bytearray((state / name).read_bytes())
        data[len(data) // 2] ^= 1
        (state / name).write_bytes(data)

    return damage


def outside(state: Path) -> None:
    """A manifest that points at a file elsewhere, with its right checksum."""
    secret = state.parent.parent / "secret"
    secret.write_text("{}")
    edit_manifest(lambda m: m["sha256"].update({"../../secret": storage._sha256(secret)}))(state)
    (state / "state.json").unlink()
    edit_manifest(lambda m: m["sha256"].pop("state.json") and None)(state)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated tensors": lambda s: os.truncate(s / "state.safetensors", 20),
    "truncated values": lambda s: os.truncate(s / "state.json", 3),
    "flipped tensor byte": flip("state.safetensors"),
    "flipped value byte": flip("state.json"),
    "no tensors": lambda s: (s / "state.safetensors").unlink(),
    "no values": lambda s: (s / "state.json").unlink(),
    "no manifest": lambda s: (s / "manifest.json").unlink(),
    "empty folder": lambda s: [file.unlink() for file in s.iterdir()],
    "junk manifest": lambda s: (s / "manifest.json").write_bytes(b"\x80junk"),
    "manifest of another kind": edit_manifest(lambda m: [1, 2]),
    "deep manifest": lambda s: (s / "manifest.json").write_text("[" * 100_000),
    "no checksums": edit_manifest(lambda m: m.update(sha256={})),
    "checksums null": edit_manifest(lambda m: m.update(sha256=None)),
    "no step": edit_manifest(lambda m: m.pop("step") and None),
    "version of the future": edit_manifest(lambda m: m.update(version=99)),
    "path traversal": outside,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_state_is_passed_over_with_a_warning(tmp_path: Path, how: str) -> None:
    states = tmp_path / "state"
    good = {"x": torch.arange(50), "name": "good"}
    storage.save_state(states, 10, good)
    DAMAGE[how](storage.save_state(states, 20, {"x": torch.zeros(50), "name": "bad"}))
    with pytest.warns(UserWarning, match="step_000000020 is damaged") as caught:
        step, tree = storage.load_newest_state(states)
    assert step == 10 and len(caught) == 1
    assert_same(good, tree)


def test_without_a_valid_state_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable saved state"):
        storage.load_newest_state(tmp_path / "absent")
    for step in (1, 2):
        (storage.save_state(tmp_path, step, step) / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="no usable saved state"):
        storage.load_newest_state(tmp_path)


# ---------------------------------------------------------------------------------------------- the folder of a run


def make_run(folder: Path) -> Path:
    (folder / "trainer_0" / "checkpoints").mkdir(parents=True)
    (folder / "state" / "step_000000001").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl", "summary.csv", "report.html", "trainer_0/ae.safetensors", "notes.txt"):
        (folder / name).write_text("old")
    return folder


def snapshot(folder: Path) -> list[str]:
    """All paths at or below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["new", "deep/er/new", "."])
def test_a_new_or_empty_folder_will_do_and_checking_makes_nothing(tmp_path: Path, name: str) -> None:
    storage.check_run_folder(tmp_path / name, resume=False, overwrite=False)
    assert snapshot(tmp_path) == []
    storage.prepare_run_folder(tmp_path / name, resume=False, overwrite=False, bytes_needed=1)
    assert (tmp_path / name).is_dir()


def refused(folder: Path, sentence: str, *, resume: bool = False, overwrite: bool = False) -> None:
    before = snapshot(folder.parent)
    for function in (storage.check_run_folder, storage.prepare_run_folder):
        with pytest.raises(UserError, match=sentence) as caught:
            function(folder, resume=resume, overwrite=overwrite)
        assert str(caught.value).count("\n") == 0 and str(folder) in str(caught.value)
    assert snapshot(folder.parent) == before


def test_each_folder_that_will_not_do_has_its_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refused(run, "holds another run: .*--resume .*--overwrite")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    refused(foreign, "holds other files")
    refused(foreign, "holds other files", overwrite=True)
    refused(tmp_path / "absent", "no run to resume", resume=True)
    refused(foreign, "no run to resume", resume=True)
    refused(foreign / "thesis.tex", "is a file: give a folder")
    refused(foreign / "thesis.tex" / "below", "can't be written")
    refused(tmp_path / ("x" * 300), "can't be written .*[Nn]ame too long")


def test_a_folder_that_cannot_be_written_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    refused(tmp_path / "new", r"can't be written \(Permission denied\)")
    run = make_run(tmp_path / "run")
    refused(run, r"can't be written \(Permission denied\)", resume=True)


def test_a_folder_that_cannot_be_looked_into_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(UserError, match=r"can't be written \(Permission denied\)"):
        storage.check_run_folder(tmp_path, resume=False, overwrite=False)


def test_a_full_disk_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    before = snapshot(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(UserError, match=r"has 1\.0 GB left, but the run needs 2\.5 GB"):
        storage.prepare_run_folder(run, resume=False, overwrite=True, bytes_needed=25 * 10**8)
    assert snapshot(run) == before, "nothing may be dropped before the run can begin"
    storage.prepare_run_folder(run, resume=True, overwrite=False, bytes_needed=10**9)


def test_overwrite_drops_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    storage.prepare_run_folder(run, resume=False, overwrite=True)
    assert snapshot(run) == ["notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_resume_keeps_everything(tmp_path: Path, overwrite: bool) -> None:
    run = make_run(tmp_path / "run")
    before = snapshot(run)
    storage.prepare_run_folder(run, resume=True, overwrite=overwrite)
    assert snapshot(run) == before
