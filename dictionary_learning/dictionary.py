"""What a dictionary is: encode, decode, forward, load. How it learns lives in `trainers/`.

The classes are in `dictionaries/`, a file a family; this module is where they are imported from, and `DICTIONARIES`
maps the names in config files to them.
"""

from __future__ import annotations

from dictionary_learning.dictionaries.base import DICTIONARIES, Dictionary, dictionary_class, unit_rows
from dictionary_learning.dictionaries.configurable import SparseAutoencoder
from dictionary_learning.dictionaries.gated import GatedAutoEncoder
from dictionary_learning.dictionaries.identity import IdentityDict
from dictionary_learning.dictionaries.jumprelu import JumpReluAutoEncoder
from dictionary_learning.dictionaries.linear import AutoEncoder, AutoEncoderNew
from dictionary_learning.dictionaries.top_k import (
    AutoEncoderGroupMax,
    AutoEncoderTopK,
    BatchTopKSAE,
    MatryoshkaBatchTopKSAE,
)
from dictionary_learning.dictionaries.weights import read_weights

__all__ = [
    "DICTIONARIES",
    "AutoEncoder",
    "AutoEncoderGroupMax",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "Dictionary",
    "GatedAutoEncoder",
    "IdentityDict",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
    "SparseAutoencoder",
    "dictionary_class",
    "read_weights",
    "unit_rows",
]
