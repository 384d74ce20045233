"""Pooled metrics against brute force on the whole set, and the summary of a sweep."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK, Dictionary, IdentityDict, JumpReluAutoEncoder
from dictionary_learning.errors import UserError
from dictionary_learning.evaluation import (
    PooledMetrics,
    evaluate,
    sorted_along_front,
    write_summary,
)

D, F = 16, 48


def random_dictionaries(seed: int = 0) -> list[Dictionary]:
    """One of each kind, with biases, so that codes are sparse and reconstructions bad."""
    torch.manual_seed(seed)
    dictionaries: list[Dictionary] = [AutoEncoder(D, F), AutoEncoderTopK(D, F, 5), JumpReluAutoEncoder(D, F)]
    with torch.no_grad():
        for dictionary in dictionaries:
            dictionary.decoder_bias.normal_(0, 0.3)
            for name, bias in dictionary.named_parameters():
                if name in ("encoder.bias", "b_enc"):
                    bias.normal_(-0.5, 0.5)
    return dictionaries


def activations(rows: int = 90) -> Tensor:
    """Correlated, off centre, with norms from 1 to 1,000."""
    g = torch.Generator().manual_seed(3)
    scale = torch.logspace(0, 2.5, rows)[:, None]
    x = (torch.randn(rows, 6, generator=g) @ torch.randn(6, D, generator=g) + 2.0) * scale
    return x[torch.randperm(rows, generator=g)]


def brute_force(dictionary: Dictionary, x: Tensor) -> dict[str, float]:
    """The formulas of EvalResult's docstring on the whole set, in float64 and one row at a time."""
    x = x.double()
    dictionary = copy.deepcopy(dictionary).double()
    f, x_hat, mean = dictionary.encode(x).detach(), dictionary(x).detach(), x.mean(0)
    rows = list(zip(x, x_hat, f, strict=True))
    n = len(rows)
    return {
        "l0": sum(int((codes != 0).sum()) for _, _, codes in rows) / n,
        "frac_variance_explained": 1
        - (sum(((a - b) @ (a - b)).item() for a, b, _ in rows) / sum(((a - mean) @ (a - mean)).item() for a in x)),
        "mse": sum(((a - b) @ (a - b)).item() for a, b, _ in rows) / (n * x.shape[1]),
        "l2_loss": sum((a - b).norm().item() for a, b, _ in rows) / n,
        "l1_loss": sum(codes.abs().sum().item() for _, _, codes in rows) / n,
        "cossim": sum(((a @ b) / (a.norm() * b.norm())).item() for a, b, _ in rows) / n,
        "l2_ratio": sum((b.norm() / a.norm()).item() for a, b, _ in rows) / n,
        "relative_reconstruction_bias": sum((b @ b).item() for _, b, _ in rows)
        / sum((a @ b).item() for a, b, _ in rows),
        "frac_alive": sum(bool((f[:, i] != 0).any()) for i in range(f.shape[1])) / f.shape[1],
        "tokens": n,
    }


# ---------------------------------------------------------------------------------------------- pooled metrics


@pytest.mark.parametrize("kind", range(3))
def test_pooled_metrics_equal_brute_force_on_the_whole_set(kind: int) -> None:
    dictionary = random_dictionaries()[kind]
    measured = evaluate(dictionary.double(), activations().double().split(17), n_batches=None)
    assert measured == pytest.approx(brute_force(dictionary, activations()), rel=1e-10)
    assert 0 < measured["frac_alive"] <= 1 and 0 < measured["l0"] < F


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_metrics_do_not_depend_on_how_the_set_is_cut_into_batches(cuts: list[int]) -> None:
    x, dictionary = activations().double(), random_dictionaries()[0].double()
    ends = [0, *itertools.accumulate(cuts), len(x)]
    batches = [x[start:end] for start, end in itertools.pairwise(ends)]  # some of no rows
    assert evaluate(dictionary, batches, n_batches=None) == pytest.approx(evaluate(dictionary, [x]), rel=1e-12)


def test_a_known_dictionary_gives_the_numbers_of_the_formulas() -> None:
    """x_hat = x / 2 through an identity dictionary whose last two latents never fire."""
    dictionary = AutoEncoder(4, 4)
    with torch.no_grad():
        dictionary.encoder.weight.copy_(torch.eye(4))
        dictionary.decoder.weight.copy_(torch.eye(4) / 2)
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    result = evaluate(dictionary, [x[:1], x[1:]], n_batches=None)
    assert result == pytest.approx(
        {
            "l0": 4 / 3,
            "frac_variance_explained": 1 - (30 / 4) / (30 - (4**2 + 6**2) / 3),
            "mse": (30 / 4) / 12,
            "l2_loss": (5 + 1 + 2) / 2 / 3,
            "l1_loss": (7 + 1 + 2) / 3,
            "cossim": 1.0,
            "l2_ratio": 0.5,
            "relative_reconstruction_bias": (30 / 4) / (30 / 2),  # shrunk by half: 1 would be unbiased
            "frac_alive": 0.5,
            "tokens": 3,
        }
    )


