"""Where saved activations lie: a file or folder here, or a dataset repository on the Hub.

In: a path or `hf://user/name[@revision]`. Out: a `ShardSet`, the list of shards with their rows, hook points and dtype,
each fetched, checked and opened when it is first read. A folder that `sae-factory harvest` wrote has a manifest.json,
which says all of that without opening a shard; of other folders the safetensors headers are read. A repository is
pinned to its commit when it is opened, and comes file by file through the cache of huggingface_hub.

A manifest may come from anybody: file names in it are only believed where they are names that a harvest gives.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dictionary_learning import untrusted
from dictionary_learning.activations.loading import DTYPES, HUB_TIMEOUT_S
from dictionary_learning.activations.types import Provenance
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.hub_client import hub_endpoint, reach_hub, said_plainly
from dictionary_learning.untrusted import listed, plain_json, read_npz, read_pickled

MANIFEST = "manifest.json"
FORMAT, VERSION = "sae-factory activations", 1
COMPLETE, HARVESTING = "complete", "harvesting"
TOKENS = "tokens"  # folder of the provenance: out of the way of programs that read every shard beside the manifest
COLUMNS = tuple(field.removesuffix("_N") for field in Provenance._fields)  # of the files in it
SUFFIXES = (".safetensors", ".pt", ".npy", ".npz")
_SHARD_NAME = re.compile(r"shard-\d{5,9}\.safetensors")
_HUB = re.compile(r"hf://(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?/?")
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Shard:
    """One file of rows. `fetch` gives its path (downloading it at need), `batches` the rows of each harvested batch,
    `tokens` the file with the provenance of the same rows."""

    name: str
    fetch: Callable[[], Path]
    rows: int
    sha256: str | None = None
    batches: tuple[int, ...] = ()
    tokens: Shard | None = None

    def open(self, verify: bool) -> dict[str, Any]:
        """Name -> what can be sliced by rows, of which only the rows asked for are read.

        Raises:
            UserError: it can't be read or, with `verify`, does not match its checksum.
        """
        path = self.fetch()
        if verify and self.sha256 is not None and file_sha256(path) != self.sha256:
            raise UserError(f"The shard '{self.name}' does not match its checksum: it is damaged or was exchanged.")
        return read_tensors(path)


@dataclass(frozen=True)
class ShardSet:
    """Saved activations: shards in order, hook point -> width, dtype; `manifest` of a harvest, `revision` (the commit)
    of a repository. `max_rows` is the bound on the rows of a batch that the harvested stream had."""

    shards: list[Shard]
    widths: dict[str, int]
    dtype: torch.dtype
    max_rows: int | None = None
    manifest: dict[str, Any] | None = None
    revision: str | None = None


def open_shards(path: str | os.PathLike[str]) -> ShardSet:
    """The shards at `path`.

    Raises:
        UserError: nothing there, an unreadable or cut file, a damaged manifest, shards that do not fit together.
    """
    if str(path).startswith("hf:"):
        return _on_hub(str(path))
    place = Path(path).expanduser()
    if place.is_dir() and (manifest := read_manifest(place)) is not None:
        for name, size in manifest_files(manifest).items():
            _check_size(place / name, size)
        return _harvested(manifest, lambda name: lambda: place / name, str(place))
    headers = []
    for file in _files(place):
        tensors = read_tensors(file)
        found = described({name: _header(t) for name, t in tensors.items()}, f"'{file}'")
        headers.append((Shard(str(file), lambda file=file: file, rows_of(tensors)), found))  # type: ignore[misc]
    return _alike(headers)


def _alike(headers: list[tuple[Shard, tuple[dict[str, int], torch.dtype]]], revision: str | None = None) -> ShardSet:
    for shard, found in headers:
        if found != headers[0][1]:
            raise UserError(f"'{shard.name}' has {shown(found)}, the shards before it {shown(headers[0][1])}.")
    return ShardSet([shard for shard, _ in headers], *headers[0][1], revision=revision)


# ---------------------------------------------------------------------------------------------- files


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        shards = sorted(path.glob("*.safetensors"))
        if not shards:
            tensors = next(iter(sorted(path.glob("*.pt"))), None)
            hint = f" A .pt file is given by itself, as '{tensors}'." if tensors else ""
            raise UserError(f"The folder '{path}' holds no .safetensors shard of activations.{hint}")
        return shards
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"The saved activations '{path}' do not exist.{did_you_mean(path.name, beside)}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"The saved activations '{path}' are none of {', '.join(SUFFIXES)}, nor a folder of shards.")
    return [path]


def read_tensors(file: Path) -> dict[str, Any]:
    """Name -> tensor, or slice of a file, mapped into memory. Raises UserError where the file is not readable."""
    from safetensors import safe_open

    try:
        if file.suffix == ".npy":  # a private mapping: what is written to it never reaches the file
            return {"activations": torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))}
        if file.suffix == ".npz":
            return dict(read_npz(file))
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        loaded = read_pickled(file)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"The saved activations '{file}' hold something else than tensors.") from error
    except Exception as error:  # each format has errors of its own; all mean that the file can't be used
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The saved activations '{file}' are not readable: {why}") from error
    named = loaded if isinstance(loaded, Mapping) else {"activations": loaded}
    return {str(name): x for name, x in named.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise UserError(f"The shard '{file}' is missing: its {MANIFEST} lists it.")
    if file.stat().st_size != size:
        raise UserError(f"The shard '{file}' is cut or was exchanged: {file.stat().st_size:,} bytes, not {size:,}.")


def _header(tensor: Any) -> Any:
    """(shape, dtype) of a tensor or of a slice of a file; anything else as it is."""
    if isinstance(tensor, Tensor):
        return tuple(tensor.shape), tensor.dtype
    if hasattr(tensor, "get_shape"):  # it tells its type by a name
        return tuple(tensor.get_shape()), _SAFETENSORS_DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
    return tensor


def rows_of(tensors: Mapping[str, Any]) -> int:
    """Rows of the first of tensors, or slices of files, that `described` found to have equal numbers."""
    return _header(next(iter(tensors.values())))[0][0]


def shown(found: tuple[dict[str, int], torch.dtype]) -> str:
    """Widths and dtype for a message."""
    return untrusted.shown(f"widths {found[0]} in {found[1]}", 300)


def described(headers: Mapping[Any, Any], where: str) -> tuple[dict[str, int], torch.dtype]:
    """Widths and dtype of activations given as name -> (shape, dtype).

    Raises:
        UserError: anything but 2-D floating-point tensors of one type with equal numbers of rows.
    """
    widths, dtypes, counts = {}, set(), set()
    for name, header in headers.items():
        if not isinstance(header, tuple) or len(header) != 2 or not isinstance(header[0], tuple):
            raise UserError(f"{where}: '{listed([name])}' is {type(header).__name__}, expected a tensor [rows, width].")
        shape, dtype = header
        if len(shape) != 2 or not shape[1]:  # of no width there may be any number of rows
            raise UserError(f"{where}: '{listed([name])}' has shape {str(shape)[:80]}, expected [rows, width].")
        dtypes.add(dtype)
        widths[str(name)] = shape[1]
        counts.add(shape[0])
    if len(counts) != 1 or len(dtypes) != 1 or not getattr(next(iter(dtypes)), "is_floating_point", False):
        raise UserError(
            f"{where} should hold floating-point tensors of one type with equal numbers of rows, got "
            f"{', '.join(map(str, dtypes)) or 'nothing'} with {listed(sorted(counts)) if counts else 'no'} rows."
        )
    return widths, dtypes.pop()


def described_tensors(tensors: Mapping[Any, Any], where: str) -> tuple[dict[str, int], torch.dtype]:
    """`described` for tensors, or slices of files."""
    return described({name: _header(tensor) for name, tensor in tensors.items()}, where)


# ---------------------------------------------------------------------------------------------- the manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a harvest in `folder`; None where there is none, or that of something else.

    Raises:
        UserError: it is ours but damaged, or of another version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        return _checked_manifest(plain_json(file.read_text(encoding="utf-8")), str(file))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{file}' is not a readable JSON file: {error}.") from error


def _checked_manifest(data: Any, where: str) -> dict[str, Any] | None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return None
    if data.get("version") != VERSION:
        raise UserError(
            f"'{where}' has version {listed([data.get('version')])}, not {VERSION}, which this program reads."
        )
    try:
        for shard in data["shards"]:
            whole = all(isinstance(n, int) and n > 0 for n in (shard["rows"], shard["bytes"], *shard["batches"]))
            if not _SHARD_NAME.fullmatch(shard["file"]) or not whole or sum(shard["batches"]) != shard["rows"]:
                raise ValueError(f"the entry of shard {str(shard['file'])[:40]!r} can't be")
            if not (isinstance(shard["sha256"], str) and isinstance(shard["tokens"]["sha256"], str)):
                raise ValueError("a checksum is not text")
            if not isinstance(shard["tokens"]["bytes"], int):
                raise ValueError("a size is not a number")
        if data["dtype"] not in DTYPES:
            raise ValueError(f"the dtype is {str(data['dtype'])[:40]!r}")
        if not all(isinstance(point["width"], int) for point in data["hook_points"].values()):
            raise ValueError("a width is not a number")
        if not all(isinstance(data[key], dict) for key in ("model", "corpus", "settings", "hook_points")):
            raise ValueError("it does not say what was harvested")
        if not isinstance(data["documents"], int) or not isinstance(data["state"], dict | None):
            raise ValueError("its documents or its state can't be")
        most = max((n for shard in data["shards"] for n in shard["batches"]), default=1)
        if not isinstance(data["max_rows"], int) or data["max_rows"] < most:
            raise ValueError(f"max_rows is {data['max_rows']!r}, but a batch has {most} rows")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"'{where}' is damaged: {untrusted.shown(why, 200)}.") from error
    return data


def manifest_files(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Relative name -> bytes of every file that a manifest lists."""
    files = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    return files | {f"{TOKENS}/{shard['file']}": shard["tokens"]["bytes"] for shard in manifest["shards"]}


