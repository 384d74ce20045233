"""One process: who trains what, which device a rank takes, and launches that can't be."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_launching import free_port

from dictionary_learning import record
from dictionary_learning.config import DictionarySpec, RunConfig
from dictionary_learning.distributed import Ranks, job, join, rank_exit_code
from dictionary_learning.distributed.ranks import OfAllRanks, rank_device
from dictionary_learning.distributed.sharded import sharded_trainer_class
from dictionary_learning.distributed.spread import SLACK, spread, step_cost
from dictionary_learning.errors import UserError


def slowest(shares: list[list[int]], costs: list[float]) -> float:
    return max(sum(costs[number] for number in share) for share in shares)


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 2.0, 2.7, 8.0]), st.sampled_from("abc")), min_size=1, max_size=24),
    st.integers(1, 6),
)
def test_every_dictionary_has_one_rank_and_the_slowest_is_near_the_best(
    dictionaries: list[tuple[float, str]], world: int
) -> None:
    costs, points = [cost for cost, _ in dictionaries], [point for _, point in dictionaries]
    if len(costs) < world:
        with pytest.raises(UserError, match=f"{world} ranks have only {len(costs)}"):
            spread(costs, points, world)
        return
    shares = spread(costs, points, world)
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    assert len(shares) == world and all(shares)
    assert all(share == sorted(share) for share in shares)
    best = max(max(costs), sum(costs) / world)  # nothing can be faster
    assert slowest(shares, costs) <= SLACK * (best + max(costs)) + 1e-9


def test_the_costliest_are_placed_first() -> None:
    shares = spread([1.0, 1.0, 1.0, 1.0, 4.0], ["a"] * 5, 2)
    assert shares == [[4], [0, 1, 2, 3]]


def test_dictionaries_of_one_hook_point_stay_together() -> None:
    points = ["a", "b", "c", "d"] * 4
    shares = spread([1.0] * 16, points, 4)
    assert [len(share) for share in shares] == [4] * 4
    assert [len({points[number] for number in share}) for share in shares] == [1] * 4


def test_a_step_costs_by_width_activations_and_architecture() -> None:
    def cost(architecture: str, width: int, dim: int) -> float:
        return step_cost(DictionarySpec(architecture, "a", width, {}), dim)

    assert cost("top_k", 2048, 64) == 2 * cost("top_k", 1024, 64) == 4 * cost("top_k", 1024, 32)
    assert cost("matryoshka_batch_top_k", 64, 64) > cost("batch_top_k", 64, 64) > cost("top_k", 64, 64)


def test_alone_nothing_is_sent() -> None:
    ranks = Ranks()
    assert ranks.first
    assert ranks.everyone(3) == [3] and ranks.of_first(4) == 4
    assert ranks.agreed("SIGINT") == "SIGINT" and ranks.agreed("") == "" and ranks.agreed("", "x") == "x"
    assert list(ranks.merged({"trainer_10": 1, "trainer_9": 2})) == ["trainer_10", "trainer_9"]
    x = torch.arange(3.0)
    assert (
        ranks.total(x) is x
        and ranks.stacked(x) is x
        and torch.equal(ranks.stacked_by_first(x), x)
        and ranks.exchanged(x, [3], [3]) is x
    )
    with pytest.raises(UserError, match="^full$"), ranks.together():
        raise UserError("full")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of the first of two ranks, whose other one does not exist."""
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAE_FACTORY_RANK_TIMEOUT", "2")
    return monkeypatch


def test_an_address_in_use_is_named(environment: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        port = listener.getsockname()[1]
        environment.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"localhost:{port} is in use: set MASTER_PORT"):
            join("cpu")


