"""The ranks of a run: how a process finds the others, and what they say to each other.

In: what `torchrun` puts into the environment. Out: a `Ranks`, with which the rest of the program need not know whether
there is one process or many: with one, everything that is said to all is said to itself, and nothing is sent.

What ranks agree on (settings, stop requests, metrics, states) goes over Gloo on the CPU, which waits for no device;
activations go over NCCL where there are GPUs. Objects are pickled on the way, as torch.distributed does it: ranks trust
each other as one process trusts itself. Nothing from a file is unpickled.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dictionary_learning.devices import AUTO, resolve_device
from dictionary_learning.errors import UserError, exit_code

V = TypeVar("V")
TIMEOUT = "SAE_FACTORY_RANK_TIMEOUT"  # seconds that a rank waits for another one
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun has started the ranks again
TIMEOUT_S = 1800.0  # the first rank may be writing a large state while the others wait
_lost = threading.Event()  # set once a message showed that another rank is gone


class OfAllRanks(UserError):
    """What every rank raises at once, so that they can still do something together, such as saving their state."""


@dataclass
class Ranks:
    """This process among `world` of them.

    Every method is to be called by all ranks, in the same order.

    Raises:
        UserError: (all methods) another rank is gone, or did not answer in time.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this one reads the text, keeps the log and speaks for all."""
        return self.rank == 0

    def everyone(self, own: V) -> list[V]:
        """What every rank has, in the order of the ranks."""
        if self.world == 1:
            return [own]
        given: list[Any] = [None] * self.world
        with said_of_lost():
            dist.all_gather_object(given, own)
        return given

    def of_first(self, own: V) -> V:
        """What the first rank has."""
        if self.world == 1:
            return own
        given = [own]
        with said_of_lost():
            dist.broadcast_object_list(given, src=0)
        return given[0]

    def agreed(self, reason: str, idle: str = "") -> str:
        """Why all are to stop: the first `reason` that any rank has, else the `idle` that all have, else "". Costs a
        message a step while they go on."""
        if self.world == 1:
            return reason or idle
        found = torch.tensor([bool(reason), not idle], dtype=torch.uint8)
        with said_of_lost():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        anyone, busy = found.tolist()
        return next(filter(None, self.everyone(reason))) if anyone else ("" if busy else idle)

    def merged(self, own: Mapping[str, V]) -> dict[str, V]:
        """Every rank's entries in one, by the numbers in their names."""
        if self.world == 1:
            return dict(own)
        entries = {name: value for part in self.everyone(dict(own)) for name, value in part.items()}
        return dict(sorted(entries.items(), key=lambda entry: [int(n) for n in re.findall(r"\d+", entry[0])]))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one rank can't do, none does: a `UserError` of any of them inside is raised by all.

        Inside, ranks may not wait for each other.
        """
        if self.world == 1:
            yield
            return
        problem = ""
        try:
            yield
        except UserError as error:
            problem = str(error)
        for rank, said in enumerate(self.everyone(problem)):
            if said:
                raise OfAllRanks(f"On rank {rank}: {said}" if rank else said)

    def check_same(self, what: Mapping[str, Any]) -> None:
        """See that all ranks were given the same.

        Raises:
            UserError: names what differs, and the rank.
        """
        everyone = self.everyone(dict(what))
        for rank, other in enumerate(everyone):
            if differing := [name for name in everyone[0] if other.get(name) != everyone[0][name]]:
                raise OfAllRanks(
                    f"Rank {rank} differs from rank 0 in {', '.join(differing)}: start every rank with the same "
                    "command, on the same files and versions."
                )

    @staticmethod
    def part() -> None:
        """Say nothing any more: what comes behind is done by each alone. NCCL wants all ranks to part at about the same
        time, which is when they have just said the last thing, and not when the slowest has nothing left to do."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # ------------------------------------------------------------------------------------------- tensors

    def total(self, x: Tensor) -> Tensor:
        """The sum of every rank's tensor, in place."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def smallest(self, x: Tensor) -> Tensor:
        """The elementwise minimum of every rank's tensor, in place."""
        return self._reduced(x, dist.ReduceOp.MIN)

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        if self.world > 1:
            with said_of_lost():
                dist.all_reduce(x, op=how)
        return x

    def stacked(self, x: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor, all of one shape, one behind the other along `dim`."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        with said_of_lost():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def stacked_by_first(self, x: Tensor, dim: int = 0) -> Tensor:
        """As `stacked`, in the memory of the first rank's machine; this rank's own part on the others."""
        own = x.detach().cpu().contiguous()
        if self.world == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.first else None
        with said_of_lost():
            dist.gather(own, parts, dst=0)
        return own if parts is None else torch.cat(parts, dim)

    def exchanged(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """The parts of a flat tensor that every rank has for this one, `sent[r]` of its elements being for rank r."""
        if self.world == 1:
            return x
        size = x.element_size()  # as bytes: Gloo does not know every dtype
        out = torch.empty(sum(received) * size, dtype=torch.uint8, device=x.device)
        with said_of_lost():
            dist.all_to_all_single(out, x.view(torch.uint8), [n * size for n in received], [n * size for n in sent])
        return out.view(x.dtype)


@contextlib.contextmanager
def said_of_lost() -> Iterator[None]:
    """One sentence in place of what a transport says when a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        _lost.set()
        raise UserError(
            f"Another rank is gone or silent ({_first_line(error)}): look at its own message, then go on from the last "
            "saved state with --resume."
        ) from error


def join(device: str = AUTO) -> Ranks:
    """Find the other ranks, where `torchrun` started this process; one rank alone otherwise.

    Args:
        device: as the command line has it. With several ranks each takes the GPU of its number on its machine.

    Raises:
        UserError: fewer GPUs than ranks on this machine, an address in use, ranks that did not come.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        return Ranks(device=resolve_device(device))
    rank, here = _number("RANK"), rank_device(device, _number("LOCAL_RANK", 0))
    backend = "gloo"
    if here.type == "cuda":
        if not dist.is_nccl_available():
            raise UserError("Several GPUs need NCCL, which this build of torch lacks: install torch's CUDA build.")
        torch.cuda.set_device(here)
        backend = "cpu:gloo,cuda:nccl"
    timeout = _number(TIMEOUT, int(TIMEOUT_S))
    where = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
    seconds = datetime.timedelta(seconds=timeout)
    try:
        store = next(iter(rendezvous("env://", rank, world, timeout=seconds)))[0]
        # torchrun's store outlives the ranks that it starts again, and would tell them the addresses of the dead ones.
        store = dist.PrefixStore(f"attempt {os.environ.get(RESTARTS, '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=seconds)
    except (RuntimeError, ValueError) as error:
        why = str(error)
        if re.search("EADDRINUSE|address already in use", why, re.I):
            raise UserError(f"The address {where} is in use: set MASTER_PORT to a free port, on every rank.") from None
        if re.search("timed? ?out|not all clients|failed to connect|could not connect", why, re.I):
            raise UserError(
                f"Not all {world} ranks met at {where} within {timeout} s: start them on every machine with the same "
                f"address, which all must reach ({TIMEOUT} sets how long to wait)."
            ) from None
        raise UserError(f"The {world} ranks can't meet at {where}: {_first_line(error)}.") from error
    return Ranks(rank, world, here)


def rank_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank that is number `local_rank` on its machine. Raises UserError where there is none."""
    found = resolve_device(device)
    if found.type != "cuda":
        return found
    if found.index is not None:
        raise UserError(f"--device {device} would put every rank on one GPU: give --device cuda, or one rank.")
    count = torch.cuda.device_count()
    if max(local_rank + 1, _number("LOCAL_WORLD_SIZE", 1)) > count:  # for all of them alike
        raise UserError(
            f"There are more ranks than the {count} GPUs on this machine: give torchrun --nproc_per_node {count}, or "
            "--device cpu."
        )
    return torch.device("cuda", local_rank)


def rank_exit_code(command: Callable[[], int | None], interrupted: str = "Interrupted.") -> int:
    """`errors.exit_code` of a command that may be one of several ranks, of which only the first speaks, but for an
    error that it can't know of. (What is no `UserError` is a bug and keeps its traceback, on any rank.) Parts from the
    others, but for an end that they do not share: with NCCL it might wait for one that is gone.
    """
    alone = True

    def speaking_for_itself() -> int | None:
        nonlocal alone
        try:
            code = command()
            alone = False
            return code
        except UserError as error:
            alone = not isinstance(error, OfAllRanks)
            if not silent() or not _only_here(error):
                raise
            stack.enter_context(contextlib.redirect_stderr(aloud))
            raise UserError(f"On rank {os.environ['RANK']}: {error}") from error

    aloud = sys.stderr
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        stack.enter_context(_time_to_say_so())
        if silent():
            stack.enter_context(_all_into(nowhere))
        code = exit_code(speaking_for_itself, interrupted)
    if not alone or (dist.is_initialized() and dist.get_backend() == "gloo"):
        Ranks.part()
    return code


@contextlib.contextmanager
def _all_into(nowhere: TextIO) -> Iterator[None]:
    """Inside, nothing is heard of Python's output, that of loggers included, which keep the stream they began with."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    handlers = [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    ours = (sys.stdout, sys.stderr)  # a handler without a stream of its own asks sys each time
    heard = [(handler, handler.stream) for handler in handlers if vars(handler).get("stream") in ours]
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for handler, _ in heard:
            handler.setStream(nowhere)
        try:
            yield
        finally:
            for handler, stream in heard:
                handler.setStream(stream)


@contextlib.contextmanager
def _time_to_say_so() -> Iterator[None]:
    """Inside, SIGTERM ends the process as ever, but not once another rank is lost: torchrun, which sees that too, sends
    it before this one has said what happened, and waits half a minute."""
    if threading.current_thread() is not threading.main_thread() or _world() == 1:
        yield
        return

    def handle(signum: int, frame: Any) -> None:
        if not _lost.is_set():
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _world() -> int:
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() else 1


def silent() -> bool:
    """Whether another rank speaks for this process, which is known before the ranks have met."""
    return os.environ.get("RANK", "0") != "0" and _world() > 1


def _only_here(error: UserError) -> bool:
    """Whether the first rank can't know of an error. Before the ranks have met it is one of a whole machine, of which
    the first rank speaks."""
    if isinstance(error, OfAllRanks) or _lost.is_set():
        return False
    return dist.is_initialized() or os.environ.get("LOCAL_RANK") == "0"


def _number(name: str, default: int | None = None) -> int:
    given = os.environ.get(name)
    if given is None and default is not None:
        return default
    if given is None or not given.isdecimal():
        got = "is not set" if given is None else f"is '{given}', not a number"
        raise UserError(f"{name} {got}: start several ranks with torchrun, which sets it.")
    return int(given)


def _first_line(error: BaseException) -> str:
    """What an error says, without where in its source and what usually is the reason."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.split(r"\. ", re.sub(r"^\[[^\]]*\] *", "", text))[0].rstrip(".")[:200]
