from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from dictionary_learning.activations.hook_points import (
    SITES,
    HookPoint,
    find_blocks,
    find_part,
    hook_points_for,
    layer_of,
    parse_hook_point,
)
from dictionary_learning.errors import UserError


def test_names_say_site_layer_and_side():
    assert parse_hook_point("resid_post_layer_8") == HookPoint("resid_post_layer_8", "out", site="resid_post", layer=8)
    sides = {site: parse_hook_point(f"{site}_layer_3").io for site in SITES}
    assert sides == {
        "resid_pre": "in",
        "resid_post": "out",
        "mlp_in": "in",
        "mlp_out": "out",
        "attn_in": "in",
        "attn_out": "out",
    }


def test_module_paths_take_a_side_and_default_to_the_output():
    assert parse_hook_point("model.layers.8.mlp:in") == HookPoint(
        "model.layers.8.mlp:in", "in", path="model.layers.8.mlp"
    )
    assert parse_hook_point("model.layers.8.mlp").io == "out"
    # The default side becomes part of the name, so that both sides can stand in one dictionary.
    assert parse_hook_point("model.layers.8.mlp", io="in").name == "model.layers.8.mlp:in"
    assert parse_hook_point("model.layers.8.mlp:out", io="in").io == "out"


def test_hook_points_for_names_one_site_in_many_layers():
    assert hook_points_for(range(1, 3)) == ["resid_post_layer_1", "resid_post_layer_2"]
    assert hook_points_for([0], site="attn_in") == ["attn_in_layer_0"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resid_pots_layer_8", "Unknown site 'resid_pots' in hook point 'resid_pots_layer_8'; known are resid_pre, "
         "resid_post, mlp_in, mlp_out, attn_in, attn_out. Did you mean 'resid_post_layer_8'?"),
        ("model.layers.8.mlp:output", "Hook point 'model.layers.8.mlp:output' should end in ':in' or ':out'"),
        (":out", "Hook point ':out' should end in"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_read_is_one_sentence(name: str, sentence: str):
    with pytest.raises(UserError) as error:
        parse_hook_point(name)
    assert str(error.value).startswith(sentence)


class Experts(nn.Module):
    """A block of few layers and many experts, with norms named after their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.post_attention_layernorm = nn.LayerNorm(4)
        self.pre_feedforward_layernorm = nn.LayerNorm(4)
        self.attn_dropout = nn.Dropout()
        self.ln_mlp = nn.Identity()
        self.mixer = type("LinearAttention", (nn.Linear,), {})(4, 4)
        self.block_sparse_moe = nn.Module()
        self.block_sparse_moe.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(16))


def model_of(**lists: nn.ModuleList) -> nn.Module:
    module = nn.Module()
    module.decoder = nn.Module()
    for name, blocks in lists.items():
        module.decoder.add_module(name, blocks)
    return module


def test_blocks_are_the_longest_outermost_list_even_with_more_experts_than_blocks():
    model = model_of(short=nn.ModuleList([nn.Linear(2, 2)]), layers=nn.ModuleList(Experts() for _ in range(3)))
    path, blocks = find_blocks(model)
    assert path == "decoder.layers" and len(blocks) == 3


def test_of_two_lists_as_long_the_first_counts():
    model = model_of(h=nn.ModuleList([nn.Linear(2, 2)] * 2), adapters=nn.ModuleList([nn.Linear(2, 2)] * 2))
    assert find_blocks(model)[0] == "decoder.h"


def test_parts_are_found_by_name_then_by_class_and_never_a_norm_or_dropout():
    block = Experts()
    assert find_part(block, "mlp") == "block_sparse_moe"
    assert find_part(block, "attn") == "mixer"


def test_a_block_without_the_part_lists_its_children():
    block = nn.ModuleDict({"fc1": nn.Linear(2, 2), "final_layer_norm": nn.LayerNorm(2)})
    with pytest.raises(UserError) as error:
        find_part(block, "mlp", "model.layers.0")
    assert str(error.value) == (
        "model.layers.0 has no MLP module among its children (fc1, final_layer_norm); "
        "name one by its path, as in 'model.layers.0.fc1:out'."
    )


def test_a_model_without_blocks_is_told_to_use_paths():
    with pytest.raises(UserError, match="has no list of blocks to number layers by; name the module by its path"):
        parse_hook_point("resid_post_layer_0").locate(nn.Linear(2, 2))


def test_layer_of_reads_the_block_number_from_the_path():
    model = model_of(layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(12)))
    assert layer_of("decoder.layers.11", model) == 11
    assert layer_of("decoder.layers.1.mlp.up", model) == 1
    assert layer_of("decoder", model) is None
    assert layer_of("weight", nn.Linear(2, 2)) is None


def test_naming_hook_points_does_not_import_the_heavy_libraries():
    code = (
        "import sys, dictionary_learning.activations as a; a.parse_hook_point('resid_post_layer_1'); "
        "print([m for m in ('nnsight', 'transformers') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
