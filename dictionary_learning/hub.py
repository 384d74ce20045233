"""Dictionaries to the Hugging Face Hub: `sae-factory push RUN REPO`, and `--hf_repo_id` of the main job.

In: the folder of a finished run, which is only read. Out: a model repository that holds

    README.md  front.png           the model card and its picture
    run.json  summary.csv  metrics.jsonl  report.html
    trainer_<i>/                   config.json  ae.safetensors  eval_results.json
    checksums.json                 SHA-256 and size of every file above, and which dictionary is best

States and checkpoints stay at home. All of it is one commit, so that the repository's head is either what it was or
the whole run. A sweep of more files than the Hub takes in one commit goes to a pull request, in several, which is then
merged at once. The same command after an interruption finishes the push: what arrived is not sent again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from dictionary_learning.command_line import parse
from dictionary_learning.config import RunConfig, config_from_dict
from dictionary_learning.errors import UserError, exit_code, print_error
from dictionary_learning.hub_client import check_push, hub_endpoint, open_repository, reach_hub, said_plainly
from dictionary_learning.hub_load import MANIFEST, MANIFEST_VERSION
from dictionary_learning.model_card import IMAGE, CardFacts, front_image, is_hub_name, last_part, model_card, one_line

PUSH_FAILED_EXIT = 4  # of the main job: the run is whole on the disk, and not on the Hub
COMMIT_FILES = 250  # in one commit; the Hub fails on very large ones
DICTIONARY_FILES = ("config.json", "ae.safetensors", "eval_results.json")
OPTIONAL_FILES = ("metrics.jsonl", "report.html")
OWN_FILES = re.compile(  # what a push replaces; anything else in the repository stays
    rf"run\.json|summary\.csv|metrics\.jsonl|report\.html|{IMAGE}|{MANIFEST}"
    r"|trainer_\d+/(config\.json|ae\.safetensors|eval_results\.json)"
)


class PushFile(NamedTuple):
    """A file of the repository, and what goes in: a file on disk or bytes."""

    path: str
    source: Path | bytes


@dataclass(frozen=True)
class Pushed:
    """What a push did. url: of the repository. commit: its head. image: whether the card has its picture."""

    url: str
    commit: str
    image: bool


def push_run(
    run_dir: Path,
    repo_id: str,
    *,
    private: bool = False,
    only: Literal["best", "all"] = "all",
    endpoint: str | None = None,
) -> Pushed:
    """Put a finished run into the model repository `repo_id`, made if it does not exist.

    Args:
        private: make it private; refused where it exists and is public.
        only: "best" leaves out the weights of every dictionary but the best one.
        endpoint: of the Hub (default: HF_ENDPOINT, else huggingface.co).

    Raises:
        UserError: no finished run in `run_dir`, a bad name, no token, no network, a refusal of the Hub.
    """
    from huggingface_hub import HfApi

    check_push(repo_id, "The repository")
    endpoint = endpoint or hub_endpoint()
    api = HfApi(endpoint=endpoint)
    failing = f"Could not push to {repo_id}"
    with said_plainly(failing):
        reach_hub(endpoint)  # first, and before PyTorch is imported: without a network there is nothing to wait for
    _read_run(run_dir)  # what is wrong here is said before anything is made there
    with said_plainly(failing):
        url = open_repository(api, repo_id, repo_type="model", private=private)
    files = push_files(run_dir, url.repo_id, only)
    with said_plainly(failing):
        head = str(api.repo_info(url.repo_id).sha)
        there = api.list_repo_files(url.repo_id, revision=head)
        message = f"Add the run {one_line(run_dir.resolve().name)}"
        commit = _commit(api, url.repo_id, files, _stale(files, there), message, head)
    return Pushed(str(url), commit, any(file.path == IMAGE for file in files))


def push_files(run_dir: Path, repo_id: str, only: Literal["best", "all"] = "all") -> list[PushFile]:
    """Everything that a push of the run puts into the repository, checksums.json the last.

    Raises:
        UserError: there is no finished run in `run_dir`.
    """
    from dictionary_learning.evaluation import best_of

    record, config, rows = _read_run(run_dir)
    best = best_of(rows)["trainer"]
    names = [best] if only == "best" else [f"trainer_{index}" for index in range(len(config.dictionaries))]
    local = {name: getattr(config, name) for name in ("corpus", "model_name") if _is_local(name, config)}
    shown = {value: last_part(value) for value in local.values()}
    image = front_image(rows, best)
    config = dataclasses.replace(
        config,
        corpus=shown.get(config.corpus, config.corpus),
        model_name=shown.get(config.model_name, config.model_name),
    )
    facts = CardFacts(repo_id, config, record, rows, best, names, tuple(local), image is not None)
    files = [PushFile("README.md", model_card(facts).encode())]
    files += [PushFile(IMAGE, image)] if image is not None else []
    files += [PushFile("run.json", _without_paths(run_dir / "run.json", shown))]
    files += [PushFile("summary.csv", run_dir / "summary.csv")]
    files += [PushFile(name, run_dir / name) for name in OPTIONAL_FILES if (run_dir / name).is_file()]
    for name in names:
        folder = run_dir / name
        files += [PushFile(f"{name}/config.json", _without_paths(folder / "config.json", shown))]
        files += [PushFile(f"{name}/{file}", folder / file) for file in DICTIONARY_FILES[1:]]
    listed = {file.path: dict(zip(("sha256", "size"), _checksum(file.source), strict=True)) for file in files}
    manifest = {"version": MANIFEST_VERSION, "best": best, "files": listed}
    return [*files, PushFile(MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())]


def push_command(run_dir: Path, repo_id: str, private: bool) -> str:
    """The command line that pushes this run later."""
    return shlex.join(["sae-factory", "push", str(run_dir), repo_id, *(["--private"] if private else [])])


def push_finished_run(run_dir: Path, repo_id: str, private: bool) -> bool:
    """Push at the end of a run, and say how that went; False where it failed, with the command for later."""
    try:
        pushed = push_run(run_dir, repo_id, private=private)
    except UserError as error:
        print_error(error)
        print(f"The results are whole in {run_dir}. Push them later with:\n  {push_command(run_dir, repo_id, private)}")
        return False
    _say(pushed)
    return True


def _say(pushed: Pushed) -> None:
    print(f"Pushed to {pushed.url} (commit {pushed.commit[:12]}).")
    if not pushed.image:
        print("Its card has no picture: matplotlib is not installed (pip install 'sae-factory[report]').")


# ---------------------------------------------------------------------------------------------- what is pushed


def _read_run(run_dir: Path) -> tuple[dict[str, Any], RunConfig, list[dict[str, Any]]]:
    """(run.json, its configuration, the rows of summary.csv) of a run that is whole."""
    from dictionary_learning.evaluation import read_summary
    from dictionary_learning.storage import read_json

    if not (run_dir / "run.json").is_file():
        raise UserError(f"There is no run in '{run_dir}': give the --save_dir of a finished run.")
    record = read_json(run_dir / "run.json")
    config = config_from_dict(record.get("config") if isinstance(record, dict) else None, str(run_dir / "run.json"))
    wanted = [f"trainer_{index}/{name}" for index in range(len(config.dictionaries)) for name in DICTIONARY_FILES]
    missing = [name for name in ["summary.csv", *wanted] if not (run_dir / name).is_file()]
    status = record.get("status")
    if missing or status not in ("complete", "stopped: end of stream"):
        why = f"{missing[0]} is missing" if missing else f"run.json says '{status}'"
        raise UserError(f"The run in '{run_dir}' is not finished ({why}): go on with it with --resume, then push.")
    root = run_dir.resolve()
    for name in ["run.json", "summary.csv", *wanted, *OPTIONAL_FILES]:
        if not (run_dir / name).resolve().is_relative_to(root):  # a stranger's run may point at anything of ours
            raise UserError(f"'{run_dir / name}' is a link out of the run: put what is to be pushed there itself.")
    rows = read_summary(run_dir / "summary.csv")
    if sorted(row["trainer"] for row in rows) != sorted(f"trainer_{i}" for i in range(len(config.dictionaries))):
        raise UserError(f"summary.csv and run.json in '{run_dir}' list different dictionaries: one is of another run.")
    return record, config, rows


def _is_local(setting: str, config: RunConfig) -> bool:
    """Whether the corpus or the model is a place on this disk, whose path is nobody's business."""
    value: str = getattr(config, setting)
    if value in ("embedded", "medical_qa") or value.startswith("hf://"):
        return False
    return setting == "corpus" or not is_hub_name(value) or Path(value).exists()


