"""What a dictionary is, for every registered architecture: shapes, formulas, files, units, and errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dictionary_learning.dictionary import (
    DICTIONARIES,
    AutoEncoder,
    AutoEncoderTopK,
    Dictionary,
    IdentityDict,
    JumpReluAutoEncoder,
    dictionary_class,
)
from dictionary_learning.errors import UserError

D, F, K = 6, 10, 3
EXTRA_ARGUMENTS: dict[str, dict[str, Any]] = {
    "AutoEncoderTopK": {"k": K},
    "AutoEncoderGroupMax": {"k": 2},
    "BatchTopKSAE": {"k": K},
    "MatryoshkaBatchTopKSAE": {"k": K, "group_sizes": [2, 3, 5]},
    "SparseAutoencoder": {"input_norm": False},
}
WITH_WEIGHTS = [name for name in DICTIONARIES if name != "IdentityDict"]
every = pytest.mark.parametrize("name", list(DICTIONARIES))
every_learned = pytest.mark.parametrize("name", WITH_WEIGHTS)


def make(name: str, dict_size: int = F, seed: int = 0) -> Dictionary:
    """A dictionary in which no parameter is what it was initialised to (decoder rows aside, which stay of norm 1)."""
    if name == "IdentityDict":
        return IdentityDict(D)
    torch.manual_seed(seed)
    dictionary = DICTIONARIES[name](D, dict_size, **EXTRA_ARGUMENTS.get(name, {}))
    with torch.no_grad():
        for key, tensor in dictionary.state_dict().items():
            if "threshold" in key:
                tensor.copy_(torch.rand(tensor.shape) * 0.5 + 0.1)
            elif tensor.is_floating_point() and tensor.data_ptr() != dictionary.decoder_rows.data_ptr():
                tensor.copy_(torch.randn(tensor.shape))
    return dictionary


def save(dictionary: Dictionary, file: Path) -> None:
    state = dictionary.state_dict()
    if file.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    else:
        torch.save(state, file)


# ------------------------------------------------------------------------------------------------- what it computes


@every
def test_forward_decodes_what_encode_gives_on_2d_and_3d_input(name: str) -> None:
    dictionary = make(name)
    x = torch.randn(4, 5, D)
    f = dictionary.encode(x)
    assert f.shape == (4, 5, dictionary.dict_size)
    x_hat, codes = dictionary(x, output_features=True)
    assert torch.equal(x_hat, dictionary.decode(f)) and torch.equal(dictionary(x), x_hat)
    if name != "AutoEncoderNew":  # which hands out codes times decoder norms
        assert torch.equal(codes, f)
    assert x_hat.shape == x.shape
    flat_x_hat, flat_codes = dictionary(x.flatten(0, 1), output_features=True)
    torch.testing.assert_close(flat_x_hat, x_hat.flatten(0, 1))
    torch.testing.assert_close(flat_codes, codes.flatten(0, 1))


def numpy_weights(dictionary: Dictionary) -> dict[str, np.ndarray]:
    return {key: tensor.numpy() for key, tensor in dictionary.state_dict().items()}


def test_standard_sae_is_its_formula() -> None:
    sae, x = make("AutoEncoder").double(), torch.randn(7, D, dtype=torch.float64)
    w = numpy_weights(sae)
    f = np.maximum((x.numpy() - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), f, atol=1e-12)
    np.testing.assert_allclose(sae(x).detach().numpy(), f @ w["decoder.weight"].T + w["bias"], atol=1e-12)


def test_topk_sae_keeps_the_k_largest_relu_pre_activations() -> None:
    sae, x = make("AutoEncoderTopK").double(), torch.randn(7, D, dtype=torch.float64)
    w = numpy_weights(sae)
    acts = np.maximum((x.numpy() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    f = np.where(acts >= np.sort(acts, axis=1)[:, [-K]], acts, 0)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), f, atol=1e-12)
    np.testing.assert_allclose(sae(x).detach().numpy(), f @ w["decoder.weight"].T + w["b_dec"], atol=1e-12)


def test_topk_sae_encodes_by_its_threshold_and_hands_out_what_it_chose_from() -> None:
    sae = make("AutoEncoderTopK")
    assert isinstance(sae, AutoEncoderTopK)
    x = torch.randn(7, D)
    f, values, indices, acts = sae.encode(x, return_topk=True)
    assert torch.equal(acts.gather(1, indices), values) and torch.equal(f.gather(1, indices), values)
    assert f.count_nonzero() == values.count_nonzero()
    by_threshold = sae.encode(x, use_threshold=True)
    assert torch.equal(by_threshold, torch.where(acts > sae.threshold, acts, 0.0))
    assert torch.equal(sae.encode(x, return_topk=True, use_threshold=True)[0], by_threshold)


def test_topk_sae_without_a_measured_threshold_refuses_to_encode_by_it() -> None:
    with pytest.raises(UserError, match="no measured threshold"):
        AutoEncoderTopK(D, F, K).encode(torch.randn(2, D), use_threshold=True)


def test_jumprelu_sae_is_its_formula() -> None:
    sae, x = make("JumpReluAutoEncoder").double(), torch.randn(7, D, dtype=torch.float64)
    assert isinstance(sae, JumpReluAutoEncoder)
    w = numpy_weights(sae)
    pre = x.numpy() @ w["W_enc"] + w["b_enc"]
    f = np.where(pre > w["threshold"], pre, 0)
    found, found_pre = sae.encode(x, output_pre_jump=True)
    np.testing.assert_allclose(found.detach().numpy(), f, atol=1e-12)
    np.testing.assert_allclose(found_pre.detach().numpy(), pre, atol=1e-12)
    np.testing.assert_allclose(sae(x).detach().numpy(), f @ w["W_dec"] + w["b_dec"], atol=1e-12)
    sae.apply_b_dec_to_input = True
    pre = (x.numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), np.where(pre > w["threshold"], pre, 0), atol=1e-12)


@every_learned
@given(scale=st.floats(0.01, 500), seed=st.integers(0, 1000))
def test_scaling_the_biases_carries_a_dictionary_to_other_units(name: str, scale: float, seed: int) -> None:
    dictionary = make(name, seed=seed)
    scaled = copy.deepcopy(dictionary)
    scaled.scale_biases(scale)
    x = torch.randn(8, D) * scale
    torch.testing.assert_close(scaled(x) / scale, dictionary(x / scale), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.encode(x) / scale, dictionary.encode(x / scale), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- its weights


@every_learned
def test_a_new_dictionary_has_decoder_rows_of_one_norm_and_a_tied_encoder(name: str) -> None:
    dictionary = DICTIONARIES[name](D, F, **EXTRA_ARGUMENTS.get(name, {}))
    assert dictionary.decoder_rows.shape == (F, D)
    norm = 1.0 if dictionary.unit_norm_decoder else 0.1
    torch.testing.assert_close(dictionary.decoder_rows.norm(dim=1), torch.full((F,), norm))
    assert torch.equal(dictionary.encoder_rows, dictionary.decoder_rows)
    assert dictionary.encoder_rows.data_ptr() != dictionary.decoder_rows.data_ptr()
    assert dictionary.decoder_bias.shape == (D,) and not dictionary.decoder_bias.any()


@every_learned
def test_one_latents_weights_lie_contiguous_also_after_copying_casting_and_loading(name: str) -> None:
    dictionary = make(name)
    loaded = make(name, seed=1)
    loaded.load_state_dict({key: tensor.contiguous() for key, tensor in dictionary.state_dict().items()})
    for one in (dictionary, copy.deepcopy(dictionary), dictionary.to(torch.float64), loaded):
        assert one.decoder_rows.is_contiguous() and one.encoder_rows.is_contiguous()
    assert torch.equal(loaded.decoder_rows.double(), dictionary.decoder_rows)


@every_learned
def test_rows_are_views_that_write_to_the_parameters(name: str) -> None:
    dictionary = make(name)
    x = torch.randn(3, D)
    with torch.no_grad():
        dictionary.decoder_rows.zero_()
        torch.testing.assert_close(dictionary(x), dictionary.decoder_bias.expand(3, D))
        dictionary.encoder_rows.zero_()
        assert torch.equal(dictionary.encode(x), dictionary.encode(x + 1))


def test_normalising_a_decoder_keeps_the_function() -> None:
    sae, x = make("AutoEncoder"), torch.randn(20, D)
    assert isinstance(sae, AutoEncoder)
    with torch.no_grad():
        sae.decoder_rows.mul_(torch.linspace(0.2, 3, F)[:, None])
    before = sae(x)
    sae.normalize_decoder()
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.decoder_rows.norm(dim=1), torch.ones(F))


# ------------------------------------------------------------------------------------------------- files


@every
@pytest.mark.parametrize("file_name", ["ae.safetensors", "ae.pt"])
def test_a_saved_dictionary_loads_as_it_was(name: str, file_name: str, tmp_path: Path) -> None:
    dictionary, x = make(name), torch.randn(9, D)
    save(dictionary, tmp_path / file_name)
    for path in (tmp_path, tmp_path / file_name, str(tmp_path)):
        loaded = type(dictionary).from_pretrained(path)
        assert type(loaded) is type(dictionary)
        assert torch.equal(loaded(x), dictionary(x)) and torch.equal(loaded.encode(x), dictionary.encode(x))
        for key, tensor in dictionary.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key


@every_learned
def test_a_dictionary_loads_in_the_data_type_asked_for(name: str, tmp_path: Path) -> None:
    save(make(name), tmp_path / "ae.pt")
    loaded = DICTIONARIES[name].from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_standard_sae_from_elsewhere_loads_with_a_normalised_decoder_unless_told_not_to(tmp_path: Path) -> None:
    sae, x = make("AutoEncoder"), torch.randn(9, D)
    with torch.no_grad():
        sae.decoder_rows.mul_(0.1)
    save(sae, tmp_path / "ae.pt")
    loaded = AutoEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decoder_rows.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(loaded(x), sae(x))
    as_it_was = AutoEncoder.from_pretrained(tmp_path, normalize_decoder=False)
    assert torch.equal(as_it_was.decoder_rows, sae.decoder_rows)


def test_a_topk_file_without_k_or_threshold_takes_k_from_the_call(tmp_path: Path) -> None:
    sae = make("AutoEncoderTopK")
    weights = {key: value for key, value in sae.state_dict().items() if key not in ("k", "threshold")}
    torch.save(weights, tmp_path / "ae.pt")
    x = torch.randn(4, D)
    loaded = AutoEncoderTopK.from_pretrained(tmp_path, k=K)
    assert torch.equal(loaded.encode(x), sae.encode(x)) and loaded.threshold == -1
    with pytest.raises(UserError, match="does not hold a AutoEncoderTopK"):
        AutoEncoderTopK.from_pretrained(tmp_path)


@pytest.mark.parametrize("k", [0, 2, 4])
def test_another_k_than_the_files_is_refused(k: int, tmp_path: Path) -> None:
    save(make("AutoEncoderTopK"), tmp_path / "ae.pt")
    with pytest.raises(UserError, match=f"trained with k = 3, and k = {k}"):
        AutoEncoderTopK.from_pretrained(tmp_path, k=k)


@every_learned
def test_weights_of_another_architecture_are_refused(name: str, tmp_path: Path) -> None:
    others = [other for other in WITH_WEIGHTS if set(make(other).state_dict()) != set(make(name).state_dict())]
    assert len(others) >= len(WITH_WEIGHTS) - 2  # TopK and BatchTopK have the same tensors
    for other in others:
        save(make(other), tmp_path / "ae.safetensors")
        with pytest.raises(UserError, match=f"does not hold a {name}: its tensors are .*|k must be .* got 0"):
            DICTIONARIES[name].from_pretrained(tmp_path)


@every_learned
def test_weights_of_the_wrong_shapes_are_refused(name: str, tmp_path: Path) -> None:
    state = make(name).state_dict()
    for wrong in (state | {key: value.reshape(-1) for key, value in state.items()}, state | {"extra": torch.ones(1)}):
        torch.save(wrong, tmp_path / "ae.pt")
        with pytest.raises(UserError, match=f"does not hold a {name}"):
            DICTIONARIES[name].from_pretrained(tmp_path)


class _Code:
    """Pickled, it runs a command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(how: str, tmp_path: Path) -> None:
    trace, file = tmp_path / "code ran", tmp_path / "ae.pt"
    content = {"encoder.weight": _Code(trace)}
    torch.save(content, file) if how == "torch.save" else file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError) as caught:
        AutoEncoder.from_pretrained(file)
    assert not trace.exists()
    message = str(caught.value)
    assert "ae.pt" in message and "was not loaded" in message and "weights_only" not in message and "\n" not in message


