"""The `dictionary-learning` package: `config.json` + `ae.pt`, which its `load_dictionary` reads.

Our own folders are of the same layout with `ae.safetensors`, and may hold what the package has no class for; those are
read, and not written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dictionary_learning.dictionary import (
    DICTIONARIES,
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import CannotHold, as_coder, to_dictionary
from dictionary_learning.storage import atomic_path, finite, write_json
from dictionary_learning.untrusted import shown
from dictionary_learning.utils import WEIGHT_FILES, load_dictionary

CONFIG, WEIGHTS = "config.json", "ae.pt"
WRITABLE = (  # what the package has a class for
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a dictionary with its config; remarks for the reader.

    Raises:
        CannotHold: the identity, which has no weights; a transcoder, or a class that the package does not have.
    """
    if isinstance(dictionary, IdentityDict):
        raise CannotHold("The identity has no weights to export: make it where it is needed.")
    if dictionary.is_transcoder:
        raise CannotHold("dictionary-learning has no transcoders: use saelens, sparsify or gemma_scope.")
    remarks: list[str] = []
    # AutoEncoder: its loader rescales codes. JumpReLU: files have no place for apply_b_dec_to_input.
    as_it_is = type(dictionary) in WRITABLE and not isinstance(dictionary, AutoEncoder | JumpReluAutoEncoder)
    stored = dictionary if as_it_is else to_dictionary(as_coder(dictionary))
    if type(stored) not in WRITABLE:
        raise CannotHold(f"dictionary-learning has no {type(dictionary).__name__}: use sparsify.")
    if type(stored) is not type(dictionary):
        remarks.append(
            f"The {type(dictionary).__name__} is written as {type(stored).__name__}, the same function: the package "
            "would rescale its codes, or has no such class."
        )
    facts = files.facts_of(config)
    trainer = files.part_of(config, "trainer") | {
        "dict_class": type(stored).__name__,
        "activation_dim": stored.activation_dim,
        "dict_size": stored.dict_size,
        "layer": facts.layer,
        "lm_name": facts.model,
        "submodule_name": facts.hook_point,
    }
    state = {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in stored.state_dict().items()
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    with atomic_path(folder / WEIGHTS) as file:
        torch.save({name: tensor.contiguous() for name, tensor in state.items()}, file)
    write_json(folder / CONFIG, finite({"trainer": trainer, "buffer": files.part_of(config, "buffer")}))
    return remarks


def read(path: str | os.PathLike[str]) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary of a folder (or of the ae.pt or ae.safetensors in it) and its config.

    Raises:
        UserError: a file is missing or damaged, or the class is unknown.
    """
    folder = files.folder_of(path, CONFIG, *WEIGHT_FILES)
    config_file = folder / CONFIG
    config = files.read_config(config_file)
    name = files.part_of(config, "trainer").get("dict_class")
    if not isinstance(name, str):
        raise UserError(f"'{config_file}' does not say trainer.dict_class: it is no dictionary's config.")
    if name not in DICTIONARIES:
        raise UserError(
            f"Dictionary class '{shown(name)}' in '{config_file}' is unknown: use one of {', '.join(DICTIONARIES)}."
            f"{did_you_mean(name, DICTIONARIES)}"
        )
    try:
        dictionary = load_dictionary(folder)[0]
    except UserError:
        raise
    except Exception as error:  # a config whose values don't fit the class; each class trips over them in its own way
        raise UserError(f"'{folder}' does not hold a {name} ({type(error).__name__}: {shown(error, 200)}).") from error
    for key, tensor in dictionary.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"The tensor '{key}' in '{folder}' holds NaN or infinity: the file is damaged.")
    trainer = files.part_of(config, "trainer")
    for key, size in (("activation_dim", dictionary.activation_dim), ("dict_size", dictionary.dict_size)):
        files.check_size(trainer, key, size, config_file)
    return dictionary, config
