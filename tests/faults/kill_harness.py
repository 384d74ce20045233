"""Kill an embedded run with SIGKILL at random moments, resume it each time, and compare what it ends with.

    python tests/faults/kill_harness.py --kills 25

An unbroken run comes first. Then the same run is killed again and again: the moments are drawn with a seed and fall on
the start, the training, the writing of states and the evaluation. Every resume reads ahead with another number of
batches. Where a run ends before all kills are done, it is compared and another one begins. Every file that does not
tell the time (weights, metrics, evaluation, summary) must end with the bytes of the unbroken run.

The jobs are forked from this process, which has imported everything, so that a cycle takes a second and not ten; each
is a process of its own, with its own model, buffer and files. Exit code: 0 if all is bit for bit the same, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

CONFIG = {
    "model_name": "embedded",
    "corpus": "embedded",
    "ctx_len": 32,
    "harvest_contexts": 16,
    "buffer_contexts": 64,
    "batch_size": 256,
    "dtype": "float32",
    "eval_tokens": 100,
    "eval_contexts": 16,
    "dictionaries": [
        {"architecture": "top_k", "hook_point": "resid_post_layer_1", "width": 64, "sparsity": {"k": 8}},
        {"architecture": "jump_relu", "hook_point": "resid_post_layer_1", "width": 64, "sparsity": {"target_l0": 8}},
    ],
}
STATE_EVERY = 7  # steps


def begin(folder: Path, config: Path, resume: bool, read_ahead: int) -> int:
    """Start the run, or go on with it, in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with open(folder.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        import torch

        from dictionary_learning import demo

        torch.set_num_threads(1)  # once here, or threads of the forked process make PyTorch's pool at the same time
        arguments = ["--save_dir", str(folder), "--config", str(config), "--state_every", str(STATE_EVERY)]
        arguments += ["--device", "cpu", "--log_steps", "1", "--read_ahead", str(read_ahead), "--no-report"]
        code = demo.main([*arguments, *(["--resume"] if resume else [])])
    finally:
        os._exit(code)  # nothing of the process it was forked from is to be cleaned up here
    return 0


def ended(pid: int, until: float) -> int | None:
    """The exit code of a job, or None when it still runs at `until` (of time.monotonic)."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a finished run whose bytes must be the same."""
    names = ("ae.safetensors", "eval_results.json", "config.json", "metrics.jsonl", "summary.csv")
    files = sorted(path for path in folder.rglob("*") if path.name in names)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_done(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def measure(folder: Path, config: Path) -> tuple[float, float]:
    """Run without a break: (seconds to the first step, seconds in all)."""
    began, first = time.monotonic(), 0.0
    pid = begin(folder, config, resume=False, read_ahead=0)
    while (code := ended(pid, 0.0)) is None:
        time.sleep(0.005)
        if not first and steps_done(folder):
            first = time.monotonic() - began
    if code:
        raise SystemExit(f"The unbroken run failed with {code}:\n{folder.with_suffix('.log').read_text()}")
    return first, time.monotonic() - began


def warm_up() -> None:
    """Import and read once, for all the forks, what a job needs."""
    import torch

    from data_prep.embedded import MODEL_DIR
    from dictionary_learning import console, demo, evaluation, hub, planning, training  # noqa: F401
    from dictionary_learning.activations.fitting import FittingLM
    from dictionary_learning.corpus import open_corpus

    torch.set_num_threads(1)
    lm = FittingLM.load(str(MODEL_DIR), device="cpu")
    lm.capture(torch.zeros(1, 4, dtype=torch.long), "resid_post_layer_1")
    next(open_corpus("embedded").read(0))
    lm.tokenizer("warm")


def harness(kills: int, seed: int, steps: int, work: Path) -> bool:
    """Whether every broken run ended as the unbroken one."""
    warm_up()
    draw, config = random.Random(seed), work / "config.json"
    config.write_text(json.dumps({**CONFIG, "num_tokens": steps * CONFIG["batch_size"]}))  # type: ignore[operator]
    startup, whole = measure(work / "unbroken", config)
    expected = results(work / "unbroken")
    print(f"Unbroken: {steps} steps, {whole:.1f} s, {startup:.1f} s of them to the first step; {len(expected)} files.")
    killed, runs, same = 0, 0, True
    while killed < kills or not runs:
        folder, cycles = work / f"broken_{runs}", 0
        while True:
            resume = (folder / "run.json").exists()
            # Long enough to get past the start more often than not, short enough for many kills a run.
            delay = draw.uniform(0.0, startup + 2.5 * max(whole - startup, 0.5) / max(kills, 2))
            pid = begin(folder, config, resume, read_ahead=cycles % 4)
            code = ended(pid, time.monotonic() + delay if killed < kills else float("inf"))
            if code is None:
                os.kill(pid, signal.SIGKILL)
                code = ended(pid, float("inf"))
                if code == -signal.SIGKILL:
                    killed, cycles = killed + 1, cycles + 1
                    print(f"  kill {killed}: after {delay:.2f} s, at step {steps_done(folder)}", flush=True)
                    continue
            break
        if code:
            print(
                f"The run that was killed {cycles} times ended with {code}:\n{folder.with_suffix('.log').read_text()}"
            )
            return False
        found, runs = results(folder), runs + 1
        differing = [name for name in expected if found.get(name) != expected[name]]
        same &= not differing and found.keys() == expected.keys()
        print(
            f"Run {runs}, killed {cycles} times: {'differs in ' + ', '.join(differing) if differing else 'the same'}."
        )
    print(f"{killed} kills, {runs} run(s): {'all bit for bit the same' if same else 'NOT the same'}.")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of the run that is killed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as work:
        return 0 if harness(arguments.kills, arguments.seed, arguments.steps, Path(work)) else 1


if __name__ == "__main__":
    sys.exit(main())
