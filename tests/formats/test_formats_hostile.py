"""Files from strangers: whatever is wrong is one sentence, nothing runs, and nothing is written elsewhere."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_cases import CASES, CONFIG, D, F
from safetensors.torch import load_file, save_file

from dictionary_learning.dictionary import Dictionary, JumpReluAutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.formats import FORMATS, detect, find_dictionaries, read, write
from dictionary_learning.formats import files as format_files

WEIGHTS = {
    "saelens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
    "gemma_scope": "params.npz",
    "dictionary_learning": "ae.pt",
}
JSON = {
    "saelens": "cfg.json",
    "sparsify": "cfg.json",
    "gemma_scope": "config.json",
    "dictionary_learning": "config.json",
}
every_format = pytest.mark.parametrize("name", FORMATS)


def written(name: str, folder: Path, case: str = "topk") -> Path:
    write(CASES[case](), CONFIG, folder, name)
    return folder


def change_tensors(name: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load the weights of a written folder, change them, and put them back."""
    file = folder / WEIGHTS[name]
    if file.suffix == ".npz":
        arrays = dict(np.load(file))
        tensors: dict[str, Any] = {key: torch.from_numpy(value) for key, value in arrays.items()}
    else:
        tensors = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    change(tensors)
    if file.suffix == ".npz":
        np.savez(file, **{key: value.numpy() for key, value in tensors.items()})
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)


