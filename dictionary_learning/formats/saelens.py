"""SAELens (6 and later): `cfg.json` + `sae_weights.safetensors`, as `SAE.load_from_disk` reads and `save_model` writes.

Written: standard, topk, jumprelu, gated, and transcoders with ReLU or JumpReLU, with or without skip; BatchTopK as the
jumprelu that it is after training, as there. Read besides: the flat configs of SAELens before 6. SAELens applies no
norm factor of ours: saved dictionaries take raw activations already.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dictionary_learning.dictionary import Dictionary, JumpReluAutoEncoder
from dictionary_learning.errors import UserError, did_you_mean
from dictionary_learning.formats import files
from dictionary_learning.formats.coder import CannotHold, Coder, as_coder, to_dictionary
from dictionary_learning.formats.hook_names import (
    from_transformer_lens,
    is_transformer_lens_name,
    transformer_lens_name,
)
from dictionary_learning.storage import finite, write_json, write_tensors
from dictionary_learning.untrusted import shown

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"  # of the layout; without it SAELens takes the file for one of before 6 and drops the metadata
ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}  # ours -> theirs
TRANSCODERS = {  # (activation, whether with a skip connection) -> theirs
    ("relu", False): "transcoder",
    ("relu", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
READABLE = (*ARCHITECTURES.values(), *TRANSCODERS.values())


def write(dictionary: Dictionary, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a dictionary with what its config knows of model and hook point; remarks for the reader.

    Raises:
        CannotHold: group-max, or a TopK transcoder; see also `as_coder`.
    """
    coder, architecture = _their_form(as_coder(dictionary))
    facts = files.facts_of(config)
    hook_name = transformer_lens_name(facts.hook_point, facts.model)
    tensors = {"W_enc": coder.encoder_FD.t(), "W_dec": coder.decoder_FO, "b_dec": coder.decoder_bias_O}
    tensors["b_gate" if coder.activation == "gated" else "b_enc"] = coder.encoder_bias_F
    also = {"r_mag": coder.r_mag_F, "b_mag": coder.mag_bias_F, "W_skip": coder.skip_OD}
    tensors |= {name: tensor for name, tensor in also.items() if tensor is not None}
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": coder.subtracts_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if coder.transcodes:
        cfg["d_out"] = coder.d_out
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


def _their_form(coder: Coder) -> tuple[Coder, str]:
    """A coder as SAELens computes it, and the name of its architecture there."""
    if coder.transcodes and coder.activation == "gated":
        coder = coder.as_jumprelu()
    if coder.activation == "groupmax":
        raise CannotHold("SAELens has no group-max: use sparsify.")
    if not coder.transcodes:
        return coder, ARCHITECTURES[coder.activation]
    if coder.activation == "topk":
        raise CannotHold("SAELens has no TopK transcoder: use sparsify, or gemma_scope with its measured threshold.")
    return coder, TRANSCODERS[coder.activation, coder.skip_OD is not None]


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
    files.check_size(cfg, "d_out", coder.d_out, config_file)
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


def jumprelu_from_library(**kwargs: Any) -> JumpReluAutoEncoder:
    """An SAE that `sae_lens.SAE.from_pretrained(**kwargs)` finds, as JumpReLU.

    Raises:
        UserError: `sae_lens` is not installed; the SAE computes something that no dictionary here does.
    """
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise UserError("load_from_sae_lens needs the library: pip install sae-lens.") from error
    found = SAE.from_pretrained(**kwargs)
    sae = found[0] if isinstance(found, tuple) else found  # before SAELens 6: with its config and sparsity
    with tempfile.TemporaryDirectory() as folder:
        sae.save_model(folder)
        dictionary, _ = read(folder)
    jumprelu = to_dictionary(as_coder(dictionary).as_jumprelu())
    assert isinstance(jumprelu, JumpReluAutoEncoder)
    return jumprelu


