"""Every combination of a sweep, files that say the same after a round trip, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from demo_config import PRESETS, SWEEP
from dictionary_learning.config import (
    CONFIG_VERSION,
    DictionarySpec,
    Preset,
    RunConfig,
    Sweep,
    changed_fields,
    config_from_dict,
    load_config,
    resolve,
)
from dictionary_learning.errors import UserError
from dictionary_learning.trainers import TRAINERS, trainer_class

PRESET = Preset("toy", "texts", layers=(1,), widths=(64,), num_tokens=10_000, batch_size=100, dtype="bfloat16")
TWO_KINDS = Sweep(
    architectures=("top_k", "jump_relu"),
    sparsities={"top_k": {"k": (8, 16)}, "jump_relu": {"target_l0": (4,), "bandwidth": (0.1, 0.2)}},
)


def config(**changes: Any) -> RunConfig:
    return resolve(PRESET, TWO_KINDS, hook_points=["resid_post_layer_1"], **changes)


def plain(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(config().to_dict())), **changes}


# ---------------------------------------------------------------------------------------------- resolve


def test_every_combination_in_the_order_of_the_sweep() -> None:
    run = resolve(
        PRESET,
        dataclasses.replace(TWO_KINDS, learning_rates=(None, 1e-3), seeds=(0, 7)),
        hook_points=["a", "b"],
        widths=[64, 128],
    )
    assert len(run.dictionaries) == 2 * (2 + 2) * 2 * 2 * 2
    assert run.hook_points == ["a", "b"]
    first, second = run.dictionaries[:2]
    assert first == DictionarySpec("top_k", "a", 64, {"k": 8}, None, 0)
    assert second == DictionarySpec("top_k", "a", 64, {"k": 8}, None, 7)
    keys = [(d.hook_point, d.architecture, d.width, str(d.sparsity), d.lr, d.seed) for d in run.dictionaries]
    assert len(set(keys)) == len(keys)
    assert {str(d.sparsity) for d in run.dictionaries if d.architecture == "jump_relu"} == {
        "{'target_l0': 4, 'bandwidth': 0.1}",
        "{'target_l0': 4, 'bandwidth': 0.2}",
    }


def test_the_preset_fills_what_the_command_line_leaves_out() -> None:
    run = config(num_tokens=505, ctx_len=None, seed=3)
    assert (run.model_name, run.corpus, run.dtype, run.ctx_len) == ("toy", "texts", "bfloat16", PRESET.ctx_len)
    assert (run.num_tokens, run.seed, run.steps) == (505, 3, 5)
    assert {d.width for d in run.dictionaries} == {64} and {d.lr for d in run.dictionaries} == {None}


def test_the_command_line_replaces_parts_of_the_sweep() -> None:
    run = config(architectures=["top_k"], widths=[32, 16], seeds=[5], learning_rates=[0.01])
    assert [(d.architecture, d.width, d.sparsity["k"], d.lr, d.seed) for d in run.dictionaries] == [
        ("top_k", width, k, 0.01, 5) for width in (32, 16) for k in (8, 16)
    ]


def test_arguments_for_the_trainer_are_whole_numbers_where_they_can_be() -> None:
    spec = DictionarySpec("top_k", "a", 64, {"k": 8.0, "auxk_alpha": 0.5}, 1e-3, 2)
    arguments = spec.trainer_arguments()
    assert arguments == {"dict_size": 64, "lr": 1e-3, "seed": 2, "submodule_name": "a", "k": 8, "auxk_alpha": 0.5}
    assert isinstance(arguments["k"], int)
    assert spec.label == "top_k k=8 auxk_alpha=0.5 m=64 a"


@pytest.mark.parametrize("name", PRESETS)
def test_the_sweep_that_comes_with_the_project_resolves(name: str) -> None:
    run = resolve(PRESETS[name], SWEEP, hook_points=["resid_post_layer_0"])
    assert len(run.dictionaries) >= 12
    assert set(SWEEP.architectures) <= set(TRAINERS)
    assert run.ctx_len * run.buffer_contexts >= run.ctx_len * run.harvest_contexts + run.batch_size


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["topk"]}, "Unknown architecture 'topk': use one of .*Did you mean 'top_k'"),
        ({"architectures": ["standard"]}, "no sparsities for 'standard': add them to demo_config.py"),
        ({"widths": [64, 64]}, "names the dictionary 'top_k k=8 m=64 resid_post_layer_1' twice"),
        ({"seeds": [1, 1]}, "twice"),
        ({"widths": [0]}, "width of a dictionary must be positive, got 0"),
        ({"widths": [-64]}, "width of a dictionary must be positive, got -64"),
        ({"batch_size": -1}, "batch_size must be positive, got -1"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"num_tokens": 0}, "num_tokens must be positive"),
        ({"ctx_len": 0}, "ctx_len must be positive"),
        ({"buffer_contexts": -5}, "buffer_contexts must be positive"),
        ({"eval_tokens": 0}, "eval_tokens must be positive"),
        ({"num_tokens": 99}, "num_tokens 99 is less than one batch of 100 activations"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seeds": [-1]}, "seed must be at least 0"),
        ({"seeds": [2**64]}, "seed must be at least 0 and below"),
        ({"heldout_fraction": 1.0}, "heldout_fraction must lie between 0 and 1"),
        ({"max_activation_norm_multiple": 0.5}, "max_activation_norm_multiple .*at least 1"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_k_above_the_width_is_refused_by_the_trainer() -> None:
    spec = config(widths=[10], architectures=["top_k"]).dictionaries[-1]
    with pytest.raises(UserError, match="k must be a positive integer of at most the width 10, got 16"):
        trainer_class(spec.architecture)(
            steps=1, activation_dim=4, layer=None, lm_name=None, device="cpu", **spec.trainer_arguments()
        )


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ({"sparsities": {"top_k": {"k": 16}}}, r"lists values of k: write \(16,\)"),
        ({"sparsities": {"top_k": {"k": ()}}}, "no sparsities for 'top_k'"),
        ({"sparsities": {"top_k": {}}}, "no sparsities for 'top_k'"),
        ({"architectures": "top_k"}, r"lists values of architectures: write \('top_k',\)"),
        ({"learning_rates": 1e-3}, r"lists values of learning_rates: write \(0.001,\)"),
        ({"seeds": 4}, r"lists values of seeds: write \(4,\)"),
        ({"architectures": ()}, "no dictionaries"),
    ],
)
def test_slips_in_an_edited_sweep_are_named(sweep: dict[str, Any], sentence: str) -> None:
    edited = dataclasses.replace(Sweep(("top_k",), {"top_k": {"k": (8,)}}), **sweep)
    with pytest.raises(UserError, match=sentence):
        resolve(PRESET, edited, hook_points=["a"])


def test_a_run_without_hook_points_has_no_dictionaries() -> None:
    with pytest.raises(UserError, match="no dictionaries"):
        resolve(PRESET, TWO_KINDS, hook_points=[])


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_configuration_comes_back_equal_from_a_file(tmp_path: Path, suffix: str) -> None:
    run = config(learning_rates=[1e-3], max_activation_norm_multiple=8)
    path = tmp_path / f"run{suffix}"
    path.write_text(json.dumps(run.to_dict()) if suffix == ".json" else yaml.safe_dump(run.to_dict()))
    assert load_config(path) == run
    assert changed_fields(load_config(path), run) == []


def test_a_run_json_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"status": "running", "config": config().to_dict(), "versions": {}}))
    assert load_config(path) == config()


def test_fields_with_defaults_may_be_left_out() -> None:
    data = plain()
    for field in dataclasses.fields(RunConfig):
        if field.default is not dataclasses.MISSING:
            del data[field.name]
    del data["dictionaries"][0]["lr"], data["dictionaries"][0]["seed"]
    assert config_from_dict(data) == config()


def test_changed_fields_are_named() -> None:
    assert changed_fields(config(), config(seed=1, widths=[8])) == ["dictionaries", "seed"]


def without(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


def with_first_dictionary(**changes: Any) -> dict[str, Any]:
    data = plain()
    data["dictionaries"][0] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (plain(batchsize=5), "unknown field 'batchsize'. Did you mean 'batch_size'"),
        (with_first_dictionary(widht=5), r"unknown field 'dictionaries.0.widht'. Did you mean 'width'"),
        (without(plain(), "corpus"), "field 'corpus': Field required"),
        (plain(ctx_len="long"), "field 'ctx_len': Input should be a valid integer"),
        (plain(ctx_len=1.5), "field 'ctx_len'"),
        (plain(dictionaries={}), "field 'dictionaries'"),
        (plain(dictionaries=[]), "no dictionaries"),
        (with_first_dictionary(sparsity={"k": "many"}), r"field 'dictionaries.0.sparsity.k'"),
        (with_first_dictionary(sparsity={"k": float("nan")}), r"field 'dictionaries.0.sparsity.k'.*finite"),
        (with_first_dictionary(lr=float("inf")), r"field 'dictionaries.0.lr'.*finite"),
        (with_first_dictionary(width=0), "^run.yaml: The width of a dictionary must be positive, got 0"),
        (plain(heldout_fraction=float("nan")), "field 'heldout_fraction'"),
        (plain(max_activation_norm_multiple=float("nan")), "field 'max_activation_norm_multiple'"),
        (plain(batch_size=-3), "^run.yaml: batch_size must be positive, got -3"),
        (plain(version=CONFIG_VERSION + 1, novelty=1), f"version {CONFIG_VERSION + 1} is not {CONFIG_VERSION}"),
        (plain(version=None), "version None is not"),
        ([1, 2], "the top level: Input should be a dictionary"),
        (None, "the top level: Input should be a dictionary"),
    ],
)
def test_errors_name_the_field(data: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        config_from_dict(data, "run.yaml")
    assert str(caught.value).startswith("run.yaml: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{"),
        ("a.json", "[" * 100_000),
        ("a.yaml", "a: [1,\nb: }"),
        ("a.yaml", "!!int ''"),
        ("a.yaml", "!!timestamp never"),
        ("a.yaml", "a: &a [*a, *b]"),
        ("a.yaml", "? [1]\n: 2"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    form = "JSON" if name.endswith("json") else "YAML"
    with pytest.raises(UserError, match=f"configuration '.*{name}' is not valid {form}: ") as caught:
        load_config(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UserError, match="can't be read"):
            load_config(path)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_tags_in_yaml_are_not_executed(tmp_path: Path, tag: str) -> None:
    victim = tmp_path / "made_by_yaml"
    (tmp_path / "evil.yaml").write_text(f"corpus: {tag} ['{victim}']\n")
    with pytest.raises(UserError, match="is not valid YAML: could not determine a constructor"):
        load_config(tmp_path / "evil.yaml")
    assert not victim.exists()


# ---------------------------------------------------------------------------------------------- anything at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
spec_fields, run_fields = ([f.name for f in dataclasses.fields(cls)] for cls in (DictionarySpec, RunConfig))
spoiled_specs = st.dictionaries(st.sampled_from(spec_fields) | st.text(max_size=3), json_values, max_size=2).map(
    lambda changes: plain()["dictionaries"][:1] + [{**plain()["dictionaries"][0], **changes}]
)
spoiled_runs = st.dictionaries(st.sampled_from(run_fields) | st.text(max_size=3), json_values, max_size=2)


def loads_or_says_why(load: Any) -> None:
    try:
        run = load()
    except UserError as error:
        assert str(error)
    else:
        json.dumps(run.to_dict(), allow_nan=False)  # what was accepted can be written to run.json


@given(
    json_values
    | spoiled_runs.map(lambda changes: plain(**changes))
    | spoiled_specs.map(lambda d: plain(dictionaries=d))
)
@example({"\ud800": 1})
@example({1: 2, None: 3})
@example(plain(corpus="\udfff"))
@example(plain(num_tokens=10**400))
def test_any_value_loads_or_is_a_user_error(data: Any) -> None:
    loads_or_says_why(lambda: config_from_dict(data))


@given(text=json_values.map(json.dumps) | st.text(st.sampled_from("!&*[]{}:,-?|>'\"%@` \n#abk10.~é\x00")) | st.text())
@example(text="&a [*a]")
@example(text="!!bool x")
@example(text="9" * 5000)
@example(text="2001-99-99")
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_any_file_loads_or_is_a_user_error(tmp_path_factory: pytest.TempPathFactory, suffix: str, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    loads_or_says_why(lambda: load_config(path))