def _harvested(
    manifest: dict[str, Any], fetch: Callable[[str], Callable[[], Path]], where: str, revision: str | None = None
) -> ShardSet:
    if manifest.get("status") != COMPLETE:
        raise UserError(f"The harvest in '{where}' is not finished: run the same harvest again, and it goes on.")
    shards = []
    for entry in manifest["shards"]:
        name, tokens = entry["file"], f"{TOKENS}/{entry['file']}"
        beside = Shard(f"{where}/{tokens}", fetch(tokens), entry["rows"], entry["tokens"]["sha256"])
        shards.append(
            Shard(f"{where}/{name}", fetch(name), entry["rows"], entry["sha256"], tuple(entry["batches"]), beside)
        )
    widths = {name: point["width"] for name, point in manifest["hook_points"].items()}
    return ShardSet(shards, widths, DTYPES[manifest["dtype"]], manifest["max_rows"], manifest, revision)


# ---------------------------------------------------------------------------------------------- the Hub


def _on_hub(spec: str) -> ShardSet:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import SafetensorsParsingError

    match = _HUB.fullmatch(spec)
    if match is None:
        raise UserError(f"'{spec}' is not a dataset on the Hub: write hf://user/name, or hf://user/name@revision.")
    repo, where, endpoint = match["repo"], f"hf://{match['repo']}", hub_endpoint()
    opened = _pinned(repo, match["revision"], endpoint)

    def fetch(name: str) -> Callable[[], Path]:
        def download() -> Path:
            with said_plainly(f"Could not read '{name}' of '{where}'"):
                return Path(
                    hf_hub_download(
                        repo,
                        name,
                        repo_type="dataset",
                        revision=opened.revision,
                        endpoint=endpoint,
                        local_files_only=opened.offline,
                    )
                )

        return download

    if opened.manifest is not None:
        try:
            data = plain_json(opened.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"'{where}/{MANIFEST}' is not a readable JSON file.") from error
        manifest = _checked_manifest(data, f"{where}/{MANIFEST}")
        if manifest is not None:
            return _harvested(manifest, fetch, where, opened.revision)
    api, headers = HfApi(endpoint=endpoint), []
    with said_plainly(f"Could not read the dataset '{where}'"):
        files = api.list_repo_files(repo, repo_type="dataset", revision=opened.revision)
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        with said_plainly(f"Could not read '{name}' of '{where}'"):
            try:
                header = api.parse_safetensors_file_metadata(
                    repo, name, repo_type="dataset", revision=opened.revision, timeout=HUB_TIMEOUT_S
                )
            except SafetensorsParsingError as error:
                raise UserError(f"The shard '{where}/{name}' is not a readable safetensors file.") from error
        tensors = {key: (tuple(t.shape), _SAFETENSORS_DTYPES.get(t.dtype)) for key, t in header.tensors.items()}
        found = described(tensors, f"'{where}/{name}'")
        headers.append((Shard(f"{where}/{name}", fetch(name), next(iter(tensors.values()))[0][0]), found))
    if not headers:
        raise UserError(f"The dataset '{where}' holds no .safetensors shard of activations.")
    return _alike(headers, opened.revision)


