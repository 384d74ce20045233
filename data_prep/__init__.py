"""Medical QA records -> one table of `text` and `source_dataset`, on disk or on the Hub.

`stream_texts` is the one call that the rest of SAE Factory uses; `python -m data_prep` writes and publishes the table.
Names are imported on first use: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.formats import (
        RecordError,
        format_medmcqa,
        format_medqa,
        format_mmlu,
        format_pubmed_qa,
    )
    from data_prep.sources import CORPORA, CorpusSpec, RawRecord, looks_like_raw_records, stream_texts

_HOME = {
    "RecordError": "formats",
    "format_medmcqa": "formats",
    "format_medqa": "formats",
    "format_mmlu": "formats",
    "format_pubmed_qa": "formats",
    "CORPORA": "sources",
    "CorpusSpec": "sources",
    "RawRecord": "sources",
    "looks_like_raw_records": "sources",
    "stream_texts": "sources",
}
__all__ = [
    "CORPORA",
    "CorpusSpec",
    "RawRecord",
    "RecordError",
    "format_medmcqa",
    "format_medqa",
    "format_mmlu",
    "format_pubmed_qa",
    "looks_like_raw_records",
    "stream_texts",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"data_prep.{_HOME[name]}"), name)
    raise AttributeError(f"module 'data_prep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
