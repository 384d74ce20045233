"""The benchmark of several ranks: the cost model, and what is said of measurements. No ranks are started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import ranks

COSTS = ranks.Costs(harvest=1000.0, dictionary=1e-3, row_bytes=3072.0, bandwidth=1e6, message=1e-2, reading=1e9)


def test_on_one_rank_nothing_is_sent() -> None:
    terms = ranks.seconds_a_row(COSTS, 1, 4, 100, overlapped=False)
    assert terms["network"] == terms["messages"] == 0
    assert terms["total"] == pytest.approx(1e-3 + 4e-3, rel=1e-3)


def test_what_ranks_share_is_divided_and_what_they_send_added() -> None:
    terms = ranks.seconds_a_row(COSTS, 4, 6, 100, overlapped=False)
    assert terms["harvest"] == pytest.approx(1e-3 / 4)
    assert terms["training"] == pytest.approx(2e-3)  # of the rank that has two of the six
    assert terms["network"] == pytest.approx(3 / 4 * 3072 / 1e6)
    assert terms["messages"] == pytest.approx(1e-2 / 100)
    parts = ("harvest", "training", "network", "messages", "reading")
    assert terms["total"] == pytest.approx(sum(terms[name] for name in parts))


def test_overlapped_the_longer_of_harvest_and_training_counts() -> None:
    assert ranks.seconds_a_row(COSTS, 1, 8, 100, overlapped=True)["total"] == pytest.approx(8e-3)
    few = ranks.seconds_a_row(COSTS, 2, 2, 10_000, overlapped=True)
    assert few["total"] == pytest.approx(few["harvest"] + few["network"])
    slow = ranks.Costs(**(vars(COSTS) | {"reading": 10.0}))
    assert ranks.seconds_a_row(slow, 2, 2, 100, overlapped=True)["total"] == pytest.approx(0.1)


def point(world: int, rate: float) -> dict[str, Any]:
    return {
        "ranks": world,
        "dictionaries": 4,
        "width": 64,
        "rows_a_second": rate,
        "harvest_a_second": 1000.0,
        "dictionary_seconds_a_row": 1e-3,
        "row_bytes": 768.0,
    }


def test_measured_and_predicted_stand_side_by_side(tmp_path: Path) -> None:
    options = vars(ranks.Options(dictionaries=[4], widths=[64], batch=1000))
    network = [{"bandwidth": 1e8, "message": 1e-3}]
    data = {"points": [point(1, 200.0), point(2, 390.0)], "network 1": [{}], "network 2": network, "threads": 1}
    report = ranks.report(data, options)
    measured, paper = report.tables
    assert [row[:4] for row in measured.rows] == [["4 x 64", "1", "200", "1.00x"], ["4 x 64", "2", "390", "1.95x"]]
    predicted = 1 / (1e-3 / 2 + 768 / 2 / 1e8 + 2e-3 + 1e-3 / 1000)
    assert measured.rows[1][4] == f"{predicted:,.0f}" and measured.rows[1][5] == f"{predicted / 390:.2f}"
    assert "not a measurement" in paper.title
    ranks.plot(data, tmp_path)
    assert (tmp_path / "ranks.svg").stat().st_size > 1000


def test_the_table_of_the_docs_is_that_of_the_model() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "distributed.md").read_text()
    for row in ranks.on_paper().rows:
        if row[0] in ("8", "64", "128"):
            cells = [row[1], row[2], *(share.replace("%", " %") for share in row[4:])]
            assert f"| {' | '.join(cells)} |" in text
