"""Dictionaries from the Hugging Face Hub: `hf://user/repo[@revision][/folder]` to checked files on this disk.

In: a reference. Out: a local folder (in the Hub's cache) with config.json and the weights of one dictionary. All files
are of one commit. Where the repository has a `checksums.json`, as those that `sae-factory push` makes, every file is
compared with it; a damaged copy in the cache is replaced. Checksums find damage, not malice: what is loaded is only
ever plain tensors and JSON, under names that are asked for here.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.hub_client import REACH_SECONDS, hub_endpoint, reach_hub, said_plainly
from dictionary_learning.untrusted import plain_json, shown

SCHEME = "hf://"
MANIFEST, MANIFEST_VERSION = "checksums.json", 1
_REPO_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
CONFIG, WEIGHTS = "config.json", ("ae.safetensors", "ae.pt")
RESULTS, RUN = "eval_results.json", "run.json"  # fetched with a dictionary, to evaluate it again


class HubReference(NamedTuple):
    """A dictionary on the Hub. An empty folder stands for the best one; revision None for the head of main."""

    repo_id: str
    revision: str | None
    folder: str

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo_id}{at}{'/' if self.folder else ''}{self.folder}"


def local_folder(path: str | os.PathLike[str], revision: str | None, subfolder: str | None) -> Path:
    """Where a dictionary lies on this disk: `path` itself, or what is fetched where it names one on the Hub.

    `user/repo` without hf:// names one if there is no such file or folder here.

    Raises:
        UserError: see `parse_reference` and `pull_dictionary`; a revision of what is no repository.
    """
    local = Path(path).expanduser()
    if isinstance(path, str) and (path.startswith(SCHEME) or (_looks_like_repo(path) and not local.exists())):
        return pull_dictionary(parse_reference(path, revision, subfolder))
    if revision is not None:
        raise UserError(f"'{path}' has no revision '{revision}': only a repository (hf://user/repo) has revisions.")
    return local / subfolder if subfolder else local


def _looks_like_repo(path: str) -> bool:
    return not path.endswith(WEIGHTS) and re.fullmatch(_REPO_ID, path.partition("@")[0], re.ASCII) is not None


def parse_reference(text: str, revision: str | None = None, subfolder: str | None = None) -> HubReference:
    """`user/repo`, with or without `hf://`, `@revision` and a folder below it.

    A revision is a branch, a tag or a commit id; one with a slash, like refs/pr/1, goes into `revision`.

    Raises:
        UserError: not such a reference, two revisions or two folders, or a folder outside of the repository.
    """
    parts = text.removeprefix(SCHEME).split("/", 2)
    name, at, named_revision = (parts[1] if len(parts) > 1 else "").partition("@")
    repo_id = f"{parts[0]}/{name}"
    if not re.fullmatch(_REPO_ID, repo_id, re.ASCII) or bool(at) != bool(named_revision):
        raise UserError(f"'{text}' is no dictionary on the Hub: write hf://user/repo or hf://user/repo/trainer_3.")
    if named_revision and revision is not None and named_revision != revision:
        raise UserError(f"'{text}' names a revision, and revision='{revision}' another: give one.")
    folder = parts[2].rstrip("/") if len(parts) > 2 else ""
    if folder and subfolder:
        raise UserError(f"'{text}' names a folder, and subfolder='{subfolder}' too: give one.")
    return HubReference(repo_id, revision or named_revision or None, _safe_folder(folder or subfolder or "", text))


def pull_dictionary(reference: HubReference) -> Path:
    """Fetch a dictionary's files, what is not in the cache, and check them; the folder that holds them.

    Of a pushed run, `eval_results.json` comes with it, and the `run.json` in the folder above.

    Raises:
        UserError: no network, no such repository, revision or folder, files that don't match their checksums.
    """
    with said_plainly(f"Could not load {reference}"):
        offline = _unreachable()
        manifest_file = _download(reference, reference.revision, MANIFEST, offline, optional=True)
        manifest = None if manifest_file is None else _read_manifest(manifest_file, reference)
        folder = reference.folder
        if not folder and manifest is not None:
            folder = _safe_folder(manifest["best"], str(reference))
        prefix = f"{folder}/" if folder else ""
        revision = reference.revision if manifest_file is None else _commit_of(manifest_file, MANIFEST)
        if manifest is None:
            config = _download(reference, revision, prefix + CONFIG, offline, optional=True)
            if config is None:
                where = f"in its folder '{folder}'" if folder else "at its top: name a folder, hf://user/repo/folder"
                raise UserError(f"Could not load {reference}: the repository has no {CONFIG} {where}.")
            revision = _commit_of(config, prefix + CONFIG)
            weights = (_download(reference, revision, prefix + name, offline, optional=True) for name in WEIGHTS)
            if next((file for file in weights if file is not None), None) is None:
                raise UserError(f"Could not load {reference}: '{folder}' holds neither {' nor '.join(WEIGHTS)}.")
            return config.parent
        listed = manifest["files"]
        weights_name = next((name for name in WEIGHTS if prefix + name in listed), None)
        if weights_name is None or prefix + CONFIG not in listed:
            here = sorted({str(PurePosixPath(path).parent) for path in listed if path.endswith(WEIGHTS)})
            raise UserError(
                f"Could not load {reference}: it has no dictionary '{folder}', but "
                f"{shown(', '.join(here) or 'none at all', 300)}.{did_you_mean(folder, here)}"
            )
        wanted = [prefix + CONFIG, prefix + weights_name, *({prefix + RESULTS, RUN} & set(listed))]
        return [_checked(reference, revision, name, listed[name], offline) for name in wanted][0].parent


def _safe_folder(folder: str, text: str) -> str:
    """A folder inside a repository. Raises UserError for anything that could point elsewhere."""
    if folder and not all(
        re.fullmatch(r"[^\\\x00-\x1f:]+", part) and part not in (".", "..") for part in folder.split("/")
    ):
        raise UserError(f"'{text}': '{shown(folder)}' is not a folder inside a repository.")
    return folder


def _download(
    reference: HubReference,
    revision: str | None,
    name: str,
    offline: Exception | None,
    *,
    optional: bool = False,
    force: bool = False,
) -> Path | None:
    """A file in the cache, fetched at need; where the Hub does not answer (`offline` says why) from the cache alone."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(
                reference.repo_id,
                name,
                revision=revision,
                endpoint=hub_endpoint(),
                etag_timeout=REACH_SECONDS,
                force_download=force,
                local_files_only=offline is not None,
            )
        )
    except LocalEntryNotFoundError:  # the Hub could not be asked
        if offline is not None:
            raise offline from None
        raise
    except EntryNotFoundError:
        if optional:
            return None
        raise


