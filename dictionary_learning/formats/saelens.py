"""SAELens (6 and later): `cfg.json` + `sae_weights.safetensors`, as `SAE.load_from_disk` reads and `save_model` writes.

Written: standard, topk and jumprelu. Read besides: gated (as the JumpReLU it equals) and the flat configs of SAELens
before 6. SAELens applies no norm factor of ours: saved dictionaries take raw activations already.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import Coder, as_coder, gated, to_dictionary
from dictionary_learning.formats.hook_names import (
    from_transformer_lens,
    is_transformer_lens_name,
    transformer_lens_name,
)
from dictionary_learning.storage import finite, write_json, write_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"  # of the layout; without it SAELens takes the file for one of before 6 and drops the metadata
ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}  # our activation -> theirs
READABLE = ("standard", "topk", "jumprelu", "gated")


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a dictionary with what its config knows of model and hook point; remarks for the reader.

    Raises:
        CannotHold: see `as_coder`.
    """
    coder = as_coder(dictionary)
    facts = files.facts_of(config)
    hook_name = transformer_lens_name(facts.hook_point, facts.model)
    tensors = {
        "W_enc": coder.encoder_FD.t(),
        "b_enc": coder.encoder_bias_F,
        "W_dec": coder.decoder_FD,
        "b_dec": coder.decoder_bias_D,
    }
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURES[coder.activation],
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": coder.subtracts_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if coder.activation == "topk":
        cfg |= {"k": coder.k, "rescale_acts_by_decoder_norm": False}
    elif coder.threshold_F is not None:
        tensors["threshold"] = coder.threshold_F
    cfg["metadata"] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": facts.model,
        "hook_name": hook_name,
        "hook_head_index": None,
        "context_size": facts.ctx_len,
        "prepend_bos": facts.adds_bos,
        "dataset_path": facts.corpus,
        "seqpos_slice": [None],
        "exclude_special_tokens": facts.masks_specials,
        # We train on the model's own activations; TransformerLens would centre what writes to the residual stream.
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "sae_factory": {"layer": facts.layer},
    }
    if coder.activation == "topk" and coder.threshold_F is not None:
        cfg["metadata"]["sae_factory"]["threshold"] = float(coder.threshold_F[0])
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, finite(cfg))
    if hook_name is not None and not is_transformer_lens_name(hook_name):
        return [f"TransformerLens has no name for '{hook_name}', so cfg.json keeps ours as hook_name."]
    return []


def read(path: str | os.PathLike[str]) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary of a SAELens folder (or its cfg.json) and its config in our form.

    Raises:
        UserError: a file is missing or damaged, or the SAE computes something that no dictionary here does.
    """
    folder = files.folder_of(path, CONFIG, WEIGHTS)
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    cfg = files.read_config(config_file)
    architecture = _architecture(cfg, config_file)
    _refuse_other_functions(cfg, config_file)
    about = cfg | (cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else {})  # before 6 it was one level
    facts = files.part_of(about, "sae_factory")
    coder = _coder(files.Weights.load(weights_file), architecture, cfg, facts, config_file)
    files.check_size(cfg, "d_in", coder.d_in, config_file)
    files.check_size(cfg, "d_sae", coder.d_sae, config_file)
    dictionary = to_dictionary(coder)
    named = files.text(about.get("hook_name", about.get("hook_point")))
    hook_point, layer = from_transformer_lens(named, files.text(about.get("model_name")))
    return dictionary, files.our_config(
        dictionary,
        format_name="saelens",
        source=cfg,
        lm_name=about.get("model_name"),
        hook_point=hook_point,
        layer=facts.get("layer") if layer is None else layer,
        ctx_len=about.get("context_size"),
    )


def _architecture(cfg: Mapping[str, Any], file: Path) -> str:
    """The architecture; before SAELens 6 a TopK one was "standard" with an activation function "topk"."""
    name = cfg.get("architecture", "standard" if "d_sae" in cfg else None)
    if name is None:
        raise UserError(f"'{file}' lacks 'architecture': it is no config of SAELens.")
    if name not in READABLE:
        hint = " (save a BatchTopK SAE for inference, which makes it jumprelu)" if "batch" in str(name) else ""
        raise UserError(
            f"The SAELens architecture '{name}' in '{file}' can't be read: use one of {', '.join(READABLE)}{hint}."
            f"{did_you_mean(name, READABLE)}"
        )
    function = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if name == "standard" and function == "topk":
        return "topk"
    if function not in ("relu", "topk"):
        raise UserError(f"'{file}' has the activation function '{function}', expected relu or topk.")
    return name


def _refuse_other_functions(cfg: Mapping[str, Any], file: Path) -> None:
    """Settings under which the same weights compute something else."""
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation != "none":
        raise UserError(
            f"'{file}' normalises activations by '{normalisation}', with numbers that are not in the file: fold it "
            "into the weights first (SAELens: fold_activation_norm_scaling_factor) and save again."
        )
    if cfg.get("finetuning_scaling_factor"):
        raise UserError(f"'{file}' rescales its codes by a finetuning_scaling_factor, which no dictionary here does.")
    if (cfg.get("reshape_activations") or "none") not in ("none", "hook_z"):  # hook_z: heads side by side, as here
        raise UserError(f"'{file}' reshapes activations by '{cfg['reshape_activations']}', expected none or hook_z.")


def _coder(
    weights: files.Weights, architecture: str, cfg: dict[str, Any], facts: Mapping[str, Any], file: Path
) -> Coder:
    if "scaling_factor" in weights and bool((weights.tensors["scaling_factor"] == 1).all()):
        del weights.tensors["scaling_factor"]  # once written by SAELens, and then of ones
    encoder_FD = weights.matrix("W_enc").t().contiguous()
    d_sae, d_in = encoder_FD.shape
    decoder_FD, b_dec_D = weights.take("W_dec", d_sae, d_in), weights.take("b_dec", d_in)
    subtracts = cfg.get("apply_b_dec_to_input", True)
    if not isinstance(subtracts, bool):
        raise UserError(f"'apply_b_dec_to_input' in '{file}' must be true or false, got {subtracts!r}.")
    if architecture == "gated":
        names = ("r_mag", "b_gate", "b_mag")
        r_mag_F, gate_F, mag_F = (weights.take(name, d_sae) for name in names)
        weights.finish()
        coder = gated(encoder_FD, r_mag_F, gate_F, mag_F, decoder_FD, b_dec_D)
        return replace(coder, subtracts_bias=subtracts)
    bias_F = weights.take("b_enc", d_sae)
    if architecture == "topk":
        k = files.positive_integer(cfg | _legacy_k(cfg), "k", file)
        if k > d_sae:
            raise UserError(f"'k' in '{file}' is {k}, more than the {d_sae} latents.")
        threshold_F = files.measured_threshold(facts, d_sae)
        coder = Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "topk", subtracts, k=k, threshold_F=threshold_F)
        if cfg.get("rescale_acts_by_decoder_norm"):
            coder = coder.scaled(decoder_FD.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    elif architecture == "jumprelu":
        threshold_F = weights.take("threshold", d_sae)
        coder = Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "jumprelu", subtracts, threshold_F=threshold_F)
    else:
        coder = Coder(encoder_FD, bias_F, decoder_FD, b_dec_D, "relu", subtracts)
    weights.finish()
    return coder


def _legacy_k(cfg: Mapping[str, Any]) -> dict[str, Any]:
    arguments = cfg.get("activation_fn_kwargs")
    return {"k": arguments["k"]} if "k" not in cfg and isinstance(arguments, dict) and "k" in arguments else {}
