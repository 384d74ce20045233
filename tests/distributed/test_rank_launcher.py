"""The launcher: torchrun without its traceback, with the exit code of the ranks. No rank is started."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dictionary_learning.distributed.__main__ import main

LINE = ["--standalone", "--nproc_per_node", "2", "train", "--save_dir", "runs/a b", "--resume"]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torchrun end in some way; what it was given is in the list that comes back."""
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "LOGLEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    given: list[Any] = []

    def end(error: Exception | None = None) -> list[Any]:
        def fake(args: Any) -> None:
            given.append(args)
            if error is not None:
                raise error

        monkeypatch.setattr(run, "run", fake)
        return given

    return end


def failed(codes: dict[int, int]) -> ChildFailedError:
    return ChildFailedError(
        "dictionary_learning", {rank: ProcessFailure(rank, 100 + rank, code, "") for rank, code in codes.items()}
    )


def test_the_command_is_handed_to_torchrun(ends: Any) -> None:
    (given,) = [ends()]
    assert main(LINE) == 0
    (args,) = given
    assert (args.module, args.training_script) == (True, "dictionary_learning")
    assert args.training_script_args == ["train", "--save_dir", "runs/a b", "--resume"]
    assert args.standalone and args.nproc_per_node == "2"
    assert int(os.environ["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (failed({0: 2, 1: 2}), 2, ""),  # the sentence was said by a rank
        (failed({0: 3, 1: 3}), 3, ""),
        (failed({0: 2, 1: -9}), 137, "Rank 1 was ended by SIGKILL: perhaps the machine's memory ran out.\n"),
        (failed({0: -11, 1: -15}), 139, "Rank 0 was ended by SIGSEGV.\n"),
        (failed({0: 2, 1: -15}), 2, ""),  # torchrun ended the other one
        (failed({1: -15}), 143, "Rank 1 was ended by SIGTERM.\n"),
        (SignalException("asked to stop", signal.SIGINT), 130, ""),
        (
            ValueError("Unsupported nproc_per_node value: many."),
            2,
            "Error: torchrun refuses these options: Unsupported",
        ),
    ],
)
def test_the_end_is_that_of_the_ranks(
    ends: Any, capsys: pytest.CaptureFixture[str], error: Exception, code: int, said: str
) -> None:
    ends(error)
    assert main(LINE) == code
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(said)
    assert printed.err.count("\n") == bool(said)


def test_what_every_rank_would_do_alike_is_refused(ends: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ends()
    assert main(["--nproc_per_node", "2", "analyze", "runs/a"]) == 2
    assert capsys.readouterr().err == "Error: several ranks are for 'train', not for 'analyze'.\n"
    assert given == []
