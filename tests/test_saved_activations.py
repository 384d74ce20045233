"""Activation sources without a language model: tensors from any iterable, and saved rows in files and folders."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dictionary_learning.activations.saved import SavedActivations, TensorStream
from dictionary_learning.activations.types import ActivationSource
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError


def rows(start: int, stop: int, width: int = 3, dtype=torch.float32) -> torch.Tensor:
    """Row n is [n, n, ...]."""
    return torch.arange(start, stop, dtype=dtype)[:, None].repeat(1, width)


def numbers(batches, name: str = "activations") -> list[int]:
    return [int(n) for batch in batches for n in batch.acts[name][:, 0].tolist()]


@pytest.fixture
def folder(tmp_path):
    """Shards of 10, 0, 7 and 13 rows; their order is that of the names, not of the writing."""
    for name, (start, stop) in {"d": (17, 30), "a": (0, 10), "c": (10, 17), "b": (10, 10)}.items():
        x = rows(start, stop)
        save_file({"activations": x, "second": torch.cat([-x, -x], dim=1)}, tmp_path / f"shard-{name}.safetensors")
    return tmp_path


# ---------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("kind", [list, iter])
def test_tensors_come_out_as_they_went_in_and_larger_batches_in_parts(kind):
    batches = [rows(0, 4), rows(4, 5), rows(5, 5), rows(5, 16)]
    source = TensorStream(kind(batches))
    assert isinstance(source, ActivationSource)
    assert (source.widths, source.dtype, source.max_rows) == ({"activations": 3}, torch.float32, 4)
    found = [batch.acts["activations"] for batch in source]
    assert [len(x) for x in found] == [4, 1, 4, 4, 3]
    assert torch.equal(torch.cat(found), rows(0, 16))


def test_dicts_are_several_hook_points_and_names_can_be_given():
    source = TensorStream([{"a": rows(0, 4), "b": rows(0, 4, width=5)}])
    assert source.widths == {"a": 3, "b": 5}
    assert TensorStream([rows(0, 2)], name="resid_post_layer_0").widths == {"resid_post_layer_0": 3}
    assert TensorStream([rows(0, 2)], widths={"activations": 3}).widths == {"activations": 3}


def test_only_one_batch_is_read_ahead():
    given = []
    source = TensorStream(given.append(i) or rows(i, i + 1) for i in range(100))
    assert given == [0]
    next(source)
    next(source)
    assert given == [0, 1]


def test_tensors_that_do_not_fit_are_named():
    for batches, said in (
        ([], "no rows"),
        ([rows(0, 0)], "no rows"),
        ([torch.zeros(3)], r"shape \(3,\), expected \[rows, width\]"),
        ([torch.zeros(2, 3, 4)], r"shape \(2, 3, 4\)"),
        ([torch.zeros(2, 3, dtype=torch.long)], "floating-point"),
        ([{"a": rows(0, 2), "b": rows(0, 3)}], "2, 3 rows"),
        ([{}], "got nothing"),
        (["text"], "is str, expected a tensor"),
        ([rows(0, 2), rows(0, 2, width=4)], "Batch 1.*'activations': 4.*expected.*'activations': 3"),
        ([rows(0, 2), rows(0, 2, dtype=torch.float64)], "float64, expected.*float32"),
        ([{"a": rows(0, 2)}, {"b": rows(0, 2)}], "Batch 1"),
    ):
        with pytest.raises(UserError, match=said):
            list(TensorStream(batches))
    with pytest.raises(UserError, match="Batch 0.*expected.*'activations': 5"):
        TensorStream([rows(0, 2)], widths={"activations": 5})


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(any), data=st.data())
def test_a_tensor_stream_resumed_anywhere_goes_on(sizes, data):
    batches, start = [], 0
    for size in sizes:
        batches.append(rows(start, start := start + size))
    whole = [numbers([batch]) for batch in TensorStream(batches)]
    stop = data.draw(st.integers(0, len(whole)), label="stop")
    broken = TensorStream(iter(batches))
    begun = [numbers([batch]) for batch in islice(broken, stop)]
    state = json.loads(json.dumps(broken.state_dict()))
    used = TensorStream(batches)  # a list can be read again, so that this one can go back
    list(used)
    for resumed in (TensorStream(iter(batches)), TensorStream(batches), used):
        resumed.load_state_dict(state)
        assert begun + [numbers([batch]) for batch in resumed] == whole


def test_an_iterator_that_cannot_go_back_says_so():
    source = TensorStream(rows(i, i + 1) for i in range(5))
    state = source.state_dict()
    next(source)
    with pytest.raises(UserError, match="pass a fresh iterator"):
        source.load_state_dict(state)
    with pytest.raises(UserError, match="ends before the 9 batches"):
        source.load_state_dict({"batches": 9})


# ---------------------------------------------------------------------------------------------- files


def test_a_folder_of_shards_is_read_in_order_of_name(folder):
    source = SavedActivations(folder, batch_rows=6)
    assert isinstance(source, ActivationSource)
    assert (source.widths, source.dtype) == ({"activations": 3, "second": 6}, torch.float32)
    assert (source.max_rows, source.rows) == (6, 30)
    batches = list(source)
    assert [len(batch.acts["second"]) for batch in batches] == [6, 4, 6, 1, 6, 6, 1]
    assert numbers(batches) == list(range(30)) and numbers(batches, "second") == [-n for n in range(30)]


def test_one_file_of_either_kind(tmp_path):
    save_file({"resid": rows(0, 9, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    torch.save(rows(0, 9).requires_grad_(), tmp_path / "x.pt")  # with its graph, as is easily done
    torch.save({"a": rows(0, 9), "b": -rows(0, 9, width=2)}, tmp_path / "two.pt")
    source = SavedActivations(tmp_path / "x.safetensors", batch_rows=4)
    assert source.dtype == torch.bfloat16 and numbers(source, "resid") == list(range(9))
    assert numbers(SavedActivations(tmp_path / "x.pt", batch_rows=4)) == list(range(9))
    assert not next(SavedActivations(tmp_path / "x.pt")).acts["activations"].requires_grad
    source = SavedActivations(str(tmp_path / "two.pt"), batch_rows=100)
    assert source.widths == {"a": 3, "b": 2} and numbers(source, "b") == [-n for n in range(9)]


def test_a_seed_permutes_blocks_and_rows_and_keeps_hook_points_aligned(folder):
    def read(seed, epochs=1):
        batches = list(SavedActivations(folder, batch_rows=4, seed=seed, epochs=epochs))
        assert all(torch.equal(b.acts["second"][:, :3], -b.acts["activations"]) for b in batches)
        return [numbers([batch]) for batch in batches]

    first = read(0)
    assert sorted(n for block in first for n in block) == list(range(30))
    assert first == read(0) != read(1)
    assert [block[0] for block in first] != sorted(block[0] for block in first)
    assert any(block != sorted(block) for block in first)
    both = read(0, epochs=2)
    second = both[len(first) :]
    assert both[: len(first)] == first and sorted(n for block in second for n in block) == list(range(30))
    assert [min(block) for block in first] != [min(block) for block in second]
    assert sorted(first) != sorted(second)


def test_endless_epochs_go_round(folder):
    assert numbers(islice(SavedActivations(folder, batch_rows=30, epochs=None), 7)) == [
        *range(30),
        *range(30),
        *range(10),
    ]


@given(batch_rows=st.integers(1, 12), seed=st.none() | st.integers(0, 3), data=st.data())
def test_saved_activations_resumed_anywhere_go_on(tmp_path_factory, batch_rows, seed, data):
    file = tmp_path_factory.mktemp("saved") / "x.safetensors"
    save_file({"activations": rows(0, 25)}, file)

    def source():
        return SavedActivations(file, batch_rows=batch_rows, seed=seed, epochs=2)

    whole = numbers(source())
    broken = source()
    begun = numbers(islice(broken, data.draw(st.integers(0, 50), label="stop")))
    resumed = source()
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    assert begun + numbers(resumed) == whole


def test_a_position_in_other_files_is_refused(folder):
    state = SavedActivations(folder, batch_rows=4).state_dict()
    with pytest.raises(UserError, match="30 rows read 4 at a time"):
        SavedActivations(folder, batch_rows=5).load_state_dict(state)
    (folder / "shard-d.safetensors").unlink()
    with pytest.raises(UserError, match="now there are 17 rows"):
        SavedActivations(folder, batch_rows=4).load_state_dict(state)


def test_files_that_cannot_be_used_are_named(tmp_path):
    def message(name, **settings):
        with pytest.raises(UserError) as caught:
            list(SavedActivations(tmp_path / name, **settings))
        return str(caught.value)

    save_file({"a": rows(0, 5)}, tmp_path / "acts.safetensors")
    assert "do not exist. Did you mean 'acts.safetensors'?" in message("act.safetensors")
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors shard" in message("empty")
    (tmp_path / "acts.csv").write_bytes(b"")
    assert "none of .safetensors, .pt, .npy, .npz, nor a folder" in message("acts.csv")
    assert "at least 1, got 0" in message("acts.safetensors", batch_rows=0)

    save_file({"a": torch.zeros(2, 3, 4)}, tmp_path / "3d.safetensors")
    assert "3d.safetensors': 'a' has shape (2, 3, 4), expected [rows, width]" in message("3d.safetensors")
    save_file({"a": torch.zeros(2, 3, dtype=torch.int32)}, tmp_path / "int.safetensors")
    assert "floating-point" in message("int.safetensors")
    save_file({"a": rows(0, 2), "b": rows(0, 3)}, tmp_path / "uneven.safetensors")
    assert "2, 3 rows" in message("uneven.safetensors")
    save_file({"a": rows(0, 0)}, tmp_path / "none.safetensors")
    assert "hold no rows" in message("none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "acts.safetensors").read_bytes()[:-8])
    assert "cut.safetensors' are not readable" in message("cut.safetensors")
    (tmp_path / "cut.pt").write_bytes(b"not a tensor")
    assert "cut.pt" in message("cut.pt")
    torch.save(["a", 1], tmp_path / "list.pt")
    assert "is list, expected a tensor" in message("list.pt")
    torch.save({"a": Path("x")}, tmp_path / "object.pt")  # would need an unrestricted unpickler
    assert "something else than tensors" in message("object.pt")

    (tmp_path / "mixed").mkdir()
    save_file({"a": rows(0, 5)}, tmp_path / "mixed" / "1.safetensors")
    save_file({"a": rows(0, 5, width=4)}, tmp_path / "mixed" / "2.safetensors")
    assert "2.safetensors' has widths {'a': 4}" in message("mixed")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_row_that_is_not_finite_is_named_with_its_shard(folder, bad, seed):
    x = rows(17, 30)
    x[9, 2] = x[10, 0] = bad
    save_file({"activations": x, "second": torch.cat([x, x], dim=1)}, folder / "shard-d.safetensors")
    with pytest.raises(UserError, match=r"shard-d.safetensors' has a NaN or an infinity in row 9 of 'activations'"):
        list(SavedActivations(folder, batch_rows=6, seed=seed))


def test_a_folder_larger_than_the_memory_in_use_is_streamed(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak of the resident memory from /proc")
    for shard in range(8):
        save_file({"a": torch.full((8192, 256), float(shard))}, tmp_path / f"{shard}.safetensors")  # 8 MiB
    script = """
import sys
from dictionary_learning.activations.saved import SavedActivations

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
next(SavedActivations(sys.argv[1], batch_rows=8, seed=0))
before, count = peak(), 0
for batch in SavedActivations(sys.argv[1], batch_rows=512, seed=0):
    count += len(batch.acts["a"])
print(count, peak() - before)
"""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", script, str(tmp_path)]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    count, grown = out.stdout.split()
    assert int(count) == 8 * 8192 and float(grown) < 20  # MiB, of 64


# ---------------------------------------------------------------------------------------------- with the buffer


def test_a_buffer_over_saved_activations_gives_every_row_once_and_resumes(folder):
    def make():
        source = SavedActivations(folder, batch_rows=6, seed=0, epochs=3)
        return ActivationBuffer(None, source, n_ctxs=20, ctx_len=1, out_batch_size=5)

    whole = list(make())
    found = sorted(n for batch in whole for n in batch["activations"][:, 0].tolist())
    assert found == sorted(list(range(30)) * 3)
    broken, resumed = make(), make()
    for _ in range(7):
        next(broken)
    resumed.load_state_dict(broken.state_dict())
    assert all(torch.equal(a["second"], b["second"]) for a, b in zip(resumed, whole[7:], strict=True))
