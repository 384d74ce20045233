"""Files of a run: every one written to a temporary name, flushed, and renamed, so that none is ever half there.

A state (`state/step_000001200/`) is a tree of tensors and plain values, kept as one safetensors file, one JSON file
and a manifest with the SHA-256 of both. It is renamed into place when complete; the newest valid one wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dictionary_learning.errors import UserError
from dictionary_learning.stopping import StoppedWaiting, interruptible
from dictionary_learning.untrusted import checked, shown

log = logging.getLogger("dictionary_learning")

FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: the disk, or the quota
STATES_KEPT = 2
DISK_TRIES, DISK_WAIT = 100, 20.0  # to write what would be lost, and seconds between two of them
STATE_VERSION = 1
_STATE_FILES = ("state.json", "state.safetensors")
_TENSOR, _ITEMS, _FLOAT = "__tensor__", "__items__", "__float__"  # what state.json marks, since JSON lacks it


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`; what is written there appears at `path` all at once when the block ends, and not
    at all if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
        with open(name, "rb") as handle:
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """`atomic_path`, opened for writing text."""
    with atomic_path(path) as name, name.open("w", encoding="utf-8") as handle:
        yield handle


def write_json(path: Path, data: Any) -> None:
    """Write strict JSON (no NaN: use `finite` where values may be)."""
    with atomic_file(path) as handle:
        json.dump(data, handle, indent=2, allow_nan=False)
        handle.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError when it is absent or damaged."""
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")), bits=None)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not a readable JSON file: {error}.") from error


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, for JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, each in its logical layout."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as name:
        try:
            save_file(plain, name)  # straight into the file: a state may take half of the memory
        except SafetensorError as error:  # which tells the system's refusals in words alone
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


def save_state(folder: Path, step: int, tree: Any) -> Path:
    """Write `tree` as the state of a step, and drop the older ones but one.

    Args:
        tree: nested mappings and sequences of tensors, strings, numbers, booleans and None. Keys are kept as they are;
            tuples come back as lists.

    On a full disk the older of two states gives way, and it is tried once more.

    Raises:
        TypeError: the tree holds anything else.
        OSError: it can't be written; the newest state that was there before still is.
    """
    try:
        return _save_state(folder, step, tree)
    except OSError as error:
        older = saved_states(folder)[1:]
        if error.errno not in FULL or not older:
            raise
    for state in older:
        shutil.rmtree(state, ignore_errors=True)
    return _save_state(folder, step, tree)