def _damaged(kind: str, file: Path) -> None:
    save(make("AutoEncoder"), file)
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut short": whole[: len(whole) // 2], "noise": b"\x93\x00hello" * 50}[kind])


@pytest.mark.parametrize("file_name", ["ae.safetensors", "ae.pt"])
@pytest.mark.parametrize("kind", ["empty", "cut short", "noise"])
def test_a_damaged_file_is_named_in_one_sentence(kind: str, file_name: str, tmp_path: Path) -> None:
    _damaged(kind, tmp_path / file_name)
    with pytest.raises(UserError, match=f"{file_name}.*(not a readable file of weights|was not loaded)") as caught:
        AutoEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"encoder.weight": "text"}, torch.ones(3)])
def test_a_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="expected named tensors"):
        AutoEncoder.from_pretrained(tmp_path)


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No dictionary at .*absent"):
        AutoEncoder.from_pretrained(tmp_path / "absent" / "ae.pt")
    with pytest.raises(UserError, match="holds neither ae.safetensors nor ae.pt"):
        AutoEncoder.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------- sizes and names


@every_learned
@pytest.mark.parametrize("size", [0, -3, 2.0, "8", None])
def test_impossible_sizes_are_refused(name: str, size: Any) -> None:
    extra = EXTRA_ARGUMENTS.get(name, {})
    with pytest.raises(UserError, match="dict_size .width. must be a positive integer, got"):
        DICTIONARIES[name](D, size, **extra)
    with pytest.raises(UserError, match="activation_dim must be a positive integer, got"):
        DICTIONARIES[name](size, F, **extra)


@pytest.mark.parametrize("k", [0, -1, F + 1, 2.0, "3", None])
def test_impossible_k_is_refused(k: Any) -> None:
    with pytest.raises(UserError, match=f"k must be a positive integer of at most the width {F}, got"):
        AutoEncoderTopK(D, F, k)


@every
def test_a_registered_class_is_found_by_its_name(name: str) -> None:
    assert dictionary_class(name) is DICTIONARIES[name]
    assert not name.startswith("_")


def test_an_unknown_class_name_brings_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match="'AutoEncoderTopk' is unknown.*Did you mean 'AutoEncoderTopK'"):
        dictionary_class("AutoEncoderTopk")
    with pytest.raises(UserError, match="is unknown"):
        dictionary_class("_LinearDictionary")


def test_a_second_class_of_one_name_is_refused() -> None:
    with pytest.raises(TypeError, match="two dictionary classes are named 'AutoEncoder'"):
        type("AutoEncoder", (AutoEncoder,), {})
    assert DICTIONARIES["AutoEncoder"] is AutoEncoder


def test_the_identity_is_the_identity() -> None:
    x: Tensor = torch.randn(3, D)
    identity = IdentityDict()
    assert identity.encode(x) is x and identity.decode(x) is x and identity(x) is x
