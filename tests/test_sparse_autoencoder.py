"""The tutorials' autoencoder: each option does what it says, alone and together, and comes back from files."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
import yaml
from test_dictionary import D, F, save
from torch import Tensor

from dictionary_learning.dictionary import SparseAutoencoder
from dictionary_learning.errors import UserError
from dictionary_learning.storage import write_json
from dictionary_learning.utils import load_dictionary

K = 3
OPTIONS = [
    {"activation": activation, "input_norm": norm, "k": k, "tie_weights": tie}
    for activation, norm, k, tie in product(["relu", "silu"], [True, False], [None, K], [True, False])
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(f"{v}" for v in o.values()))


def make(**options: Any) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, **options).double()
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    return sae.requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(5, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1


@every_option
def test_it_is_its_formula(options: dict[str, Any]) -> None:
    sae, x = make(**options), inputs()
    encoder = sae.encoder.weight
    decoder = encoder if options["tie_weights"] else sae.decoder.weight.t()
    seen = functional.layer_norm(x, (D,), eps=0.0) if options["input_norm"] else x
    pre = (seen - sae.bias) @ encoder.t() + sae.encoder.bias
    f = functional.silu(pre) if options["activation"] == "silu" else functional.relu(pre)
    if options["k"]:
        kept = f.abs() >= f.abs().sort(-1, descending=True).values[..., [K - 1]]
        f = f * kept
        assert ((f != 0).sum(-1) <= K).all() and (f != 0).any()
    x_hat = f @ decoder + sae.bias
    if options["input_norm"]:
        x_hat = x_hat * x.std(-1, correction=0, keepdim=True) + x.mean(-1, keepdim=True)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae(x), x_hat)
    torch.testing.assert_close(sae.reconstruct(f, x), x_hat)
    if not options["k"]:
        assert (options["activation"] == "silu") == bool((f < 0).any())


@every_option
@pytest.mark.parametrize("file_name", ["ae.safetensors", "ae.pt"])
def test_it_comes_back_from_its_weights_alone(options: dict[str, Any], file_name: str, tmp_path: Path) -> None:
    sae, x = make(**options).float(), inputs().float()
    save(sae, tmp_path / file_name)
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": "SparseAutoencoder", "k": options["k"]}})
    for loaded in (SparseAutoencoder.from_pretrained(tmp_path), load_dictionary(tmp_path)[0]):
        assert torch.equal(loaded(x), sae(x)) and torch.equal(loaded.encode(x), sae.encode(x))
        assert isinstance(loaded, SparseAutoencoder) and loaded.to_config() == sae.to_config()


@every_option
def test_it_goes_to_a_config_yaml_and_back(options: dict[str, Any]) -> None:
    sae = SparseAutoencoder(D, F, unit_norm_decoder=False, **options)
    text = yaml.safe_dump(sae.to_config())
    again = SparseAutoencoder.from_config(yaml.safe_load(text))
    assert (
        again.to_config()
        == sae.to_config()
        == {"input_dims": D, "n_features": F, **options}
        | {
            "beta_l1": None,
            "unit_norm_decoder": False,
        }
    )
    assert not again.unit_norm_decoder


@every_option
def test_other_units_of_the_data_change_nothing_but_units(options: dict[str, Any]) -> None:
    sae, x = make(**options), inputs()
    scaled = copy.deepcopy(sae)
    scaled.scale_biases(7.0)
    torch.testing.assert_close(scaled(7 * x) / 7, sae(x))
    codes_have_units = options["activation"] == "relu" and not options["input_norm"]
    torch.testing.assert_close(scaled.encode(7 * x), sae.encode(x) * (7 if codes_have_units else 1))


@every_option
def test_it_has_gradients_in_float64(options: dict[str, Any]) -> None:
    sae, x = make(**options), inputs()
    names = [name for name, _ in sae.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in sae.parameters())

    def function(*values: Tensor) -> Any:
        return torch.func.functional_call(sae, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, values, atol=1e-6)


def test_tied_weights_are_one_tensor() -> None:
    sae = SparseAutoencoder(D, F, tie_weights=True)
    assert sae.decoder_rows is sae.encoder.weight and sae.encoder_rows is sae.encoder.weight
    assert [name for name, _ in sae.named_parameters()] == ["bias", "encoder.weight", "encoder.bias"]
    sae(torch.randn(4, D)).sum().backward()
    assert sae.encoder.weight.grad is not None


def test_an_input_norm_makes_codes_independent_of_scale_and_offset() -> None:
    sae, x = make(), inputs()
    torch.testing.assert_close(sae.encode(2 * x + 3), sae.encode(x))
    torch.testing.assert_close(sae(2 * x + 3), 2 * sae(x) + 3)
    torch.testing.assert_close(sae.encode(x * 1e-9), sae.encode(x))  # no epsilon, which would have units
    flat = torch.full((2, D), 4.0, dtype=torch.float64)
    assert torch.isfinite(sae(flat)).all() and torch.isfinite(sae.encode(flat)).all()


def test_it_is_exported_as_the_class_that_it_equals(tmp_path: Path) -> None:
    """Tied ReLU is the standard SAE."""
    from dictionary_learning.formats.coder import as_coder, to_dictionary

    sae, x = make(input_norm=False, tie_weights=True).float(), inputs().float()
    with torch.no_grad():
        sae.encoder.weight.div_(sae.encoder.weight.norm(dim=1, keepdim=True).clone())
    same = to_dictionary(as_coder(sae))
    assert type(same).__name__ == "AutoEncoder"
    torch.testing.assert_close(same(x), sae(x))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"n_feature": 3}, "key 'n_feature' is unknown.*Did you mean 'n_features'"),
        ({"tied_weights": True}, "key 'tied_weights' is unknown.*Did you mean 'tie_weights'"),
        ({1: 2}, "key '1' is unknown"),
        ({"input_dims": None}, "lacks 'input_dims'"),
        ({"n_features": 0}, "dict_size .width. must be a positive integer"),
        ({"input_dims": "512"}, "activation_dim must be a positive integer"),
        ({"activation": "gelu"}, "activation must be relu or silu, got 'gelu'"),
        ({"activation": "silo"}, "activation must be relu or silu.*Did you mean 'silu'"),
        ({"activation": ["relu"]}, "activation must be relu or silu"),
        ({"input_norm": "no"}, "input_norm must be true or false, got 'no'"),
        ({"tie_weights": 1}, "tie_weights must be true or false, got 1"),
        ({"unit_norm_decoder": None}, "unit_norm_decoder must be true or false, got None"),
        ({"k": 0}, "k must be a positive integer of at most the width 10, or null, got 0"),
        ({"k": 11}, "at most the width 10"),
        ({"k": True}, "k must be"),
        ({"k": 2.5}, "k must be"),
        ({"beta_l1": -0.1}, "beta_l1 must be a number that is not negative"),
        ({"beta_l1": float("nan")}, "beta_l1 must be"),
        ({"beta_l1": float("inf")}, "beta_l1 must be"),
        ({"beta_l1": "much"}, "beta_l1 must be a number, got 'much'"),
        ({"k": 3, "beta_l1": 0.1}, "Give k .TopK. or beta_l1"),
    ],
)
def test_what_a_config_cant_mean_is_refused_in_one_sentence(config: dict[Any, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        SparseAutoencoder.from_config({"input_dims": D, "n_features": F} | config)
    assert "\n" not in str(caught.value)


def test_a_penalty_without_a_dot_is_a_number_though_yaml_takes_it_for_text() -> None:
    config = yaml.safe_load(f"input_dims: {D}\nn_features: {F}\nbeta_l1: 1e-3\ninput_norm: false\n")
    assert isinstance(config["beta_l1"], str)
    assert SparseAutoencoder.from_config(config).beta_l1 == 1e-3


def test_the_defaults_are_the_tutorials() -> None:
    assert SparseAutoencoder(D, F).to_config() == {
        "input_dims": D,
        "n_features": F,
        "activation": "relu",
        "input_norm": True,
        "k": None,
        "beta_l1": None,
        "tie_weights": False,
        "unit_norm_decoder": True,
    }


def test_another_k_than_the_files_is_refused(tmp_path: Path) -> None:
    save(make(k=K), tmp_path / "ae.pt")
    with pytest.raises(UserError, match="trained with k = 3, and k = 4"):
        SparseAutoencoder.from_pretrained(tmp_path, k=4)
