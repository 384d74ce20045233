"""What a run will cost: counted exactly where it can be, measured where it must be."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dictionary_learning import TracedLM, planning
from dictionary_learning.activations.language_model import LanguageModelActivations
from dictionary_learning.config import DictionarySpec, RunConfig
from dictionary_learning.errors import UserError
from dictionary_learning.packing import ContextPacker
from dictionary_learning.planning import Plan, plan_run, probe
from dictionary_learning.trainers import TRAINERS, trainer_class

D, BATCH, CTX = 8, 32, 16
SPARSITY = {
    **dict.fromkeys(("top_k", "batch_top_k", "matryoshka_batch_top_k", "group_max"), {"k": 4.0}),
    **dict.fromkeys(("standard", "standard_april_update", "gated"), {"l1_penalty": 0.1}),
    **dict.fromkeys(("p_anneal", "gated_anneal"), {"initial_sparsity_penalty": 0.1}),
    "jump_relu": {"target_l0": 4.0},
}
SETTINGS: dict[str, dict[str, Any]] = {"matryoshka_batch_top_k": {"group_fractions": [0.25, 0.75]}}
POINTS = ("resid_post_layer_0", "mlp_in_layer_1")


def spec(architecture: str, width: int = 32, hook_point: str = POINTS[0], **sparsity: float) -> DictionarySpec:
    settings = SETTINGS.get(architecture, {})
    return DictionarySpec(architecture, hook_point, width, {**SPARSITY[architecture], **sparsity}, settings=settings)


def config(*specs: DictionarySpec, **changes: Any) -> RunConfig:
    sizes = {"num_tokens": 1000, "ctx_len": CTX, "harvest_contexts": 2, "buffer_contexts": 8, "batch_size": BATCH}
    rest = {"dtype": "float32", "eval_tokens": 100, "eval_contexts": 2}
    return RunConfig("toy", "texts", list(specs), **{**sizes, **rest, **changes})


@pytest.fixture(scope="module")
def lm(tokenizer: Any) -> TracedLM:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_layer=2, n_embd=D, n_head=2, n_positions=CTX)).eval()
    return TracedLM.load(model, tokenizer)


def source(lm: TracedLM, *points: str, texts: Any = None) -> LanguageModelActivations:
    texts = texts or itertools.repeat("The left ventricle pumps blood into the aorta.")
    return LanguageModelActivations(
        lm, ContextPacker(texts, lm.tokenizer, ctx_len=CTX, batch_contexts=2), points or POINTS[:1]
    )


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_the_parameters_are_those_of_the_trainers(lm: TracedLM, architecture: str) -> None:
    specs = [spec(architecture, width) for width in (32, 56)]
    trainers = [
        trainer_class(architecture)(
            steps=10, activation_dim=D, layer=0, lm_name="toy", device="cpu", **s.trainer_arguments()
        )
        for s in specs
    ]
    expected = sum(p.numel() for trainer in trainers for p in trainer.ae.parameters())
    assert plan_run(config(*specs), lm).parameters == expected


def test_planning_draws_and_fills_nothing(lm: TracedLM) -> None:
    before = torch.get_rng_state()
    plan = plan_run(config(*(spec(architecture, 2**26) for architecture in sorted(TRAINERS))), lm)  # 13 GB
    assert plan.parameters > 3 * 2 * D * 2**26
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_follow_the_configuration(lm: TracedLM) -> None:
    one = plan_run(config(spec("top_k")), lm)
    assert one.model_bytes == sum(p.numel() for p in lm.module.parameters()) * 4
    assert one.buffer_bytes == 8 * CTX * D * 4
    assert (one.dictionaries, one.steps, one.tokens) == (1, 31, 31 * BATCH)
    assert one.training_bytes >= 4 * 4 * one.parameters  # weights, gradients and Adam's two moments
    assert one.device_bytes == one.model_bytes + one.buffer_bytes + one.training_bytes
    assert one.disk_bytes >= 4 * one.parameters + 2 * (3 * 4 * one.parameters + one.buffer_bytes)
    assert plan_run(config(spec("top_k")), lm, checkpoints=4).disk_bytes == one.disk_bytes + 4 * 4 * one.parameters

    two_points = plan_run(config(spec("top_k"), spec("top_k", hook_point=POINTS[1])), lm)
    assert two_points.buffer_bytes == 2 * one.buffer_bytes and two_points.parameters == 2 * one.parameters
    same_point = plan_run(config(spec("top_k"), spec("top_k", k=5)), lm)
    assert same_point.buffer_bytes == one.buffer_bytes and same_point.parameters == 2 * one.parameters


def test_what_cannot_be_built_is_refused_before_anything_runs(lm: TracedLM) -> None:
    for bad, sentence in (
        (spec("top_k", 32, k=33), "k must be a positive integer of at most the width 32, got 33"),
        (spec("top_k", 32, k=0), "k must be a positive integer"),
        (spec("top_k", hook_point="resid_post_layer_2"), "Layer 2 .*has layers 0 to 1"),
        (dataclasses.replace(spec("top_k"), architecture="topk"), "Unknown architecture 'topk'"),
        (spec("standard", kk=4), "settings of 'standard .*kk=4.* it has no 'kk'"),
        (spec("standard", steps=4), "settings of 'standard .*multiple values for keyword argument 'steps'"),
        (dataclasses.replace(spec("top_k"), sparsity={}), "settings of 'top_k .*missing a required argument: 'k'"),
    ):
        with pytest.raises(UserError, match=sentence):
            plan_run(config(spec("top_k"), bad), lm)


# ---------------------------------------------------------------------------------------------- rates


class Clock:
    """Time that passes only where a test says so: a second a forward, and `costs` seconds a step of a trainer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: dict[str, float]) -> None:
        self.now, self.updates = 50.0, []
        monkeypatch.setattr(planning, "time", SimpleNamespace(perf_counter=lambda: self.now))
        for architecture, seconds in costs.items():
            monkeypatch.setattr(TRAINERS[architecture], "update", self.update(architecture, seconds))
        harvest = LanguageModelActivations.__next__

        def slow(source: LanguageModelActivations) -> Any:
            self.now += 1.0
            return harvest(source)

        monkeypatch.setattr(LanguageModelActivations, "__next__", slow)

    def update(self, architecture: str, seconds: float) -> Any:
        def update(trainer: Any, step: int, x_BD: torch.Tensor) -> None:
            assert x_BD.shape == (BATCH, D) and 0 <= step < trainer.steps
            self.now += seconds
            self.updates.append(architecture)

        return update


