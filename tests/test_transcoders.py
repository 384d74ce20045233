"""Every architecture as a transcoder: from one site's activations to another's, of any width, with and without skip."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dictionary import DICTIONARIES, EXTRA_ARGUMENTS, WITH_WEIGHTS, D, F, save

from dictionary_learning import formats
from dictionary_learning.dictionary import AutoEncoder, Dictionary, SparseAutoencoder
from dictionary_learning.errors import UserError
from dictionary_learning.storage import write_json
from dictionary_learning.utils import load_dictionary

OUT = 4
ARCHITECTURES = [name for name in WITH_WEIGHTS if name != "SparseAutoencoder"]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
every_kind = pytest.mark.parametrize(("output_dim", "skip"), [(OUT, False), (OUT, True), (D, False), (D, True)])


def make(name: str, output_dim: int = OUT, skip: bool = True, seed: int = 0) -> Dictionary:
    """A transcoder in which no parameter is what it was initialised to (decoder rows aside, which stay of norm 1)."""
    torch.manual_seed(seed)
    transcoder = DICTIONARIES[name](D, F, output_dim=output_dim, skip=skip, **EXTRA_ARGUMENTS.get(name, {}))
    with torch.no_grad():
        for key, tensor in transcoder.state_dict().items():
            if "threshold" in key:
                tensor.copy_(torch.rand(tensor.shape) * 0.5 + 0.1)
            elif tensor.is_floating_point() and tensor.data_ptr() != transcoder.decoder_rows.data_ptr():
                tensor.copy_(torch.randn(tensor.shape))
    return transcoder.requires_grad_(False)


@every_architecture
@every_kind
def test_it_predicts_the_output_from_its_codes_and_the_skip(name: str, output_dim: int, skip: bool) -> None:
    """x_hat = W_dec f + b_dec (+ W_skip x): Dunefsky et al. 2024, equation 1, and Paulo et al. 2025, equation 1."""
    transcoder = make(name, output_dim, skip).double()
    x = torch.randn(5, 3, D, dtype=torch.float64)
    f = transcoder.encode(x)
    by_hand = f @ transcoder.decoder_rows + transcoder.decoder_bias
    torch.testing.assert_close(transcoder.decode(f), by_hand)
    if skip:
        assert transcoder.W_skip is not None and transcoder.W_skip.shape == (output_dim, D)
        by_hand = by_hand + x @ transcoder.W_skip.t()
    else:
        assert transcoder.W_skip is None
    torch.testing.assert_close(transcoder(x), by_hand)
    torch.testing.assert_close(transcoder.reconstruct(f, x), by_hand)
    assert torch.equal(transcoder(x, output_features=True)[0], transcoder(x))
    assert transcoder(x).shape == (5, 3, output_dim) and f.shape == (5, 3, F)


@every_architecture
@every_kind
def test_its_encoder_sees_the_input_as_it_is(name: str, output_dim: int, skip: bool) -> None:
    transcoder = make(name, output_dim, skip)
    assert transcoder.is_transcoder and transcoder.pre_bias is None
    x = torch.randn(5, D)
    pre = x @ transcoder.encoder_rows.t() + transcoder.encoder_bias
    torch.testing.assert_close(transcoder.preactivations(x), pre)
    before = transcoder.encode(x)
    transcoder.decoder_bias.add_(3.0)
    assert torch.equal(transcoder.encode(x), before)


@every_architecture
def test_a_new_one_has_unit_rows_on_both_sides_and_a_skip_of_zeros(name: str) -> None:
    transcoder = DICTIONARIES[name](D, F, output_dim=OUT, skip=True, **EXTRA_ARGUMENTS.get(name, {}))
    norm = 1.0 if transcoder.unit_norm_decoder else 0.1
    for rows, width in ((transcoder.encoder_rows, D), (transcoder.decoder_rows, OUT)):
        assert rows.shape == (F, width) and rows.is_contiguous()
        torch.testing.assert_close(rows.norm(dim=1), torch.full((F,), norm))
    assert transcoder.W_skip is not None and not transcoder.W_skip.any() and transcoder.W_skip.requires_grad
    assert transcoder.decoder_bias.shape == (OUT,) and transcoder.output_dim == OUT
    same_width = DICTIONARIES[name](D, F, output_dim=D, **EXTRA_ARGUMENTS.get(name, {}))
    assert not torch.equal(same_width.encoder_rows, same_width.decoder_rows)  # rows of two different spaces


@every_architecture
@every_kind
@pytest.mark.parametrize("file_name", ["ae.safetensors", "ae.pt"])
def test_a_saved_one_loads_as_it_was(name: str, output_dim: int, skip: bool, file_name: str, tmp_path: Path) -> None:
    transcoder, x = make(name, output_dim, skip), torch.randn(9, D)
    save(transcoder, tmp_path / file_name)
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": name, "activation_dim": D, "dict_size": F}})
    for loaded in (type(transcoder).from_pretrained(tmp_path), load_dictionary(tmp_path)[0], formats.read(tmp_path)[0]):
        assert loaded.is_transcoder and loaded.output_dim == output_dim and loaded.pre_bias is None
        assert torch.equal(loaded(x), transcoder(x)) and torch.equal(loaded.encode(x), transcoder.encode(x))


@every_architecture
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 300), output_scale=st.one_of(st.none(), st.floats(0.01, 300)))
def test_scales_of_input_and_output_carry_it_to_other_units(
    name: str, seed: int, scale: float, output_scale: float | None
) -> None:
    transcoder = make(name, seed=seed).double()
    scaled = copy.deepcopy(transcoder)
    scaled.scale_biases(scale, output_scale)
    units = scale if output_scale is None else output_scale
    x = torch.randn(8, D, dtype=torch.float64)
    torch.testing.assert_close(scaled(x * scale) / units, transcoder(x))
    torch.testing.assert_close(scaled.encode(x * scale) / units, transcoder.encode(x))
    assert torch.equal(scaled.decoder_rows, transcoder.decoder_rows)


def test_an_autoencoder_has_one_scale() -> None:
    with pytest.raises(UserError, match="has one scale, got 2.0 for its input and 3.0 for its output"):
        AutoEncoder(D, F).scale_biases(2.0, 3.0)
    sae = AutoEncoder(D, F)
    torch.nn.init.ones_(sae.bias)
    sae.scale_biases(2.0, 2.0)
    assert sae.bias.eq(2).all()


@every_architecture
def test_its_gradients_in_float64_reach_the_skip_and_both_matrices(name: str) -> None:
    transcoder = make(name, seed=3).double()
    x = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2
    names = [key for key, _ in transcoder.named_parameters() if key != "threshold"]
    values = tuple(dict(transcoder.named_parameters())[key].detach().requires_grad_() for key in names)

    def function(*values: Any) -> Any:
        return torch.func.functional_call(transcoder, dict(zip(names, values, strict=True)), (x,))

    assert "W_skip" in names and torch.autograd.gradcheck(function, values, atol=1e-6)


@every_architecture
@pytest.mark.parametrize("size", [0, -3, 2.0, "8", True])
def test_impossible_outputs_are_refused(name: str, size: Any) -> None:
    with pytest.raises(UserError, match="output_dim must be a positive integer, got"):
        DICTIONARIES[name](D, F, output_dim=size, **EXTRA_ARGUMENTS.get(name, {}))


@every_architecture
def test_an_autoencoder_with_a_skip_would_copy_its_input_and_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="has no skip connection, it would copy its input: give output_dim"):
        DICTIONARIES[name](D, F, skip=True, **EXTRA_ARGUMENTS.get(name, {}))


@every_architecture
def test_a_file_whose_tensors_do_not_fit_together_is_refused(name: str, tmp_path: Path) -> None:
    state = make(name).state_dict()
    decoder = "W_dec" if "W_dec" in state else "decoder.weight"
    for change in (
        {"W_skip": torch.zeros(OUT, D + 1)},
        {"W_skip": torch.zeros(0, 0)},
        {decoder: torch.zeros(F, OUT + 1) if decoder == "W_dec" else torch.zeros(OUT + 1, F)},
        {"transcodes_to": torch.zeros(3)},
    ):
        torch.save(state | change, tmp_path / "ae.pt")
        with pytest.raises(UserError, match=f"does not hold a {name}"):
            DICTIONARIES[name].from_pretrained(tmp_path)
    without = {key: tensor for key, tensor in state.items() if key != "transcodes_to"}
    torch.save(without, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=f"does not hold a {name}"):
        DICTIONARIES[name].from_pretrained(tmp_path)


def test_a_file_that_asks_for_an_absurd_output_takes_no_memory_for_it(tmp_path: Path) -> None:
    state = make("AutoEncoder").state_dict() | {"transcodes_to": torch.tensor(10**15)}
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="does not hold a AutoEncoder"):
        AutoEncoder.from_pretrained(tmp_path)


def test_the_tutorials_autoencoder_is_no_transcoder() -> None:
    with pytest.raises(UserError, match="reconstructs its own input: for a transcoder take"):
        SparseAutoencoder(D, F, output_dim=OUT)
