"""EleutherAI's sparsify (`eai-sparsify`): `cfg.json` + `sae.safetensors`, a folder a hook point.

It holds TopK, and a ReLU dictionary as TopK with k of all latents, which is the same function. It subtracts the decoder
bias from its input always (transcoders apart, which no dictionary here is), and has no thresholds. Model and hook point
are said by the folder's name alone; we write our config.json beside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import CannotHold, Coder, as_coder, to_dictionary
from dictionary_learning.formats.hook_names import from_module_path
from dictionary_learning.storage import finite, write_json, write_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a dictionary; remarks for the reader.

    Raises:
        CannotHold: JumpReLU; see also `as_coder`.
    """
    coder = as_coder(dictionary).subtracting(True)
    if coder.activation == "jumprelu":
        raise CannotHold(
            "sparsify has no thresholds, so a JumpReLU dictionary can't be written for it: use saelens, gemma_scope or "
            "dictionary_learning."
        )
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, coder.d_sae // coder.d_in),
        "normalize_decoder": coder.has_unit_decoder,
        "num_latents": coder.d_sae,
        "k": coder.k or coder.d_sae,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": coder.d_in,
    }
    tensors = {
        "encoder.weight": coder.encoder_FD,
        "encoder.bias": coder.encoder_bias_F,
        "W_dec": coder.decoder_FD,
        "b_dec": coder.decoder_bias_D,
    }
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
        UserError: a file is missing or damaged, or it is a transcoder, has a skip connection or groups.
    """
    folder = files.folder_of(path, CONFIG, WEIGHTS)
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    cfg = files.read_config(config_file)
    if cfg.get("activation", "topk") != "topk":
        raise UserError(
            f"'{config_file}' has the activation {cfg['activation']!r}; only topk can be read (groupmax keeps a latent "
            "of every group, which no dictionary here does)."
        )
    for key, meaning in {
        "transcode": "is a transcoder",
        "skip_connection": "has a skip connection",
        "signed": "keeps negative codes",
    }.items():
        if cfg.get(key):
            raise UserError(f"The coder of '{config_file}' {meaning}, which no dictionary here does.")
    weights = files.Weights.load(weights_file)
    encoder_FD = weights.matrix("encoder.weight")
    d_sae, d_in = encoder_FD.shape
    bias_F, decoder_FD = weights.take("encoder.bias", d_sae), weights.take("W_dec", d_sae, d_in)
    b_dec_D = weights.take("b_dec", d_in)
    weights.finish()
    files.check_size(cfg, "d_in", d_in, config_file)
    if cfg.get("num_latents") != 0:  # 0: by the expansion factor
        files.check_size(cfg, "num_latents", d_sae, config_file)
    k = files.positive_integer(cfg, "k", config_file)
    if k > d_sae:
        raise UserError(f"'k' in '{config_file}' is {k}, more than the {d_sae} latents.")
    known, buffer = files.read_own(folder)
    if k == d_sae:
        coder = Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "relu", subtracts_bias=True)
    else:
        threshold_F = files.measured_threshold(known, d_sae)
        coder = Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "topk", True, k=k, threshold_F=threshold_F)
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