def _without_paths(file: Path, shown: Mapping[str, str]) -> Path | bytes:
    """A JSON file in which the paths of local places are cut to their last part; as it is where there are none."""

    from dictionary_learning.storage import read_json

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        if not isinstance(value, str):
            return value
        return shown.get(value) or (last_part(value) if os.path.isabs(value) else value)

    data = read_json(file)
    return file if cut(data) == data else (json.dumps(cut(data), indent=2) + "\n").encode()


def _checksum(source: Path | bytes) -> tuple[str, int]:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest(), len(source)
    with source.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest(), source.stat().st_size


def _stale(files: Sequence[PushFile], there: Sequence[str]) -> list[str]:
    """Files of an earlier push that this one does not have."""
    fresh = {file.path for file in files}
    return [path for path in there if path not in fresh and OWN_FILES.fullmatch(path)]


# ---------------------------------------------------------------------------------------------- how it is pushed


def _commit(api: Any, repo_id: str, files: Sequence[PushFile], stale: Sequence[str], message: str, head: str) -> str:
    """Make the files the head of the repository, all at once; the commit id of the head."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationDelete(path) for path in stale]
    operations += [CommitOperationAdd(file.path, file.source) for file in files]
    if len(operations) <= COMMIT_FILES:  # files that are there already are left out; with nothing new no commit is made
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=head).oid
    # upload_folder and upload_large_folder would put the parts on the main branch one by one
    digest = hashlib.sha256("\n".join([head, repr(_checksum(files[-1].source)), *stale]).encode()).hexdigest()
    title = f"{message} [{digest[:12]}]"  # the same push from the same head finds its pull request again
    mine = api.whoami()["name"]  # a stranger's pull request of the same title is not to be merged
    waiting = [
        pull.num
        for pull in api.get_repo_discussions(repo_id, discussion_status="open")
        if pull.title == title and pull.author == mine
    ]
    revision = f"refs/pr/{waiting[0]}" if waiting else None
    arrived = set(api.list_repo_files(repo_id, revision=revision)) if revision else set(stale)
    operations = [op for op in operations if not isinstance(op, CommitOperationDelete) or op.path_in_repo in arrived]
    for start in range(0, len(operations), COMMIT_FILES):
        part = operations[start : start + COMMIT_FILES]
        if revision is None:
            opened = api.create_commit(repo_id, part, commit_message=title, create_pr=True)
            revision = f"refs/pr/{opened.pr_num}"
        else:
            api.create_commit(repo_id, part, commit_message=title, revision=revision)
    assert revision is not None
    api.merge_pull_request(repo_id, int(revision.removeprefix("refs/pr/")))
    return api.repo_info(repo_id).sha


# ---------------------------------------------------------------------------------------------- the command


@dataclass
class PushArgs:
    """Push a finished run to a model repository on the Hugging Face Hub, as one commit with a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run (its --save_dir)."""
    repo: Annotated[str, tyro.conf.Positional]
    """Repository, like user/name; it is made if it does not exist."""
    private: bool = False
    """Make the repository private."""
    only: Literal["best", "all"] = "all"
    """The dictionaries to push."""


def push_main(argv: Sequence[str] | None = None) -> int:
    """The command: 0; 2 for what the user can mend (one sentence); 130 after Ctrl-C."""
    args = parse(PushArgs, argv, "sae-factory push")
    return exit_code(
        lambda: _say(push_run(args.run, args.repo, private=args.private, only=args.only)),
        "Interrupted: the repository is as it was. The same command finishes the push.",
    )
