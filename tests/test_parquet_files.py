"""Parquet files: real ones come out as they were written; those that unfold end in their decoder, not in the run."""

from __future__ import annotations

import datetime
import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dictionary_learning import parquet_files
from dictionary_learning.parquet_files import parquet_columns, parquet_rows

COLUMNS = {"text": [f"text {n}" for n in range(500)], "id": list(range(500)), "source_dataset": ["a"] * 500}


def written(file: Path, columns: Any, **options: Any) -> Path:
    parquet.write_table(pa.table(columns), file, **options)
    return file


def test_rows_come_in_order_with_the_columns_that_were_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path / "x.parquet", COLUMNS, row_group_size=150)
    rows = list(parquet_rows(file, ("text", "source_dataset", "absent")))
    assert rows == [{"text": text, "source_dataset": "a"} for text in COLUMNS["text"]]
    for asked in ((), ("absent", "id")):
        whole = list(parquet_rows(file, asked))
        assert [list(row) for row in whole] == [["text", "id", "source_dataset"]] * 500
        assert [row["id"] for row in whole] == COLUMNS["id"]


def test_values_are_what_json_has(tmp_path: Path) -> None:
    row = {
        "text": "é\u2028\n\U0001f600",
        "none": None,
        "float": 0.1,
        "nested": [{"a": ["b", None]}, {"a": []}],
        "bytes": b"caf\xe9",
        "day": datetime.date(2001, 2, 3),
    }
    (read,) = parquet_rows(written(tmp_path / "x.parquet", pa.Table.from_pylist([row])))
    assert read == row | {"bytes": "caf\ufffd", "day": "2001-02-03"}


def test_a_long_row_is_not_refused_for_a_character_that_makes_it_wide(tmp_path: Path) -> None:
    """Python takes 4 bytes for each character of a text with an emoji."""
    text = "".join(random.Random(0).choices("abcdefghij ", k=12_000_000)) + "\U0001f600"
    assert list(parquet_rows(written(tmp_path / "x.parquet", {"text": [text]}, compression="zstd"))) == [{"text": text}]


def test_long_texts_are_not_refused_for_being_read_together(tmp_path: Path) -> None:
    """Some books, of which each is there several times: they pack well."""
    chooser = random.Random(0)
    words = ["".join(chooser.choices("abcdefghij", k=5)) for _ in range(5000)]
    books = [" ".join(chooser.choices(words, k=170_000)) + "\u0142" for _ in range(8)] * 8
    file = written(tmp_path / "x.parquet", {"text": books}, compression="zstd")
    assert [row["text"] for row in parquet_rows(file)] == books


def repeated(rows: int) -> pa.ListArray:
    """One row of so many times the same text of 1 MB, kept once."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * (1 << 20)]))
    return pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), text)


@pytest.mark.parametrize(
    ("columns", "options", "match"),
    [
        ({"text": repeated(100_000)}, {}, "more memory than a file of its size may take"),
        ({"text": ["y" * (90 << 20)]}, {"compression": "zstd", "use_dictionary": False}, "would unpack to 0.1 GB"),
        ({"text": pa.nulls(3_000_000, pa.string())}, {}, "3,000,000 rows in"),
        ({"text": ["y" * 9000] * 9000}, {}, "unpacks to more than text does"),
        ({"text": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())}, {}, "can't decode byte"),
    ],
)
def test_what_unfolds_is_refused(columns: Any, options: Any, match: str, tmp_path: Path) -> None:
    file = written(tmp_path / "x.parquet", columns, **options)
    with pytest.raises(ValueError, match=match):
        list(parquet_rows(file, ("text",)))


def test_a_file_that_is_damaged_or_gone(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1 no")
    for read in (lambda: list(parquet_rows(file)), lambda: parquet_columns(file, {}, pa.float64())):
        with pytest.raises(ValueError, match="[Pp]arquet"):
            read()
    file.unlink()
    with pytest.raises(FileNotFoundError):
        list(parquet_rows(file))


@pytest.mark.parametrize(
    ("status", "match"),
    [("-11", "ended with status -11"), ("-6", "more memory than"), ("1", "the reason"), ("9", "ended with status 9")],
)
def test_how_the_decoder_ended_is_said(
    status: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also may in the middle of a row."""
    program = (
        "import os, sys; sys.stdout.write('{\"text\": 1}\\n{\"te'); print('more\\nthe reason', file=sys.stderr);"
        "sys.stdout.flush(); sys.stderr.flush(); code = int(sys.argv[1]);"
        "os.kill(os.getpid(), -code) if code < 0 else os._exit(code)"
    )
    ends = [sys.executable, "-c", program, status]
    monkeypatch.setattr(parquet_files, "_started", lambda _: _popen(ends))
    rows = parquet_rows(written(tmp_path / "x.parquet", COLUMNS))
    assert next(rows) == {"text": 1}
    with pytest.raises(ValueError, match=match):
        next(rows)


