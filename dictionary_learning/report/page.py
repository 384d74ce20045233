"""`report.html`: one file that holds the page, its code, and the parts that it unpacks when they are asked for.

In: a run's folder, with its analysis where there is one. Out: HTML. The same files give the same bytes.

The page may load nothing: its content security policy allows one style and one script, by their hashes, and forbids
every connection. The parts stand behind the script, so that the page works while a browser still reads them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dictionary_learning import __version__
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.subjects import trained_on
from dictionary_learning.analysis.types import Examples
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.report.data import RunData, read_run
from dictionary_learning.report.details import Source
from dictionary_learning.report.features import ALL, Parts, corpora_of, fitting_parts, read_source
from dictionary_learning.report.parts import compressed, element, packed_json
from dictionary_learning.untrusted import listed

MAX_MB = 60.0
STYLES = ("page.css", "sections.css", "feature.css", "print.css")
SCRIPTS = (  # in this order
    "text.js",
    "parts.js",
    "state.js",
    "tooltip.js",
    "axes.js",
    "front.js",
    "curves.js",
    "histograms.js",
    "head.js",
    "dictionaries.js",
    "columns.js",
    "texts.js",
    "table.js",
    "examples.js",
    "feature.js",
    "keys.js",
    "main.js",
)
RESERVE = 100_000  # bytes for what the page is told of the parts
BINS = 40  # of log10 density from -10 (latents that never fired) to 0
LOWEST = -10.0


def report_html(folder: Path, max_mb: float = MAX_MB, only: tuple[str, int] | None = None) -> str:
    """The report of the run in `folder`.

    Args:
        max_mb: the most that it may take, in millions of bytes; fewer examples are kept where all take more.
        only: (dictionary, latent): a page that shows this latent alone.

    Raises:
        UserError: there is no run, a file is damaged, the analysis has no such dictionary or latent.
    """
    if not max_mb > 0:
        raise UserError(f"max_mb must be positive, got {max_mb:g}.")
    data = read_run(folder)
    analysis, sources = _analysis(folder, data)
    if only is not None:
        sources = [_chosen(sources, *only)]
    app = "\n".join(["'use strict';", "(() => {", *(_asset(name) for name in SCRIPTS), "})();"])
    style = "\n".join(_asset(name) for name in STYLES)
    page = _asset("page.html")
    parts = None
    if analysis is not None and sources:
        told = len(compressed([("run", packed_json(_told(data, None, sources, None)))])["run"])
        room = int(min(max_mb, 1e6) * 1e6) - len(app) - len(style) - len(page) - told - RESERVE
        parts = fitting_parts(analysis, sources, data.names, max(room, 0))
    facts = _told(data, analysis, sources, parts)
    if only is not None:
        facts["only"] = {"dictionary": data.names.index(only[0]), "feature": only[1]}
    return _assembled(page, style, app, data.name, facts, _encoded(parts, only, data))


def _assembled(page: str, style: str, app: str, name: str, told: dict[str, Any], encoded: dict[str, str]) -> str:
    """The template with everything in its place."""
    if "</script" in app or "<!--" in app or "</style" in style:
        raise AssertionError("the page's own code must not hold what ends its element")
    first = compressed([("run", packed_json(told))])
    tables = [name for name in encoded if name.endswith("/table") or name == "vocabulary"]
    early = [element(name, text) for name, text in [*first.items(), *((t, encoded[t]) for t in tables)]]
    late = [element(name, text) for name, text in encoded.items() if name not in tables]
    head, middle, end = page.split("{{parts}}")
    head = (
        head.replace("{{script_hash}}", _sha256(app))
        .replace("{{style_hash}}", _sha256(style))
        .replace("{{title}}", html.escape(_printable(name)))
        .replace("{{style}}", style)
    )
    return "".join([head, *early, middle.replace("{{script}}", app), *late, end])


def _analysis(folder: Path, data: RunData) -> tuple[AnalysisFolder | None, list[Source]]:
    """The run's complete analysis, or None with a note of what would make one."""
    command = shlex.join(["sae-factory", "analyze", data.name])
    if not (folder / "analysis" / "analysis.json").is_file():
        text = "What the latents fire on is not known yet: an analysis of the run adds it, then write the report again."
        data.notes.append({"kind": "info", "text": text, "command": command})
        return None, []
    analysis = AnalysisFolder(folder / "analysis")
    if analysis.info["status"] != "complete":
        text = "The analysis of this run is not complete: the command that began it, given again, goes on."
        data.notes.append({"kind": "warning", "text": text, "command": command})
        return None, []
    known = [name for name in analysis.names if name in data.names]
    if old := trained_on(folder, [entry for entry in analysis.info["dictionaries"] if entry["name"] in known]):
        text = f"{listed(old)}: trained on since the analysis, which tells of the weights before. To make it again:"
        data.notes.append({"kind": "warning", "text": text, "command": f"{command} --overwrite"})
    return analysis, [read_source(analysis, name) for name in known]


