from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor, nn

from dictionary_learning.activations.loading import _find_on_hub, resolve_device, resolve_dtype
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.errors import UserError

from .conftest import VOCAB, build


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    build("gpt2").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_gives_the_model_and_its_tokenizer(folder: Path, gpt2: TracedLM, tokens_CL: Tensor):
    lm = TracedLM.load(folder)
    torch.testing.assert_close(lm.logits(tokens_CL)[0], gpt2.logits(tokens_CL)[0], rtol=0, atol=1e-6)
    assert lm.tokenizer("the aorta").input_ids[0] == 0
    assert (lm.name, lm.n_layers, lm.d_model, lm.vocab_size, lm.max_positions) == ("tiny-gpt2", 4, 32, VOCAB, 64)
    assert lm.dtype == torch.float32 and lm.device.type == "cpu" and not lm.module.training


def test_the_embedded_model_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    lm = TracedLM.load("embedded")
    assert lm.tokenizer is not None and lm.d_model == 192


def test_bfloat16_weights_give_bfloat16_activations(folder: Path, gpt2: TracedLM, tokens_CL: Tensor):
    lm = TracedLM.load(str(folder), dtype="bfloat16")
    acts = lm.capture(tokens_CL, "resid_post_layer_2")["resid_post_layer_2"]
    assert acts.dtype == lm.dtype == torch.bfloat16
    exact = gpt2.capture(tokens_CL, "resid_post_layer_2")["resid_post_layer_2"]
    assert (acts.float() - exact).norm() / exact.norm() < 0.05


def test_an_object_keeps_its_dtype_unless_told_otherwise_and_is_put_in_eval_mode():
    module = build("gpt2").bfloat16().train()
    assert TracedLM.load(module).dtype == torch.bfloat16 and not module.training
    assert TracedLM.load(module, dtype=torch.float32).dtype == torch.float32


def test_dropout_is_off_so_that_two_captures_agree(tokens_CL: Tensor):
    module = build("gpt2").train()
    assert module.config.resid_pdrop > 0
    lm = TracedLM.load(module)
    a, b = (lm.capture(tokens_CL, "resid_post_layer_3")["resid_post_layer_3"] for _ in range(2))
    assert torch.equal(a, b)


def test_a_traced_lm_is_returned_as_it_is(gpt2: TracedLM):
    assert TracedLM.load(gpt2) is gpt2