def test_ranks_that_do_not_come_are_waited_for_no_longer_than_asked(environment: pytest.MonkeyPatch) -> None:
    port = free_port()
    environment.setenv("MASTER_PORT", str(port))
    with pytest.raises(UserError, match=f"Not all 2 ranks met at localhost:{port} within 2 s"):
        join("cpu")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [("RANK", "one", "RANK is 'one', not a number"), ("RANK", None, "RANK is not set"), ("WORLD_SIZE", "x", "WORLD_")],
)
def test_an_environment_that_torchrun_did_not_make(
    environment: pytest.MonkeyPatch, name: str, value: str | None, sentence: str
) -> None:
    environment.delenv(name) if value is None else environment.setenv(name, value)
    with pytest.raises(UserError, match=f"{sentence}.*torchrun"):
        join("cpu")


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [rank_device("auto", rank) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert rank_device("cpu", 7) == torch.device("cpu")
    with pytest.raises(UserError, match="more ranks than the 2 GPUs.*--nproc_per_node 2"):
        rank_device("cuda", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # the first rank refuses it as the third does, and says so
    with pytest.raises(UserError, match="more ranks than the 2 GPUs"):
        rank_device("cuda", 0)
    with pytest.raises(UserError, match="every rank on one GPU"):
        rank_device("cuda:1", 0)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="'cuda' is not available"):
        rank_device("cuda", 0)


@pytest.mark.parametrize(("rank", "heard"), [("0", True), ("1", False)])
def test_only_the_first_rank_speaks(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, heard: bool
) -> None:
    handler = logging.StreamHandler()  # made before, as those of packages that were imported
    environment.setattr(logging.getLogger("a package"), "handlers", [handler])

    def refuse() -> int:
        print("a plan")
        logging.getLogger("a package").warning("a warning")
        raise UserError("The corpus is empty.")

    environment.setenv("RANK", rank)
    environment.setenv("LOCAL_RANK", rank)
    assert rank_exit_code(refuse) == 2
    printed = capsys.readouterr()
    assert printed.out == ("a plan\n" if heard else "")
    assert printed.err == ("a warning\nError: The corpus is empty.\n" if heard else "")
    assert handler.stream is sys.stderr


@pytest.mark.parametrize(
    ("met", "local_rank", "error", "heard"),
    [
        (True, "1", UserError("The memory of cuda:1 does not suffice."), True),  # rank 0 only sees that rank 1 is gone
        (True, "1", OfAllRanks("The corpus is empty."), False),
        (False, "0", UserError("This machine has no GPU."), True),  # another machine than that of rank 0
        (False, "1", UserError("This machine has no GPU."), False),
    ],
)
def test_what_the_first_rank_can_not_know_another_rank_says(
    environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    met: bool,
    local_rank: str,
    error: UserError,
    heard: bool,
) -> None:
    def refuse() -> int:
        print("a plan")
        raise error

    environment.setenv("RANK", "1")
    environment.setenv("LOCAL_RANK", local_rank)
    environment.setattr("torch.distributed.is_initialized", lambda: met)
    environment.setattr("torch.distributed.get_backend", lambda: "nccl")
    parted: list[bool] = []
    environment.setattr("torch.distributed.destroy_process_group", lambda: parted.append(True))
    assert rank_exit_code(refuse) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (f"Error: On rank 1: {error}\n" if heard else "")
    assert parted == ([True] if isinstance(error, OfAllRanks) else [])  # alone it might wait for ever


@pytest.mark.parametrize(("end", "code", "parts"), [(None, 0, True), (3, 3, True), (KeyboardInterrupt(), 130, False)])
def test_ranks_part_where_they_end_together(
    environment: pytest.MonkeyPatch, end: int | BaseException | None, code: int, parts: bool
) -> None:
    environment.setattr("torch.distributed.is_initialized", lambda: True)
    environment.setattr("torch.distributed.get_backend", lambda: "nccl")
    parted: list[bool] = []
    environment.setattr("torch.distributed.destroy_process_group", lambda: parted.append(True))

    def command() -> int | None:
        if isinstance(end, BaseException):
            raise end
        return end

    assert rank_exit_code(command) == code
    assert parted == [True] * parts


def test_a_bug_keeps_its_traceback_on_any_rank(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    streams: list[Any] = [sys.stdout, sys.stderr]

    def broken() -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        rank_exit_code(broken)
    assert [sys.stdout, sys.stderr] == streams


def test_the_command_that_goes_on_starts_as_many_ranks(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOCAL_WORLD_SIZE", "2")
    assert job.launcher() == ["torchrun", "--standalone", "--nproc_per_node", "2"]
    environment.setenv("WORLD_SIZE", "4")
    assert job.launcher() == ["torchrun", "..."]
    environment.setattr(
        sys, "argv", ["/here/dictionary_learning/__main__.py", "train", "--save_dir", "a b", "--override"]
    )
    assert record.resume_command() == "torchrun ... -m dictionary_learning train --save_dir 'a b' --resume"
    environment.delenv("WORLD_SIZE")
    assert job.launcher() == ["python"]
    assert record.resume_command().endswith(" -m dictionary_learning train --save_dir 'a b' --resume")


def test_a_rank_that_torchrun_started_again_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not job.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not job.restarted(tmp_path)  # it died before there was anything to go on with
    (tmp_path / "run.json").write_text("{}")
    assert job.restarted(tmp_path)


def sweep(architectures: Sequence[str], hook_points: Sequence[str]) -> RunConfig:
    return RunConfig(
        model_name="embedded",
        corpus="embedded",
        dictionaries=[DictionarySpec(a, point, 64, {"k": 4}) for a in architectures for point in hook_points],
        **dict.fromkeys(("num_tokens", "ctx_len", "harvest_contexts", "buffer_contexts", "batch_size"), 64),
        dtype="float32",
        eval_tokens=64,
        eval_contexts=4,
        max_activation_norm_multiple=None,
    )


class TwoWidths:
    """A model whose second hook point is four times as wide."""

    def resolve(self, names: Sequence[str]) -> list[Any]:
        return [SimpleNamespace(name=name, width=16 * 4**index) for index, name in enumerate(names)]


def test_a_job_is_spread_by_what_its_dictionaries_cost() -> None:
    config = sweep(["top_k", "top_k", "top_k", "top_k"], ["a"])
    config = replace(config, dictionaries=[*config.dictionaries, DictionarySpec("top_k", "b", 64, {"k": 4})])
    shares = job.assignment(config, TwoWidths(), Ranks(0, 2))
    assert shares == [[0, 1, 2, 3], [4]]
    assert job.wanted(config, shares) == [["a"], ["b"]]
    assert job.assignment(config, TwoWidths(), Ranks()) == [[0, 1, 2, 3, 4]]
    assert job.assignment(config, TwoWidths(), Ranks(0, 2), shard=True) == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    ("config", "ranks", "shard", "sentence"),
    [
        (sweep(["top_k"], ["a"]), Ranks(), True, "there is one: start several"),
        (sweep(["top_k", "standard"], ["a"]), Ranks(0, 2), True, "'standard' can't be split"),
        (sweep(["top_k"], ["a"]), Ranks(0, 2), False, "2 ranks have only 1 dictionary to train: start at most 1"),
    ],
)
def test_jobs_that_can_not_be_spread(config: RunConfig, ranks: Ranks, shard: bool, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        job.assignment(config, TwoWidths(), ranks, shard)


def test_only_the_top_k_family_can_be_split() -> None:
    assert sharded_trainer_class("batch_top_k").architecture == "batch_top_k"
    with pytest.raises(UserError, match="'standard' can't be split over ranks: that is for top_k, batch_top_k"):
        sharded_trainer_class("standard")


@pytest.mark.parametrize(("world", "here", "told"), [("8", "8", False), ("16", "8", True)])
def test_a_report_is_made_where_no_other_machine_waits_for_it(
    world: str, here: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dictionary_learning import run_report
    from dictionary_learning.job import Job

    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    made: list[Path] = []
    monkeypatch.setattr(run_report, "report_run", lambda config, folder, lm, device: made.append(folder))
    job = object.__new__(Job)
    job.config, job.lm, job.save_dir = None, None, Path("run")  # type: ignore[assignment]
    job.ranks = SimpleNamespace(first=True, device="cpu")  # type: ignore[assignment]
    run: Any = SimpleNamespace(stopped="")
    assert job.publish(run, True, None, False) == 0
    assert made == ([] if told else [Path("run")])
    assert ("sae-factory report run" in capsys.readouterr().out) == told