def _popen(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_reader_that_stops_leaves_no_process_and_no_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    start = parquet_files._started
    monkeypatch.setattr(parquet_files, "_started", lambda arguments: begun.append(start(arguments)) or begun[-1])
    file = written(tmp_path / "x.parquet", {"text": ["x" * 1000] * 10_000})
    rows = parquet_rows(file)
    assert next(rows) and begun[0].poll() is None  # it waits for the pipe to be emptied
    del rows
    gc.collect()
    assert begun[0].returncode is not None
    assert begun[0].stdout is not None and begun[0].stdout.closed


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="there are no sessions of processes")
def test_ctrl_c_does_not_reach_the_decoder(tmp_path: Path) -> None:
    """A run goes on reading till its state is saved."""
    child = parquet_files._started([os.fspath(tmp_path / "none"), "rows", "100000000", "20", "100"])
    with child:
        assert os.getsid(child.pid) != os.getsid(0)
        assert child.wait() == 1 and child.stderr is not None and b"none" in child.stderr.read()


def test_a_run_that_is_killed_takes_the_decoder_along(tmp_path: Path) -> None:
    """It writes to a pipe that nobody reads, and ends."""
    file = written(tmp_path / "x.parquet", {"text": ["x" * 1000] * 10_000})
    program = (
        "import os, signal, sys; from pathlib import Path; from dictionary_learning import parquet_files;"
        "start = parquet_files._started;"
        "parquet_files._started = lambda a: print((child := start(a)).pid, flush=True) or child;"
        "next(parquet_files.parquet_rows(Path(sys.argv[1]))); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(parquet_files.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, cwd=root)
    assert ran.returncode == -9
    while _runs(int(ran.stdout)):
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # whose parent takes no notice of it


# ---------------------------------------------------------------------------------------------- tables

TYPES = {"n": pa.int32(), "s": pa.string(), "l": pa.list_(pa.float64())}
TABLE: dict[str, Any] = {
    "n": pa.array([1, 2], pa.int32()),
    "s": ["a", "é"],
    "l": pa.array([[0.5], []], pa.list_(pa.float64())),
    "more": [0.1, float("inf")],
}


def test_columns_come_out_exactly(tmp_path: Path) -> None:
    file = written(tmp_path / "x.parquet", TABLE, compression="zstd")
    table = parquet_columns(file, TYPES, pa.float64())
    assert table.to_pydict() == {name: pa.array(column).to_pylist() for name, column in TABLE.items()}


def test_a_wide_table_of_latents_that_are_alike_is_not_refused(tmp_path: Path) -> None:
    """As that of many latents that are dead: columns of numbers cost no object a value."""
    rows = 100_000
    alike: dict[str, Any] = {"s": ["dead"] * rows, "l": pa.array([[]] * rows, pa.list_(pa.float64()))}
    columns = {"n": pa.array(range(rows), pa.int32()), **alike, **{f"rate:{n}": [0.0] * rows for n in range(20)}}
    table = parquet_columns(written(tmp_path / "x.parquet", columns, compression="zstd"), TYPES, pa.float64())
    assert table.num_rows == rows


@pytest.mark.parametrize("stack", ["8192", "1000000", "unlimited"])
def test_threads_of_the_decoder_take_nothing_of_what_a_file_may(stack: str, tmp_path: Path) -> None:
    """Their stacks are as large as the shell says, and the first memory that each asks for brings 64 MB of addresses:
    about half of the time, so it is asked some times."""
    if subprocess.run(["sh", "-c", f"ulimit -s {stack}"], capture_output=True).returncode:
        pytest.skip("this machine allows no such stack")
    file = written(tmp_path / "x.parquet", {"n": pa.array(range(200_000), pa.int32())}, compression="zstd")
    program = (
        "import sys; from pathlib import Path; import pyarrow; from dictionary_learning.parquet_files import *;"
        "types = {'n': pyarrow.int32()};"
        "print({parquet_columns(Path(sys.argv[1]), types, pyarrow.int32()).num_rows for _ in range(5)})"
    )
    command = ["sh", "-c", f'ulimit -s {stack}; exec "$0" "$@"', sys.executable, "-c", program, file]
    root = Path(parquet_files.__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (ran.stdout, ran.stderr) == ("{200000}\n", "")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda table: table.pop("s"), "lacks the column s"),
        (lambda table: table.update(n=[1, 2]), "its column n is of type int64, not int32"),
        (lambda table: table.update(extra=["a", "b"]), "its column extra is of type string, not double"),
        (lambda table: table.update(s=pa.array(["a", "b"]).dictionary_encode()), "column s is of type dictionary"),
        (lambda table: table.update(l=pa.array([[0.5] * 2_000_000, []])), "more values than a file of its size"),
    ],
)
def test_other_columns_are_refused(change: Callable[[dict[str, Any]], Any], match: str, tmp_path: Path) -> None:
    table = dict(TABLE)
    change(table)
    with pytest.raises(ValueError, match=match):
        parquet_columns(written(tmp_path / "x.parquet", table), TYPES, pa.float64())
