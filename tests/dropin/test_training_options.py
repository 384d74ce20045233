"""What trainSAE takes besides a stream of one activation: transcoders, attention heads, bfloat16, gaps in configs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dictionary_learning import ActivationBuffer, trainSAE
from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.errors import UserError
from dictionary_learning.trainers import StandardTrainer, TopKTrainer
from dictionary_learning.training import TrainingRun, get_norm_factor
from dictionary_learning.utils import load_dictionary

D, F, B, STEPS = 8, 32, 64, 30


def config(**changes: Any) -> dict[str, Any]:
    sizes = {"activation_dim": D, "dict_size": F, "k": 4, "layer": 0, "lm_name": "toy", "device": "cpu", "seed": 0}
    return {"trainer": TopKTrainer, **sizes, **changes}


def batches(*shape: int, steps: int = STEPS, scale: float = 3.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(16, shape[-1], generator=g)
    return [
        scale
        * ((torch.rand(*shape[:-1], 16, generator=g) * (torch.rand(*shape[:-1], 16, generator=g) < 0.2)) @ directions)
        for _ in range(steps)
    ]


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------------------------------------------- transcoders


def module_of() -> Tensor:
    return torch.randn(D, D, generator=torch.Generator().manual_seed(7)) / D**0.5


def pairs(steps: int = STEPS, out_scale: float = 1.0) -> list[Tensor]:
    return [torch.stack([x, out_scale * (x @ module_of())], dim=1) for x in batches(B, D, steps=steps)]


def test_a_transcoder_learns_the_output_from_the_input_and_takes_raw_activations() -> None:
    """The two sides have norms a hundredfold apart; the factors of both are folded into the weights."""
    steps = 400
    data = pairs(steps, out_scale=0.01)
    (dictionary,) = trainSAE(data, [config(steps=steps)], steps, transcoder=True, normalize_activations=True)
    x, y = data[-1].unbind(1)
    explained = 1 - (y - dictionary(x)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert explained > 0.8
    assert 1 - (x - dictionary(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum() < 0.1, "it learned the input instead"


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_the_pair_of_a_transcoder_comes_in_three_forms(form: str) -> None:
    def as_form(pair: Tensor) -> Any:
        x, y = pair.unbind(1)
        return pair if form == "tensor" else (x, y) if form == "tuple" else {"in": x, "out": y}

    (wanted,) = trainSAE(pairs(), [config()], STEPS, transcoder=True)
    (found,) = trainSAE([as_form(pair) for pair in pairs()], [config()], STEPS, transcoder=True)
    assert equal(wanted, found)


def test_a_transcoder_between_spaces_of_two_widths() -> None:
    data = [(x, x[:, :5]) for x in batches(B, D)]
    (dictionary,) = trainSAE(data, [config(output_dim=5)], STEPS, transcoder=True)
    assert dictionary(data[0][0]).shape == (B, 5)
    with pytest.raises(UserError, match="predicts activations of width 8, the data has 5: set output_dim to 5"):
        trainSAE(data, [config()], STEPS, transcoder=True)


def test_a_transcoders_files_say_both_norm_factors_and_load(tmp_path: Path) -> None:
    data = pairs(out_scale=0.01)
    (dictionary,) = trainSAE(
        data, [config()], STEPS, transcoder=True, normalize_activations=True, save_dir=tmp_path, log_steps=10
    )
    loaded, saved = load_dictionary(tmp_path / "trainer_0")
    x = data[0][:, 0]
    assert torch.equal(loaded(x), dictionary(x))
    factors = [saved["trainer"][name] for name in ("norm_factor", "output_norm_factor")]
    first = torch.cat(data[:16])
    assert factors == pytest.approx(first.pow(2).sum(-1).mean(0).sqrt().tolist(), rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["frac_variance_explained"] < 1 for line in lines)


def test_a_buffer_of_inputs_and_outputs_trains_transcoders() -> None:
    chunks = [{"in": pair[:, 0], "out": pair[:, 1]} for pair in pairs(60)]
    buffer = ActivationBuffer(None, TensorStream(chunks), io="in_and_out", n_ctxs=64, ctx_len=8, out_batch_size=B)
    (dictionary,) = trainSAE(buffer, [config()], STEPS, transcoder=True, normalize_activations=True)
    assert dictionary.is_transcoder


# ---------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("shape", [(B, 2, D), (B // 4, 4, 2, D)])
@pytest.mark.parametrize("normalize", [False, True])
def test_trainer_i_learns_head_i(shape: tuple[int, ...], normalize: bool) -> None:
    data = batches(*shape)
    heads = trainSAE(data, [config(), config()], STEPS, activations_split_by_head=True, normalize_activations=normalize)
    for head, found in enumerate(heads):
        alone = [batch[..., head, :].reshape(-1, D) for batch in data]
        (wanted,) = trainSAE(alone, [config()], STEPS, normalize_activations=normalize)
        assert equal(wanted, found)
    assert not equal(*heads)


def test_more_trainers_than_heads_are_refused() -> None:
    with pytest.raises(UserError, match="Trainer 2 is to learn head 2, but the data has 2 heads"):
        trainSAE(batches(B, 2, D), [config()] * 3, STEPS, activations_split_by_head=True)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (batches(B, D, steps=1), {"activations_split_by_head": True}, r"\[rows, heads, width\], got \[64, 8\]"),
        (batches(B, D, steps=1), {"transcoder": True}, r"\[rows, 2, width\] or a pair .*got \[64, 8\]"),
        (batches(B, 3, D, steps=1), {"transcoder": True}, r"got \[64, 3, 8\]"),
        ([(torch.ones(4, D),)], {"transcoder": True}, "got tuple"),
        ([], {"transcoder": True, "activations_split_by_head": True}, "choose one"),
    ],
)
def test_batches_of_another_form_get_one_sentence(data: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainSAE(data, [config()], STEPS, **options)


# ---------------------------------------------------------------------------------------------------- the rest


def test_autocast_dtype_is_the_precision_of_the_encoder() -> None:
    data = batches(B, D)
    exact, coarse = (trainSAE(data, [config()], STEPS, autocast_dtype=t)[0] for t in (torch.float32, torch.bfloat16))
    (by_config,) = trainSAE(data, [config(encoder_dtype="bf16")], STEPS)
    assert equal(exact, trainSAE(data, [config()], STEPS)[0]) and equal(coarse, by_config)
    assert all(parameter.dtype == torch.float32 for parameter in coarse.parameters())
    chosen = trainSAE(data, [config(encoder_dtype="fp32")], STEPS, autocast_dtype=torch.bfloat16)[0]
    assert equal(chosen, exact), "a config's own encoder_dtype goes first"
    with pytest.raises(UserError, match="autocast_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        trainSAE(data, [config()], STEPS, autocast_dtype=torch.float16)


def test_what_a_config_leaves_out_is_filled_in(tmp_path: Path) -> None:
    bare = {"trainer": StandardTrainer, "activation_dim": D, "dict_size": F, "device": "cpu"}
    trainSAE(batches(B, D), [bare], STEPS, save_dir=tmp_path)
    saved = json.loads((tmp_path / "trainer_0" / "config.json").read_text())["trainer"]
    assert (saved["layer"], saved["lm_name"], saved["steps"]) == (None, None, STEPS)


def test_the_arguments_come_in_the_order_of_the_package(tmp_path: Path) -> None:
    trainSAE(
        batches(B, 2, D), [config()] * 2, 4, False, "", "", [2], tmp_path, 2, True, False, {}, True, False, "cpu",
        torch.float32,
    )  # fmt: skip
    assert (tmp_path / "trainer_1" / "checkpoints" / "ae_2.safetensors").is_file()


def test_the_norm_factor_is_over_the_batches_asked_for_and_uses_them_up() -> None:
    data = batches(B, D, steps=10)
    stream = iter(data)
    wanted = torch.cat(data[:6]).pow(2).sum(1).mean().sqrt().item()
    assert get_norm_factor(stream, 6) == pytest.approx(wanted, rel=1e-6)
    assert len(list(stream)) == 4
    for nothing in ([], [torch.zeros(3, D)], [torch.full((3, D), float("nan"))]):
        with pytest.raises(UserError, match="no norm factor"):
            get_norm_factor(nothing, 6)


class Resumable:
    """Batches with a position, and no buffer."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Resumable:
        return self

    def __next__(self) -> Tensor:
        if self.at >= STEPS:
            raise StopIteration
        self.at += 1
        return batches(B, D)[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("stop", [3, 20])
def test_a_run_stopped_among_the_batches_that_gave_the_norm_factor_goes_on_exactly(stop: int, tmp_path: Path) -> None:
    def interrupt(run: TrainingRun, step: int) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    options: dict[str, Any] = {"normalize_activations": True}
    (unbroken,) = trainSAE(Resumable(), [config()], STEPS, **options)
    with pytest.warns(UserWarning, match=f"stopped after {stop} of {STEPS}"):
        trainSAE(Resumable(), [config()], STEPS, save_dir=tmp_path, callbacks=[interrupt], **options)
    (resumed,) = trainSAE(Resumable(), [config()], STEPS, save_dir=tmp_path, resume=True, **options)
    assert equal(unbroken, resumed)