def test_an_nnsight_model_loaded_lazily_gets_its_weights(
    folder: Path, gpt2: TracedLM, tokens_CL: Tensor, tokenizer: Any
):
    wrapper = nnsight.TransformersModel(str(folder), tokenizer=tokenizer, task="text-generation")
    assert not wrapper.dispatched
    lm = TracedLM.load(wrapper)
    expected = gpt2.capture(tokens_CL, "resid_post_layer_1")["resid_post_layer_1"]
    got = lm.capture(tokens_CL, wrapper.transformer.h[1])["transformer.h.1:out"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_edited_nnsight_model_is_refused_because_its_edits_would_be_ignored(tokenizer: Any):
    wrapper = nnsight.TransformersModel(build("gpt2"), tokenizer=tokenizer, task="text-generation")
    with wrapper.edit(inplace=True):
        wrapper.transformer.h[0].output[:] = 0
    with pytest.raises(UserError, match="carries edits"):
        TracedLM.load(wrapper)


def test_config_identifies_the_model_and_its_weights(folder: Path):
    config = TracedLM.load(folder).config
    assert json.loads(json.dumps(config)) == config == TracedLM.load(folder).config
    assert config["architecture"] == "GPT2LMHeadModel" and config["n_layers"] == 4 and config["d_model"] == 32
    changed = TracedLM.load(folder)
    with torch.no_grad():
        changed.module.transformer.h[3].mlp.c_fc.weight += 0.01
    assert changed.config["weights"] != config["weights"]


def test_a_model_without_a_tokenizer_says_so_when_one_is_needed(tmp_path: Path, tokenizer: Any, folder: Path):
    build("gpt2").save_pretrained(tmp_path)  # transformers would silently make up an empty tokenizer here
    lm = TracedLM.load(tmp_path)
    with pytest.raises(UserError, match="came without a tokenizer; pass one with tokenizer="):
        _ = lm.tokenizer
    assert TracedLM.load(tmp_path, tokenizer).tokenizer is tokenizer
    assert len(TracedLM.load(tmp_path, str(folder)).tokenizer) == len(tokenizer)
    with pytest.raises(UserError, match="holds no tokenizer_config.json"):
        TracedLM.load(tmp_path, str(tmp_path))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nobody/no-such-model", "Model 'nobody/no-such-model' is not a local folder, not in the local cache, and "
         "offline mode is on (HF_HUB_OFFLINE)."),
        ("./no/such/folder", "There is no model folder './no/such/folder'."),
        ("not//an id", "'not//an id' is neither a local folder nor a Hub id such as 'openai-community/gpt2'."),
        (42, "A model is a Hub id, a local folder, a torch module or an nnsight model, not int."),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there_is_one_sentence(model: Any, sentence: str):
    with pytest.raises(UserError) as error:
        TracedLM.load(model)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("RepositoryNotFoundError", "There is no model 'a/b' on the Hub, or it is private and you are not logged in."),
        ("GatedRepoError", "'a/b' is gated: accept its terms on the Hub and log in with `hf auth login`."),
        ("RevisionNotFoundError", "'a/b' has no revision 'v9' on the Hub."),
        ("HfHubHTTPError", "Model 'a/b' is not a local folder, not in the local cache, and the Hub answered: 500 Oh."),
        (None, "Model 'a/b' is not a local folder, not in the local cache, and the Hub could not be reached."),
    ],
)
def test_what_the_hub_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: str | None, sentence: str):
    import huggingface_hub

    def model_info(*args: Any, **kwargs: Any) -> None:
        if error is None:
            raise ConnectionError("[Errno -2] Name or service not known")
        kind = getattr(huggingface_hub.errors, error)
        raised = kind.__new__(kind)  # the constructor wants a response of whichever HTTP library is in use
        raised.args = ("500 Oh. And more.\nRequest id: 1",)
        raise raised

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(UserError) as caught:
        TracedLM.load("a/b", revision="v9")
    assert str(caught.value) == sentence


def test_without_a_network_a_cached_copy_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: "somewhere/config.json")
    assert _find_on_hub("a/b", "main", "config.json") == {"revision": "main", "local_files_only": True}


def test_a_known_model_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models--openai-community--gpt2").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"Did you mean 'openai-community/gpt2'\?$"):
        TracedLM.load("openai-comunity/gpt2")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "holds no config.json; expected a folder written by save_pretrained()."),
        ("{not json", "Could not load a language model from"),
        ('{"model_type": "t5"}', "is a T5 model, which is not a causal language model in transformers."),
        ('{"model_type": "gpt2"}', "Error no file named model.safetensors, or pytorch_model.bin, found in directory"),
        ('{"model_type": "nosuch"}', "has model type `nosuch` but Transformers does not recognize this architecture."),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}', "brings its own Python code; read it, then pass "
         "trust_remote_code=True to run it."),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_one_sentence(tmp_path: Path, config: str | None, sentence: str):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as error:
        TracedLM.load(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_dtypes_and_devices_are_checked_by_name():
    assert resolve_dtype("bf16") == resolve_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(UserError, match=r"Unknown dtype 'float23'; known are .*Did you mean 'float32'\?"):
        resolve_dtype("float23")
    with pytest.raises(UserError, match="'gpu' is not a device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."):
        resolve_device("gpu")
    with pytest.raises(UserError, match="Device 'cuda:99' is not available on this machine; use "):
        resolve_device("cuda:99")


def test_a_module_that_is_no_language_model_can_be_loaded_too():
    assert TracedLM.load(nn.Sequential(nn.Embedding(4, 2))).vocab_size == 4
