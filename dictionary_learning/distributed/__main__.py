"""`python -m dictionary_learning.distributed OPTIONS train ...`: torchrun, for `sae-factory train`.

In: torchrun's options, then the command. Out: what the command prints, and its exit code. torchrun itself ends with 1
whatever happened, behind a page of its own traceback in which the one sentence of a rank is hard to find. It is what
runs here; different are the end, the processor's cores, shared among the ranks where nobody has said how, and the time
that ranks have to save their state when asked to stop.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from dictionary_learning.errors import USER_ERROR_EXIT, print_error

STOP_S = 600  # for a state to be written; torchrun's own half minute is too short for a large one
COMMAND = "train"  # others would do the same on every rank


def main(argv: Sequence[str] | None = None) -> int:
    """The command: the code of the ranks; 137 where one was killed (128 + its signal)."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = run.get_args_parser()
    parser.prog = "python -m dictionary_learning.distributed"
    args = parser.parse_args(argv)
    if args.training_script != COMMAND:
        print_error(f"several ranks are for '{COMMAND}', not for '{args.training_script}'.")
        return USER_ERROR_EXIT
    args.module, args.training_script_args = True, [args.training_script, *args.training_script_args]
    args.training_script = "dictionary_learning"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_S))
    try:
        ranks = run.determine_local_world_size(args.nproc_per_node)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
        if "LOGLEVEL" not in os.environ:  # what it would say of ranks that end is said below
            for name in ("multiprocessing.api", "agent.server.api"):
                logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        run.run(args)
    except ChildFailedError as error:
        return _code_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        return 128 + error.sigval
    except ValueError as error:
        print_error(f"torchrun refuses these options: {str(error).rstrip('.')}.")
        return USER_ERROR_EXIT
    return 0


def _code_of(codes: dict[int, int]) -> int:
    """The code of ranks that did not end well (-n: by signal n). Of one that was killed nobody has told yet."""
    told = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes  # torchrun's, to the others
    for rank, code in sorted(told.items()):
        if code < 0:
            why = ": perhaps the machine's memory ran out" if code == -signal.SIGKILL else ""
            print(f"Rank {rank} was ended by {signal.Signals(-code).name}{why}.", file=sys.stderr)
    code = min(told.values())
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
