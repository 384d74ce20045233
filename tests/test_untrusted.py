"""Files that unfold are refused before they do; whole ones come out as their libraries would have read them."""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dictionary_learning import untrusted
from dictionary_learning.errors import UserError, exit_code

TREE: dict[str, Any] = {
    "transposed": torch.arange(15.0).reshape(5, 3).t(),
    "part": torch.arange(10.0)[3:7],
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "plain": [1, 2.5, "x", None, True, (1, 2), 2**40],
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.bool, torch.int64)},
}


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def test_pickled_tensors_come_out_as_torch_reads_them(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pt", TREE)
    ours, theirs = untrusted.read_pickled(file), torch.load(file, weights_only=True)
    assert list(ours) == list(theirs) and ours["plain"] == theirs["plain"]
    for name, tensor in ours.items():
        if name != "plain":
            assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
            assert tensor.stride() == theirs[name].stride() and not tensor.requires_grad


def test_a_state_dict_keeps_its_order_and_shares_what_was_shared(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 4)
    state = linear.state_dict() | {"again": linear.weight.detach()}
    ours = untrusted.read_pickled(saved(tmp_path / "x.pt", state))
    assert list(ours) == ["weight", "bias", "again"] and torch.equal(ours["weight"], linear.weight)
    assert ours["weight"].data_ptr() == ours["again"].data_ptr()


def test_what_is_changed_in_memory_never_reaches_the_file(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pt", {"a": torch.zeros(4)})
    before = file.read_bytes()
    untrusted.read_pickled(file)["a"].fill_(1)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "options", "match"),
    [
        (torch.ones(1).expand(10**6, 10**6), {}, "in a record of 1 values"),
        (torch.empty(2, 2, device="meta"), {}, "_rebuild_meta_tensor"),
        (torch.eye(3).to_sparse(), {}, "_rebuild_sparse_tensor"),
        (print, {}, "print"),
        (torch.ones(1), {"_use_new_zipfile_serialization": False}, "since 1.6"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(value: Any, options: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, pickle.UnpicklingError), match=match):
        untrusted.read_pickled(saved(tmp_path / "x.pt", {"a": value}, **options))


def repacked(file: Path, old: bytes, new: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old, new) if name.endswith(".pkl") else content)
    return file


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"K\x04tq", b"K\x05tq", "its record 0 is shorter than it says"),
        (b"K\x04\x85", b"K\x05\x85", "in a record of 4 values"),
        (b"K\x00K\x04\x85", b"K\x01K\x04\x85", "in a record of 4 values"),
        (b"}q\x00", b"}r\xff\xff\xff\x7f", "numbers more values than it has"),
        (b"}q\x00", b"}q\x00\x96\x00\x00\x00\x00\x01\x00\x00\x00", "BYTEARRAY8|expected .* bytes"),
        (b"FloatStorage", b"Size", "torch.Size"),
    ],
)
def test_a_pickle_that_asks_for_more_than_the_file_has(old: bytes, new: bytes, match: str, tmp_path: Path) -> None:
    file = repacked(saved(tmp_path / "x.pt", {"a": torch.ones(4)}), old, new)
    with pytest.raises((ValueError, pickle.UnpicklingError), match=match):
        untrusted.read_pickled(file)


def test_records_anywhere_in_the_file_are_read(tmp_path: Path) -> None:
    """Another writer may not align them."""
    file = repacked(saved(tmp_path / "x.pt", {"a": torch.arange(4.0)}), b"", b"")
    assert torch.equal(untrusted.read_pickled(file)["a"], torch.arange(4.0))


def test_a_compressed_archive_of_tensors_is_not_inflated(tmp_path: Path) -> None:
    file = repacked(saved(tmp_path / "x.pt", {"a": torch.ones(4)}), b"", b"", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        untrusted.read_pickled(file)


def test_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((1000, 10)))
    assert untrusted.read_npz(tmp_path / "x.npz")["a"].shape == (1000, 10)
    monkeypatch.setattr(untrusted, "ROOM", 1000)
    with pytest.raises(ValueError, match="would unpack to"):
        untrusted.read_npz(tmp_path / "x.npz")