def _architecture(cfg: Mapping[str, Any], file: Path) -> str:
    """The architecture; before SAELens 6 a TopK one was "standard" with an activation function "topk"."""
    name = cfg.get("architecture", "standard" if "d_sae" in cfg else None)
    if name is None:
        raise UserError(f"'{file}' lacks 'architecture': it is no config of SAELens.")
    if name not in READABLE:
        hint = " (save a BatchTopK SAE for inference, which makes it jumprelu)" if "batch" in str(name) else ""
        raise UserError(
            f"The SAELens architecture '{shown(name)}' in '{file}' can't be read: use one of "
            f"{', '.join(READABLE)}{hint}.{did_you_mean(name, READABLE)}"
        )
    function = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if name == "standard" and function == "topk":
        return "topk"
    if function not in ("relu", "topk"):
        raise UserError(f"'{file}' has the activation function '{shown(function)}', expected relu or topk.")
    return name


def _refuse_other_functions(cfg: Mapping[str, Any], file: Path) -> None:
    """Settings under which the same weights compute something else."""
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation != "none":
        raise UserError(
            f"'{file}' normalises activations by '{shown(normalisation)}', with numbers that are not in the file: fold "
            "it into the weights first (SAELens: fold_activation_norm_scaling_factor) and save again."
        )
    if cfg.get("finetuning_scaling_factor"):
        raise UserError(f"'{file}' rescales its codes by a finetuning_scaling_factor, which no dictionary here does.")
    if (cfg.get("reshape_activations") or "none") not in ("none", "hook_z"):  # hook_z: heads side by side, as here
        raise UserError(
            f"'{file}' reshapes activations by '{shown(cfg['reshape_activations'])}', expected none or hook_z."
        )


def _coder(
    weights: files.Weights, architecture: str, cfg: dict[str, Any], facts: Mapping[str, Any], file: Path
) -> Coder:
    if "scaling_factor" in weights and bool((weights.tensors["scaling_factor"] == 1).all()):
        del weights.tensors["scaling_factor"]  # once written by SAELens, and then of ones
    transcodes = architecture in TRANSCODERS.values()
    encoder_FD = weights.matrix("W_enc").t().contiguous()
    d_sae, d_in = encoder_FD.shape
    decoder_FO = weights.matrix("W_dec")
    d_out = decoder_FO.shape[1] if transcodes else d_in
    if decoder_FO.shape != (d_sae, d_out):
        raise UserError(
            f"'W_dec' in '{weights.file}' has the shape {list(decoder_FO.shape)}, expected {[d_sae, d_out]}."
        )
    b_dec_O = weights.take("b_dec", d_out)
    subtracts = cfg.get("apply_b_dec_to_input", not transcodes)
    if not isinstance(subtracts, bool):
        raise UserError(f"'apply_b_dec_to_input' in '{file}' must be true or false, got {shown(repr(subtracts))}.")
    if transcodes and subtracts:
        raise UserError(f"'apply_b_dec_to_input' in '{file}' must be false: b_dec belongs to a transcoder's output.")
    coder = Coder(encoder_FD, b_dec_O, decoder_FO, b_dec_O, "relu", subtracts, transcodes=transcodes)
    if "skip" in architecture:
        coder = replace(coder, skip_OD=weights.take("W_skip", d_out, d_in))
    if architecture == "gated":
        b_gate_F, r_mag_F, b_mag_F = (weights.take(name, d_sae) for name in ("b_gate", "r_mag", "b_mag"))
        weights.finish()
        return replace(coder, activation="gated", encoder_bias_F=b_gate_F, r_mag_F=r_mag_F, mag_bias_F=b_mag_F)
    coder = replace(coder, encoder_bias_F=weights.take("b_enc", d_sae))
    if architecture == "topk":
        k = files.positive_integer(cfg | _legacy_k(cfg), "k", file)
        if k > d_sae:
            raise UserError(f"'k' in '{file}' is {k}, more than the {d_sae} latents.")
        threshold_F = files.measured_threshold(facts, d_sae)
        coder = replace(coder, activation="topk", k=k, threshold_F=threshold_F)
        if cfg.get("rescale_acts_by_decoder_norm"):
            coder = coder.scaled(decoder_FO.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    elif architecture.startswith("jumprelu"):
        coder = replace(coder, activation="jumprelu", threshold_F=weights.take("threshold", d_sae))
    weights.finish()
    return coder


def _legacy_k(cfg: Mapping[str, Any]) -> dict[str, Any]:
    arguments = cfg.get("activation_fn_kwargs")
    return {"k": arguments["k"]} if "k" not in cfg and isinstance(arguments, dict) and "k" in arguments else {}
