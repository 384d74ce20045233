"""The table on disk and on the Hub.

In: texts with their corpus and split, one at a time. Out: a folder that `datasets.load_dataset` and the Hub read:

    README.md                              dataset card, its YAML header names the files of each split
    data/<split>-00000-of-00001.parquet    columns text, source_dataset
    skipped.jsonl                          every record left out: corpus, where, id, reason; of a duplicate also `of`

The folder is written under a hidden name beside (or inside) its place and moved when it is whole: a run that fails
or is interrupted leaves nothing. Rows go to disk in small row groups, so memory does not depend on their number.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dictionary_learning.errors import UserError
from dictionary_learning.hub_client import check_push as check_push
from dictionary_learning.hub_client import hub_endpoint, open_repository, reach_hub, said_plainly

ROW_GROUP_ROWS = 2_000
ROW_GROUP_CHARACTERS = 4 * 2**20
OWN_FILES = ("data/*.parquet", "README.md", "skipped.jsonl")


# ---------------------------------------------------------------------------------------------- writing


class TableWriter:
    """Writes the table into `folder` as it streams by. Use as a context manager: leaving it closes every file.

    `files` maps each split that has rows to its parquet file, relative to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self._writers: dict[str, Any] = {}
        self._rows: dict[str, list[tuple[str, str]]] = {}
        self._characters: dict[str, int] = {}
        (folder / "data").mkdir()
        self._skipped = (folder / "skipped.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self._rows.clear()
        self.close()

    def close(self) -> None:
        """Writes what is left and closes every file; a second call does nothing."""
        for split in self._rows:
            self._flush(split)
        for writer in self._writers.values():
            writer.close()
        self._skipped.close()

    def write(self, split: str, text: str, source_dataset: str) -> None:
        """Adds a row to a split."""
        rows = self._rows.setdefault(split, [])
        rows.append((text, source_dataset))
        self._characters[split] = self._characters.get(split, 0) + len(text)
        if len(rows) >= ROW_GROUP_ROWS or self._characters[split] >= ROW_GROUP_CHARACTERS:
            self._flush(split)

    def skip(self, **fields: str) -> None:
        """Adds a line to skipped.jsonl."""
        self._skipped.write(json.dumps(fields) + "\n")

    def _flush(self, split: str) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._rows[split]:
            return
        texts, sources = zip(*self._rows[split], strict=True)
        schema = pyarrow.schema([("text", pyarrow.string()), ("source_dataset", pyarrow.string())])
        if split not in self._writers:
            self.files[split] = f"data/{split}-00000-of-00001.parquet"
            self._writers[split] = pyarrow.parquet.ParquetWriter(
                self.folder / self.files[split],
                schema,
                compression="zstd",
                use_dictionary=["source_dataset"],
                write_statistics=["source_dataset"],  # of texts they would hold whole texts, once a row group
            )
        batch = pyarrow.record_batch([pyarrow.array(texts), pyarrow.array(sources)], schema=schema)
        self._writers[split].write_batch(batch)
        self._rows[split], self._characters[split] = [], 0


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where a table can't be written to `out`: a file, or a folder with something in it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(
            f"--out {out} is not empty; give a new folder, or --overwrite to replace the data files, README.md and "
            f"skipped.jsonl in it (other files stay)."
        )


@contextlib.contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder to write in. Leaving the block moves it to `out`; an error or Ctrl-C removes it instead.

    A new `out` appears by one rename. In one that exists, the files of an earlier table give way to the new ones, the
    card last. Raises UserError when the place can't be written.
    """
    check_out(out, overwrite)
    new = not out.exists()
    try:
        parent = out.parent if new else out
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".data_prep-", dir=parent))
    except OSError as error:
        raise UserError(f"Could not write to {out}: {error.strerror or error}.") from error
    try:
        yield staging
        _sync(staging)
        if new:
            staging.chmod(0o777 & ~_umask())
            staging.rename(out)
        else:
            _replace_files(staging, out)
    except OSError as error:
        raise UserError(f"Could not write to {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_files(staging: Path, out: Path) -> None:
    fresh = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    (out / "data").mkdir(exist_ok=True)
    for path in sorted(fresh, key=lambda path: path.name == "README.md"):
        (staging / path).replace(out / path)
    for stale in (out / "data").glob("*.parquet"):
        if stale.relative_to(out) not in fresh:
            stale.unlink()


def _sync(folder: Path) -> None:
    """Flushes every file and folder to the disk, so that what the rename shows survives a power cut."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------------------------- the Hub


def push_folder(folder: Path, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Uploads the table in `folder` to the dataset repository `repo` in one commit, and gives its address.

    The repository is made if it does not exist. Data files of an earlier push go in the same commit: stale splits must
    not stay beside new ones. `endpoint` (default: HF_ENDPOINT, else the Hub). Raises UserError when the Hub refuses or
    can't be reached, or when a private table would become public in a repository that is public already.
    """
    from huggingface_hub import HfApi

    endpoint = endpoint or hub_endpoint()
    api = HfApi(endpoint=endpoint)
    with said_plainly(f"Could not push to {repo}"):
        reach_hub(endpoint)
        url = open_repository(api, repo, repo_type="dataset", private=private)
        api.upload_folder(
            folder_path=folder,
            repo_id=url.repo_id,
            repo_type="dataset",
            commit_message="Add medical QA texts (SAE Factory data_prep)",
            allow_patterns=list(OWN_FILES),
            delete_patterns=["data/*.parquet"],
        )
    return str(url)
