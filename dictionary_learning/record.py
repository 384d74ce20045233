"""run.json: what a run computes and what it ran on, and whether a resume would still compute the same."""

from __future__ import annotations

import datetime
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dictionary_learning import __version__, storage
from dictionary_learning.config import RunConfig, config_from_dict
from dictionary_learning.distributed import job
from dictionary_learning.errors import UserError
from dictionary_learning.resume import Difference, differences, refuse

if TYPE_CHECKING:
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.corpus import Corpus
    from dictionary_learning.training_run import TrainingRun

PROBE = "Paracetamol 500 mg, 3×/day:\n\n\tO'Brien's née «Weiß» had 頭痛 at -0.5 °C  (see Dr. A.B.)!"  # for tokenizers


def package_versions() -> dict[str, str]:
    """Of this program and of what it computes with."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"sae-factory": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "nnsight", "transformers", "datasets", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def run_record(config: RunConfig, lm: TracedLM, corpus: Corpus, device: Any) -> dict[str, Any]:
    """What run.json says: the configuration, and what it ran on."""
    return {
        "status": "running",
        "config": config.to_dict(),
        "corpus_fingerprint": corpus.fingerprint,
        **({"corpus_commits": dict(corpus.commits)} if corpus.commits else {}),
        "model": storage.finite(lm.config)
        | {"tokenizer": tokenizer_digest(lm.tokenizer), **folder_digest(config.model_name)},
        "device": str(device),
        "versions": package_versions(),
        "git_revision": git_revision(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells a tokenizer from another: its vocabulary, and what it makes of a text of all kinds of characters."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"], tokenizer.all_special_ids]
    return hashlib.sha256(repr(known).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def folder_digest(model_name: str) -> dict[str, str]:
    """{"config": what tells one config.json of a local model folder from another}, which says what the weights don't
    (the activation function, the epsilon of norms); empty for a model by name, whose commit says it all."""
    file = Path(model_name) / "config.json"
    if model_name == "embedded" or not file.is_file():
        return {}
    said = storage.read_json(file)
    for name in ("_name_or_path", "transformers_version"):  # where it lay, and what wrote it
        said.pop(name, None)
    return {"config": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]}


class Commits(NamedTuple):
    """At which commits on the Hub a run reads its model and its corpus; None: at the newest."""

    model: str | None = None
    corpus: Mapping[str, str] | None = None


def commits_of(save_dir: Path, config: RunConfig) -> Commits:
    """Those that the run in `save_dir` began with, as far as its model and corpus are those of `config`. Raises
    UserError where its run.json is damaged."""
    found = storage.read_json(save_dir / "run.json")
    record = found if isinstance(found, dict) else {}
    settings, model, commits = (
        part if isinstance(part := record.get(key), dict) else {} for key in ("config", "model", "corpus_commits")
    )
    revision = model.get("revision") if settings.get("model_name") == config.model_name else None
    at = {path: commit for path, commit in commits.items() if isinstance(commit, str)}
    return Commits(
        revision if isinstance(revision, str) else None, at if settings.get("corpus") == config.corpus else None
    )


def git_revision() -> str | None:
    """The commit of the checkout that this file lies in, or None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def check_resumable(save_dir: Path, config: RunConfig, record: dict[str, Any], override: bool = False) -> list[str]:
    """Refuse to go on with another configuration, corpus or model than the run began with. More tokens are the same
    run made longer.

    Args:
        record: `run_record` of now; what goes on from the run's own record (when it began, earlier resumes and what
            they changed) is entered into it.

    Returns:
        warnings: what differs and `override` allows, and what may change the last bits (versions, the device).

    Raises:
        UserError: names each field that differs, with what it was and what it is.
    """
    path = save_dir / "run.json"
    old = storage.read_json(path)
    if not isinstance(old, dict) or not isinstance(old.get("model"), dict) or "config" not in old:
        raise UserError(f"'{path}' is no record of such a run: give the --save_dir of a run of this command.")
    was = config_from_dict(old["config"], str(path))
    states = old.get("states")
    had_one = isinstance(states, dict) and states.get("newest") is not None
    if (had_one or old.get("status") == "complete") and not storage.saved_states(save_dir / "state"):
        raise UserError(
            f"The run in '{save_dir}' has no saved state any more (its state/ is gone): it can't go on. Give another "
            "folder, or start it anew with --overwrite in place of --resume."
        )
    found = [d for d in differences(was.to_dict(), config.to_dict()) if not _is_longer(d)]
    changed = refuse(f"The run in '{save_dir}'", found, override)
    weights, tokenizer = record["model"]["weights"], record["model"]["tokenizer"]
    settings = record["model"].get("config")
    for what, before, now in (
        (f"The weights of '{config.model_name}' have", old["model"].get("weights"), weights),
        (f"The tokenizer of '{config.model_name}' has", old["model"].get("tokenizer", tokenizer), tokenizer),
        (f"The config.json of '{config.model_name}' has", old["model"].get("config", settings), settings),
        (f"The corpus '{config.corpus}' has", old.get("corpus_fingerprint"), record["corpus_fingerprint"]),
    ):
        if before != now and not override:
            raise UserError(
                f"{what} changed since the run in '{save_dir}' began ({str(before)[-16:]} -> {str(now)[-16:]}): go "
                "back to what it was, start anew, or add --override."
            )
        changed += [f"{what} changed"] if before != now else []
    record["started"] = old.get("started", record["started"])
    versions = old.get("versions")
    began_on = {"device": old.get("device"), "git_revision": old.get("git_revision")}
    began_on |= versions if isinstance(versions, dict) else {}
    goes_on = {"device": record["device"], "git_revision": record["git_revision"], **record["versions"]}
    bits = [d for d in differences(began_on, goes_on) if d.old is not None]
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    before_this = old.get("resumed")
    record["resumed"] = [
        *(before_this if isinstance(before_this, list) else []),
        {"time": time, "changed": [*changed, *map(str, bits)]},
    ]
    return [
        *(f"{change}: from here on it is not the run that began." for change in changed),
        *(f"{d}: the last bits may differ from those of an unbroken run." for d in bits),
    ]


