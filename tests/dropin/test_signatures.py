"""Every public name, argument and default of the `dictionary-learning` package is here, or in docs/differences.md."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from signatures import ABSENT, TABLE, Difference, Row, differences, load_ours, recorded_modules, table_rows

from dictionary_learning.activations.saved import TensorStream

ARGUMENTS: dict[str, Any] = {  # of the classes whose instances are looked at, as far as a class takes them
    "steps": 20,
    "activation_dim": 8,
    "dict_size": 32,
    "k": 2,
    "layer": 0,
    "lm_name": "toy",
    "device": "cpu",
    "group_sizes": [8, 24],
    "group_fractions": [0.25, 0.75],
    "anneal_start": 5,
    "resample_steps": 5,
}


def make(cls: type, tokenizer: Any) -> Any:
    """An instance of one of our classes."""
    if cls.__name__.endswith("Buffer"):
        return _buffer(cls, tokenizer)
    if cls.__name__ == "SAETrainer":  # abstract here
        cls = load_ours("dictionary_learning.trainers").TopKTrainer
    if cls.__name__ == "ConstrainedAdam":
        weight = torch.nn.Parameter(torch.ones(4, 3))
        return cls([weight], [weight], lr=0.1)  # type: ignore[call-arg]
    parameters = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in ARGUMENTS.items() if name in parameters})


def _buffer(cls: type, tokenizer: Any) -> Any:
    if cls.__name__ == "ActivationBuffer":
        source = TensorStream([{"a": torch.randn(64, 8)}])
        return cls(None, source, n_ctxs=16, ctx_len=8, out_batch_size=16)  # type: ignore[call-arg]
    import transformers

    from dictionary_learning import TracedLM

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, vocab_size=260, max_position_embeddings=16)
    model = TracedLM.load(transformers.LlamaForCausalLM(config), tokenizer)
    place = {"layer": 0} if cls.__name__.startswith("Head") else {"submodule": "resid_post_layer_0"}
    sizes = {"n_ctxs": 8, "ctx_len": 8, "refresh_batch_size": 2, "out_batch_size": 4}
    data = ["Some text to read."] * 9 if place.get("layer") == 0 else [[1, 2, 3, 4, 5, 6, 7, 8]] * 9
    return cls(iter(data), model, **place, **sizes)


@pytest.fixture(scope="module")
def found(tokenizer_bos_eos_pad: Any) -> list[Difference]:
    return list(differences(recorded_modules(), load_ours, lambda cls: make(cls, tokenizer_bos_eos_pad)))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return table_rows(TABLE.read_text(encoding="utf-8"))


def test_every_difference_from_the_package_is_in_the_table_once(found: list[Difference], rows: list[Row]) -> None:
    explained = {difference: [row for row in rows if row.explains(difference)] for difference in found}
    unlisted = [f"{d.name}: ours {d.ours}, there {d.peer}" for d, by in explained.items() if not by]
    assert not unlisted, f"{len(unlisted)} are not in docs/differences.md:\n" + "\n".join(unlisted)
    twice = [d.name for d, by in explained.items() if len(by) > 1]
    assert not twice, f"listed in several rows: {twice}"


def test_every_row_of_the_table_is_still_a_difference_and_says_why(found: list[Difference], rows: list[Row]) -> None:
    assert rows
    stale = [row.name for row in rows if not any(row.explains(difference) for difference in found)]
    assert not stale, f"no longer a difference (take them out of docs/differences.md): {stale}"
    assert not [row.name for row in rows if len(row.why) < 8]


def test_the_record_is_of_the_whole_package() -> None:
    recorded = recorded_modules()
    trainers = [name for names in recorded.values() for name in names if name.endswith(("Trainer", "AprilUpdate"))]
    assert len(recorded) == 19 and len(set(trainers)) == 10  # nine and their base class
    assert recorded["dictionary_learning.utils"]["load_dictionary"] == {"parameters": ["base_path", "device"]}


# ------------------------------------------------------------------------------------- what the comparison catches


def compared(recorded: dict[str, Any], **ours: Any) -> set[tuple[str, str, str]]:
    module = ModuleType("dictionary_learning.m")
    vars(module).update(ours)

    def load(name: str) -> ModuleType:
        if name != module.__name__:
            raise ModuleNotFoundError(name)
        return module

    return {tuple(d) for d in differences({"dictionary_learning.m": recorded}, load, lambda cls: cls())}  # type: ignore[misc]


def test_a_call_that_would_mean_something_else_is_a_difference() -> None:
    peer = {"f": {"parameters": ["x", "k = 3", "device = 'cpu'", "**kwargs"]}}
    assert compared(peer, f=lambda x, k=3, device="cpu", *, more=1: None) == set()
    assert compared(peer, f=lambda x, k=3, device=None: None) == {("m.f(device)", "None", "'cpu'")}
    assert compared(peer, f=lambda x, k=3: None) == {("m.f(device)", ABSENT, "'cpu'")}
    assert compared(peer, f=lambda x, k, device="cpu": None) == {("m.f(k)", "required", "3")}
    assert compared(peer, f=lambda y, k=3, device="cpu": None) == {("m.f(x)", "named y", "argument")}
    assert compared(peer, f=lambda x, k=3, *, device="cpu": None) == {("m.f(device)", "by keyword", "position 2")}
    assert compared(peer, f=lambda x, k=3, device="cpu", *, more: None) == {("m.f(more)", "required", ABSENT)}
    assert compared(peer, f=lambda x, new=1, k=3, device="cpu": None) == {
        ("m.f(k)", "position 2", "position 1"),
        ("m.f(device)", "position 3", "position 2"),
    }


def test_a_name_attribute_or_config_key_that_is_not_here_is_a_difference() -> None:
    class Trainer:
        lr = 1.0
        config = {"lr": 1.0}

        def loss(self, x: Any) -> None: ...

    members = {"loss": {"parameters": ["x"]}, "config": {"property": True}}
    entry = {"members": members, "attributes": ["lr"], "config": ["lr"]}
    assert compared({"T": entry}, T=Trainer) == set()
    more = {"members": members | {"update": {"parameters": []}}, "attributes": ["k"], "config": ["seed"]}
    assert compared({"T": more, "g": {"parameters": []}, "c": {"value": True}}, T=Trainer) == {
        ("m.T.update", ABSENT, "method"),
        ("m.T.k", ABSENT, "attribute"),
        ("m.T.config:seed", ABSENT, "key"),
        ("m.g", ABSENT, "function"),
        ("m.c", ABSENT, "value"),
    }
    assert list(differences({"dictionary_learning.gone": {}}, _no_module, type)) == [
        Difference("gone", ABSENT, "module")
    ]


def _no_module(name: str) -> Any:
    raise ModuleNotFoundError(name)


def test_a_row_explains_by_name_and_by_both_values() -> None:
    text = (
        "# t\n\n| name | ours | peer | why |\n|---|---|---|---|\n| `a.*(lr)` | `None` | `*` | a rule |\n\n| other |\n"
    )
    (row,) = table_rows(text)
    assert row == Row("a.*(lr)", "None", "*", "a rule")
    assert row.explains(Difference("a.T(lr)", "None", "0.001"))
    assert not row.explains(Difference("a.T(lr)", "0.1", "0.001"))
    assert not row.explains(Difference("b.T(lr)", "None", "0.001"))
