"""Each architecture by its paper's formula in float64, and what it has besides encode and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_dictionary import DICTIONARIES, WITH_WEIGHTS, D, F, K, make, numpy_weights
from torch import Tensor

from dictionary_learning.dictionary import (
    AutoEncoderGroupMax,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)
from dictionary_learning.errors import UserError

every_learned = pytest.mark.parametrize("name", WITH_WEIGHTS)


def double(name: str, seed: int = 0) -> tuple[Any, np.ndarray, Tensor, dict[str, np.ndarray]]:
    """A dictionary in float64, inputs [7, D] twice, and its weights."""
    dictionary = make(name, seed=seed).double().requires_grad_(False)
    x = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return dictionary, x.numpy(), x, numpy_weights(dictionary)


def close(actual: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(actual.numpy(), wanted, atol=1e-12)


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def test_gated_sae_is_equations_6_and_7() -> None:
    sae, x, x_BD, w = double("GatedAutoEncoder", seed=2)
    w_mag = w["encoder.weight"] * np.exp(w["r_mag"])[:, None]
    gate = (x - w["decoder_bias"]) @ w["encoder.weight"].T + w["gate_bias"]
    f = np.heaviside(gate, 0) * relu((x - w["decoder_bias"]) @ w_mag.T + w["mag_bias"])
    close(sae.encode(x_BD), f)
    close(sae(x_BD), f @ w["decoder.weight"].T + w["decoder_bias"])
    close(sae.encode(x_BD, return_gate=True)[1], relu(gate))
    close(sae.preactivations(x_BD), gate)
    by_magnitude = relu((x - w["decoder_bias"]) @ w_mag.T + w["mag_bias"]) > 0
    ungated = (x - w["decoder_bias"]) @ w["encoder.weight"].T > 0  # what the gate would say without its bias
    assert ((gate > 0) & ~by_magnitude).any() and (by_magnitude & (ungated != (gate > 0))).any()


def test_gated_sae_takes_codes_in_units_of_its_decoder_rows_when_asked() -> None:
    sae, _, x_BD, w = double("GatedAutoEncoder")
    sae.decoder_rows.mul_(torch.linspace(0.3, 2, F)[:, None].double())
    f, norms = sae.encode(x_BD), sae.decoder_rows.norm(dim=1)
    scaled = sae.encode(x_BD, normalize_decoder=True)
    close(scaled, (f * norms).numpy())
    close(sae.decode(scaled, normalize_decoder=True), sae.decode(f).numpy())
    x_hat, codes = sae(x_BD, output_features=True, normalize_decoder=True)
    close(codes, scaled.numpy())
    close(x_hat, sae(x_BD).numpy())


def test_gated_sae_can_be_initialised_by_a_function() -> None:
    def ones(sae: GatedAutoEncoder) -> None:
        torch.nn.init.ones_(sae.encoder.weight)

    assert GatedAutoEncoder(D, F, initialization=ones).encoder_rows.eq(1).all()


def test_april_sae_is_its_formula_and_hands_out_codes_times_decoder_norms() -> None:
    sae, x, x_BD, w = double("AutoEncoderNew")
    f = relu(x @ w["encoder.weight"].T + w["encoder.bias"])
    close(sae.encode(x_BD), f)
    x_hat, codes = sae(x_BD, output_features=True)
    close(x_hat, f @ w["decoder.weight"].T + w["decoder.bias"])
    close(codes, f * np.linalg.norm(w["decoder.weight"], axis=0))
    assert sae.pre_bias is None and not sae.unit_norm_decoder


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_batch_topk_keeps_k_an_input_over_the_batch_in_training_and_what_is_above_its_threshold_after(
    name: str,
) -> None:
    sae, x, x_BD, w = double(name)
    w_enc, b_enc = (w["W_enc"], w["b_enc"]) if "W_enc" in w else (w["encoder.weight"].T, w["encoder.bias"])
    w_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    acts = relu((x - w["b_dec"]) @ w_enc + b_enc)
    by_threshold = acts * (acts > w["threshold"])
    close(sae.encode(x_BD), by_threshold)
    close(sae(x_BD), by_threshold @ w_dec + w["b_dec"])
    smallest = np.sort(acts.flatten())[-K * len(x)]
    f, active, post = sae.encode(x_BD, return_active=True, use_threshold=False)
    close(f, np.where(acts >= smallest, acts, 0))
    close(post, acts)
    assert torch.equal(active, (f > 0).any(0)) and int((f > 0).sum()) == K * len(x)
    assert len(set((f > 0).sum(1).tolist())) > 1  # on average, not each
    folded = sae.encode(x_BD.view(7, 1, D), use_threshold=False)  # k an input, whatever the leading axes
    assert torch.equal(folded.view(7, F), f)
    assert torch.equal(sae.encode(x_BD.view(1, 7, D), use_threshold=False).view(7, F), f)
    assert torch.equal(sae.encode(x_BD.view(7, 1, D), return_active=True, use_threshold=False)[1], active)


def test_a_batch_topk_without_a_measured_threshold_lets_all_positive_ones_by() -> None:
    sae, _, x_BD, _ = double("BatchTopKSAE")
    sae.threshold.fill_(-1.0)
    assert torch.equal(sae.encode(x_BD), torch.relu(sae.preactivations(x_BD)))


@pytest.mark.parametrize(("groups", "end"), [(1, 2), (2, 5), (3, F)])
@pytest.mark.parametrize("use_threshold", [True, False])
def test_a_prefix_of_matryoshka_groups_is_a_dictionary_of_its_own(groups: int, end: int, use_threshold: bool) -> None:
    sae, _, x_BD, w = double("MatryoshkaBatchTopKSAE")
    assert sae.group_sizes.tolist() == [2, 3, 5] and sae.group_indices == [0, 2, 5, F] and sae.active_groups == 3
    all_of_them = sae.encode(x_BD.view(7, 1, D), use_threshold=use_threshold)
    sae.active_groups = groups
    f = sae.encode(x_BD.view(7, 1, D), use_threshold=use_threshold)
    assert torch.equal(f[..., :end], all_of_them[..., :end]) and not f[..., end:].any() and f.any()
    close(sae.decode(f).view(7, D), f.view(7, F)[:, :end].numpy() @ w["W_dec"][:end] + w["b_dec"])


@pytest.mark.parametrize("groups", [0, 4, -1, 2.0, None])
def test_impossible_numbers_of_active_groups_are_refused(groups: Any) -> None:
    sae = make("MatryoshkaBatchTopKSAE")
    with pytest.raises(UserError, match="active_groups must lie between 1 and the 3 groups"):
        sae.active_groups = groups  # type: ignore[assignment]


@pytest.mark.parametrize("sizes", [[], [F + 1], [F, 0], [F - 2, 1], [-1, F + 1], [5.0, 5.0], ["5", "5"]])
def test_groups_that_are_not_the_width_are_refused(sizes: list[Any]) -> None:
    with pytest.raises(UserError, match=f"group_sizes must be positive and add up to the width {F}"):
        MatryoshkaBatchTopKSAE(D, F, K, sizes)


def test_group_max_keeps_the_largest_of_each_group() -> None:
    sae, x, x_BD, w = double("AutoEncoderGroupMax")
    acts = relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    grouped = acts.reshape(7, 2, F // 2)
    f = np.where(grouped == grouped.max(-1, keepdims=True), grouped, 0).reshape(7, F)
    close(sae.encode(x_BD), f)
    close(sae(x_BD), f @ w["decoder.weight"].T + w["b_dec"])
    codes, values, indices, post = sae.encode(x_BD, return_topk=True)
    close(post, acts)
    assert values.shape == (7, 2) and torch.equal(codes.gather(1, indices), values)
    assert torch.equal(indices // (F // 2), torch.arange(2).expand(7, 2))
    assert int(sae.group_size) == F // 2


@pytest.mark.parametrize("k", [3, 4, 7])
def test_groups_must_be_of_one_size(k: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"10 latents can't be split into k = {k} groups"):
        AutoEncoderGroupMax(D, F, k)
    state = make("AutoEncoderGroupMax").state_dict()
    torch.save(state | {"group_size": torch.tensor(k)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=f"2 groups of {k} are not the 10 latents"):
        AutoEncoderGroupMax.from_pretrained(tmp_path)


def test_ghost_gradients_get_what_dead_latents_would_add() -> None:
    sae, x, x_BD, w = double("AutoEncoder")
    mask = torch.arange(F) % 3 == 0
    pre = (x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]
    x_hat, ghost, f = sae(x_BD, output_features=True, ghost_mask=mask)
    close(ghost, (np.exp(pre) * mask.numpy()) @ w["decoder.weight"].T)
    close(f, relu(pre))
    assert torch.equal(x_hat, sae(x_BD)) and len(sae(x_BD, ghost_mask=mask)) == 2


# ------------------------------------------------------------------------------------- what trainers are written on


@every_learned
def test_rows_and_biases_are_where_the_formula_says(name: str) -> None:
    sae, _, x_BD, _ = double(name)
    centered = x_BD if sae.pre_bias is None else x_BD - sae.pre_bias
    torch.testing.assert_close(sae.preactivations(x_BD), centered @ sae.encoder_rows.t() + sae.encoder_bias)
    f = torch.rand(7, F, dtype=torch.float64)
    torch.testing.assert_close(sae.decode(f), f @ sae.decoder_rows + sae.decoder_bias)
    own = {id(p) for p in sae.parameters()}
    assert id(sae.encoder_bias) in own and id(sae.decoder_bias) in own
    assert sae.pre_bias is None or sae.pre_bias is sae.decoder_bias
    assert sae.encoder_bias.shape == (F,) and sae.decoder_bias.shape == (D,)


@pytest.mark.parametrize("name", [name for name in WITH_WEIGHTS if hasattr(DICTIONARIES[name], "activation")])
def test_an_elementwise_activation_of_pre_activations_gives_the_codes(name: str) -> None:
    sae, _, x_BD, _ = double(name)
    torch.testing.assert_close(sae.activation(sae.preactivations(x_BD)), sae.encode(x_BD))


def test_jumprelu_has_a_pre_bias_only_when_told() -> None:
    sae = JumpReluAutoEncoder(D, F)
    assert sae.pre_bias is None
    sae.apply_b_dec_to_input = True
    assert sae.pre_bias is sae.b_dec


@every_learned
def test_forward_has_gradients_in_float64(name: str) -> None:
    sae = make(name, seed=3).double()
    x = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2
    names = [key for key, p in sae.named_parameters() if key != "threshold"]  # JumpReLU's has a pseudo-derivative
    parameters = [dict(sae.named_parameters())[key] for key in names]

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(sae, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, tuple(p.detach().requires_grad_() for p in parameters), atol=1e-6)


@every_learned
def test_a_dictionary_works_in_bfloat16(name: str) -> None:
    sae = make(name).bfloat16().requires_grad_(False)
    x_hat, f = sae(torch.randn(5, D, dtype=torch.bfloat16), output_features=True)
    assert x_hat.dtype == f.dtype == torch.bfloat16 and torch.isfinite(x_hat).all()


# ------------------------------------------------------------------------------------- calls in the package's order


def test_files_load_by_position_as_in_the_dictionary_learning_package(tmp_path: Path) -> None:
    for name, arguments in {
        "AutoEncoder": (torch.float64, "cpu", False),
        "AutoEncoderNew": ("cpu",),
        "GatedAutoEncoder": ("cpu",),
        "AutoEncoderTopK": (K, "cpu"),
        "BatchTopKSAE": (K, "cpu"),
        "MatryoshkaBatchTopKSAE": (K, "cpu"),
        "JumpReluAutoEncoder": (False, torch.float64, "cpu"),
    }.items():
        dictionary = make(name)
        torch.save(dictionary.state_dict(), tmp_path / "ae.pt")
        loaded = DICTIONARIES[name].from_pretrained(tmp_path / "ae.pt", *arguments)  # type: ignore[arg-type]
        wanted = torch.float64 if torch.float64 in arguments else torch.float32
        assert loaded.decoder_rows.dtype == wanted, name
        torch.testing.assert_close(loaded.encoder_rows.float(), dictionary.encoder_rows)


def test_an_sae_is_asked_of_sae_lens_or_loaded_from_a_path_but_not_both(tmp_path: Path) -> None:
    for arguments in ((), (tmp_path, True)):
        with pytest.raises(UserError, match="Give the path of a dictionary, or load_from_sae_lens"):
            JumpReluAutoEncoder.from_pretrained(*arguments)


def test_asking_sae_lens_without_the_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match="pip install sae-lens"):
        JumpReluAutoEncoder.from_pretrained(load_from_sae_lens=True, release="r", sae_id="s")