class _Opened(NamedTuple):
    """A repository at one commit: its manifest, if it has one; offline, everything is in the cache or nowhere."""

    revision: str
    manifest: Path | None
    offline: bool = False


def _pinned(repo: str, revision: str | None, endpoint: str) -> _Opened:
    """The commit that a revision means now or, without a network, meant when it was last read."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    with said_plainly(f"Could not read the dataset 'hf://{repo}{f'@{revision}' if revision else ''}'"):
        try:
            reach_hub(endpoint)
            path = hf_hub_download(repo, MANIFEST, repo_type="dataset", revision=revision, endpoint=endpoint)
            return _Opened(Path(path).parent.name, Path(path))  # .../snapshots/<commit>/manifest.json
        except EntryNotFoundError:
            info = HfApi(endpoint=endpoint).dataset_info(repo, revision=revision or "main", timeout=HUB_TIMEOUT_S)
            assert info.sha is not None  # it is of every repository
            return _Opened(info.sha, None)
        except Exception as error:  # refused, gone, or no network: httpx, socket and proxy errors, offline mode
            status = getattr(getattr(error, "response", None), "status_code", None)
            cached = try_to_load_from_cache(repo, MANIFEST, repo_type="dataset", revision=revision)
            if isinstance(cached, str) and (status is None or status >= 500):
                return _Opened(Path(cached).parent.name, Path(cached), offline=True)
            raise