def _save_state(folder: Path, step: int, tree: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".step_*"):  # by a run that was killed while it wrote
        shutil.rmtree(abandoned, ignore_errors=True)
    final = state_folder(folder, step)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{final.name}."))
    try:
        tensors: dict[str, Tensor] = {}
        write_json(temporary / "state.json", _encode(tree, "", tensors))
        write_tensors(temporary / "state.safetensors", tensors)
        files = {name: _sha256(temporary / name) for name in _STATE_FILES}
        write_json(temporary / "manifest.json", {"version": STATE_VERSION, "step": step, "sha256": files})
        if final.exists():  # whole or damaged; a folder can't be replaced in one go
            os.replace(final, temporary.with_name(f"{temporary.name}.old"))
        os.replace(temporary, final)
        shutil.rmtree(temporary.with_name(f"{temporary.name}.old"), ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    states = saved_states(folder)
    here = states.index(final)  # what is newer is damaged, or of a run that began anew
    for other in [*states[:here], *states[here + STATES_KEPT :]]:
        shutil.rmtree(other, ignore_errors=True)
    return final


def state_folder(folder: Path, step: int) -> Path:
    """Where the state of a step lies."""
    return folder / f"step_{step:09d}"


def saved_states(folder: Path) -> list[Path]:
    """Folders of complete states, newest first."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdecimal() and p.is_dir()), reverse=True)


def load_newest_state(folder: Path) -> tuple[int, Any]:
    """(step, tree) of the newest state whose checksums hold; a damaged one is passed over with a warning.

    Raises:
        UserError: there is no valid state.
    """
    for path in saved_states(folder):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            if manifest["version"] != STATE_VERSION:
                raise ValueError(f"its version is {manifest['version']!r}, not {STATE_VERSION}")
            for name in _STATE_FILES:
                if _sha256(path / name) != manifest["sha256"][name]:
                    raise ValueError(f"{name} does not match its checksum")
            from safetensors.torch import load_file

            tensors = load_file(path / "state.safetensors")
            return int(manifest["step"]), _decode(json.loads((path / "state.json").read_text("utf-8")), tensors)
        except Exception as error:  # whatever is wrong with it, the one before may be whole
            why = f"{type(error).__name__}: {shown(error, 200)}"
            warnings.warn(f"The saved state {path.name} is damaged ({why}); trying the one before.", stacklevel=2)
    raise UserError(f"There is no usable saved state in '{folder}': start anew (with --overwrite, without --resume).")


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # numbered, because different keys can spell one path
        plain = value.detach().cpu().contiguous()  # a copy only where it must be: the buffer may be large
        taken = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        tensors[name] = plain.clone() if plain.untyped_storage().data_ptr() in taken else plain
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key not in (_TENSOR, _ITEMS, _FLOAT) for key in value):
            return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
        if not all(isinstance(key, bool | int | float | str | None) for key in value):
            raise TypeError(f"a state's keys must be strings or numbers (at {path})")
        return {_ITEMS: [[key, _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state can't hold a {type(value).__name__} (at {path})")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _FLOAT in value:
        return float(value[_FLOAT])
    if _ITEMS in value:
        return {key: _decode(item, tensors) for key, item in value[_ITEMS]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """See that a run may use `folder`, and change nothing.

    Raises:
        UserError: it can't be written, holds another run or foreign files, or has nothing to resume.
    """
    with _said_of(folder):
        holds_run = (folder / "run.json").is_file()
        if resume:
            if not holds_run:
                raise UserError(f"There is no run to resume in '{folder}': give the --save_dir of an interrupted run.")
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"save_dir '{folder}' is a file: give a folder.")
        elif folder.is_dir() and any(folder.iterdir()):
            if not holds_run:
                raise UserError(f"save_dir '{folder}' holds other files: give a new or empty folder.")
            if not overwrite:
                raise UserError(
                    f"save_dir '{folder}' holds another run: choose another folder, or add --resume to go on with that "
                    "run or --overwrite to replace it."
                )
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass


def prepare_run_folder(folder: Path, *, resume: bool, overwrite: bool, bytes_needed: int = 0) -> None:
    """Make `folder` ready for a run; with `overwrite`, drop what an earlier run left in it.

    Raises:
        UserError: see `check_run_folder`; or its disk lacks `bytes_needed`.
    """
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    with _said_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if resume:  # what is there already need not be written beside itself
            free += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if bytes_needed > free:
        raise UserError(
            f"The disk of '{folder}' has {free / 1e9:.1f} GB left, but the run needs {bytes_needed / 1e9:.1f} GB: free "
            "some space, give another folder, or train fewer or narrower dictionaries."
        )
    if overwrite and not resume:
        for name in ("metrics.jsonl", "summary.csv", "report.html", "run.json", "wandb.json"):
            (folder / name).unlink(missing_ok=True)
        for old in [folder / "state", folder / "analysis", *folder.glob("trainer_*")]:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    """Turn the system's refusals inside the block into one sentence about `folder`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"save_dir '{folder}' can't be written ({why}): give another folder.") from error


def patiently(write: Callable[[], None], lost: Callable[[], bool]) -> None:
    """Write the results of a run. Where the disk refuses them and they would be `lost` a warning is logged (also where
    a run shows no progress), and it is tried again for half an hour, in which somebody may make room; a stop request
    gives up.

    Raises:
        UserError: the last refusal, see `disk_faults_said`.
    """
    for tries_left in reversed(range(DISK_TRIES)):
        try:
            return write()
        except UserError as error:
            if not tries_left or not lost():
                raise
            try:
                with interruptible():  # which a run that was asked to stop before does not enter
                    if tries_left == DISK_TRIES - 1:
                        why = getattr(error.__cause__, "strerror", None) or error
                        log.warning(
                            "The disk takes neither the state nor the dictionaries (%s): make room for them. It is "
                            "tried every %g s for %.0f minutes; Ctrl-C gives up.",
                            *(why, DISK_WAIT, DISK_TRIES * DISK_WAIT / 60),
                        )
                    time.sleep(DISK_WAIT)
            except StoppedWaiting:
                raise error from None


@contextlib.contextmanager
def disk_faults_said(folder: Path) -> Iterator[None]:
    """Turn what a disk can do to a run inside the block (full, read-only, gone) into one sentence that says how to go
    on. Other errors pass."""
    try:
        yield
    except OSError as error:
        of_disks = error.errno in (*FULL, errno.EROFS, errno.EIO, errno.ESTALE)
        named = error.filename if isinstance(error.filename, str) else None  # temporary files by their whole path
        here = named is not None and Path(named).absolute().is_relative_to(folder.absolute())
        if not of_disks and not (here and error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT)):
            raise
        states = saved_states(folder / "state")
        kept = f"the state of step {int(states[0].name[5:]):,} is kept" if states else "no state was saved yet"
        remedy = "free some space" if error.errno in FULL else "make it writable again"
        where = folder if here or named is None else named
        raise UserError(
            f"'{where}' can't be written ({error.strerror or error}): {remedy} and go on with the same command and "
            f"--resume; {kept}."
        ) from error
