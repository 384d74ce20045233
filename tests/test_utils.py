"""Dictionaries come back from folders, ours and others', and nothing in a folder is executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK, Dictionary, JumpReluAutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.storage import write_json, write_tensors
from dictionary_learning.utils import get_nested_folders, get_submodule, hf_dataset_to_generator, load_dictionary

D, F, K = 6, 15, 4


def inputs() -> Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(5))


def made(kind: str) -> Dictionary:
    torch.manual_seed(2)
    dictionary: Dictionary
    if kind == "AutoEncoder":
        dictionary = AutoEncoder(D, F)
    elif kind == "AutoEncoderTopK":
        dictionary = AutoEncoderTopK(D, F, K)
    else:
        dictionary = JumpReluAutoEncoder(D, F)
        dictionary.threshold.data.uniform_(0.05, 0.5)
    for name, parameter in dictionary.named_parameters():
        if parameter.ndim == 1 and name != "threshold":
            parameter.data.normal_(0, 0.3)
    return dictionary


KINDS = ("AutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder")


def config_of(kind: str) -> dict[str, Any]:
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "gpt2"}
    return {"trainer": trainer | ({"k": K} if "TopK" in kind else {}), "buffer": {"ctx_len": 128}}


def save(folder: Path, kind: str, state: dict[str, Any] | None = None, config: Any = None) -> Path:
    """A folder in our layout, or with `state` as torch.save leaves it."""
    write_json(folder / "config.json", config_of(kind) if config is None else config)
    if state is None:
        write_tensors(folder / "ae.safetensors", made(kind).state_dict())
    else:
        torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ours_gives_the_same_dictionary_and_its_config(tmp_path: Path, kind: str) -> None:
    loaded, config = load_dictionary(save(tmp_path, kind))
    assert type(loaded).__name__ == kind and (loaded.activation_dim, loaded.dict_size) == (D, F)
    assert torch.equal(loaded(inputs()), made(kind)(inputs()))
    assert config == config_of(kind)


# Files as the dictionary-learning package writes them: plain state dicts under its parameter names, through torch.save.


def foreign_state(kind: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(9)
    enc, dec = torch.randn(F, D, generator=g), torch.randn(D, F, generator=g)
    enc_b, dec_b = torch.randn(F, generator=g), torch.randn(D, generator=g)
    if kind == "JumpReluAutoEncoder":
        threshold = torch.rand(F, generator=g)
        return {"W_enc": enc.t(), "b_enc": enc_b, "W_dec": dec.t(), "b_dec": dec_b, "threshold": threshold}
    linear = {"encoder.weight": enc, "encoder.bias": enc_b, "decoder.weight": dec}
    if kind == "AutoEncoder":
        return linear | {"bias": dec_b}
    return linear | {"b_dec": dec_b, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}


def foreign_forward(kind: str, s: dict[str, Tensor], x: Tensor) -> Tensor:
    if kind == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        return torch.relu(pre * (pre > s["threshold"])) @ s["W_dec"] + s["b_dec"]
    bias = s["bias"] if kind == "AutoEncoder" else s["b_dec"]
    f = torch.relu((x - bias) @ s["encoder.weight"].t() + s["encoder.bias"])
    if kind == "AutoEncoderTopK":
        f = f * (f >= f.topk(K, dim=-1).values[:, -1:])
    return f @ s["decoder.weight"].t() + bias


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_the_dictionary_learning_package_computes_its_formula(tmp_path: Path, kind: str) -> None:
    loaded, _ = load_dictionary(save(tmp_path, kind, foreign_state(kind)))
    expected = foreign_forward(kind, foreign_state(kind), inputs())
    torch.testing.assert_close(loaded(inputs()).detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_topk_file_without_k_takes_it_from_the_config(tmp_path: Path) -> None:
    state = foreign_state("AutoEncoderTopK")
    expected = foreign_forward("AutoEncoderTopK", state, inputs())
    del state["k"], state["threshold"]
    loaded, _ = load_dictionary(save(tmp_path, "AutoEncoderTopK", state))
    assert isinstance(loaded, AutoEncoderTopK) and int(loaded.k) == K
    torch.testing.assert_close(loaded(inputs()).detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_k_in_the_config_of_a_dictionary_without_k_is_let_be(tmp_path: Path) -> None:
    config = config_of("AutoEncoder")
    config["trainer"]["k"] = 5
    loaded, _ = load_dictionary(save(tmp_path, "AutoEncoder", config=config))
    assert torch.equal(loaded(inputs()), made("AutoEncoder")(inputs()))


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    save(tmp_path, "AutoEncoder", foreign_state("AutoEncoder"))
    loaded, _ = load_dictionary(save(tmp_path, "AutoEncoder"))
    assert torch.equal(loaded(inputs()), made("AutoEncoder")(inputs()))


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    victim = tmp_path / "pwned"
    folder = save(tmp_path / "evil", "AutoEncoder", foreign_state("AutoEncoder") | {"bias": Evil(victim)})
    if how == "pickle":
        (folder / "ae.pt").write_bytes(pickle.dumps(Evil(victim), protocol=2))
    with pytest.raises(UserError, match="ae.pt' holds something other than plain tensors and was not loaded"):
        load_dictionary(folder)
    assert not victim.exists()


def test_what_is_no_dictionary_is_named(tmp_path: Path) -> None:
    def broken(name: str, kind: str = "AutoEncoder", **options: Any) -> Path:
        return save(tmp_path / name, kind, **options)

    no_config = broken("no_config")
    (no_config / "config.json").unlink()
    no_weights = broken("no_weights")
    (no_weights / "ae.safetensors").unlink()
    cut = broken("cut")
    os.truncate(cut / "ae.safetensors", 30)
    sparse = foreign_state("AutoEncoderTopK")
    del sparse["k"]
    for folder, sentence in (
        (tmp_path / "absent", "config.json' does not exist"),
        (no_config, "config.json' does not exist"),
        (no_weights, "holds neither ae.safetensors nor ae.pt"),
        (cut, "ae.safetensors' is not a readable file of weights"),
        (broken("list", config=[1]), "does not say trainer.dict_class"),
        (broken("empty", config={"trainer": {}}), "does not say trainer.dict_class"),
        (broken("odd", config={"trainer": {"dict_class": ["AutoEncoder"]}}), "does not say trainer.dict_class"),
        (broken("unknown", config=config_of("AutoEncodr")), "class 'AutoEncodr' is unknown: .*Did you mean"),
        (broken("other", config=config_of("JumpReluAutoEncoder")), "does not hold a JumpReluAutoEncoder"),
        (broken("no_tensors", state={"a": 1}), "expected named tensors"),
        (
            broken("k", state=sparse, config={"trainer": {"dict_class": "AutoEncoderTopK", "k": "many"}}),
            "should give trainer.k as an integer, got 'many'",
        ),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            load_dictionary(folder)
        assert "\n" not in str(caught.value) and str(tmp_path) not in sentence


def test_nested_folders_are_those_that_hold_weights(tmp_path: Path) -> None:
    save(tmp_path / "sweep" / "trainer_1", "AutoEncoder")
    save(tmp_path / "sweep" / "trainer_0", "AutoEncoder", foreign_state("AutoEncoder"))
    write_tensors(
        tmp_path / "sweep" / "trainer_0" / "checkpoints" / "ae_10.safetensors", made("AutoEncoder").state_dict()
    )
    (tmp_path / "sweep" / "state").mkdir()
    (tmp_path / "ae.pt").mkdir()  # a folder of that name is no weights
    expected = [str(tmp_path / "sweep" / f"trainer_{index}") for index in (0, 1)]
    assert get_nested_folders(tmp_path) == get_nested_folders(str(tmp_path)) == expected
    assert get_nested_folders(expected[0]) == expected[:1]
    assert get_nested_folders(tmp_path / "absent") == []
    for folder in expected:
        load_dictionary(folder)


# ---------------------------------------------------------------------------------------------- models and texts


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=257, n_layer=3, n_embd=8, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config).eval()


def test_the_submodule_of_a_layer_is_its_block_however_the_model_is_wrapped(gpt2: nn.Module, tokenizer: Any) -> None:
    import nnsight

    from dictionary_learning import TracedLM

    block = gpt2.get_submodule("transformer.h.1")
    assert get_submodule(gpt2, 1) is block
    assert get_submodule(TracedLM.load(gpt2), 1) is block
    for wrapper in (
        nnsight.NNsight(gpt2),
        nnsight.TransformersModel(gpt2, tokenizer=tokenizer, task="text-generation"),
    ):
        envoy = get_submodule(wrapper, 1)
        assert isinstance(envoy, nnsight.Envoy) and envoy._module is block
    with pytest.raises(UserError, match="Layer 3 .*has layers 0 to 2"):
        get_submodule(gpt2, 3)


def test_the_texts_of_a_hub_dataset_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def rows(path: str, split: str, first_row: int = 0) -> Any:
        asked.append((path, split))
        return iter([{"text": "one"}, {"text": "two", "source_dataset": "x"}][first_row:])

    monkeypatch.setattr("data_prep.sources.open_hub_split", rows)
    texts = hf_dataset_to_generator("user/texts", split="validation")
    assert list(texts) == ["one", "two"]
    assert set(asked) == {("user/texts", "validation")}


def test_a_hub_dataset_can_be_downloaded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [{"text": f"{name} {split} {i}"} for i in (0, 1)])
    assert list(hf_dataset_to_generator("user/texts", "train", False)) == ["user/texts train 0", "user/texts train 1"]


def test_configs_are_read_as_data_only(tmp_path: Path) -> None:
    folder = save(tmp_path, "AutoEncoder")
    (folder / "config.json").write_text(json.dumps(config_of("AutoEncoder"))[:-1] + ', "deep": ' + "[" * 100_000)
    with pytest.raises(UserError, match="config.json' is not a readable JSON file"):
        load_dictionary(folder)
