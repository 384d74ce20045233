"""What other libraries save and we do not write: other settings, other classes, older layouts, all computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_cases import D, F, K, assert_same, inputs
from torch import Tensor

from dictionary_learning import load_dictionary
from dictionary_learning.dictionary import (
    DICTIONARIES,
    AutoEncoderNew,
    AutoEncoderTopK,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.errors import UserError
from dictionary_learning.formats import read
from dictionary_learning.formats.files import save_ours
from dictionary_learning.storage import write_json, write_tensors

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


def weights(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "encoder.weight": (F, D), "decoder.weight": (D, F)}
    shapes |= {"decoder.bias": (D,), "decoder_bias": (D,), "bias": (D,)}
    drawn = {name: torch.randn(shapes.get(name, (F,)), generator=generator) for name in names}
    return {name: t * 0.3 if t.ndim == 1 or "dec" in name else t for name, t in drawn.items()}


def saelens(folder: Path, tensors: dict[str, Tensor], **cfg: Any) -> Path:
    write_tensors(folder / "sae_weights.safetensors", tensors)
    write_json(folder / "cfg.json", {"d_in": D, "d_sae": F, "dtype": "float32"} | cfg)
    return folder


META = {"sae_lens_version": "6.54.0", "model_name": "gpt2", "hook_name": "blocks.4.attn.hook_z", "context_size": 64}


def check(folder: Path, function: Function, kind: type, tmp_path: Path) -> dict[str, Any]:
    """Read, compare, save as ours, load, compare again; the config."""
    x = inputs()
    dictionary, config = read(folder)
    assert type(dictionary) is kind
    assert_same((dictionary.encode(x).detach(), dictionary(x).detach()), function(x))
    save_ours(dictionary, config, tmp_path / "ours")
    loaded, again = load_dictionary(tmp_path / "ours")
    assert again == config and type(loaded) is kind
    assert_same((loaded.encode(x).detach(), loaded(x).detach()), function(x))
    return config


@pytest.mark.parametrize("subtracts", [True, False, None])
def test_jumprelu_of_saelens_with_and_without_b_dec_subtracted(subtracts: bool | None, tmp_path: Path) -> None:
    w = weights("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    w["threshold"].abs_()
    setting = {} if subtracts is None else {"apply_b_dec_to_input": subtracts}  # left out, it is true there
    folder = saelens(tmp_path / "there", w, architecture="jumprelu", metadata=META, **setting)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - w["b_dec"] * (subtracts is not False)) @ w["W_enc"] + w["b_enc"]
        f = torch.relu(z) * (z > w["threshold"])
        return f, f @ w["W_dec"] + w["b_dec"]

    config = check(folder, function, JumpReluAutoEncoder, tmp_path)
    assert config["trainer"]["submodule_name"] == "blocks.4.attn.hook_z" and config["trainer"]["layer"] == 4
    assert config["trainer"]["imported_from"]["config"]["metadata"] == META


@pytest.mark.parametrize("rescaled", [True, False])
def test_topk_of_saelens_that_ranks_by_decoder_norm(rescaled: bool, tmp_path: Path) -> None:
    w = weights("W_enc", "b_enc", "W_dec", "b_dec")
    folder = saelens(
        tmp_path / "there", w, architecture="topk", k=K, rescale_acts_by_decoder_norm=rescaled, metadata=META
    )

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        norms = w["W_dec"].norm(dim=1) if rescaled else torch.ones(F)
        top = (((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms).topk(K)
        f = torch.zeros(*x.shape[:-1], F).scatter(-1, top.indices, top.values.relu())
        return f, (f / norms) @ w["W_dec"] + w["b_dec"]

    assert check(folder, function, AutoEncoderTopK, tmp_path)["trainer"]["k"] == K


@pytest.mark.parametrize("k_place", [{"activation_fn_str": "topk"}, {"activation_fn": "topk"}])
def test_the_flat_config_of_saelens_before_6(k_place: dict[str, Any], tmp_path: Path) -> None:
    w = weights("W_enc", "b_enc", "W_dec", "b_dec")
    folder = saelens(
        tmp_path / "there",
        w | {"scaling_factor": torch.ones(F)},
        activation_fn_kwargs={"k": K},
        model_name="gpt2-small",
        hook_point="blocks.8.hook_resid_pre",
        context_size=128,
        normalize_activations=None,
        **k_place,
    )

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        top = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(K)
        f = torch.zeros(*x.shape[:-1], F).scatter(-1, top.indices, top.values.relu())
        return f, f @ w["W_dec"] + w["b_dec"]

    config = check(folder, function, AutoEncoderTopK, tmp_path)
    trainer = config["trainer"]
    assert (trainer["lm_name"], trainer["submodule_name"], trainer["layer"]) == ("gpt2-small", "resid_pre_layer_8", 8)
    assert config["buffer"] == {"ctx_len": 128}


@pytest.mark.parametrize("subtracts", [True, False])
def test_gated_of_saelens_with_and_without_b_dec_subtracted(subtracts: bool, tmp_path: Path) -> None:
    w = weights("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")
    folder = saelens(tmp_path / "there", w, architecture="gated", apply_b_dec_to_input=subtracts, metadata=META)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - w["b_dec"] * subtracts) @ w["W_enc"]
        f = (u + w["b_gate"] > 0) * torch.relu(u * w["r_mag"].exp() + w["b_mag"])
        return f, f @ w["W_dec"] + w["b_dec"]

    check(folder, function, GatedAutoEncoder, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    w = {name: tensor.to(dtype) for name, tensor in weights("W_enc", "b_enc", "W_dec", "b_dec").items()}
    dictionary, _ = read(saelens(tmp_path, w, architecture="topk", k=K, metadata=META))
    assert {p.dtype for p in dictionary.parameters()} == {torch.float32}
    assert torch.equal(dictionary.encoder_rows, w["W_enc"].t().float())


@pytest.mark.parametrize("path", ["cfg.json", "sae_weights.safetensors", ""])
def test_a_folder_can_be_given_by_one_of_its_files(path: str, tmp_path: Path) -> None:
    saelens(tmp_path, weights("W_enc", "b_enc", "W_dec", "b_dec"), architecture="topk", k=K, metadata=META)
    assert type(read(tmp_path / path)[0]) is AutoEncoderTopK


def dictionary_learning(folder: Path, name: str, state: dict[str, Tensor], **trainer: Any) -> Path:
    write_json(folder / "config.json", {"trainer": {"dict_class": name, **trainer}, "buffer": {"ctx_len": 64}})
    torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("threshold", [0.6, -1.0])
@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_the_batch_topk_classes_of_dictionary_learning_encode_by_their_threshold(
    name: str, threshold: float, tmp_path: Path
) -> None:
    counts = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    if name == "BatchTopKSAE":
        w = weights("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
        enc, enc_b, dec = w["encoder.weight"].t(), w["encoder.bias"], w["decoder.weight"].t()
    else:
        w = weights("W_enc", "b_enc", "W_dec", "b_dec")
        enc, enc_b, dec = w["W_enc"], w["b_enc"], w["W_dec"]
        counts["group_sizes"] = torch.tensor([F // 4, F - F // 4])

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        post_relu = torch.relu((x - w["b_dec"]) @ enc + enc_b)
        f = post_relu * (post_relu > threshold)
        return f, f @ dec + w["b_dec"]

    folder = dictionary_learning(tmp_path / "there", name, w | counts, k=K, lm_name="gpt2")
    assert check(folder, function, DICTIONARIES[name], tmp_path)["trainer"]["lm_name"] == "gpt2"


def test_the_gated_class_of_dictionary_learning(tmp_path: Path) -> None:
    w = weights("encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight", "decoder_bias")

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - w["decoder_bias"]) @ w["encoder.weight"].t()
        f = (u + w["gate_bias"] > 0).float() * torch.relu(w["r_mag"].exp() * u + w["mag_bias"])
        return f, f @ w["decoder.weight"].t() + w["decoder_bias"]

    check(dictionary_learning(tmp_path / "there", "GatedAutoEncoder", w), function, GatedAutoEncoder, tmp_path)


def test_the_april_class_of_dictionary_learning(tmp_path: Path) -> None:
    w = weights("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        f = torch.relu(x @ w["encoder.weight"].t() + w["encoder.bias"])
        return f, f @ w["decoder.weight"].t() + w["decoder.bias"]

    check(dictionary_learning(tmp_path / "there", "AutoEncoderNew", w), function, AutoEncoderNew, tmp_path)


def test_gemma_scope_says_what_its_path_says(tmp_path: Path) -> None:
    w = weights("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    arrays = {name: tensor.numpy() for name, tensor in w.items()}
    known = {}
    for release in ("gemma-scope-2b-pt-res", "gemma-scope-9b-it-res", "gemma-scope-2b-pt-mlp", "somewhere"):
        folder = tmp_path / release / "layer_20" / "width_16k" / "average_l0_71"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **arrays)
        trainer = read(folder / "params.npz")[1]["trainer"]
        known[release] = (trainer["lm_name"], trainer["submodule_name"], trainer["layer"])
    assert known == {
        "gemma-scope-2b-pt-res": ("google/gemma-2-2b", "resid_post_layer_20", 20),
        "gemma-scope-9b-it-res": ("google/gemma-2-9b-it", "resid_post_layer_20", 20),
        "gemma-scope-2b-pt-mlp": ("google/gemma-2-2b", None, 20),
        "somewhere": (None, None, 20),
    }


@pytest.mark.parametrize(
    ("folder", "hook_point"),
    [("layers.8", "resid_post_layer_8"), ("h.3.mlp", "mlp_out_layer_3"), ("embed", None), ("layers.8.attn", None)],
)
def test_sparsify_says_its_hook_point_by_its_folder(folder: str, hook_point: str | None, tmp_path: Path) -> None:
    write_tensors(tmp_path / folder / "sae.safetensors", weights("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    write_json(tmp_path / folder / "cfg.json", {"expansion_factor": 3, "k": K, "num_latents": 0, "d_in": D})
    dictionary, config = read(tmp_path / folder)
    assert config["trainer"]["submodule_name"] == hook_point and int(dictionary.state_dict()["k"]) == K


@pytest.mark.parametrize("d_out", [D, 5])
def test_a_transcoder_of_gemma_scope_is_told_by_its_path(d_out: int, tmp_path: Path) -> None:
    w = weights("W_enc", "b_enc", "threshold")
    w |= {"W_dec": torch.randn(F, d_out) * 0.3, "b_dec": torch.randn(d_out)}
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_5"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x @ w["W_enc"] + w["b_enc"]
        f = torch.relu(z) * (z > w["threshold"])
        return f, f @ w["W_dec"] + w["b_dec"]

    trainer = check(folder, function, JumpReluAutoEncoder, tmp_path)["trainer"]
    assert (trainer["output_dim"], trainer["skip"], trainer["submodule_name"]) == (d_out, False, None)
    if d_out != D:  # elsewhere another width is damage
        np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})
        with pytest.raises(UserError, match="'W_dec'.*has the shape .40, 5., expected .40, 12."):
            read(tmp_path)


def test_a_skip_of_sparsify_without_transcoding_goes_past_the_bias_that_the_encoder_subtracts(tmp_path: Path) -> None:
    w = weights("encoder.weight", "encoder.bias", "W_dec", "b_dec") | {"W_skip": torch.randn(D, D)}
    write_tensors(tmp_path / "there" / "sae.safetensors", w)
    write_json(
        tmp_path / "there" / "cfg.json",
        {"k": K, "num_latents": F, "d_in": D, "skip_connection": True, "transcode": False},
    )

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        top = ((x - w["b_dec"]) @ w["encoder.weight"].t() + w["encoder.bias"]).topk(K)
        f = torch.zeros(*x.shape[:-1], F).scatter(-1, top.indices, top.values.relu())
        return f, f @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].t()

    trainer = check(tmp_path / "there", function, AutoEncoderTopK, tmp_path)["trainer"]
    assert (trainer["output_dim"], trainer["skip"], trainer["k"]) == (D, True, K)
