"""Gemma Scope: `params.npz` with `W_enc [D, F]`, `W_dec [F, D]`, `b_enc`, `b_dec`, `threshold`; nothing is subtracted
from the input.

It holds JumpReLU, ReLU (thresholds of 0) and TopK only through its measured threshold: then a latent fires on its own,
whatever the others do, and codes are those of `encode(x, use_threshold=True)`. A Gemma Scope folder says nothing about
itself but by its path (`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`); we write our config.json beside.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import CannotHold, Coder, as_coder, to_dictionary
from dictionary_learning.storage import atomic_path

WEIGHTS = "params.npz"
_RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)")
_LAYER = re.compile(r"layer_(\d{1,4})")


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a dictionary; remarks for the reader.

    Raises:
        CannotHold: a TopK dictionary without a measured threshold, group-max, a skip connection; see also `as_coder`.
    """
    own = as_coder(dictionary)
    if own.skip_OD is not None:
        raise CannotHold("Gemma Scope has no skip connections: use saelens or sparsify.")
    coder = own.as_jumprelu().subtracting(False)
    assert coder.threshold_F is not None
    arrays = {
        "W_enc": coder.encoder_FD.t(),
        "W_dec": coder.decoder_FO,
        "b_enc": coder.encoder_bias_F,
        "b_dec": coder.decoder_bias_O,
        "threshold": coder.threshold_F,
    }
    with atomic_path(folder / WEIGHTS) as name, name.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **{key: value.contiguous().numpy() for key, value in arrays.items()})
    files.write_own(dictionary, config, folder)
    if own.activation == "topk":
        return [
            f"Gemma Scope has only JumpReLU: a TopK dictionary is written with its measured threshold "
            f"({float(coder.threshold_F[0]):.4g}) in place of k = {own.k}, so its codes are those of "
            "encode(x, use_threshold=True)."
        ]
    return []


def read(path: str | os.PathLike[str]) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary of a folder with a params.npz (or of the file) and a config in our form.

    Model, layer and hook point come from our config.json beside it, else from the path as Gemma Scope lays it out. Only
    the residual stream's hook point is named: MLP and attention SAEs of Gemma Scope lie behind a norm, or before the
    output projection, where our hook points do not. A file looks alike for an autoencoder and for a transcoder: what is
    said beside it, or by the path, decides.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = files.folder_of(path, WEIGHTS) / WEIGHTS
    if not file.is_file():
        raise UserError(f"'{file.parent}' lacks {WEIGHTS}.")
    weights = files.Weights(files.read_npz(file), file)
    own, buffer = files.read_own(file.parent)
    known = own or _from_path(file.absolute())
    encoder_FD = weights.matrix("W_enc").t().contiguous()
    d_sae, d_in = encoder_FD.shape
    transcodes = known.get("output_dim") is not None
    decoder_FO = weights.matrix("W_dec") if transcodes else weights.take("W_dec", d_sae, d_in)
    if len(decoder_FO) != d_sae:
        raise UserError(f"'W_dec' in '{file}' has {len(decoder_FO)} rows, expected one a latent, {d_sae}.")
    coder = Coder(
        encoder_FD,
        weights.take("b_enc", d_sae),
        decoder_FO,
        weights.take("b_dec", decoder_FO.shape[1]),
        activation="jumprelu",
        subtracts_bias=False,
        threshold_F=weights.take("threshold", d_sae),
        transcodes=transcodes,
    )
    weights.finish()
    dictionary = to_dictionary(coder)
    return dictionary, files.our_config(
        dictionary,
        format_name="gemma_scope",
        source={key: known[key] for key in ("dict_class", "path") if known.get(key) is not None},
        lm_name=known.get("lm_name"),
        hook_point=known.get("submodule_name"),
        layer=known.get("layer"),
        ctx_len=buffer.get("ctx_len"),
    )


def _from_path(file: Path) -> dict[str, Any]:
    """What the folders' names say, from the release downwards."""
    parts = file.parent.parts
    start = next((i for i, part in enumerate(parts) if _RELEASE.search(part)), None)
    release = _RELEASE.search(parts[start]) if start is not None else None
    layer = next((int(m[1]) for part in reversed(parts) if (m := _LAYER.fullmatch(part))), None)
    known: dict[str, Any] = {"layer": layer}
    if release is not None and start is not None:
        known["lm_name"] = f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}"
        known["path"] = "/".join(parts[start:])
        if release[3] == "transcoders":
            known["output_dim"] = "as W_dec has it"
        if release[3] == "res" and layer is not None:
            known["submodule_name"] = f"resid_post_layer_{layer}"
    return known
