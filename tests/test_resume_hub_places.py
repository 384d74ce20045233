"""A Hub dataset is read on from a place near where it was put down, and gives the same texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import sources
from dictionary_learning.corpus import TextStream, open_corpus

ROWS, SHARDS = 400, 4


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shards that a stream asks for are local; each item is (first row, place) with which reading began."""
    for shard in range(SHARDS):
        rows = [{"text": f"text {i}"} for i in range(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{shard}.parquet", row_group_size=20)
    files = [str(tmp_path / f"{shard}.parquet") for shard in range(SHARDS)]
    load = datasets.load_dataset
    local: dict[str, Any] = {"data_files": files, "split": "train", "streaming": True, "cache_dir": str(tmp_path / "c")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load("parquet", **local))
    monkeypatch.setattr(sources, "PLACE_ROWS", 30)
    begun: list[Any] = []
    true_open = sources.open_hub_split

    def noted(path: str, split: str, first_row: int, place: Any = None) -> Any:
        begun.append((first_row, None if place is None else place.row))
        return true_open(path, split, first_row, place)

    monkeypatch.setattr(sources, "open_hub_split", noted)
    return begun


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("stop", [5, 130, 255, 399])
def test_a_hub_stream_put_down_anywhere_goes_on_from_a_place(seed: int | None, stop: int, opened: list[Any]) -> None:
    def stream() -> TextStream:
        return TextStream(open_corpus("hf://user/texts"), seed=seed, block=50)

    whole = [text.text for text in stream()]
    assert len(whole) == ROWS
    broken = stream()
    begun = [next(broken).text for _ in range(stop)]
    state = broken.state_dict()
    resumed = stream()
    resumed.load_state_dict(state)
    opened.clear()
    assert begun + [text.text for text in resumed] == whole
    wanted = stop if seed is None else stop // 50 * 50
    assert opened[0] == (wanted, wanted // 30 * 30 or None)
