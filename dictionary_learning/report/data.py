"""What the report tells of a run, gathered from the files of its folder.

In: run.json, metrics.jsonl, summary.csv, trainer_*/config.json and eval_results.json. Out: `RunData`, plain JSON.

A report is wanted most of a run that went wrong, so any of these files but run.json may be missing, a log may end in
half a line, and a number may be null. What is there but can't be read at all is said in one sentence.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dictionary_learning import storage
from dictionary_learning.errors import UserError
from dictionary_learning.untrusted import names_folder

POINTS = 150  # of a training curve
QUALITIES = {"frac_recovered": "front_recovered", "frac_variance_explained": "front_explained"}
MEASURED = ("l0", "frac_recovered", "frac_variance_explained", "mse", "kl", "cossim", "frac_alive", "tokens")
CURVES = {  # name in the page: heading, name in metrics.jsonl
    "loss": ("Loss", "loss"),
    "l0": ("L0", "l0"),
    "explained": ("Explained variance", "frac_variance_explained"),
    "dead": ("Dead share", "dead_latents"),
    "silent": ("Silent in the batch", "nz_frac"),
}


@dataclass
class RunData:
    """name: of the folder. status: {"kind": complete | running | stopped, "text"}. facts, versions: [label, value]
    pairs. notes: {"kind": warning | info, "text"} each, with a "command" where one helps. dictionaries: a dict each, in
    the order of their numbers. curves: {name: {"tokens": [...], metric: [...]}}. best: name of the best on the front.
    metrics: {metric: heading} of the curves that there are."""

    folder: Path
    name: str
    status: dict[str, str]
    facts: list[list[str]]
    versions: list[list[str]]
    notes: list[dict[str, str]]
    dictionaries: list[dict[str, Any]]
    curves: dict[str, dict[str, list[float | None]]]
    best: str | None = None
    metrics: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [dictionary["name"] for dictionary in self.dictionaries]


def read_run(folder: Path) -> RunData:
    """Raises UserError: there is no run in the folder, or a file of it is damaged."""
    if not (folder / "run.json").is_file():
        hint = "" if not folder.is_dir() or not any(folder.iterdir()) else ", with its run.json"
        raise UserError(f"There is no run in '{folder}': give the save_dir of a run{hint}.")
    record = _object(folder / "run.json")
    rows = _log_rows(folder / "metrics.jsonl")
    curves = _curves(rows)
    summary = _summary_rows(folder / "summary.csv")
    specs = _list(_dict(record.get("config")).get("dictionaries"))
    names = {f"trainer_{index}" for index in range(len(specs))} | set(curves) | set(summary)
    names |= {path.parent.name for path in folder.glob("trainer_*/config.json")}
    stopped = _stopped(record)
    dictionaries = []
    for name in sorted(names, key=_by_number):
        number = name.removeprefix("trainer_")
        spec = _dict(specs[int(number)]) if number.isdecimal() and int(number) < len(specs) else {}
        entry = _dictionary(folder / name, name, spec, summary.get(name, {}), curves.get(name))
        dictionaries.append({**entry, "stopped": stopped.get(name) or _why_short(name, rows, curves)})
        if name in curves:  # the log has their number
            curves[name]["dead"] = [
                v / entry["width"] if v is not None and entry["width"] else None for v in curves[name]["dead"]
            ]
    if not dictionaries:
        raise UserError(f"The run in '{folder}' has no dictionary yet: there is nothing to report.")
    for quality, front in QUALITIES.items():
        _mark_front(dictionaries, quality, front)
    status = _status(record)
    data = RunData(
        folder=folder,
        name=folder.resolve().name,
        status=status,
        facts=_facts(record, dictionaries, rows),
        versions=[[str(k), str(v)] for k, v in _dict(record.get("versions")).items()]
        + ([["revision", str(record["git_revision"])[:12]]] if record.get("git_revision") else []),
        notes=_notes(status, dictionaries),
        dictionaries=dictionaries,
        curves={name: _thinned(curve) for name, curve in curves.items()},
        best=_best(dictionaries),
    )
    kept = {
        metric for curve in data.curves.values() for metric, values in curve.items() if any(map(_is_number, values))
    }
    data.metrics = {metric: heading for metric, (heading, _) in CURVES.items() if metric in kept}
    return data


def _dictionary(
    folder: Path, name: str, spec: Mapping[str, Any], summary: Mapping[str, Any], curve: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is known of one dictionary, by what was measured on held-out text or else by its last batch."""
    trainer = _dict(_object(folder / "config.json").get("trainer")) if (folder / "config.json").is_file() else {}
    measured = dict(summary)
    if (folder / "eval_results.json").is_file():
        measured |= _object(folder / "eval_results.json")
    sparsity = spec.get("sparsity") or {k: trainer[k] for k in ("k", "target_l0", "l1_penalty") if trainer.get(k)}
    said = " ".join(f"{k} = {v:g}" if _is_number(v) else f"{k} = {v}" for k, v in _dict(sparsity).items())
    entry = {
        "name": name,
        "architecture": str(
            trainer.get("architecture") or spec.get("architecture") or summary.get("architecture") or "?"
        ),
        "dict_class": str(trainer.get("dict_class") or ""),
        "hook_point": str(trainer.get("submodule_name") or spec.get("hook_point") or summary.get("hook_point") or "?"),
        "width": _number(trainer.get("dict_size") or spec.get("width") or summary.get("width")),
        "sparsity": said or str(summary.get("sparsity") or ""),
        "lr": _number(trainer.get("lr") or spec.get("lr")),
        "seed": _number(trainer.get("seed", spec.get("seed"))),
        **{key: _number(measured.get(key)) for key in MEASURED},
        "measured": "heldout" if _number(measured.get("l0")) is not None else None,
    }
    if entry["measured"] is None and curve is not None:
        last = {metric: next((v for v in reversed(values) if v is not None), None) for metric, values in curve.items()}
        entry |= {"l0": last.get("l0"), "frac_variance_explained": last.get("explained"), "measured": "batch"}
    return entry


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """{dictionary: {"tokens", metric: values}}; `silent` is the share of latents that no row of the batch made fire."""
    curves: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        curve = curves.setdefault(str(row["trainer"]), {name: [] for name in ("tokens", *CURVES)})
        curve["tokens"].append(_number(row.get("tokens", row.get("step"))))
        for name, (_, key) in CURVES.items():
            value = _number(row.get(key))
            curve[name].append(1 - value if name == "silent" and value is not None else value)
    return curves