def _unreachable() -> Exception | None:
    """Why the Hub does not answer, or None. Asked first: the client itself tries for 20 s and more, for each file."""
    try:
        reach_hub()
    except Exception as error:  # of the HTTP library, or that the network is forbidden; for `said_plainly`
        return error
    return None


def _commit_of(file: Path, name: str) -> str:
    """The commit that a file in the cache (.../snapshots/<commit>/<name>) belongs to."""
    return file.parts[-1 - len(PurePosixPath(name).parts)]


def _read_manifest(file: Path, reference: HubReference) -> dict[str, Any]:
    try:
        manifest = plain_json(file.read_text(encoding="utf-8"))
        if manifest["version"] != MANIFEST_VERSION:
            raise ValueError(f"its version is {manifest['version']!r}, not {MANIFEST_VERSION}")
        if not isinstance(manifest["best"], str) or not all(
            isinstance(entry["sha256"], str) and isinstance(entry["size"], int) for entry in manifest["files"].values()
        ):
            raise ValueError("a field is of the wrong kind")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"Could not load {reference}: its {MANIFEST} can't be used ({shown(error, 120)}).") from error
    return manifest


def _checked(
    reference: HubReference, revision: str | None, name: str, entry: dict[str, Any], offline: Exception | None
) -> Path:
    for force in (False, True):  # the copy in the cache may be what is damaged
        file = _download(reference, revision, name, offline, force=force)
        assert file is not None
        with file.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() == entry["sha256"]:
                return file
    raise UserError(
        f"Could not load {reference}: {name} does not match its checksum in the repository; it was damaged or changed "
        "after the push. Load an earlier revision, or have it pushed again."
    )
