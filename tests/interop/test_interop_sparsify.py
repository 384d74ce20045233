"""What we write loads in the real sparsify and computes the same, and what it saves loads here: `make test-interop`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sparsify = pytest.importorskip("sparsify", reason="needs the environment of `make test-interop`")

from format_cases import CASES, CONFIG, D, F, K, assert_same, expected, inputs, largest_difference, refusal  # noqa: E402

from dictionary_learning import load_dictionary  # noqa: E402
from dictionary_learning.formats import CannotHold, find_dictionaries, read, write  # noqa: E402
from dictionary_learning.formats.files import save_ours  # noqa: E402

differences: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _say_the_differences() -> Any:
    yield
    print(f"\neai-sparsify {version('eai-sparsify')}: largest differences, relative to 1 + |value|")
    for name, value in differences.items():
        print(f"  {name}: {value:.1e}")


def run(coder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, reconstructions) of sparsify itself, its codes spread out."""
    flat = x.flatten(0, -2)
    with torch.no_grad():
        top_acts, top_indices, _ = coder.encode(flat)
        out = coder(flat).sae_out.float()  # with the skip connection, where there is one
    codes = torch.zeros(len(flat), coder.num_latents).scatter(-1, top_indices, top_acts)
    return codes.reshape(*x.shape[:-1], -1), out.reshape(x.shape)


def same(name: str, actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    differences[name] = largest_difference(actual, wanted)
    assert_same(actual, wanted)


@pytest.mark.parametrize("case", CASES)
def test_sparsify_loads_what_we_write_and_we_what_it_saves(case: str, tmp_path: Path) -> None:
    dictionary, x = CASES[case](), inputs()
    if why := refusal(case, "sparsify"):
        with pytest.raises(CannotHold, match=why):
            write(dictionary, CONFIG, tmp_path / "there", "sparsify")
        return
    wanted = expected(dictionary, "sparsify", x)
    write(dictionary, CONFIG, tmp_path / "there", "sparsify")
    coder = sparsify.SparseCoder.load_from_disk(tmp_path / "there")
    same(f"written here, read there: {case}", run(coder, x), wanted)

    coder.save_to_disk(tmp_path / "layers.8")
    assert [entry.name for _, _, entry in find_dictionaries(tmp_path / "layers.8")] == ["sparsify"]
    back, config = read(tmp_path / "layers.8")
    same(f"and back: {case}", (back.encode(x), back(x)), wanted)
    assert config["trainer"]["submodule_name"] == "resid_post_layer_8"


@pytest.mark.parametrize("size", [{"num_latents": F}, {"expansion_factor": 5}])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_decoder": False},
        {"activation": "groupmax"},
        {"transcode": True},
        {"transcode": True, "skip_connection": True},
        {"activation": "groupmax", "transcode": True, "skip_connection": True},
        {"skip_connection": True},
    ],
)
def test_a_coder_made_by_sparsify_loads_here(size: dict[str, int], options: dict[str, Any], tmp_path: Path) -> None:
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, **options, **size))
    with torch.no_grad():
        for parameter in coder.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            elif not parameter.any():  # of transcoders, the decoder and the skip connection begin at zero
                parameter.normal_()
    coder.save_to_disk(tmp_path / "layers.3.mlp")
    dictionary, config = read(tmp_path / "layers.3.mlp")
    x = inputs()
    name = f"made there, read here: {size}, {options}"
    same(name, (dictionary.encode(x).detach(), dictionary(x).detach()), run(coder, x))
    assert config["trainer"]["submodule_name"] == "mlp_out_layer_3" and config["trainer"]["k"] == K
    save_ours(dictionary, config, tmp_path / "ours")
    again, _ = load_dictionary(tmp_path / "ours")
    same(f"{name}, saved and loaded", (again.encode(x).detach(), again(x).detach()), run(coder, x))
