"""Parquet files that anybody may have made, decoded by a process of their own under a limit of memory and time.

In: a path. Out: rows, or columns. A few bytes of parquet can stand for gigabytes in many ways (pages, dictionaries,
repeated prefixes, nulls of any width), and the footer that tells the sizes may lie, so that no look at the file tells
what it costs. The system's limit holds whatever the file says, and a crash of the decoder ends no run. Rows come as
lines of JSON, columns as an Arrow stream. Where the system has no such limit (it has on Linux), the footer is believed.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dictionary_learning.untrusted import MOST_LINE, allowance, bounded_lines

if TYPE_CHECKING:
    import pyarrow

BATCH = 64  # rows decoded together: each may be long
ROW = 16 * MOST_LINE  # bytes that the longest row takes, of 4 a character: as text, escaped, as a line, and encoded
MOST_ROWS = 100  # of a table in a byte: those of real ones differ
OBJECT, NUMBER = 64, 40  # bytes of a short string or a list, and of a number, as an object with its place in a list
SECONDS, SECONDS_PER_MB = 20, 10  # of processor time: decoding takes 0.05 s a MB


def parquet_rows(file: Path, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of all columns or those of the `columns` that it has, if it has the first of them.

    What JSON lacks comes as text: bytes as the UTF-8 they hold, times and decimals as they print. Raises ValueError for
    a file that is damaged or unfolds, OSError for one that is gone.
    """
    with _decoded(file, "rows", *columns) as stream:
        for line in bounded_lines(stream, file):
            if not line.endswith(b"\n"):
                break  # the decoder ended in the middle of it, and says why
            yield json.loads(line)


def parquet_columns(file: Path, types: Mapping[str, pyarrow.DataType], others: pyarrow.DataType) -> pyarrow.Table:
    """All columns of a parquet file, which must have those of `types`, and others only of the type `others`.

    Raises ValueError for a file that is damaged, unfolds, or has other columns; OSError for one that is gone.
    """
    import pyarrow

    room = allowance(file)
    with _decoded(file, "table") as stream:
        data = stream.read(room + 1)
        if len(data) > room:
            raise ValueError("it unpacks to more than a table does")
    table = pyarrow.ipc.open_stream(data).read_all()
    if missing := [name for name in types if name not in table.column_names]:
        raise ValueError(f"it lacks the column {missing[0]}")
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.type != types.get(name, others):
            raise ValueError(f"its column {name} is of type {column.type}, not {types.get(name, others)}")
        if pyarrow.types.is_primitive(column.type):
            room -= column.nbytes  # numbers stay an array
            continue
        items = column
        while pyarrow.types.is_list(items.type):
            room -= OBJECT * len(items)
            items = pyarrow.chunked_array([chunk.flatten() for chunk in items.chunks], items.type.value_type)
        room -= (NUMBER if pyarrow.types.is_primitive(items.type) else OBJECT) * len(items)
    if room < 0:
        raise ValueError("it has more values than a file of its size may")
    return table


@contextlib.contextmanager
def _decoded(file: Path, what: str, *columns: str) -> Iterator[IO[bytes]]:
    """What the decoder writes. Raises ValueError, when the block ends, if it could not decode all."""
    size = file.stat().st_size
    limits = [allowance(file), SECONDS + SECONDS_PER_MB * size // 1_000_000, MOST_ROWS * size]
    child = _started([os.fspath(file), what, *map(str, limits), *columns])
    assert child.stdout is not None and child.stderr is not None
    try:
        yield child.stdout
        said = child.stderr.read().decode("utf-8", "replace")
        if child.wait():
            raise ValueError(_why(child.returncode, said))
    finally:
        child.kill()
        for pipe in (child.stdout, child.stderr):
            pipe.close()
        child.wait()


def _started(arguments: list[str]) -> subprocess.Popen[bytes]:
    """This module as a program. In a session of its own: Ctrl-C lets a run go on to its next state, and read till then;
    and a run that is killed takes it along, because nobody reads what it writes."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(str(path) or os.curdir for path in sys.path)},
    )


# The system's own allocator takes what it is asked for; others take a gigabyte of addresses at once, and so does it for
# threads: 64 MB for the first allocation of each, as often as not.
_ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
    "ARROW_IO_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def _why(status: int, said: str) -> str:
    if status == 1 and said.strip():
        return said.strip().splitlines()[-1]
    if status in (-int(signal.SIGABRT), 134):  # C++ found no memory where it has no other way to say so
        return "it unpacks to more memory than a file of its size may take"
    if status == -int(getattr(signal, "SIGXCPU", 0)):
        return "it takes longer to decode than a file of its size may"
    return f"its decoder ended with status {status}"


# ---------------------------------------------------------------------------------------------- the program


def main(file: str, what: str, memory: str, seconds: str, most_rows: str, *columns: str) -> int:
    """Write a file's rows to stdout as JSON lines, or all of it ("table") as an Arrow stream; to stderr why not."""
    import pyarrow.parquet

    _start_reading_thread()
    _limit(int(memory) + (ROW if what == "rows" else 0), int(seconds))
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            claims = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
            if (rows := sum(claim.num_rows for claim in claims)) > int(most_rows):
                raise ValueError(f"it has {rows:,} rows in {Path(file).stat().st_size:,} bytes")
            if (size := max((claim.total_byte_size for claim in claims), default=0)) > int(memory):
                raise ValueError(f"it would unpack to {size / 1e9:.1f} GB")
            if what == "table":
                _write_table(table, sys.stdout.buffer)
            else:
                known = table.schema_arrow.names
                wanted = [name for name in columns if name in known] if columns and columns[0] in known else None
                _write_rows(table, wanted, sys.stdout.buffer)
        return 0
    except BrokenPipeError:  # enough was read
        os._exit(1)
    except MemoryError:
        why = "it unpacks to more memory than a file of its size may take"
    except Exception as error:  # pyarrow's own, and those of Python's types of what a column may hold
        why = " ".join(str(error).split())[:300] or type(error).__name__
    print(why, file=sys.stderr)
    return 1


def _write_rows(table: pyarrow.parquet.ParquetFile, columns: list[str] | None, out: IO[bytes]) -> None:
    for batch in table.iter_batches(batch_size=BATCH, columns=columns, use_threads=False):
        for row in batch.to_pylist():
            out.write(json.dumps(row, ensure_ascii=False, default=_text).encode())
            out.write(b"\n")
    out.flush()


def _write_table(table: pyarrow.parquet.ParquetFile, out: IO[bytes]) -> None:
    import pyarrow

    with pyarrow.ipc.new_stream(out, table.schema_arrow) as stream:
        for batch in table.iter_batches(use_threads=False):
            stream.write_batch(batch)
    out.flush()


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _start_reading_thread() -> None:
    """Before memory is limited: its stack takes as many addresses as `ulimit -s` says, which may be a gigabyte."""
    import pyarrow.parquet

    smallest = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": [0]}), smallest)
    with pyarrow.parquet.ParquetFile(smallest) as table:
        collections.deque(table.iter_batches(use_threads=False), maxlen=0)


def _limit(memory: int, seconds: int) -> None:
    """Let this process take so many bytes more than it has, and so much processor time; where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = resource.getrusage(resource.RUSAGE_SELF)  # on a slow machine imports alone take their time
        for limit, most in (
            (resource.RLIMIT_AS, pages * resource.getpagesize() + memory),
            (resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            allowed = [most, *(given for given in resource.getrlimit(limit) if given != resource.RLIM_INFINITY)]
            resource.setrlimit(limit, (min(allowed), resource.getrlimit(limit)[1]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
