"""`analyze`: what the dictionaries of a run learned, measured in one pass over text and written as plain files.

In: a run or a dictionary, and corpora. Out: an `AnalysisFolder`. One forward of the model serves all dictionaries; each
keeps statistics of its own, of bounded size (see docs/analysis.md). What the latents do to the model is measured
afterwards, a dictionary at a time.

The same command goes on with an analysis that was interrupted. Behind the pass its state stays until the last file is
written, and a dictionary whose table is there is not measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dictionary_learning import record, storage
from dictionary_learning.analysis.corpora import small_corpora
from dictionary_learning.analysis.density import dense_latents
from dictionary_learning.analysis.folder import (
    COMPLETE,
    DESCRIPTIONS,
    FEATURES,
    INFO,
    RUNNING,
    STATE,
    TEXTS,
    VOCABULARY,
    AnalysisFolder,
)
from dictionary_learning.analysis.mixed_texts import MOST_LABELS, OTHERS, NamedCorpus, open_corpora
from dictionary_learning.analysis.one_pass import Measures, OnePass
from dictionary_learning.analysis.plan import print_plan, size, too_much
from dictionary_learning.analysis.subjects import Subjects, load_reader, load_subjects, unit_of
from dictionary_learning.analysis.tables import write_dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.untrusted import listed

FEW_ROWS = 1000  # with fewer, rates of latents are hardly more than noise


class Stopped(Exception):
    """An analysis was stopped by a signal, named `reason`, after `seen` rows."""

    def __init__(self, reason: str, seen: str) -> None:
        super().__init__(f"stopped by {reason} after {seen}")
        self.reason, self.seen = reason, seen


def analyze(
    source: str | Path,
    *,
    corpus: Sequence[str] = (),
    against: Sequence[str] = (),
    measures: Measures | None = None,
    dictionaries: Sequence[str] = (),
    model_name: str | None = None,
    hook_point: str | None = None,
    ctx_len: int | None = None,
    batch_contexts: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
    state_every: int | None = None,
    dry_run: bool = False,
    automatic: bool = False,
    lm: Any = None,
) -> AnalysisFolder:
    """Analyse dictionaries on text, or go on with the analysis that is there; its folder, complete.

    Args:
        source, dictionaries, model_name, hook_point, ctx_len, batch_contexts: see `load_subjects`.
        corpus, against: see `open_corpora`; without a corpus that of the run.
        measures: what to measure.
        out: folder of the analysis; by default the folder `analysis` of the run.
        overwrite: drop an analysis of other settings that is there.
        state_every: batches between saved states; by default a fifth of the pass, 0 saves one only when stopped.
        dry_run: print what would be done and what that takes, and leave the folder as it is.
        automatic: it is made for the report of a run, and gives way to one of other settings without `overwrite`.
        lm: the model, where it is in memory already.

    Raises:
        UserError: anything about the dictionaries, the model, the corpora or the folder that can't be; no latent fires.
        Stopped: by SIGINT or SIGTERM, with its state saved; the same call goes on.
    """
    from dictionary_learning.devices import resolve_device
    from dictionary_learning.stopping import stop_requests

    measures = measures or Measures()
    if state_every is not None and state_every < 0:
        raise UserError(f"state_every must be at least 0, got {state_every}.")
    torch_device = resolve_device(device)
    subjects = load_subjects(
        source,
        chosen=dictionaries,
        model_name=model_name,
        hook_point=hook_point,
        ctx_len=ctx_len,
        batch_contexts=batch_contexts,
        device=torch_device,
    )
    folder = AnalysisFolder(_place(out, subjects))
    begun = _begun(folder)
    if not corpus and not subjects.config.corpus:
        raise UserError("A dictionary outside of a run has no corpus of its own: add --corpus.")
    pinned = _commits(subjects, None if overwrite else begun)
    corpora = open_corpora(corpus or [subjects.config.corpus], against, pinned)
    lm = load_reader(subjects, torch_device, lm)
    header = _header(subjects, lm, corpora, len(against), measures)
    header |= {"automatic": True} if automatic else {}
    if begun is not None and not overwrite:
        differing = _differing(begun, header)
        if begun["status"] != COMPLETE and not storage.saved_states(folder.path / STATE):
            overwrite = True  # it failed before anything was measured: nothing binds this one to its settings
        elif differing and begun.get("automatic"):
            overwrite = True
        elif differing:
            said = "is complete, of" if begun["status"] == COMPLETE else "began with"
            raise UserError(
                f"The analysis in '{folder.path}' {said} other settings ({', '.join(differing)}): give the same, "
                "another folder as --out, or --overwrite."
            )
        elif begun["status"] == COMPLETE:
            return folder
    one_pass = OnePass(subjects, lm, corpora, measures)
    if dry_run:
        print_plan(one_pass, subjects.config, lm, folder.path)
        return folder
    print(f"Memory: at most {size(one_pass.bytes_needed)} beside the model and the dictionaries.")
    if sentence := too_much(one_pass):
        warn(sentence)
    with _said_of(folder.path), stop_requests() as request:
        if begun is None or overwrite:
            _clear(folder, begun, header)
            folder.write_info(header)
        else:
            one_pass.load_state_dict(_newest_state(folder.path / STATE))
            print(f"Going on after {one_pass.rows:,} {one_pass.unit}s.")

        def stopped() -> bool:
            return bool(request.reason)

        if one_pass.run(folder.path / STATE, state_every, stopped) and _write(folder, header, one_pass, lm, stopped):
            return folder
    raise Stopped(request.reason, f"{one_pass.rows:,} {one_pass.unit}s")


def _write(
    folder: AnalysisFolder, header: dict[str, Any], one_pass: OnePass, lm: Any, stopped: Callable[[], bool]
) -> bool:
    """Write what the pass found, a dictionary at a time, and say so: whether it came to the end.

    Raises:
        UserError: there were no rows, or no latent of any dictionary fired.
    """
    if not one_pass.rows:
        _clear(folder, header, header)
        raise UserError("The corpus gave no row: every token was left out as special or by its norm.")
    measures, unit = one_pass.measures, one_pass.unit
    if one_pass.rows < FEW_ROWS:
        warn(f"only {one_pass.rows:,} {unit}s were seen, so that rates of latents are hardly more than noise.")
    kept = one_pass.kept_texts()
    if one_pass.texts.keep:
        folder.write_texts({number: {"corpus": label, "text": text} for number, (label, text) in kept.items()})
    texts = {number: text for number, (_, text) in kept.items()}
    entries = []
    for subject, entry in zip(one_pass.subjects, header["dictionaries"], strict=True):
        if stopped():
            return False
        statistics = one_pass.finish(subject.name)
        alive = int((statistics.active_F > 0).sum())
        entries.append(
            {
                **entry,
                "l0": float(statistics.active_F.sum() / statistics.rows),
                "alive": alive,
                "dead": len(statistics.active_F) - alive,
                "dense": len(dense_latents(statistics.density_F)),
            }
        )
        small = small_corpora(statistics) if len(statistics.corpora) > 1 and not entries[1:] else []
        if small:
            warn(f"too few documents to test what is specific to {listed(small)}: p and q are left empty.")
        if not alive:
            warn(f"no latent of {subject.name} fired on {one_pass.rows:,} {unit}s: the dictionary is dead.")
        if not (folder.path / subject.name / FEATURES).is_file():
            write_dictionary(
                folder,
                subject,
                statistics,
                lm=lm,
                texts=texts,
                effects=measures.effects,
                ablate=measures.ablate,
            )
    if OTHERS in one_pass.corpora:
        warn(
            f"the texts name more than {MOST_LABELS} corpora, the later ones are counted as '{OTHERS}': write "
            "NAME=PATH to count all of a corpus under one name."
        )
    if not any(entry["alive"] for entry in entries):
        _clear(folder, header, header)
        names = ", ".join(entry["name"] for entry in entries)
        raise UserError(
            f"No latent of {names} fired on {one_pass.rows:,} {unit}s, so there is nothing to analyse: were they "
            "trained, and on this model and hook point?"
        )
    fingerprints = [entry["fingerprint"] for entry in header["settings"]["corpora"]]
    folder.write_info(
        {
            **header,
            "status": COMPLETE,
            "corpora": {label: fingerprints[one_pass.texts.origin[label]] for label in one_pass.corpora},
            "rows": one_pass.rows,
            "documents": statistics.documents,
            "dictionaries": entries,
        }
    )
    shutil.rmtree(folder.path / STATE, ignore_errors=True)
    return True


# ---- the folder --------------------------------------------------------------------------------------------------


def _place(out: Path | None, subjects: Subjects) -> Path:
    """Where the analysis goes. Raises UserError where nobody says it."""
    if out is not None:
        return out.expanduser()
    if subjects.run is None:
        raise UserError("There is no run on this disk to put the analysis into: add --out.")
    return subjects.run / "analysis"


def _begun(folder: AnalysisFolder) -> dict[str, Any] | None:
    """analysis.json of the analysis that is there, None where there is none. Raises UserError for something else."""
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--out '{folder.path}' is a file: give a folder.")
    if (folder.path / INFO).is_file():
        return folder.info
    if folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(f"'{folder.path}' holds other files and no analysis: give a new or empty folder as --out.")
    return None


def _commits(subjects: Subjects, begun: dict[str, Any] | None) -> Callable[[str], Mapping[str, str] | None]:
    """At which commits a corpus on the Hub is read: those that an analysis began with, or that its run was given."""
    if begun is not None:
        known = begun.get("commits")
        at = {path: sha for path, sha in (known if isinstance(known, dict) else {}).items() if isinstance(sha, str)}
        return lambda spec: at
    own = None if subjects.run is None else record.commits_of(subjects.run, subjects.config).corpus
    return lambda spec: own if spec == subjects.config.corpus else None


def _newest_state(states: Path) -> Any:
    """Raises UserError where none is whole."""
    try:
        return storage.load_newest_state(states)[1]
    except UserError:
        raise UserError(f"The saved states in '{states}' are damaged: begin anew with --overwrite.") from None


@contextlib.contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    """Turn the system's refusals to write below `folder` into one sentence."""
    try:
        yield
    except OSError as error:
        if not os.fspath(error.filename or "").startswith(os.fspath(folder)):
            raise
        raise UserError(
            f"'{folder}' can't be written ({error.strerror or error}): mend that and give the same command again, "
            "which goes on, or give another folder as --out."
        ) from error