def _is_longer(difference: Difference) -> bool:
    return difference.field == "num_tokens" and difference.new > difference.old


def outcome(run: TrainingRun, seconds: float) -> dict[str, Any]:
    """What run.json says of a training that has ended: how far it came, what its states cost, what could not go on."""
    states = run.states
    assert states is not None
    facts: dict[str, Any] = {
        "steps_done": run.step,
        "tokens_done": run.tokens,
        "states": {
            "newest": states.saved_step,
            "written": states.written,
            "seconds_stood_still": round(states.blocked, 3),
            "of_seconds": round(seconds, 3),
            "host_memory_bytes": states.nbytes,
        },
    }
    stopped = run.ranks.merged(run.stopped_dictionaries)
    return facts | ({"stopped_dictionaries": stopped} if stopped else {})


def kept_state(run: TrainingRun) -> str:
    """Which state a resume goes on from."""
    assert run.states is not None
    kept = run.states.saved_step
    if kept == run.step:
        return "its state is saved"
    return "no state could be saved" if kept is None else f"the newest state that could be saved is of step {kept:,}"


def resume_command() -> str:
    """The command line that goes on with this run."""
    dropped = ("--overwrite", "--no-overwrite", "--resume", "--override", "--no-override")
    given = [argument for argument in sys.argv if argument not in dropped]
    start = [given[0]]
    if given[0].endswith("__main__.py"):
        start = [*job.launcher(), "-m", "dictionary_learning"]
    elif given[0].endswith(".py"):
        start = [*job.launcher(), given[0]]
    if start[0] == "python" and shutil.which("python") != sys.executable:
        start[0] = sys.executable or "python"  # `python` on this machine is another one, or none
    return shlex.join([*start, *given[1:], "--resume"])
