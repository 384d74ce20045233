"""EleutherAI's sparsify (`eai-sparsify`): `cfg.json` + `sae.safetensors`, a folder a hook point.

It holds TopK and group-max, and a ReLU dictionary as TopK with k of all latents, which is the same function; each also
as a transcoder between sites of one width, with or without skip. It subtracts the decoder bias from its input always,
but for transcoders never, and has no thresholds. Model and hook point are said by the folder's name alone; we write our
config.json beside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import CannotHold, Coder, as_coder, to_dictionary
from dictionary_learning.formats.hook_names import from_module_path
from dictionary_learning.storage import finite, write_json, write_tensors
from dictionary_learning.untrusted import shown

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a dictionary; remarks for the reader.

    Raises:
        CannotHold: JumpReLU, gated, BatchTopK; a transcoder between two widths; see also `as_coder`.
    """
    coder = as_coder(dictionary)
    if coder.activation in ("jumprelu", "gated"):
        kind = "transcoder" if coder.transcodes else "dictionary"
        raise CannotHold(
            f"sparsify has no thresholds, so this {type(dictionary).__name__} {kind} can't be written for it: use "
            f"saelens{' or gemma_scope' if coder.transcodes else ', gemma_scope or dictionary_learning'}."
        )
    if coder.d_in != coder.d_out:
        raise CannotHold(
            f"sparsify has transcoders of one width only, and this one goes from {coder.d_in} to {coder.d_out}."
        )
    if not coder.transcodes:
        coder = coder.subtracting(True)
    cfg = {
        "activation": "groupmax" if coder.activation == "groupmax" else "topk",
        "expansion_factor": max(1, coder.d_sae // coder.d_in),
        "normalize_decoder": coder.has_unit_decoder,
        "num_latents": coder.d_sae,
        "k": coder.k or coder.d_sae,
        "multi_topk": False,
        "skip_connection": coder.skip_OD is not None,
        "transcode": coder.transcodes,
        "d_in": coder.d_in,
    }
    tensors = {
        "encoder.weight": coder.encoder_FD,
        "encoder.bias": coder.encoder_bias_F,
        "W_dec": coder.decoder_FO,
        "b_dec": coder.decoder_bias_O,
    } | ({} if coder.skip_OD is None else {"W_skip": coder.skip_OD})
    write_tensors(folder / WEIGHTS, tensors)
    files.write_own(dictionary, config, folder, coder.threshold_F)
    write_json(folder / CONFIG, finite(cfg))
    if coder.activation == "relu":
        return ["sparsify has only TopK: a ReLU dictionary is written with k of all latents, which is the same."]
    return []


def read(path: str | os.PathLike[str]) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary of a sparsify folder (or its cfg.json) and its config in our form.

    Model and hook point come from our config.json beside it, else the hook point from the folder's name (`layers.8`,
    `layers.8.mlp`), as in sparsify itself.

    Raises:
        UserError: a file is missing or damaged, or it keeps negative codes.
    """
    folder = files.folder_of(path, CONFIG, WEIGHTS)
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    cfg = files.read_config(config_file)
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise UserError(f"'{config_file}' has the activation {shown(repr(activation))}, expected topk or groupmax.")
    if cfg.get("signed"):
        raise UserError(f"The coder of '{config_file}' keeps negative codes, which no dictionary here does.")
    weights = files.Weights.load(weights_file)
    encoder_FD = weights.matrix("encoder.weight")
    d_sae, d_in = encoder_FD.shape
    bias_F, decoder_FD = weights.take("encoder.bias", d_sae), weights.take("W_dec", d_sae, d_in)
    b_dec_D = weights.take("b_dec", d_in)
    skip_DD = weights.take("W_skip", d_in, d_in) if cfg.get("skip_connection") else None
    weights.finish()
    files.check_size(cfg, "d_in", d_in, config_file)
    if cfg.get("num_latents") != 0:  # 0: by the expansion factor
        files.check_size(cfg, "num_latents", d_sae, config_file)
    k = files.positive_integer(cfg, "k", config_file)
    if k > d_sae:
        raise UserError(f"'k' in '{config_file}' is {k}, more than the {d_sae} latents.")
    known, buffer = files.read_own(folder)
    coder = Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "relu", subtracts_bias=not cfg.get("transcode"))
    if activation == "groupmax":
        if d_sae % k:
            raise UserError(f"'k' in '{config_file}' is {k}, and {d_sae} latents can't be split into so many groups.")
        coder = replace(coder, activation="groupmax", k=k)
    elif k < d_sae:  # of all latents it is ReLU
        coder = replace(coder, activation="topk", k=k, threshold_F=files.measured_threshold(known, d_sae))
    if cfg.get("transcode") or skip_DD is not None:  # a skip goes past the encoder: the input's bias moves into it
        coder = replace(coder.subtracting(False), transcodes=True, skip_OD=skip_DD)
    dictionary = to_dictionary(coder)
    hook_point, layer = from_module_path(folder.absolute().name)
    if known:
        hook_point, layer = known.get("submodule_name"), known.get("layer")
    return dictionary, files.our_config(
        dictionary,
        format_name="sparsify",
        source=cfg,
        lm_name=known.get("lm_name"),
        hook_point=hook_point,
        layer=layer,
        ctx_len=buffer.get("ctx_len"),
    )
