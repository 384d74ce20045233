"""What we write, read by independent readers: each is a few lines of numpy made from the format's own description."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_cases import CASES, CONFIG, LEARNED, D, F, K, assert_same, expected, inputs, refusal
from torch import Tensor

from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    IdentityDict,
    JumpReluAutoEncoder,
    SparseAutoencoder,
)
from dictionary_learning.formats import FORMATS, CannotHold, detect, read, write
from dictionary_learning.formats.coder import as_coder

Result = tuple[Tensor, Tensor]
every_case = pytest.mark.parametrize("case", CASES)
every_format = pytest.mark.parametrize("name", FORMATS)


def safetensors(file: Path) -> dict[str, np.ndarray]:
    """The file by its specification: a length, a JSON header, raw little-endian data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32", (name, entry)
            begin, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
    return tensors


def top_k(z: np.ndarray, k: int) -> np.ndarray:
    z = np.maximum(z, 0)
    kept = np.argsort(-z, axis=-1, kind="stable")[..., :k]
    f = np.zeros_like(z)
    np.put_along_axis(f, kept, np.take_along_axis(z, kept, -1), -1)
    return f


def result(f: np.ndarray, x_hat: np.ndarray) -> Result:
    return torch.from_numpy(f), torch.from_numpy(x_hat)


def by_saelens(folder: Path, x: np.ndarray) -> Result:
    cfg, w = json.loads((folder / "cfg.json").read_text()), safetensors(folder / "sae_weights.safetensors")
    name = cfg["architecture"]
    out = cfg["d_out"] if "transcoder" in name else D
    names = {"W_enc": (D, F), "W_dec": (F, out), "b_dec": (out,)}
    names |= {"b_gate": (F,), "r_mag": (F,), "b_mag": (F,)} if name == "gated" else {"b_enc": (F,)}
    names |= {"threshold": (F,)} if name.startswith("jumprelu") else {}
    names |= {"W_skip": (out, D)} if "skip" in name else {}
    assert {key: value.shape for key, value in w.items()} == names  # it loads strictly
    assert (cfg["d_in"], cfg["d_sae"], cfg["normalize_activations"]) == (D, F, "none")
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert not ("transcoder" in name and cfg["apply_b_dec_to_input"])
    u = (x - w["b_dec"] if cfg["apply_b_dec_to_input"] else x) @ w["W_enc"]
    if name == "gated":
        f = (u + w["b_gate"] > 0) * np.maximum(u * np.exp(w["r_mag"]) + w["b_mag"], 0)
    elif name == "topk":
        assert cfg["rescale_acts_by_decoder_norm"] is False
        f = top_k(u + w["b_enc"], cfg["k"])
    else:
        assert name in {
            "standard", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"
        }  # fmt: skip
        f = np.maximum(u + w["b_enc"], 0) * (u + w["b_enc"] > w.get("threshold", 0))
    return result(f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "skip" in name else 0))


def by_sparsify(folder: Path, x: np.ndarray) -> Result:
    cfg, w = json.loads((folder / "cfg.json").read_text()), safetensors(folder / "sae.safetensors")
    names = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    names |= {"W_skip": (D, D)} if cfg["skip_connection"] else {}
    assert {key: value.shape for key, value in w.items()} == names
    assert (cfg["d_in"], cfg["num_latents"]) == (D, F)
    z = (x if cfg["transcode"] else x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    if cfg["activation"] == "groupmax":
        grouped = np.maximum(z, 0).reshape(*z.shape[:-1], cfg["k"], -1)
        f = np.where(grouped == grouped.max(-1, keepdims=True), grouped, 0).reshape(z.shape)
    else:
        assert cfg["activation"] == "topk"
        f = top_k(z, cfg["k"])
    return result(f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if cfg["skip_connection"] else 0))


def by_gemma_scope(folder: Path, x: np.ndarray) -> Result:
    out = json.loads((folder / "config.json").read_text())["trainer"].get("output_dim", D)
    with np.load(folder / "params.npz", allow_pickle=False) as w:
        assert {key: w[key].shape for key in w.files} == {
            "W_enc": (D, F),
            "W_dec": (F, out),
            "b_enc": (F,),
            "b_dec": (out,),
            "threshold": (F,),
        }
        z = x @ w["W_enc"] + w["b_enc"]
        f = (z > w["threshold"]) * np.maximum(z, 0)
        return result(f, f @ w["W_dec"] + w["b_dec"])


