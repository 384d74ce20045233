"""What a rank does in `test_stopped_waiting.py`: `python stopped_rank.py STEP ARGUMENTS`, those of `sae-factory train`.

Its corpus is a Hub's. Behind that STEP the first rank is sent a SIGTERM while it waits for a text that never comes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)

from data_prep import sources  # noqa: E402
from dictionary_learning import demo, hub_corpus  # noqa: E402
from dictionary_learning.training_run import TrainingRun  # noqa: E402

TEXTS = [{"text": f"Patient {n} has had a fever for {n % 7} days, {'pain, ' * (n % 5)}and rest."} for n in range(200)]


def rows(path: str, split: str, first_row: int, **options: Any) -> Iterator[Any]:
    """The dataset, as `data_prep.sources.open_hub_split` gives it."""
    yield from TEXTS[first_row:]


def stop_behind(step: int) -> None:
    steps, true_step = [0], TrainingRun._one_step

    def one_step(run: TrainingRun) -> None:
        steps[0] = run.step
        true_step(run)

    def rows_that_stop(path: str, split: str, first_row: int, **options: Any) -> Iterator[Any]:
        for row in rows(path, split, first_row):
            if steps[0] >= step:
                print(f"asked to end behind step {steps[0]}", flush=True)
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("it went on waiting")
            yield row

    TrainingRun._one_step = one_step  # type: ignore[method-assign]
    sources.open_hub_split = rows_that_stop  # type: ignore[assignment]
    hub_corpus.dataset_commits = lambda paths: {}


if __name__ == "__main__":
    stop_behind(int(sys.argv[1]))
    sys.exit(demo.main(sys.argv[2:]))
