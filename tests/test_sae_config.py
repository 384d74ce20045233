"""The tutorials' config.yaml: what it says is what is trained, and what it can't say is refused by name."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dictionary_learning import trainSAE
from dictionary_learning.activations.in_memory import InMemoryActivations
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK, SparseAutoencoder
from dictionary_learning.errors import UserError
from dictionary_learning.sae_config import SAEConfig, load_sae_config, sae_config_from_dict
from dictionary_learning.trainers import StandardTrainer, TopKTrainer
from dictionary_learning.trainers.sparse_autoencoder import SparseAutoencoderTrainer
from dictionary_learning.utils import load_dictionary

D, F, B = 16, 48, 64
BASE: dict[str, Any] = {"input_dims": D, "n_features": F, "k": 4}
L1: dict[str, Any] = {"input_dims": D, "n_features": F, "beta_l1": 0.05}
PLAIN = {"input_norm": False}
OPTIONS = [
    {"activation": activation, "input_norm": norm, "tie_weights": tied, "unit_norm_decoder": unit, **sparsity}
    for activation, norm, tied, unit, sparsity in itertools.product(
        ("relu", "silu"), (True, False), (True, False), (True, False), ({"k": 4}, {"beta_l1": 0.02})
    )
]
every = pytest.mark.parametrize("options", OPTIONS, ids=["-".join(map(str, o.values())) for o in OPTIONS])


def activations(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 32, generator=g) * (torch.rand(rows, 32, generator=g) < 0.1)
    return scale * (codes @ torch.randn(32, D, generator=torch.Generator().manual_seed(99)) + 0.5)


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


def explained(dictionary: Any, x: Tensor) -> float:
    return 1 - ((x - dictionary(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()


# ---------------------------------------------------------------------------------------------- the file


def test_a_file_of_the_tutorials_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "input_dims: 16\nn_features: 48\nactivation: silu\ninput_norm: false\nk: null\nbeta_l1: 1e-3\n"
        "tie_weights: true\nunit_norm_decoder: false\nlr: 3e-4\nepochs: 2\nscheduler: cosine\n",
    )
    config = load_sae_config(path)
    assert (config.beta_l1, config.learning_rate, config.k) == (1e-3, 3e-4, None), "YAML takes 1e-3 for text"
    dictionary = config.dictionary()
    assert (dictionary.activation_name, dictionary.tie_weights, dictionary.input_norm) == ("silu", True, False)
    assert (config.scheduler, config.epochs, config.device) == ("cosine", 2, "auto")


@every
def test_a_config_written_and_read_is_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    more = {"lr": 1e-3, "warmup_fraction": 0.1, "grad_clip_norm": None, "num_steps": 7, "save_best_only": True}
    config = sae_config_from_dict({"input_dims": D, "n_features": F, **options, **more})
    config.save(tmp_path / "again.yaml")
    assert load_sae_config(tmp_path / "again.yaml") == config
    assert set(yaml.safe_load((tmp_path / "again.yaml").read_text())) == set(config.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_feature": 3}, r"unknown key 'n_feature'. Did you mean 'n_features'\?"),
        ({"learning_rates": 1e-3}, r"unknown key 'learning_rates'. Did you mean 'learning_rate'\?"),
        ({"zebra": 1}, r"unknown key 'zebra'\.$"),
        ({"input_dims": 16.0}, "'input_dims' must be a valid integer, got 16.0"),
        ({"input_dims": 0}, "'input_dims' must be greater than or equal to 1, got 0"),
        ({"k": True}, "'k' must be a valid integer, got True"),
        ({"k": "4"}, "'k' must be a valid integer, got '4'"),
        ({"k": F + 1}, f"k must be at most n_features {F}, got {F + 1}"),
        ({"beta_l1": 0.1}, "give k .TopK. or beta_l1 .an L1 penalty., not both"),
        ({"k": None}, "give k .TopK. or beta_l1 .an L1 penalty.: nothing else"),
        ({"k": None, "beta_l1": -0.1}, "'beta_l1' must be greater than or equal to 0"),
        ({"k": None, "beta_l1": float("inf")}, "'beta_l1' must be a finite number"),
        ({"activation": "rellu"}, r"'activation' must be 'relu' or 'silu', got 'rellu'. Did you mean 'relu'\?"),
        ({"scheduler": "cosin"}, r"'scheduler' must be .*, got 'cosin'. Did you mean 'cosine'\?"),
        ({"tie_weights": "yes"}, "'tie_weights' must be a valid boolean, got 'yes'"),
        ({"bf16": 1}, "'bf16' must be a valid boolean, got 1"),
        ({"lr": 1e-3, "learning_rate": 1e-3}, "'learning_rate' and 'lr' are two names"),
        ({"lr": "fast"}, "'learning_rate' must be a valid number, got 'fast'"),
        ({"lr": 0}, "'learning_rate' must be greater than 0"),
        ({"lr": True}, "'learning_rate' must be a valid number, got True"),
        ({"warmup_fraction": 1}, "'warmup_fraction' must be less than 1"),
        ({"grad_clip_norm": 0}, "'grad_clip_norm' must be greater than 0"),
        ({"epochs": 2, "num_steps": 9}, "give epochs or num_steps, not both"),
        ({"epochs": [2]}, "'epochs' must be a valid integer, got list"),
        ({"random_seed": -1}, "'random_seed' must be greater than or equal to 0"),
        ({"heldout_fraction": 1.0}, "'heldout_fraction' must be less than 1"),
        ({"device": 0}, "'device' must be a valid string, got 0"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sae_config_from_dict(BASE | changes, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ") and "\n" not in str(caught.value)


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    for text, message in (
        ("", "expected keys with values"),
        ("- 1\n", "expected keys with values"),
        ("k: [", "is not valid YAML"),
        ("k: 4\n", "the key 'input_dims' is missing"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ):
        with pytest.raises(UserError, match=message):
            load_sae_config(write(tmp_path, text))
    with pytest.raises(UserError, match="can't be read: No such file"):
        load_sae_config(tmp_path / "absent.yaml")


# ---------------------------------------------------------------------------------------------- what it builds


def test_the_number_of_steps() -> None:
    assert sae_config_from_dict(BASE | {"batch_size": 10}).steps(95) == 10, "one epoch, its last batch shorter"
    assert sae_config_from_dict(BASE | {"batch_size": 10, "epochs": 3}).steps(95) == 30
    assert sae_config_from_dict(BASE | {"num_steps": 7}).steps(95) == 7


def test_the_training_options_reach_the_trainer() -> None:
    config = sae_config_from_dict(
        BASE
        | {"lr": 5e-4, "scheduler": "linear", "warmup_fraction": 0.25, "grad_clip_norm": 0.5, "bf16": True}
        | {"random_seed": 3, "device": "cpu"}
    )
    trainer = config.trainer(200)
    assert (trainer.lr, trainer.scheduler, trainer.warmup_steps, trainer.steps) == (5e-4, "linear", 50, 200)
    assert (trainer.grad_clip_norm, trainer.encoder_dtype, trainer.seed) == (0.5, "bf16", 3)
    assert trainer.ae.to_config() == {key: getattr(config, key) for key in trainer.ae.to_config()}
    assert sae_config_from_dict(BASE).trainer(200, device="cpu").warmup_steps == 10, "a twentieth by default"
    with pytest.raises(UserError, match="'cuda:99' is not available"):
        sae_config_from_dict(BASE | {"device": "cuda:99"}).trainer(200)


def test_a_trainer_needs_k_or_beta_l1() -> None:
    with pytest.raises(UserError, match="Give k .TopK. or beta_l1"):
        SparseAutoencoderTrainer(10, D, F, device="cpu")
    with pytest.raises(UserError, match="not both"):
        SparseAutoencoderTrainer(10, D, F, k=3, beta_l1=0.1, device="cpu")
    with pytest.raises(UserError, match="fp32 or bf16, got 'tf32'"):
        SparseAutoencoderTrainer(10, D, F, k=3, device="cpu", encoder_dtype="tf32")


# ---------------------------------------------------------------------------------------------- how it learns


def test_with_k_and_nothing_else_it_learns_what_topk_learns() -> None:
    """Dead latents included: a third of the latents never fires, and AuxK pulls at them."""
    config = sae_config_from_dict(BASE | PLAIN)
    ours = config.trainer(60, device="cpu", dead_after_tokens=B)
    theirs = TopKTrainer(60, D, F, 4, None, None, device="cpu", seed=0, dead_after_tokens=B)
    for trainer in (ours, theirs):
        with torch.no_grad():
            trainer.ae.encoder_bias[::3] -= 5.0
    for step in range(60):
        x = activations(B, step)
        losses = [trainer.update(step, x).item() for trainer in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert theirs.auxk.some_dead
    assert isinstance(theirs.ae, AutoEncoderTopK)
    torch.testing.assert_close(ours.ae.decoder_rows, theirs.ae.decoder_rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("unit", [True, False])
def test_with_beta_l1_and_nothing_else_it_learns_what_the_standard_trainer_learns(unit: bool) -> None:
    config = sae_config_from_dict(L1 | PLAIN)
    ours = config.trainer(60, device="cpu")
    scale = activations(B, 0).pow(2).sum(1).mean().sqrt().item()
    theirs = StandardTrainer(60, D, F, None, None, l1_penalty=0.05 * scale, device="cpu", seed=0)
    for trainer in (ours, theirs):
        trainer.ae.unit_norm_decoder = unit
    for step in range(60):
        for trainer in (ours, theirs):
            trainer.update(step, activations(B, step))
    assert isinstance(theirs.ae, AutoEncoder)
    torch.testing.assert_close(ours.ae.decoder_rows, theirs.ae.decoder_rows, rtol=1e-3, atol=1e-3)


@every
def test_every_combination_of_options_learns_and_loads_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    steps = 300
    config = sae_config_from_dict({"input_dims": D, "n_features": F, **options, "lr": 3e-3})
    trainer_config = config.trainer_config(steps) | {"device": "cpu"}
    data = InMemoryActivations(activations(2000), B, epochs=None)
    dictionary = trainSAE(data, [trainer_config], steps, save_dir=tmp_path, normalize_activations=True)[0]
    x = activations(300, 7)
    assert isinstance(dictionary, SparseAutoencoder)
    assert explained(dictionary, x) > 0.6
    if config.unit_norm_decoder:
        torch.testing.assert_close(dictionary.decoder_rows.norm(dim=1), torch.ones(F), rtol=1e-5, atol=1e-5)
    if config.k:
        assert (dictionary.encode(x) != 0).sum(1).max() <= 4
    loaded, saved = load_dictionary(tmp_path / "trainer_0")
    assert torch.equal(loaded(x), dictionary(x))
    assert {key: saved["trainer"][key] for key in options} == options


@every
def test_the_units_of_the_data_change_nothing(options: dict[str, Any]) -> None:
    config = sae_config_from_dict({"input_dims": D, "n_features": F, **options, "lr": 1e-3})
    results = []
    for scale in (1.0, 64.0):
        trainer = config.trainer(20, device="cpu")
        for step in range(20):
            trainer.update(step, scale * activations(B, step))
        results.append(trainer.ae(scale * activations(50, 99)) / scale)
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=2e-3)


@every
def test_it_trains_in_bfloat16(options: dict[str, Any]) -> None:
    base = {"input_dims": D, "n_features": F, **options, "lr": 1e-3}
    exact, rough = (sae_config_from_dict(base | {"bf16": bf16}).trainer(20, device="cpu") for bf16 in (False, True))
    for step in range(20):
        for trainer in (exact, rough):
            trainer.update(step, activations(B, step))
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in rough.ae.parameters())
    assert not torch.equal(exact.ae.decoder_rows, rough.ae.decoder_rows)
    assert rough.last is not None and exact.last is not None
    assert rough.last.loss.item() == pytest.approx(exact.last.loss.item(), rel=0.1)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_auxk_does_not_depend_on_the_units_either(activation: str) -> None:
    config = sae_config_from_dict(BASE | PLAIN | {"activation": activation, "lr": 1e-4})
    terms = []
    for scale in (1.0, 64.0):
        trainer = config.trainer(20, device="cpu")
        x = scale * activations(B)
        trainer.update(0, x)
        trainer.tokens_since_fired_F[::2] = 10**9
        trainer.auxk.some_dead = True
        terms.append(trainer.compute_loss(x, x, 1).terms["auxk_loss"].item())
    assert terms[0] > 0 and terms[1] == pytest.approx(terms[0], rel=1e-2)


def test_a_resumed_trainer_goes_on_as_it_was() -> None:
    config = sae_config_from_dict(BASE)
    one = config.trainer(40, device="cpu", dead_after_tokens=B)
    for step in range(20):
        one.update(step, activations(B, step))
    other = config.trainer(40, device="cpu", dead_after_tokens=B)
    other.load_state_dict(one.state_dict())
    for step in range(20, 40):
        assert torch.equal(one.update(step, activations(B, step)), other.update(step, activations(B, step)))


def test_the_defaults_are_those_of_the_page() -> None:
    assert SAEConfig(D, F, k=4).to_dict() | {"device": "auto"} == sae_config_from_dict(BASE).to_dict()


def test_the_config_of_the_page_is_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    config = sae_config_from_dict(yaml.safe_load(block))
    assert (config.k, config.epochs, config.save_best_only) == (32, 5, True)
    for key in config.to_dict():
        assert f"`{key}`" in page, key
