"""The files of an analysed run, as the report and the tables of an analysis read them.

Out: `REPORT_TARGETS`, rows as of `fuzz_targets`. A run that somebody shares is reported on by others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.types import Probes
from tests.analysis_cases import statistics
from tests.report.report_cases import make_analysis, make_run, make_whole_texts

LATENTS = 8


def _analysed(folder: Path) -> None:
    """A run of one dictionary whose latents fire on tokens."""
    make_run(folder, dictionaries=1, width=LATENTS)
    analysis = make_analysis(folder, ["trainer_0"], LATENTS, top=2, samples=3, window=4)
    found = statistics(latents=LATENTS, window=4)
    top, samples = analysis.examples("trainer_0")
    probes = Probes(*(np.zeros((3, 2), np.int32) for _ in Probes._fields))
    found = dataclasses.replace(found, top=top, samples=samples, probes=probes)
    analysis.write_statistics("trainer_0", found)
    described = {"description": "aa", "score": 0.5, "model": "m", "prompt": "p", "label": "x"}
    analysis.write_descriptions("trainer_0", {1: described, 2: described})


def _analysed_texts(folder: Path) -> None:
    """One whose latents fire on whole texts."""
    make_run(folder, dictionaries=1, width=LATENTS)
    make_whole_texts(folder, [f"text {n}" for n in range(9)], LATENTS)


def _report(folder: Path) -> None:
    """What `sae-factory report` does."""
    from dictionary_learning.report.page import report_html

    report_html(folder).encode()


def _statistics(folder: Path) -> None:
    analysis = AnalysisFolder.open(folder)
    for name in analysis.names:
        analysis.statistics(name)
        analysis.probes(name)


Row = tuple[str, str, str, Callable[[Path], Any], Callable[[Path], Any]]
HERE = "analysis/trainer_0"
REPORT_TARGETS: list[Row] = [
    ("report_run", "run.json", "json", _analysed, _report),
    ("report_metrics", "metrics.jsonl", "jsonl", _analysed, _report),
    ("report_config", "trainer_0/config.json", "json", _analysed, _report),
    ("report_results", "trainer_0/eval_results.json", "json", _analysed, _report),
    ("analysis_info", "analysis/analysis.json", "json", _analysed, _report),
    ("analysis_vocabulary", "analysis/vocabulary.json", "json", _analysed, _report),
    ("analysis_texts", "analysis/texts.json", "json", _analysed_texts, _report),
    ("analysis_descriptions", f"{HERE}/descriptions.json", "json", _analysed, _report),
    ("analysis_examples", f"{HERE}/examples.safetensors", "safetensors", _analysed, _report),
    ("analysis_table", f"{HERE}/features.parquet", "parquet", _analysed, _report),
    ("analysis_statistics", f"{HERE}/statistics.safetensors", "safetensors", _analysed, _statistics),
    ("analysis_probes", f"{HERE}/probes.safetensors", "safetensors", _analysed, _statistics),
]
