"""What we write loads in the real SAELens and computes the same, and what it saves loads here: `make test-interop`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sae_lens = pytest.importorskip("sae_lens", reason="needs the environment of `make test-interop`")

from format_cases import CASES, CONFIG, D, F, K, assert_same, expected, inputs, largest_difference, refusal  # noqa: E402

from dictionary_learning import load_dictionary  # noqa: E402
from dictionary_learning.dictionary import JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.formats import CannotHold, find_dictionaries, read, write  # noqa: E402
from dictionary_learning.formats.files import save_ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
differences: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _say_the_differences() -> Any:
    yield
    print(f"\nsae_lens {sae_lens.__version__}: largest differences, relative to 1 + |value|")
    for name, value in differences.items():
        print(f"  {name}: {value:.1e}")


def same(name: str, actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    differences[name] = largest_difference(actual, wanted)
    assert_same(actual, wanted)


@pytest.mark.parametrize("case", CASES)
def test_saelens_loads_what_we_write_and_we_what_it_saves(case: str, tmp_path: Path) -> None:
    dictionary, x = CASES[case](), inputs()
    if why := refusal(case, "saelens"):
        with pytest.raises(CannotHold, match=why):
            write(dictionary, CONFIG, tmp_path / "there", "saelens")
        return
    wanted = expected(dictionary, "saelens", x)
    assert write(dictionary, CONFIG, tmp_path / "there", "saelens") == []
    sae = sae_lens.SAE.load_from_disk(tmp_path / "there")
    with torch.no_grad():
        same(f"written here, read there: {case}", (sae.encode(x), sae(x)), wanted)
    meta = sae.cfg.metadata
    assert (meta.model_name, meta.hook_name, meta.context_size) == ("gpt2", "blocks.8.hook_resid_post", 128)
    assert (meta.prepend_bos, meta.dataset_path, meta.exclude_special_tokens) == (True, "embedded", True)

    sae.save_model(tmp_path / "back")
    assert [entry.name for _, _, entry in find_dictionaries(tmp_path / "back")] == ["saelens"]
    back, config = read(tmp_path / "back")
    same(f"and back: {case}", (back.encode(x), back(x)), wanted)
    assert config["trainer"]["submodule_name"] == "resid_post_layer_8" and config["buffer"] == {"ctx_len": 128}
    if "threshold" in dictionary.state_dict() and type(back) is type(dictionary) and "topk" in case:
        assert back.threshold == dictionary.threshold  # type: ignore[union-attr]


def foreign(architecture: str, **options: Any) -> Any:
    """An SAE made by SAELens, every parameter away from where it began."""
    _, config_class = sae_lens.registry.get_sae_class(architecture)
    metadata = sae_lens.saes.sae.SAEMetadata(model_name="gpt2", hook_name="blocks.3.hook_mlp_out", context_size=64)
    sae = sae_lens.registry.get_sae_class(architecture)[0](config_class(d_in=D, d_sae=F, metadata=metadata, **options))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else 1))
            if name == "threshold":
                parameter.abs_()
    return sae


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("topk", {"k": K}),
        ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("gated", {}),
    ],
)
def test_an_sae_made_by_saelens_loads_here(
    architecture: str, options: dict[str, Any], subtracts: bool, tmp_path: Path
) -> None:
    sae, x = foreign(architecture, apply_b_dec_to_input=subtracts, **options), inputs()
    sae.save_model(tmp_path / "there")
    with torch.no_grad():
        codes = sae.encode(x)
        wanted = (codes, sae.decode(codes))
    dictionary, config = read(tmp_path / "there")
    name = f"made there, read here: {architecture}{options or ''}, apply_b_dec_to_input {subtracts}"
    same(name, (dictionary.encode(x), dictionary(x)), wanted)
    assert config["trainer"]["submodule_name"] == "mlp_out_layer_3" and config["trainer"]["layer"] == 3
    save_ours(dictionary, config, tmp_path / "ours")
    again, _ = load_dictionary(tmp_path / "ours")
    same(f"{name}, saved and loaded", (again.encode(x).detach(), again(x).detach()), wanted)


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
@pytest.mark.parametrize("d_out", [D, D - 5])
def test_a_transcoder_made_by_saelens_loads_here(architecture: str, d_out: int, tmp_path: Path) -> None:
    sae, x = foreign(architecture, apply_b_dec_to_input=False, d_out=d_out), inputs()
    sae.save_model(tmp_path / "there")
    with torch.no_grad():
        wanted = (sae.encode(x), sae(x))
    dictionary, config = read(tmp_path / "there")
    name = f"made there, read here: {architecture} to {d_out}"
    same(name, (dictionary.encode(x), dictionary(x)), wanted)
    assert (config["trainer"]["output_dim"], config["trainer"]["skip"]) == (d_out, "skip" in architecture)
    save_ours(dictionary, config, tmp_path / "ours")
    again, _ = load_dictionary(tmp_path / "ours")
    same(f"{name}, saved and loaded", (again.encode(x).detach(), again(x).detach()), wanted)


@pytest.mark.parametrize(("architecture", "options"), [("jumprelu", {}), ("standard", {}), ("gated", {})])
def test_the_jumprelu_class_finds_what_saelens_finds(
    architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = foreign(architecture, **options), inputs()
    asked: dict[str, Any] = {}
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda **names: (asked.update(names), sae)[1])
    dictionary = JumpReluAutoEncoder.from_pretrained(load_from_sae_lens=True, release="r", sae_id="s")
    assert asked == {"release": "r", "sae_id": "s"}
    with torch.no_grad():
        same(f"load_from_sae_lens: {architecture}", (dictionary.encode(x), dictionary(x)), (sae.encode(x), sae(x)))


def test_a_trained_batch_topk_saved_for_inference_loads_here(tmp_path: Path) -> None:
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
    sae = sae_lens.BatchTopKTrainingSAE(config)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.topk_threshold.fill_(0.7)
    sae.save_inference_model(tmp_path)
    there = sae_lens.SAE.load_from_disk(tmp_path)
    dictionary, _ = read(tmp_path)
    x = inputs()
    with torch.no_grad():
        same("BatchTopK", (dictionary.encode(x), dictionary(x)), (there.encode(x), there(x)))