def change_config(name: str, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / JSON[name]
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def refused(folder: Path, match: str, name: str | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read(folder, name)
    assert "\n" not in str(caught.value)


def matrix(tensors: dict[str, Any]) -> str:
    return next(key for key in ("W_enc", "encoder.weight") if key in tensors)


@every_format
def test_a_missing_tensor(name: str, tmp_path: Path) -> None:
    change_tensors(name, written(name, tmp_path), lambda t: t.pop("b_dec"))
    refused(tmp_path, "lacks the tensor 'b_dec'|does not hold a AutoEncoderTopK")


@every_format
def test_a_tensor_too_many(name: str, tmp_path: Path) -> None:
    change_tensors(name, written(name, tmp_path), lambda t: t.update(W_skip=torch.ones(2)))
    refused(tmp_path, "no known meaning: W_skip|does not hold a AutoEncoderTopK")


@every_format
@pytest.mark.parametrize("shape", [(F + 1, D), (D,), (F, D, 1), (0, D), ()])
def test_a_wrong_shape(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    change_tensors(name, written(name, tmp_path), lambda t: t.update({matrix(t): torch.ones(shape)}))
    refused(tmp_path, "has the shape|does not hold a AutoEncoderTopK|must be a positive integer")


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
@pytest.mark.parametrize(
    "change",
    [
        {"W_skip": torch.ones(D, D + 1)},
        {"W_skip": torch.ones(D + 1, D)},
        {"W_skip": torch.ones(D)},
        {"W_dec": torch.ones(F + 1, D)},
        {"W_dec": torch.ones(F, D + 1)},
        {"W_dec": torch.ones(0, 0)},
        {"b_dec": torch.ones(D + 1)},
    ],
)
def test_tensors_of_a_skip_transcoder_that_do_not_fit_together(
    name: str, change: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    case = {"saelens": "jumprelu skip transcoder", "sparsify": "topk skip transcoder"}[name]
    change_tensors(name, written(name, tmp_path, case), lambda t: t.update(change))
    refused(tmp_path, "has the shape")


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
def test_a_skip_that_the_config_does_not_speak_of(name: str, tmp_path: Path) -> None:
    case = {"saelens": "jumprelu skip transcoder", "sparsify": "topk skip transcoder"}[name]
    said = {"architecture": "jumprelu_transcoder"} if name == "saelens" else {"skip_connection": False}
    change_config(name, written(name, tmp_path, case), lambda c: c.update(said))
    refused(tmp_path, "no known meaning: W_skip")


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number(name: str, value: float, tmp_path: Path) -> None:
    change_tensors(name, written(name, tmp_path), lambda t: t[matrix(t)].view(-1)[3:4].fill_(value))
    refused(tmp_path, "holds NaN or infinity")


@pytest.mark.parametrize("name", ["saelens", "sparsify", "gemma_scope"])
def test_weights_that_are_not_floating_point(name: str, tmp_path: Path) -> None:
    change_tensors(name, written(name, tmp_path), lambda t: t.update(b_dec=torch.ones(D, dtype=torch.int64)))
    refused(tmp_path, "expected floating point")


@every_format
@pytest.mark.parametrize("kind", ["empty", "cut short", "noise"])
def test_a_damaged_file(name: str, kind: str, tmp_path: Path) -> None:
    file = written(name, tmp_path) / WEIGHTS[name]
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut short": whole[: len(whole) // 2], "noise": b"\x93\x00hello" * 50}[kind])
    refused(tmp_path, "not a readable|was not loaded")


@every_format
@pytest.mark.parametrize("kind", ["weights", "config"])
def test_a_missing_file(name: str, kind: str, tmp_path: Path) -> None:
    (written(name, tmp_path) / (WEIGHTS if kind == "weights" else JSON)[name]).unlink()
    if name == "gemma_scope" and kind == "config":
        assert detect(tmp_path) is FORMATS[name]  # it needs none
        return
    assert detect(tmp_path) is None
    refused(tmp_path, "of no known format")
    refused(tmp_path, "No dictionary at|does not exist|lacks|holds neither", name)


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[" * 100_000, "\x00"])
def test_a_config_that_is_no_config(name: str, text: str, tmp_path: Path) -> None:
    (written(name, tmp_path) / JSON[name]).write_text(text)
    refused(tmp_path, "not a readable JSON file|should hold a JSON object")


def test_a_config_of_absurd_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_files, "MAX_JSON_BYTES", 1000)
    (written("saelens", tmp_path) / "cfg.json").write_text(" " * 1001)
    refused(tmp_path, "it is no config")


@pytest.mark.parametrize("k", [0, -1, 2.5, "5", None, True, F + 1, [5]])
@pytest.mark.parametrize("name", ["saelens", "sparsify"])
def test_an_impossible_k(name: str, k: Any, tmp_path: Path) -> None:
    change_config(name, written(name, tmp_path), lambda c: c.update(k=k))
    refused(tmp_path, "'k'")


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
@pytest.mark.parametrize("size", [D + 1, -1, "12", 10**400])
def test_sizes_that_the_weights_do_not_have(name: str, size: Any, tmp_path: Path) -> None:
    change_config(name, written(name, tmp_path), lambda c: c.update(d_in=size))
    refused(tmp_path, "d_in")


def test_sizes_and_values_of_a_dictionary_learning_config(tmp_path: Path) -> None:
    for key, value in (("dict_size", F + 1), ("activation_dim", "12"), ("dict_class", None), ("dict_class", 3)):
        folder = written("dictionary_learning", tmp_path / f"{key} {value}")
        change_config("dictionary_learning", folder, lambda c, k=key, v=value: c["trainer"].update({k: v}))
        refused(folder, key)
    folder = written("dictionary_learning", tmp_path / "k")
    change_tensors("dictionary_learning", folder, lambda t: t.update(k=torch.tensor(float("inf"))))
    refused(folder, "does not hold a AutoEncoderTopK")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "jumprelu_transcode"}, "can't be read.*Did you mean 'jumprelu_transcoder'"),
        (
            {"architecture": "transcoder", "apply_b_dec_to_input": True},
            "must be false: b_dec belongs to a transcoder's",
        ),
        ({"architecture": "skip_transcoder", "apply_b_dec_to_input": False}, "lacks the tensor 'W_skip'"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": 5}, "d_out = 5, but the weights.* 12"),
        ({"architecture": "gated"}, "lacks the tensor 'b_gate'"),
        ({"architecture": "batchtopk"}, "save a BatchTopK SAE for inference"),
        ({"architecture": ["topk"]}, "can't be read"),
        ({"architecture": {}}, "can't be read"),
        ({"normalize_activations": "layer_norm"}, "normalises activations by 'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalises activations"),
        ({"reshape_activations": "wild"}, "reshapes activations by 'wild'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"apply_b_dec_to_input": "yes"}, "must be true or false"),
        ({"activation_fn_str": "tanh-relu"}, "'tanh-relu', expected relu or topk"),
    ],
)
def test_saelens_settings_that_no_dictionary_here_computes(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    change_config("saelens", written("saelens", tmp_path), lambda c: c.update(change))
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"skip_connection": True}, "lacks the tensor 'W_skip'"),
        ({"signed": True}, "keeps negative codes"),
        ({"activation": "groupmax", "k": 7}, "'k' .* is 7, and 40 latents can't be split into so many groups"),
        ({"activation": "relu"}, "'relu', expected topk or groupmax"),
        ({"activation": [1]}, "expected topk or groupmax"),
    ],
)
def test_sparsify_settings_that_no_dictionary_here_computes(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    change_config("sparsify", written("sparsify", tmp_path), lambda c: c.update(change))
    refused(tmp_path, match)


def test_an_unknown_dictionary_class_brings_the_nearest_known_one(tmp_path: Path) -> None:
    folder = written("dictionary_learning", tmp_path)
    change_config("dictionary_learning", folder, lambda c: c["trainer"].update(dict_class="BatchTopkSAE"))
    refused(tmp_path, "'BatchTopkSAE'.*is unknown.*Did you mean 'BatchTopKSAE'")


def test_an_unknown_format_brings_the_nearest_known_one(tmp_path: Path) -> None:
    refused(tmp_path, "Unknown format 'sealens'.*Did you mean 'saelens'", "sealens")


class _Code:
    """Pickled, it touches a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["gemma_scope", "dictionary_learning"])
def test_pickled_code_does_not_run(name: str, tmp_path: Path) -> None:
    trace, folder = tmp_path / "code ran", written(name, tmp_path / "there")
    if name == "gemma_scope":
        np.savez(folder / "params.npz", W_enc=np.array([_Code(trace)], dtype=object), allow_pickle=True)
        (folder / "raw").write_bytes(pickle.dumps(_Code(trace)))
        refused(folder, "not a readable .npz of plain arrays")
        (folder / "raw").rename(folder / "params.npz")
        refused(folder, "not a readable .npz of plain arrays")
    else:
        torch.save({"encoder.weight": _Code(trace)}, folder / "ae.pt")
        refused(folder, "was not loaded")
    assert not trace.exists()


def test_an_npz_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("W_enc.npy", "w", force_zip64=True) as entry:
            block = bytes(1 << 24)
            for _ in range(70):
                entry.write(block)
    refused(tmp_path, "would unpack to 1.2 GB")


def test_an_npz_whose_header_asks_for_more_than_it_holds(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 8), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", member)
    refused(tmp_path, "not a readable .npz")


def test_a_safetensors_header_that_lies(tmp_path: Path) -> None:
    folder = written("saelens", tmp_path)
    for raw in ((2**62).to_bytes(8, "little") + b"{}", b'\x02\0\0\0\0\0\0\0{"', (2).to_bytes(8, "little") + b"{}" * 9):
        (folder / "sae_weights.safetensors").write_bytes(raw)
        refused(folder, "not a readable file of weights")


HOSTILE = "../../../escaped"


def holding(dictionary: Dictionary) -> list[str]:
    """The formats that a TopK dictionary fits in, read from `topk`: with its threshold, or as JumpReLU by now."""
    if isinstance(dictionary, JumpReluAutoEncoder):
        return [name for name in FORMATS if name != "sparsify"]
    measured = dictionary.state_dict()["threshold"] >= 0
    return [name for name in FORMATS if name != "gemma_scope" or measured]


@every_format
def test_paths_in_configs_lead_nowhere(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path / "a" / "b" / "c")

    def change(config: dict[str, Any]) -> None:
        for part in (config, config.get("metadata"), config.get("trainer")):
            if isinstance(part, dict):
                for key in ("hook_name", "hook_point", "submodule_name", "model_name", "lm_name", "path", "wandb_name"):
                    part[key] = HOSTILE

    change_config(name, folder, change)
    dictionary, config = read(folder)
    format_files.save_ours(dictionary, config, tmp_path / "a" / "b" / "ours")
    for other in holding(dictionary):
        write(dictionary, config, tmp_path / "a" / "b" / other, other)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b"}


@every_format
@pytest.mark.parametrize(
    "junk",
    [
        3,
        "text",
        [1],
        None,
        {"layer": "x", "lm_name": 4, "submodule_name": [1], "threshold": 10**400},
        {"layer": 10**400, "hook_name": f"blocks.{'9' * 5000}.hook_resid_post", "threshold": 1e39},
        f"resid_post_layer_{'9' * 5000}",
    ],
)
def test_metadata_of_any_kind_is_only_metadata(name: str, junk: Any, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for key in ("metadata", "sae_factory", "buffer", "hook_name", "model_name", "context_size"):
            config[key] = junk
        if isinstance(config.get("trainer"), dict):
            config["trainer"] |= {"layer": junk, "lm_name": junk, "submodule_name": junk}

    change_config(name, written(name, tmp_path / "in"), change)
    dictionary, config = read(tmp_path / "in")
    for other in holding(dictionary):
        write(dictionary, config, tmp_path / other, other)
        assert read(tmp_path / other)[0].dict_size == F


def test_a_folder_of_two_formats_is_not_guessed(tmp_path: Path) -> None:
    written("saelens", tmp_path)
    written("gemma_scope", tmp_path)
    refused(tmp_path, "holds the files of saelens and gemma_scope: say which")
    assert type(read(tmp_path, "saelens")[0]).__name__ == "AutoEncoderTopK"
    assert [entry.name for _, _, entry in find_dictionaries(tmp_path, FORMATS["gemma_scope"])] == ["gemma_scope"]


@every_format
def test_a_path_to_nothing_or_to_something_else(name: str, tmp_path: Path) -> None:
    refused(tmp_path / "absent", "There is nothing at", name)
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "should be named", name)
    with pytest.raises(UserError, match="holds no dictionary"):
        find_dictionaries(tmp_path)
