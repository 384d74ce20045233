"""The `dictionary-learning` package: `config.json` + `ae.pt`, which its `load_dictionary` reads.

Our own folders are of the same layout with `ae.safetensors`. Classes that exist here are read as they are, others of
the package as the dictionary they equal: BatchTopKSAE and MatryoshkaBatchTopKSAE (which encode by their threshold) and
GatedAutoEncoder as JumpReLU, AutoEncoderNew as ReLU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dictionary_learning.dictionary import DICTIONARIES, Dictionary, IdentityDict
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import CannotHold, Coder, as_coder, gated, to_dictionary
from dictionary_learning.formats.files import Weights
from dictionary_learning.storage import atomic_path, finite, write_json
from dictionary_learning.utils import WEIGHT_FILES, load_dictionary

CONFIG, WEIGHTS = "config.json", "ae.pt"


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a dictionary with its config; remarks for the reader.

    Raises:
        CannotHold: the identity, which has no weights.
    """
    if isinstance(dictionary, IdentityDict):
        raise CannotHold("The identity has no weights to export: make it where it is needed.")
    remarks = []
    stored = to_dictionary(as_coder(dictionary)) if type(dictionary) in as_coder.registry else dictionary
    if type(stored) is not type(dictionary):
        remarks.append(
            "A ReLU dictionary without a unit decoder is written as JumpReLU with thresholds of 0, the same function, "
            "because an AutoEncoder's codes are rescaled when it is loaded."
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
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in stored.state_dict().items()}
    if "k" in state:
        trainer["k"] = int(state["k"])
    with atomic_path(folder / WEIGHTS) as name:
        torch.save(state, name)
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
    if name not in DICTIONARIES and name in EQUALS:
        weights = Weights.load(next((folder / f for f in WEIGHT_FILES if (folder / f).is_file()), folder / WEIGHTS))
        dictionary = to_dictionary(EQUALS[name](weights))
        trainer = files.part_of(config, "trainer") | {"dict_class": type(dictionary).__name__, "dict_class_there": name}
        trainer.pop("k", None)  # what it was trained with: it encodes by its threshold
        return dictionary, config | {"trainer": trainer, "buffer": files.part_of(config, "buffer")}
    if name not in DICTIONARIES:
        known = [*DICTIONARIES, *EQUALS]
        raise UserError(
            f"Dictionary class '{name}' in '{config_file}' is unknown: use one of {', '.join(known)}."
            f"{did_you_mean(name, known)}"
        )
    try:
        dictionary = load_dictionary(folder)[0]
    except UserError:
        raise
    except Exception as error:  # a config whose values don't fit the class; each class trips over them in its own way
        raise UserError(f"'{folder}' does not hold a {name} ({type(error).__name__}: {error}).") from error
    for key, tensor in dictionary.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"The tensor '{key}' in '{folder}' holds NaN or infinity: the file is damaged.")
    trainer = files.part_of(config, "trainer")
    for key, size in (("activation_dim", dictionary.activation_dim), ("dict_size", dictionary.dict_size)):
        files.check_size(trainer, key, size, config_file)
    return dictionary, config


def _batch_top_k(weights: Weights) -> Coder:
    encoder_FD = weights.matrix("encoder.weight")
    d_sae, d_in = encoder_FD.shape
    decoder_FD = weights.take("decoder.weight", d_in, d_sae).t().contiguous()
    bias_F, b_dec_D = weights.take("encoder.bias", d_sae), weights.take("b_dec", d_in)
    return _by_threshold(weights, Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "jumprelu", True))


def _matryoshka(weights: Weights) -> Coder:
    encoder_FD = weights.matrix("W_enc").t().contiguous()
    d_sae, d_in = encoder_FD.shape
    weights.tensors.pop("group_sizes", None)  # they shape the training loss; all groups take part in encoding
    bias_F, decoder_FD = weights.take("b_enc", d_sae), weights.take("W_dec", d_sae, d_in)
    return _by_threshold(weights, Coder(encoder_FD, bias_F, decoder_FD, weights.take("b_dec", d_in), "jumprelu", True))


def _by_threshold(weights: Weights, coder: Coder) -> Coder:
    """A threshold below 0 was never measured, and then every positive latent fires, there and here."""
    threshold = weights.take("threshold")
    weights.tensors.pop("k", None)
    weights.finish()
    return replace(coder, threshold_F=threshold.expand(coder.d_sae).clone())


def _gated(weights: Weights) -> Coder:
    encoder_FD = weights.matrix("encoder.weight")
    d_sae, d_in = encoder_FD.shape
    decoder_FD = weights.take("decoder.weight", d_in, d_sae).t().contiguous()
    r_mag_F, gate_F, mag_F = (weights.take(name, d_sae) for name in ("r_mag", "gate_bias", "mag_bias"))
    b_dec_D = weights.take("decoder_bias", d_in)
    weights.finish()
    return gated(encoder_FD, r_mag_F, gate_F, mag_F, decoder_FD, b_dec_D)


def _new(weights: Weights) -> Coder:
    encoder_FD = weights.matrix("encoder.weight")
    d_sae, d_in = encoder_FD.shape
    decoder_FD = weights.take("decoder.weight", d_in, d_sae).t().contiguous()
    bias_F, b_dec_D = weights.take("encoder.bias", d_sae), weights.take("decoder.bias", d_in)
    weights.finish()
    return Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "relu", subtracts_bias=False)


EQUALS: dict[str, Callable[[Weights], Coder]] = {  # a class of the package that has none of its name here
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "GatedAutoEncoder": _gated,
    "AutoEncoderNew": _new,
}