def probed(lm: TracedLM, run: RunConfig, seconds: float = 20.0) -> Plan:
    return probe(plan_run(run, lm), run, source(lm, *run.hook_points), torch.device("cpu"), seconds)


def test_the_rates_are_what_the_clock_says(lm: TracedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {"top_k": 0.01})
    plan = probed(lm, config(spec("top_k")))
    assert (
        plan.harvest_rate is not None and 0.8 * 2 * CTX < plan.harvest_rate <= 2 * CTX
    )  # rows of a one-second forward
    assert plan.training_rate == pytest.approx(BATCH / 0.01, rel=1e-6)
    assert len(clock.updates) > 900, "ten seconds of steps that take a hundredth"
    assert plan.seconds == pytest.approx(plan.tokens / plan.harvest_rate + plan.steps * 0.01, rel=1e-6)
    assert clock.now - 50 < 1.2 * 20


def test_the_estimate_grows_with_the_number_of_dictionaries(lm: TracedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, {"top_k": 0.5, "standard": 2.0})
    kinds = [spec("top_k", k=k) for k in (1.0, 2.0, 3.0)]
    rates = [
        probed(lm, config(*specs)).training_rate
        for specs in (kinds[:1], kinds, [*kinds, spec("standard"), spec("top_k", 64)])
    ]
    seconds_a_step = [BATCH / rate for rate in rates if rate]
    assert seconds_a_step == pytest.approx([0.5, 1.5, 1.5 + 2.0 + 0.5])


def test_a_short_probe_of_real_trainers_gives_positive_rates_and_names_them(lm: TracedLM) -> None:
    run = config(*(spec(name, hook_point=point) for name in sorted(TRAINERS) for point in POINTS))
    bare = plan_run(run, lm)
    plan = probed(lm, run, seconds=0.2)
    assert bare.seconds is None and plan.seconds is not None and plan.seconds > 0
    assert plan.harvest_rate is not None and plan.harvest_rate > 0
    assert dataclasses.replace(plan, harvest_rate=None, training_rate=None) == bare
    names = [name for name, _ in plan.lines()]
    assert names == [*(name for name, _ in bare.lines()), "harvest", "training", "estimated time"]
    assert dict(plan.lines())["dictionaries"] == str(2 * len(TRAINERS))


def test_a_stream_that_ends_during_the_probe_leaves_the_time_open(lm: TracedLM) -> None:
    run = config(spec("top_k"))
    short = source(lm, texts=["one short text"])  # a single forward
    plan = probe(plan_run(run, lm), run, short, torch.device("cpu"), 0.05)
    assert plan.seconds is None and len(plan.lines()) == 6


def test_a_plan_reads_in_units_of_people() -> None:
    plan = Plan(
        dictionaries=12, parameters=1_234_567, model_bytes=999_600, buffer_bytes=2_500_000_000, training_bytes=512,
        disk_bytes=3 * 10**15, steps=1000, tokens=2_000_000, harvest_rate=1000.0, training_rate=500.0,
    )  # fmt: skip
    lines = dict(plan.lines())
    assert lines["parameters"] == "1,234,567" and lines["tokens"] == "2,000,000 in 1,000 steps"
    assert lines["on the device"] == "2.5 GB (model 1 MB, buffer 2.5 GB, dictionaries 512 B)"
    assert lines["on disk"] == "3 PB" and lines["estimated time"] == "100 min"
    times = [dataclasses.replace(plan, tokens=tokens).lines()[-1][1] for tokens in (10_000, 10_000_000)]
    assert times == ["30 s", "8.3 h"]