def _thinned(curve: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """At most `POINTS` of them, evenly, with the last; numbers with five digits."""
    count = len(curve["tokens"])
    step = max(1, math.ceil(count / POINTS))
    chosen = sorted({*range(0, count, step), count - 1})
    return {
        name: [None if (v := values[i]) is None else float(f"{v:.5g}") for i in chosen]
        for name, values in curve.items()
        if name == "tokens" or any(value is not None for value in values)
    }


def _mark_front(dictionaries: list[dict[str, Any]], quality: str, front: str) -> None:
    """`front` where no other dictionary of the hook point has as low an L0 and is as good, among those evaluated where
    there are any: what a training batch says is no match for held-out text."""
    best: dict[str, float] = {}
    known = [d for d in dictionaries if d["l0"] is not None and d[quality] is not None]
    known = [d for d in known if d["measured"] == "heldout"] or known
    for dictionary in dictionaries:
        dictionary[front] = False
    for dictionary in sorted(known, key=lambda d: (d["l0"], -d[quality])):
        dictionary[front] = dictionary[quality] > best.get(dictionary["hook_point"], -math.inf)
        best[dictionary["hook_point"]] = max(dictionary[quality], best.get(dictionary["hook_point"], -math.inf))


def _best(dictionaries: list[dict[str, Any]]) -> str | None:
    """As `summary.best_of`: on the front, the one that recovers the most; of equals the sparsest."""
    for quality, front in QUALITIES.items():
        if found := [d for d in dictionaries if d[front]]:
            return max(found, key=lambda d: (d[quality], -d["l0"]))["name"]
    return None


def _status(record: Mapping[str, Any]) -> dict[str, str]:
    said = str(record.get("status") or "unknown")
    if said == "complete":
        return {"kind": "complete", "text": "complete"}
    if said == "stopped: end of stream":
        return {"kind": "stopped", "text": "incomplete: the text ended before the run did"}
    if said.startswith("stopped"):
        return {"kind": "stopped", "text": f"stopped ({said.partition(': ')[2] or 'no reason given'})"}
    if said.startswith("failed"):
        return {"kind": "stopped", "text": said.removesuffix(".")}
    if said == "running":
        return {"kind": "running", "text": "running, or broken off"}
    return {"kind": "running", "text": said}


def _stopped(record: Mapping[str, Any]) -> dict[str, str]:
    """{dictionary: why} of those that were stopped while the others went on, as run.json says."""
    return {str(name): str(why) for name, why in _dict(record.get("stopped_dictionaries")).items()}


def _why_short(name: str, rows: list[dict[str, Any]], curves: Mapping[str, Any]) -> str | None:
    """What the log says of a dictionary that ends before the others, or whose loss is no number any more."""
    mine = [row for row in rows if row["trainer"] == name]
    if not mine:
        return "not in the log" if curves else None
    last, of_all = mine[-1], max(_number(row.get("step")) or 0 for row in rows)
    step = _number(last.get("step")) or 0
    if _number(last.get("loss")) is None:
        return f"its loss at step {step:,.0f} is not a number"
    return f"its log ends at step {step:,.0f} of {of_all:,.0f}" if step < of_all else None


def _facts(
    record: Mapping[str, Any], dictionaries: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> list[list[str]]:
    config, model = _dict(record.get("config")), _dict(record.get("model"))
    activations = _dict(record.get("activations"))  # of `sae-factory fit`
    about = [str(model["architecture"])] if model.get("architecture") else []
    if (parameters := _number(model.get("parameters"))) is not None:
        about.append(f"{parameters / 1e6:,.1f} M parameters")
    name = config.get("model_name") or model.get("name")
    tokens = _number(record.get("tokens_done")) or max((_number(row.get("tokens")) or 0 for row in rows), default=0)
    planned = _number(config.get("num_tokens"))
    trained = f"{tokens:,.0f} activations" if tokens else ""
    if trained and planned and tokens < planned and record.get("status") != "complete":
        trained += f" of {planned:,.0f}"
    widths = sorted({d["width"] for d in dictionaries if d["width"]})
    said = [f"{width:,.0f}" for width in widths]
    sizes = " or ".join(filter(None, [", ".join(said[:-1]), *said[-1:]]))
    each = "each " if len(widths) == 1 < len(dictionaries) else ""
    heldout = next((d["tokens"] for d in dictionaries if d["tokens"]), None)
    facts = [
        ["Model", " · ".join([str(name), *about]) if name else ""],
        ["Hook points", ", ".join(dict.fromkeys(d["hook_point"] for d in dictionaries))],
        ["Corpus", str(config.get("corpus") or activations.get("path") or "")],
        ["Dictionaries", f"{len(dictionaries)}, {each}of {sizes or '?'} latents"],
        ["Trained on", trained],
        ["Evaluated on", f"{heldout:,.0f} held-out activations" if heldout else ""],
        ["Started", str(record.get("started") or "").replace("T", " ").removesuffix("+00:00")],
    ]
    return [[label, value] for label, value in facts if value]


def _notes(status: Mapping[str, str], dictionaries: list[dict[str, Any]]) -> list[dict[str, str]]:
    notes = []
    if status["kind"] != "complete":
        notes.append({"kind": "warning", "text": f"This run is not complete: {status['text']}."})
    for dictionary in dictionaries:
        if dictionary["stopped"]:
            notes.append(
                {
                    "kind": "warning",
                    "text": f"{dictionary['name']} was stopped: {dictionary['stopped'].removesuffix('.')}.",
                }
            )
    if batch := [d for d in dictionaries if d["measured"] == "batch"]:
        said = "No dictionary was" if len(batch) == len(dictionaries) else "Not every dictionary was"
        said += " evaluated: hollow points are from the last batch of the training."
        notes.append({"kind": "warning", "text": said})
    return notes


def _summary_rows(path: Path) -> dict[str, dict[str, Any]]:
    """{dictionary: its row}; a pulled run has rows of dictionaries whose folders are elsewhere."""
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"'{path}' is not a run's summary ({type(error).__name__}: {error}).") from error
    if rows and "trainer" not in rows[0]:
        raise UserError(f"'{path}' is not a run's summary: it has no column 'trainer'.")
    words = ("trainer", "architecture", "hook_point", "sparsity")
    return {
        str(row["trainer"]): {key: value if key in words else _number(value) for key, value in row.items()}
        for row in rows
        if names_folder(row["trainer"])
    }


def _log_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that name a dictionary's folder; one cut short by a crash is passed over."""
    if not path.is_file():
        return []
    rows = []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and names_folder(row.get("trainer")):
                rows.append(row)
    except OSError as error:
        raise UserError(f"'{path}' can't be read: {error.strerror or error}.") from error
    return rows


def _object(path: Path) -> dict[str, Any]:
    value = storage.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"'{path}' should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    """A finite number, also of a CSV's words; else None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if _is_number(value) else None


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