def _header(
    subjects: Subjects, lm: Any, corpora: Sequence[NamedCorpus], against: int, measures: Measures
) -> dict[str, Any]:
    """What analysis.json says before the first row: nothing of this machine, no path, no time."""
    config = subjects.config
    model = storage.finite(lm.config)
    names = [entry.name for entry in corpora]
    commits = {path: sha for entry in corpora for path, sha in entry.corpus.commits.items()}
    return {
        "status": RUNNING,
        "settings": {
            **dataclasses.asdict(measures),
            "ctx_len": config.ctx_len,
            "batch_contexts": config.harvest_contexts,
            "remove_bos": config.remove_bos,
            "max_activation_norm_multiple": config.max_activation_norm_multiple,
            "heldout_fraction": config.heldout_fraction,
            "sentence": None if config.sentence is None else dataclasses.asdict(config.sentence),
            "corpora": [
                {"name": entry.name, "fingerprint": entry.corpus.fingerprint}
                | ({"label": entry.label} if entry.label else {})
                for entry in corpora
            ],
            "against": names[len(names) - against :],
        },
        "model": {**model, "name": "embedded" if config.model_name == "embedded" else model["name"]},
        "corpora": {},
        **({"commits": commits} if commits else {}),
        "rows": 0,
        "documents": 0,
        "unit": unit_of(config),
        "dictionaries": [subject.facts | {"results": subject.results} for subject in subjects.dictionaries],
        "versions": record.package_versions(),
    }