def by_dictionary_learning(folder: Path, x: np.ndarray) -> Result:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    w = {key: value.numpy() for key, value in torch.load(folder / "ae.pt", weights_only=True).items()}
    assert (trainer["activation_dim"], trainer["dict_size"]) == (D, F)
    assert ("k" in w) == ("k" in trainer) and trainer.get("k") == w.get("k")
    name = trainer["dict_class"]
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):  # apply_b_dec_to_input is off in a loaded JumpReLU
        z = (x if name == "JumpReluAutoEncoder" else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        f = np.maximum(z * (z > w["threshold"]), 0)
        return result(f, f @ w["W_dec"] + w["b_dec"])
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    b_dec = w[bias.get(name, "b_dec")]
    u = (x if name == "AutoEncoderNew" else x - b_dec) @ w["encoder.weight"].T
    if name == "AutoEncoder":
        norms = np.linalg.norm(w["decoder.weight"], axis=0)  # its loader normalises the decoder
        f = np.maximum(u + w["encoder.bias"], 0) * norms
        return result(f, f @ (w["decoder.weight"] / norms).T + b_dec)
    if name == "GatedAutoEncoder":
        f = (u + w["gate_bias"] > 0) * np.maximum(u * np.exp(w["r_mag"]) + w["mag_bias"], 0)
    elif name == "AutoEncoderTopK":
        f = top_k(u + w["encoder.bias"], trainer["k"])
    else:
        f = np.maximum(u + w["encoder.bias"], 0)
        if name == "BatchTopKSAE":
            f = f * (f > w["threshold"])
        else:
            assert name == "AutoEncoderNew"
    return result(f, f @ w["decoder.weight"].T + b_dec)


READERS: dict[str, Callable[[Path, np.ndarray], Result]] = {
    "saelens": by_saelens,
    "sparsify": by_sparsify,
    "gemma_scope": by_gemma_scope,
    "dictionary_learning": by_dictionary_learning,
}


def test_every_format_has_an_independent_reader_and_every_class_a_case() -> None:
    assert set(READERS) == set(FORMATS)
    assert {type(make()) for make in CASES.values()} == set(LEARNED)


@every_format
@every_case
def test_another_reader_gets_the_same_codes_and_reconstructions(case: str, name: str, tmp_path: Path) -> None:
    dictionary, x = CASES[case](), inputs()
    if why := refusal(case, name):
        with pytest.raises(CannotHold, match=why):
            write(dictionary, CONFIG, tmp_path / "out", name)
        assert not (tmp_path / "out").exists()
        return
    write(dictionary, CONFIG, tmp_path / "out", name)
    assert_same(READERS[name](tmp_path / "out", x.numpy()), expected(dictionary, name, x))


KEPT: dict[tuple[str, str], type] = {  # what a case comes back as, where it is another class
    **{(name, "relu, decoder of other norms"): AutoEncoderNew for name in FORMATS},
    **{("saelens", case): JumpReluAutoEncoder for case in CASES if case.startswith(("batch topk", "matryoshka"))},
    **{(name, "tied relu"): AutoEncoder for name in FORMATS},
    **{(name, "topk by magnitude"): AutoEncoderTopK for name in FORMATS},
    ("saelens", "relu transcoder"): AutoEncoderNew,
    ("saelens", "gated skip transcoder"): JumpReluAutoEncoder,
    ("sparsify", "relu transcoder"): AutoEncoderNew,
}


@every_format
@every_case
def test_what_was_written_comes_back(case: str, name: str, tmp_path: Path) -> None:
    if refusal(case, name):
        pytest.skip("the format can't hold it")
    dictionary, x = CASES[case](), inputs()
    write(dictionary, CONFIG, tmp_path, name)
    entry = detect(tmp_path)
    assert entry is not None and entry.name == name
    back, config = read(tmp_path)
    f, x_hat = expected(dictionary, name, x)
    assert_same((back.encode(x), back(x)), (f, x_hat))
    assert back.is_transcoder == dictionary.is_transcoder and back.output_dim == dictionary.output_dim
    assert "jumprelu" in case or name == "gemma_scope" or type(back) is KEPT.get((name, case), type(dictionary))
    trainer = config["trainer"]
    assert (trainer["lm_name"], trainer["layer"], trainer["submodule_name"]) == ("gpt2", 8, "resid_post_layer_8")
    assert trainer["dict_class"] == type(back).__name__ and config["buffer"]["ctx_len"] == 128
    if type(back) is type(dictionary) and "threshold" in dictionary.state_dict() and "subtracting" not in case:
        torch.testing.assert_close(back.state_dict()["threshold"], dictionary.state_dict()["threshold"])


@every_format
@pytest.mark.parametrize("case", ["relu", "topk"])
def test_bfloat16_weights_are_written_as_float32(case: str, name: str, tmp_path: Path) -> None:
    dictionary = CASES[case]().to(torch.bfloat16)
    write(dictionary, CONFIG, tmp_path, name)
    back, _ = read(tmp_path)
    if name == "dictionary_learning":
        assert {p.dtype for p in back.parameters()} == {torch.float32}
    exact, x = dictionary.float(), inputs()
    if case == "relu" and name in ("gemma_scope", "dictionary_learning"):
        torch.testing.assert_close(back(x), exact(x), atol=1e-4, rtol=1e-4)
    else:
        assert_same((back.encode(x), back(x)), expected(exact, name, x))


def test_topk_in_gemma_scope_says_that_its_threshold_took_the_place_of_k(tmp_path: Path) -> None:
    (remark,) = write(CASES["topk"](), CONFIG, tmp_path, "gemma_scope")
    assert "measured threshold (1.25) in place of k = 5" in remark and "use_threshold=True" in remark


def test_relu_in_sparsify_says_that_it_is_topk_of_all(tmp_path: Path) -> None:
    (remark,) = write(CASES["relu"](), CONFIG, tmp_path, "sparsify")
    assert "k of all latents" in remark
    assert json.loads((tmp_path / "cfg.json").read_text())["k"] == F
    assert type(read(tmp_path)[0]) is AutoEncoder


@every_format
def test_the_identity_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(CannotHold, match="identity has no weights|IdentityDict can't be exported") as caught:
        write(IdentityDict(D), CONFIG, tmp_path, name)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@every_format
@pytest.mark.parametrize(
    ("options", "why"), [({}, "an input_norm"), ({"activation": "silu", "input_norm": False}, "silu")]
)
def test_what_no_other_library_computes_is_refused(
    options: dict[str, Any], why: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(CannotHold, match=f"with .*{why} can't be exported") as caught:
        write(SparseAutoencoder(D, F, **options), CONFIG, tmp_path, name)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_matryoshka_dictionary_is_exported_as_the_prefix_that_takes_part(tmp_path: Path) -> None:
    dictionary, x = CASES["matryoshka"](), inputs()
    dictionary.active_groups = 1  # type: ignore[assignment]
    f = dictionary.encode(x)
    write(dictionary, CONFIG, tmp_path, "saelens")
    back, _ = read(tmp_path)
    assert back.dict_size == 10 and not f[..., 10:].any()
    assert_same((back.encode(x), back(x)), (f[..., :10], dictionary(x)))


@every_format
def test_a_config_that_knows_nothing_is_enough(name: str, tmp_path: Path) -> None:
    write(CASES["topk"](), {}, tmp_path, name)
    assert read(tmp_path)[1]["trainer"]["submodule_name"] is None


@every_format
def test_paths_of_this_machine_stay_out_of_the_files(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"trainer": {"lm_name": "/home/someone/models/tiny"}, "corpus": "/home/someone/notes.txt"}
    write(CASES["topk"](), config, tmp_path, name)
    for file in tmp_path.iterdir():
        assert b"someone" not in file.read_bytes(), file
    assert read(tmp_path)[1]["trainer"]["lm_name"] == "tiny"


def test_folding_the_decoder_bias_keeps_codes_where_activations_are_huge() -> None:
    coder = as_coder(CASES["topk"]())
    there_and_back = coder.subtracting(False).subtracting(True)
    assert there_and_back.subtracts_bias and coder.subtracting(True) is coder
    torch.testing.assert_close(there_and_back.encoder_bias_F, coder.encoder_bias_F)
    assert K == there_and_back.k


def test_scaled_codes_of_gates_are_those_of_the_jumprelu_that_they_equal() -> None:
    coder, factor_F = as_coder(CASES["gated"]()), torch.linspace(0.5, 3, F)
    one, other = coder.scaled(factor_F).as_jumprelu(), coder.as_jumprelu().scaled(factor_F)
    for name in ("encoder_FD", "encoder_bias_F", "decoder_FO", "threshold_F"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_metadata_for_saelens_names_the_hook_as_transformerlens_does(tmp_path: Path) -> None:
    def written(**trainer: Any) -> tuple[Any, list[str]]:
        remarks = write(CASES["relu"](), {"trainer": trainer}, tmp_path / str(len(list(tmp_path.iterdir()))), "saelens")
        newest = max(tmp_path.iterdir(), key=lambda p: int(p.name))
        return json.loads((newest / "cfg.json").read_text())["metadata"]["hook_name"], remarks

    for ours, theirs in {
        "resid_pre_layer_0": "blocks.0.hook_resid_pre",
        "resid_post_layer_11": "blocks.11.hook_resid_post",
        "mlp_out_layer_3": "blocks.3.hook_mlp_out",
        "attn_out_layer_3": "blocks.3.hook_attn_out",
    }.items():
        assert written(submodule_name=ours, lm_name="gpt2") == (theirs, [])
    for kept in ("mlp_in_layer_3", "model.layers.3.mlp:out"):
        hook_name, (remark,) = written(submodule_name=kept, lm_name="gpt2")
        assert hook_name == kept and "no name for" in remark
    # behind a norm there, in front of it here
    assert written(submodule_name="mlp_out_layer_3", lm_name="google/gemma-2-2b")[0] == "mlp_out_layer_3"
    assert written(submodule_name="resid_post_layer_3", lm_name="google/gemma-2-2b")[0] == "blocks.3.hook_resid_post"