@pytest.mark.parametrize("width", [D, None])
def test_an_identity_is_perfect_and_update_returns_the_reconstruction(width: int | None) -> None:
    x = activations()
    pooled = PooledMetrics(IdentityDict(width))
    assert torch.equal(pooled.update(x), x)
    result = pooled.result()
    assert (result.frac_variance_explained, result.mse) == (1.0, 0.0)
    assert [result.cossim, result.l2_ratio, result.relative_reconstruction_bias] == pytest.approx([1, 1, 1])


def test_rows_of_zeros_do_not_blow_up_the_ratios() -> None:
    dictionary, x = random_dictionaries()[0], activations()
    with_zeros = evaluate(dictionary, [torch.cat([x, torch.zeros(3, D)])])
    alone = evaluate(dictionary, [x])
    assert with_zeros["tokens"] == alone["tokens"] + 3
    assert [with_zeros[name] for name in ("cossim", "l2_ratio")] == pytest.approx(
        [alone[name] for name in ("cossim", "l2_ratio")], rel=1e-5
    )


def test_bfloat16_activations_are_measured_in_the_precision_of_the_dictionary() -> None:
    x = activations().bfloat16()
    assert evaluate(random_dictionaries()[0], [x]) == evaluate(random_dictionaries()[0], [x.float()])


def test_no_activations_are_an_error_in_one_sentence() -> None:
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(random_dictionaries()[0], [])
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(random_dictionaries()[0], [torch.empty(0, D)])


def test_n_batches_limits_what_is_read() -> None:
    batches = iter(activations().split(10))
    assert evaluate(random_dictionaries()[0], batches, n_batches=3)["tokens"] == 30
    assert len(list(batches)) == 6


@pytest.mark.parametrize("rows", [torch.ones(5, D), torch.zeros(4, D), torch.linspace(0.1, 900, D).repeat(3, 1)])
def test_activations_that_do_not_vary_have_no_variance_to_explain(rows: Tensor) -> None:
    measured = evaluate(random_dictionaries()[0], [rows])
    assert math.isnan(measured["frac_variance_explained"])
    assert math.isfinite(measured["mse"]) and "loss_original" not in measured


def test_results_are_strict_json_whatever_they_hold() -> None:
    pooled = PooledMetrics(random_dictionaries()[0])
    pooled.update(torch.full((3, D), float("nan")))
    values = json.loads(json.dumps(pooled.result(loss_original=math.inf, kl=0.25).to_dict(), allow_nan=False))
    assert values["tokens"] == 3 and values["kl"] == 0.25
    assert {name for name, value in values.items() if value is None} >= {
        *("frac_variance_explained", "mse", "cossim", "l2_ratio", "loss_original", "loss_zero"),
    }


# ---------------------------------------------------------------------------------------------- the summary


def row(
    name: str, l0: float, recovered: float | None, hook_point: str = "a", fve: float | None = 0.5
) -> dict[str, Any]:
    qualities = {"frac_recovered": recovered, "frac_variance_explained": fve}
    return {"trainer": name, "hook_point": hook_point, "l0": l0, **qualities}


def test_the_front_holds_the_best_trade_offs_of_each_hook_point() -> None:
    rows = [
        row("dense", 60, 0.99),
        row("worse than sparser", 40, 0.80),
        row("sparse", 20, 0.90),
        row("other place", 50, 0.10, "b"),
        row("same l0, worse", 32, 0.91),
        row("same l0, better", 32, 0.95),
    ]
    given_order = [dict(r) for r in rows]
    ordered = sorted_along_front(rows)
    assert [(r["trainer"], r["front"]) for r in ordered] == [
        ("sparse", True),
        ("same l0, better", True),
        ("same l0, worse", False),
        ("worse than sparser", False),
        ("dense", True),
        ("other place", True),
    ]
    assert rows == given_order, "the rows passed in were changed"


def test_without_a_loss_the_front_goes_by_variance_explained_and_what_is_not_finite_is_never_on_it() -> None:
    rows = [
        row("diverged", 1, None, fve=None),
        row("poor", 30, None, fve=0.2),
        row("good", 20, None, fve=0.8),
    ]
    assert [(r["trainer"], r["front"]) for r in sorted_along_front(rows)] == [
        ("diverged", False),
        ("good", True),
        ("poor", False),
    ]
    assert sorted_along_front([]) == []


def test_the_summary_is_a_plain_csv_file_that_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    path.write_text("old")
    rows = sorted_along_front([row("a, or 'b'", 32.0, 0.5), row("c", 1.0, None)])
    write_summary(path, rows)
    assert b"\r" not in path.read_bytes()
    with path.open(newline="") as handle:
        read = list(csv.DictReader(handle))
    assert [r["trainer"] for r in read] == ["c", "a, or 'b'"]
    assert read[0]["frac_recovered"] == "" and float(read[1]["l0"]) == 32.0
    assert list(tmp_path.iterdir()) == [path]