def _differing(begun: dict[str, Any], header: dict[str, Any]) -> list[str]:
    """Names of the settings in which an analysis that began is of another kind."""

    def identity(info: dict[str, Any]) -> dict[str, Any]:
        entries = [tuple(map(entry.get, ("name", "weights", "hook_point"))) for entry in info["dictionaries"]]
        return {**info["settings"], "dictionaries": entries, "model": info.get("model", {}).get("weights")}

    before, now = identity(begun), identity(header)
    return [key for key in now if before.get(key) != now[key]]


def _clear(folder: AnalysisFolder, begun: dict[str, Any] | None, header: dict[str, Any]) -> None:
    """Remove what an analysis wrote; descriptions, which may have cost money, only where the dictionary is another."""
    now = {entry["name"]: entry["weights"] for entry in header["dictionaries"]}
    for name in (INFO, VOCABULARY, TEXTS):
        (folder.path / name).unlink(missing_ok=True)
    shutil.rmtree(folder.path / STATE, ignore_errors=True)
    for entry in begun["dictionaries"] if begun else []:
        place = folder.path / entry["name"]
        same = now.get(entry["name"]) == entry.get("weights")
        for file in place.iterdir() if place.is_dir() else []:
            if file.name != DESCRIPTIONS or not same:
                file.unlink()
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def warn(sentence: str) -> None:
    print(f"Warning: {sentence}", file=sys.stderr)