def test_yaml_without_aliases_is_what_pyyaml_reads() -> None:
    assert untrusted.plain_yaml("a: 1\nb: [x, {c: 1.5}]\nd: null") == {"a": 1, "b": ["x", {"c": 1.5}], "d": None}
    with pytest.raises(ValueError, match=r"alias \*a: write the value out"):
        untrusted.plain_yaml("a: &a [1]\nb: *a")
    with pytest.raises(ValueError, match="longer than 256 KiB, .*: write it as JSON"):
        untrusted.plain_yaml("- {}\n" * 100_000)


@pytest.mark.parametrize("read", [untrusted.plain_json, untrusted.plain_yaml])
def test_plain_data_of_a_depth_and_size_that_can_be_handled(read: Any) -> None:
    assert read("[" * 60 + "]" * 60) is not None and read(f"[{'9' * 300}]") is not None
    for text, match in (("[" * 90 + "]" * 90, "nested more than 64 deep"), (f"[{'9' * 400}]", "beyond 2")):
        with pytest.raises(ValueError, match=match):
            read(text)
    with pytest.raises(ValueError, match="nested more than"):
        untrusted.plain_json("[" * 100_000)
    with pytest.raises(ValueError, match="beyond 2"):
        untrusted.plain_yaml(f"? 0x{'f' * 6000}\n: 1")


def test_a_key_that_is_there_twice() -> None:
    """Of two lists of dictionaries in a configuration, the first would be gone without a word."""
    for read, text in (
        (untrusted.plain_json, '{"a": [{"b": 1, "c": 2, "b": 3}]}'),
        (untrusted.plain_yaml, "a:\n- b: 1\n  c: 2\n  b: 3\n"),
    ):
        with pytest.raises(ValueError, match="it has 'b' twice in one place"):
            read(text)
    assert untrusted.plain_yaml("1: a\n'1': b\nc: {1: a}") == {1: "a", "1": "b", "c": {1: "a"}}


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MOST_LINE", 8)
    (tmp_path / "x").write_text("1234567\n\nabc")
    with (tmp_path / "x").open() as handle, pytest.raises(ValueError, match="a line is longer"):
        list(untrusted.bounded_lines(handle))
    (tmp_path / "x").write_text("123456\n\nabc")
    with (tmp_path / "x").open() as handle:
        assert list(untrusted.bounded_lines(handle)) == ["123456\n", "\n", "abc"]


@pytest.mark.parametrize("inner", ["{},", '{"a":0},', "[],", "[[0]],", "0,", '"ab",'])
def test_a_line_of_more_values_than_its_file_warrants(inner: str, tmp_path: Path) -> None:
    """A packed file of a few kilobytes holds it, and its lists and dicts would take hundreds of megabytes."""
    wide = f'{{"text": "a", "x": [{inner * 2_000_000}0]}}\n'[: untrusted.MOST_LINE - 1]
    (tmp_path / "x.gz").write_bytes(gzip.compress(wide.encode(), 1))
    for mode in ("rt", "rb"):
        with gzip.open(tmp_path / "x.gz", mode) as handle, pytest.raises(ValueError, match="more values than"):
            list(untrusted.bounded_lines(handle, tmp_path / "x.gz"))
    prose = json.dumps({"text": "Prose, with a comma now and then. " * 400_000}) + "\n"
    (tmp_path / "y.gz").write_bytes(gzip.compress(prose.encode(), 1))
    with gzip.open(tmp_path / "y.gz", "rt") as handle:
        assert list(untrusted.bounded_lines(handle, tmp_path / "y.gz")) == [prose]


def test_names_and_texts_from_files_are_made_harmless() -> None:
    assert untrusted.listed(["a", "b\n\x1b[2J", "é"]) == r"a, b\n\x1b[2J, é"
    assert untrusted.listed([]) == "none" and untrusted.listed(list("abc"), 2) == "a, b, and 1 more"
    assert len(untrusted.listed(["x" * 10**6])) == 63
    assert untrusted.spellable("é\U0001f600") == "é\U0001f600"
    assert untrusted.spellable("\ud83d\ude00 \ud800") == "\U0001f600 \ufffd"


def test_a_sentence_that_quotes_a_file_can_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise UserError("'\x1b[31mred\u202e\x07' is no name" + "x" * 10_000)

    assert exit_code(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: '\\x1b[31mred\\u202e\\x07' is no name") and len(err) < 2100
