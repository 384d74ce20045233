"""Activations: token contexts in, rows of activations out.

`types.py` says what passes on to the buffer, `hook_points.py` how places in a model are named and found, `loading.py`
finds a model, `traced_lm.py` runs it (through nnsight) and stops after the last hook point, `language_model.py` makes a
stream of it, `extract.py` looks at one text, `writer.py` saves a stream as shards (`sae-factory harvest`), `saved.py`
makes a stream of those again. `sentence_model.py` and `sentence_encoder.py` do the same for sentence encoders, and
`module.py` makes a stream of any torch module, read by the hooks of `hooks.py`. The public names are imported on first
use: nnsight and transformers cost seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dictionary_learning.activations.types import ActivationBatch, ActivationSource, Provenance

if TYPE_CHECKING:
    from dictionary_learning.activations.hook_points import HookPoint, hook_points_for, parse_hook_point
    from dictionary_learning.activations.language_model import LanguageModelActivations
    from dictionary_learning.activations.loader import ActivationLoader
    from dictionary_learning.activations.module import ModuleActivations
    from dictionary_learning.activations.saved import SavedActivations, TensorStream
    from dictionary_learning.activations.sentence_encoder import SentenceActivations, SentenceEncoder
    from dictionary_learning.activations.statistics import RunningMoments, ZScore, load_zscores, save_zscores
    from dictionary_learning.activations.traced_lm import TracedLM

_LAZY = {
    "HookPoint": "hook_points",
    "parse_hook_point": "hook_points",
    "hook_points_for": "hook_points",
    "TracedLM": "traced_lm",
    "LanguageModelActivations": "language_model",
    "ActivationLoader": "loader",
    "ModuleActivations": "module",
    "SentenceActivations": "sentence_encoder",
    "SentenceEncoder": "sentence_encoder",
    "SavedActivations": "saved",
    "TensorStream": "saved",
    "RunningMoments": "statistics",
    "ZScore": "statistics",
    "load_zscores": "statistics",
    "save_zscores": "statistics",
}

__all__ = [
    "ActivationBatch",
    "ActivationLoader",
    "ActivationSource",
    "HookPoint",
    "LanguageModelActivations",
    "ModuleActivations",
    "Provenance",
    "RunningMoments",
    "SavedActivations",
    "SentenceActivations",
    "SentenceEncoder",
    "TensorStream",
    "TracedLM",
    "ZScore",
    "hook_points_for",
    "load_zscores",
    "parse_hook_point",
    "save_zscores",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
