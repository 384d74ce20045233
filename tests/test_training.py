"""One stream, many dictionaries: independence, normalisation, files, states, and honest ends."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dictionary_learning import trainSAE
from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError
from dictionary_learning.trainers import TRAINERS, JumpReluTrainer, StandardTrainer, TopKTrainer
from dictionary_learning.training import TrainingRun
from dictionary_learning.utils import load_dictionary

D, F, B, STEPS = 16, 64, 64, 24
SPARSITY: dict[str, dict[str, Any]] = {  # of the architectures that are not sparse by `k`
    "jump_relu": {"target_l0": 4.0},
    "matryoshka_batch_top_k": {"k": 4, "group_fractions": [0.25, 0.75]},
    **{name: {"l1_penalty": 0.05} for name in ("standard", "standard_april_update", "gated")},
    **{name: {"initial_sparsity_penalty": 0.05, "anneal_start": 8} for name in ("p_anneal", "gated_anneal")},
}


def activations(rows: int = B * STEPS + 256, scale: float = 3.0, seed: int = 0) -> Tensor:
    """Sparse combinations of 32 directions, off centre, in units of `scale`."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 32, generator=g) * (torch.rand(rows, 32, generator=g) < 0.1)
    directions = torch.randn(32, D, generator=torch.Generator().manual_seed(1000))
    return scale * (codes @ directions + 0.5)


def stream(rows: int = B * STEPS + 256, names: tuple[str, ...] = ("a",), seed: int = 0) -> ActivationBuffer:
    acts = {name: activations(rows, seed=seed + index) for index, name in enumerate(names)}
    chunks = [{name: x[at : at + 100] for name, x in acts.items()} for at in range(0, rows, 100)]
    return ActivationBuffer(None, TensorStream(chunks), n_ctxs=40, ctx_len=10, out_batch_size=B, seed=seed)