def _chosen(sources: list[Source], name: str, feature: int) -> Source:
    """The source of one dictionary, if it has the latent."""
    names = [source.name for source in sources]
    if name not in names:
        known = ", ".join(names) or "none"
        raise UserError(f"No dictionary '{name}' was analysed, but {known}.{did_you_mean(name, names)}")
    source = sources[names.index(name)]
    if not 0 <= feature < source.features:
        raise UserError(f"{name} has latents 0 to {source.features - 1}, not {feature}.")
    alone = [_without_others(part, feature) for part in (source.top, source.samples)]
    return dataclasses.replace(source, top=alone[0], samples=alone[1])


def _without_others(part: Examples, feature: int) -> Examples:
    document_FE = np.full_like(part.document_FE, -1)
    document_FE[feature] = part.document_FE[feature]
    return part._replace(document_FE=document_FE)


def _told(data: RunData, analysis: AnalysisFolder | None, sources: list[Source], parts: Parts | None) -> dict[str, Any]:
    """What the page knows from the start."""
    by_name = {source.name: source for source in sources}
    dictionaries = []
    for dictionary in data.dictionaries:
        source = by_name.get(dictionary["name"])
        more = {} if source is None else {"features": source.features, "histogram": _histogram(source)}
        dictionaries.append({**dictionary, **more})
    told: dict[str, Any] = {
        "version": __version__,
        "name": data.name,
        "status": data.status,
        "facts": data.facts,
        "versions": data.versions,
        "notes": data.notes,
        "best": data.best,
        "dictionaries": dictionaries,
        "metrics": data.metrics,
        "curves": data.curves,
    }
    if analysis is not None and parts is not None:
        corpora = corpora_of(analysis)
        tested = [c for c in corpora if sources and f"rate:{c}" in sources[0].table]
        info = analysis.info
        told["analysis"] = {
            "corpora": corpora,
            "tested": tested,
            "unit": str(info.get("unit")),
            "rows": info.get("rows") if isinstance(info.get("rows"), int) else None,
            "documents": info.get("documents") if isinstance(info.get("documents"), int) else None,
            **parts.facts,
            "kept": _kept(parts),
        }
    return told


def _kept(parts: Parts) -> str:
    """What was left out to keep the file small, or nothing."""
    top, samples = parts.level
    if top == ALL and samples == ALL:
        return ""
    texts = "all top texts" if top == ALL else f"{top} top texts" if top else "no texts"
    more = "" if samples == ALL else f" and {samples} samples" if samples else " and no samples"
    return f"To keep this file small it holds {texts}{more} a latent. The analysis has more: write the report with a "


def _histogram(source: Source) -> dict[str, Any]:
    """Latents by log10 density; those that never fired are told apart."""
    density = np.asarray(source.table["density"], float)
    alive = density[density > 0]
    counts, _ = np.histogram(np.log10(alive).clip(LOWEST, 0), bins=BINS, range=(LOWEST, 0))
    return {"dead": int(len(density) - len(alive)), "counts": counts.tolist(), "low": LOWEST}


def _encoded(parts: Parts | None, only: tuple[str, int] | None, data: RunData) -> dict[str, str]:
    if parts is None:
        return {}
    if only is None:
        return parts.encoded
    chunk = f"d{data.names.index(only[0])}/{only[1] // parts.facts['chunk']}"
    return {k: v for k, v in parts.encoded.items() if not k.startswith("d") or k.endswith("/table") or k == chunk}


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
