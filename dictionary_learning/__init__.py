"""SAE Factory: many sparse dictionaries from one stream of a model's activations.

The public names are imported when they are first used: importing torch alone takes a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ActivationBuffer": "buffer",
    "AutoEncoder": "dictionary",
    "AutoEncoderTopK": "dictionary",
    "BatchTopKSAE": "dictionary",
    "Dictionary": "dictionary",
    "GatedAutoEncoder": "dictionary",
    "IdentityDict": "dictionary",
    "JumpReluAutoEncoder": "dictionary",
    "MatryoshkaBatchTopKSAE": "dictionary",
    "ModuleActivations": "activations.module",
    "SentenceActivations": "activations.sentence_encoder",
    "SentenceEncoder": "activations.sentence_encoder",
    "TracedLM": "activations.language_model",
    "UserError": "errors",
    "evaluate": "evaluation",
    "evaluate_dictionaries": "evaluation",
    "extract": "activations.extract",
    "load_dictionary": "utils",
    "loss_recovered": "evaluation",
    "open_corpus": "corpus",
    "trainSAE": "training",
}

__all__ = [
    "ActivationBuffer",
    "AutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "Dictionary",
    "GatedAutoEncoder",
    "IdentityDict",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
    "ModuleActivations",
    "SentenceActivations",
    "SentenceEncoder",
    "TracedLM",
    "UserError",
    "__version__",
    "evaluate",
    "evaluate_dictionaries",
    "extract",
    "load_dictionary",
    "loss_recovered",
    "open_corpus",
    "trainSAE",
]

if TYPE_CHECKING:
    from dictionary_learning.activations.extract import extract
    from dictionary_learning.activations.language_model import TracedLM
    from dictionary_learning.activations.module import ModuleActivations
    from dictionary_learning.activations.sentence_encoder import SentenceActivations, SentenceEncoder
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.corpus import open_corpus
    from dictionary_learning.dictionary import (
        AutoEncoder,
        AutoEncoderTopK,
        BatchTopKSAE,
        Dictionary,
        GatedAutoEncoder,
        IdentityDict,
        JumpReluAutoEncoder,
        MatryoshkaBatchTopKSAE,
    )
    from dictionary_learning.errors import UserError
    from dictionary_learning.evaluation import evaluate, evaluate_dictionaries, loss_recovered
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