def config(architecture: str, **changes: Any) -> dict[str, Any]:
    sizes = {"activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "toy", "device": "cpu", "seed": 0}
    return {"trainer": TRAINERS[architecture], **sizes, **SPARSITY.get(architecture, {"k": 4}), **changes}


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_a_dictionary_trained_among_others_is_bit_for_bit_what_it_is_alone(architecture: str) -> None:
    configs = [config(name, seed=seed) for name in sorted(TRAINERS) for seed in (0, 1)]
    together = trainSAE(stream(), configs, STEPS, normalize_activations=True, log_steps=5)
    place = configs.index(config(architecture, seed=1))
    alone = trainSAE(stream(), [configs[place]], STEPS, normalize_activations=True)[0]
    for name, value in alone.state_dict().items():
        assert torch.equal(value, together[place].state_dict()[name]), name


def test_logging_does_not_change_training() -> None:
    quiet = trainSAE(stream(), [config("top_k")], STEPS)[0]
    chatty = trainSAE(stream(), [config("top_k")], STEPS, log_steps=1)[0]
    assert all(
        torch.equal(a, b) for a, b in zip(quiet.state_dict().values(), chatty.state_dict().values(), strict=True)
    )


def test_the_configs_are_left_unmodified() -> None:
    configs = [config("top_k"), config("standard")]
    before = copy.deepcopy(configs)
    trainSAE(stream(), configs, 3)
    assert configs == before


def test_training_explains_the_data() -> None:
    steps = 400
    data = stream(rows=B * steps + 256)
    for dictionary in trainSAE(data, [config(name) for name in sorted(TRAINERS)], steps, normalize_activations=True):
        x = activations(500, seed=9)
        explained = 1 - (x - dictionary(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        assert explained > 0.75, type(dictionary).__name__


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_normalised_training_gives_dictionaries_for_raw_activations(architecture: str) -> None:
    """On s * x the norm factor is s times larger, and the dictionary's output too: nothing else differs."""
    x = activations(B * STEPS)
    plain, scaled = (
        trainSAE([s * part for part in x.split(B)], [config(architecture)], STEPS, normalize_activations=True)[0]
        for s in (1.0, 8.0)
    )
    torch.testing.assert_close(scaled(8.0 * x), 8.0 * plain(x), rtol=1e-4, atol=1e-4)


def test_the_norm_factor_is_the_root_mean_squared_norm_and_stands_in_the_config(tmp_path: Path) -> None:
    x = activations(B * STEPS)
    trainSAE(list(x.split(B)), [config("top_k")], STEPS, normalize_activations=True, save_dir=tmp_path)
    saved = json.loads((tmp_path / "trainer_0" / "config.json").read_text())
    assert saved["trainer"]["norm_factor"] == pytest.approx(x[: 16 * B].pow(2).sum(1).mean().sqrt().item(), rel=1e-5)


def test_several_hook_points_train_each_on_its_own(tmp_path: Path) -> None:
    names = ("a", "b")
    configs = [config("top_k", submodule_name=name) for name in names]
    both = trainSAE(stream(names=names), configs, STEPS)
    for index, name in enumerate(names):
        acts = {key: value for key, value in stream(names=names)._rows.items()}
        assert set(acts) == set(names)
        single = [batch[name] for batch in stream(names=names)][:STEPS]
        alone = trainSAE(single, [config("top_k")], STEPS)[0]
        assert torch.equal(alone.decoder.weight, both[index].decoder.weight)
    with pytest.raises(UserError, match="several hook points .a, b.*'c'"):
        trainSAE(stream(names=names), [config("top_k", submodule_name="c")], STEPS)


def test_files_load_as_the_dictionaries_that_were_returned(tmp_path: Path) -> None:
    configs = [config(name) for name in sorted(TRAINERS)]
    returned = trainSAE(
        stream(), configs, STEPS, save_dir=tmp_path, save_steps=[10], log_steps=8, normalize_activations=True
    )
    x = activations(50)
    for index, dictionary in enumerate(returned):
        loaded, saved = load_dictionary(tmp_path / f"trainer_{index}")
        rescaled = saved["trainer"]["trainer_class"] == "StandardTrainerAprilUpdate"  # loading gives it unit rows
        torch.testing.assert_close(loaded(x), dictionary(x), rtol=1e-5 * rescaled, atol=1e-5 * rescaled)
        assert saved["trainer"]["dict_class"] == type(dictionary).__name__
        assert saved["buffer"]["out_batch_size"] == B
        checkpoint = type(dictionary).from_pretrained(
            tmp_path / f"trainer_{index}" / "checkpoints" / "ae_10.safetensors"
        )
        assert not torch.equal(checkpoint(x), dictionary(x))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["trainer"]) for line in lines] == [
        (step, f"trainer_{index}") for step in (8, 16, 24) for index in range(len(configs))
    ]
    assert {"tokens", "loss", "l0", "frac_variance_explained", "nz_frac", "lr"} <= set(lines[0])
    assert not list(tmp_path.rglob(".*")), "temporary files were left behind"


def interrupted_at(step: int) -> Any:
    def callback(run: TrainingRun, done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


@pytest.mark.parametrize("architecture", sorted(TRAINERS))
def test_a_resumed_run_is_bit_for_bit_an_unbroken_one(architecture: str, tmp_path: Path) -> None:
    configs = [config(architecture, seed=seed) for seed in (0, 1)]
    arguments: dict[str, Any] = {"normalize_activations": True, "log_steps": 4}
    unbroken = trainSAE(stream(), configs, STEPS, save_dir=tmp_path / "unbroken", **arguments)
    broken = tmp_path / "broken"
    trainSAE(stream(), configs, STEPS, save_dir=broken, callbacks=[interrupted_at(11)], **arguments)
    assert [path.name for path in (broken / "state").iterdir()] == ["step_000000011"]
    resumed = trainSAE(stream(), configs, STEPS, save_dir=broken, resume=True, **arguments)
    for a, b in zip(unbroken, resumed, strict=True):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    assert (tmp_path / "unbroken" / "metrics.jsonl").read_text() == (broken / "metrics.jsonl").read_text()


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path: Path) -> None:
    def settled(run: TrainingRun, done: int) -> None:
        """Waits for the state in flight: on a busy machine the next one would be a step or two late."""
        assert run.states is not None
        run.states.finish()

    unbroken = trainSAE(stream(), [config("top_k")], STEPS)[0]
    seen_to = [settled, interrupted_at(20)]
    trainSAE(stream(), [config("top_k")], STEPS, save_dir=tmp_path, state_every=7, callbacks=seen_to)
    states = sorted((tmp_path / "state").iterdir())
    assert [state.name for state in states] == ["step_000000014", "step_000000020"]
    weights = states[-1] / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.warns(UserWarning, match="step_000000020 is damaged"):
        resumed = trainSAE(stream(), [config("top_k")], STEPS, save_dir=tmp_path, resume=True)[0]
    assert torch.equal(resumed.decoder.weight, unbroken.decoder.weight)


def test_an_exhausted_stream_is_not_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = TrainingRun(
        stream(rows=5 * B), [TopKTrainer(STEPS, D, F, 4, 0, "toy", device="cpu")], STEPS, save_dir=tmp_path
    )
    run.run()
    assert (run.stopped, run.step, run.tokens) == ("end of stream", 5, 5 * B)
    assert (tmp_path / "trainer_0" / "ae.safetensors").is_file()


def test_a_stream_that_breaks_leaves_a_state_behind(tmp_path: Path) -> None:
    def breaking() -> Any:
        yield from activations(10 * B).split(B)
        raise UserError("line 17 is damaged")

    data = ActivationBuffer(None, TensorStream(breaking()), n_ctxs=40, ctx_len=10, out_batch_size=B)
    with pytest.raises(UserError, match="line 17"):
        trainSAE(data, [config("top_k")], STEPS, save_dir=tmp_path)
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_a_loss_that_is_not_finite_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    batches = [activations(B), torch.full((B, D), 1e30)]  # whose squares overflow
    trainSAE(batches, [config("standard")], 3, log_steps=1, verbose=True)
    assert re.search(r"trainer_0 is stopped, its loss was NaN or infinite at step 2", capsys.readouterr().out)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_refused_where_they_are(bad: float) -> None:
    broken = activations(B)
    broken[3, 1] = bad
    with pytest.raises(UserError, match="a NaN or an infinity in batch 1, row 3"):
        trainSAE([activations(B), broken], [config("top_k")], 2)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(UserError, match="Batch 1 of the activations is empty"):
        trainSAE([activations(B), activations(B)[:0]], [config("top_k")], 2)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    def twice(run: TrainingRun, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainSAE(stream(), [config("top_k")], STEPS, save_dir=tmp_path, callbacks=[twice])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_jump_relu_settles_at_its_target_l0() -> None:
    steps = 600
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(128, 64, generator=g)
    data = [
        (torch.rand(256, 128, generator=g) * (torch.rand(256, 128, generator=g) < 0.1)) @ directions
        for _ in range(steps)
    ]
    trainer = {"trainer": JumpReluTrainer, "activation_dim": 64, "dict_size": 256, "layer": 0, "lm_name": "", "seed": 0}
    dictionary = trainSAE(data, [{**trainer, "target_l0": 8.0}], steps, normalize_activations=True)[0]
    l0 = (dictionary.encode(torch.cat(data[-8:])) != 0).sum(-1).float().mean().item()
    assert l0 == pytest.approx(8.0, rel=0.15)


@pytest.mark.parametrize(
    ("configs", "data", "message"),
    [
        ([], None, "list of trainers is empty"),
        ([{"activation_dim": D}], None, "no 'trainer'"),
        ([config("top_k") | {"trainer": "top_k"}], None, "'trainer' must be a class, such as TopKTrainer, got 'top_k'"),
        (config("top_k"), None, "trainer_configs is a list of configs"),
        ([config("top_k", kk=3)], None, "TopKTrainer can't be made from its config: .*kk"),
        ([config("top_k", activation_dim=D + 1)], None, f"expects activations of width {D + 1}, the data has {D}"),
        ([config("top_k", k=F + 1)], None, "k must be a positive integer of at most the width"),
        ([config("top_k")], [torch.zeros(3, 4, 5)], r"must be \[rows, width\], got \[3, 4, 5\]"),
        ([config("top_k")], [torch.zeros(8, D)], "mean squared norm is 0"),
        ([config("top_k")], [torch.full((8, D), float("nan"))], "mean squared norm is nan"),
        ([config("top_k")], [], "activations are empty"),
    ],
)
def test_bad_input_gets_one_sentence(configs: list[dict[str, Any]], data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainSAE(stream() if data is None else data, configs, STEPS, normalize_activations=True)


def test_an_early_end_of_the_stream_is_said_aloud() -> None:
    with pytest.warns(UserWarning, match=r"stopped after 2 of 40 steps: end of stream"):
        trainSAE([torch.randn(8, D), torch.randn(8, D)], [config("top_k")], 40)


def test_a_new_run_in_a_used_folder_forgets_the_old_states(tmp_path: Path) -> None:
    trainSAE(stream(), [config("top_k")], STEPS, save_dir=tmp_path, state_every=10)
    trainSAE(stream(), [config("top_k")], 3, save_dir=tmp_path)
    with pytest.raises(UserError, match="no usable saved state"):
        trainSAE(stream(), [config("top_k")], STEPS, save_dir=tmp_path, resume=True)


def test_the_log_of_a_plain_iterable_has_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    batches = activations(B * STEPS).split(B)
    trainSAE(list(batches), [config("top_k")], STEPS, log_steps=8, verbose=True)
    out = capsys.readouterr().out
    assert "trainer_0: step 8, loss" in out and "left" not in out


def test_resume_without_a_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable saved state"):
        trainSAE(stream(), [config("top_k")], STEPS, save_dir=tmp_path, resume=True)
    with pytest.raises(UserError, match="needs the save_dir"):
        trainSAE(stream(), [config("top_k")], STEPS, resume=True)


def test_a_run_without_seeds_draws_different_dictionaries() -> None:
    first, second = (StandardTrainer(STEPS, D, F, 0, "toy", device="cpu").ae.decoder.weight for _ in range(2))
    assert not torch.equal(first, second)
