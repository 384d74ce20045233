"""The benchmarks on tiny sizes and without peers: each runs end to end, and its tables say what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import memory, peers, results, scaling, step, stream
from benchmarks.__main__ import main
from benchmarks.turns import Entry, Workers, milliseconds, rate, rate_ratio, take_turns, times_faster

TINY_STREAM = {
    "layer": 1,
    "m": 64,
    "k": 4,
    "batch": 64,
    "ctx_len": 32,
    "contexts": 2,
    "dictionaries": [1, 2],
    "dtypes": ["float32"],
    "shape": {"n_layer": 2, "n_embd": 32, "n_head": 2},
    "peers": [],
    "rounds": 2,
    "refills": 1,
}


@pytest.fixture(scope="module", autouse=True)
def no_peers(tmp_path_factory):
    """As on a machine where no environment was made."""
    patch = pytest.MonkeyPatch()
    patch.setattr(peers, "VENVS", tmp_path_factory.mktemp("venvs"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def steps():
    options = step.Options(
        d=32, m=256, k=4, batch=64, architectures=["top_k", "standard"], peers=["sae-lens"], rounds=2, steps=2
    )
    return step.measure(options, threads=1), vars(options)


def cells(report: results.Report, table: int, row: int) -> list[str]:
    return list(report.tables[table].rows[row])


def median_ms(entry):
    return 1e3 * statistics.median(statistics.median(seconds) for seconds in entry["rounds"])


def test_step_measures_every_state_of_every_architecture_beside_the_bounds(steps):
    data, _ = steps
    assert [(group["architecture"], group["state"]) for group in data["groups"]] == [
        ("top_k", "top-k"),
        ("standard", "dense"),
        ("standard", "sparse"),
    ]
    for group in data["groups"]:
        measured = step.by_name(group)
        assert {step.OURS, *step.BOUNDS, step.BF16_BOUND} <= set(measured)
        assert all(len(entry["rounds"]) == 2 for entry in measured.values())
        assert all(len(seconds) == 2 and min(seconds) > 0 for e in measured.values() for seconds in e["rounds"])


def test_the_sparse_state_has_the_l0_it_says_and_the_dense_one_half_of_the_latents(steps):
    data, _ = steps
    l0 = {
        (group["architecture"], group["state"]): step.by_name(group)[step.OURS]["info"]["l0"]
        for group in data["groups"]
    }
    assert l0["top_k", "top-k"] == pytest.approx(4, abs=0.5)
    assert l0["standard", "dense"] > 45
    assert l0["standard", "sparse"] == pytest.approx(48, abs=8)


def test_the_step_table_shows_the_medians_and_the_ratios_of_what_was_measured(steps):
    data, options = steps
    report = step.report(data, options)
    for row, group in enumerate(data["groups"]):
        measured = step.by_name(group)
        assert cells(report, 0, row)[2] == f"{median_ms(measured[step.OURS]):.1f}"
        bound = measured["one matmul, as torch does it by default"]
        ratio = statistics.median(
            statistics.median(ours) / statistics.median(theirs)
            for ours, theirs in zip(measured[step.OURS]["rounds"], bound["rounds"], strict=True)
        )
        assert cells(report, 1, row)[2] == f"{median_ms(bound):.1f} ({ratio:.2f}x)"


def test_a_peer_without_an_environment_is_skipped_and_said_so(steps):
    data, options = steps
    remarks = "\n".join(step.report(data, options).remarks)
    assert "sae-lens: its environment is missing (python -m benchmarks setup-peers)" in remarks
    assert cells(step.report(data, options), 0, 0)[-2:] == ["–", "–"]


def test_a_contestant_that_fails_is_skipped_with_its_reason_and_the_others_are_measured():
    sizes = {"d": 16, "m": 32, "batch": 8, "way": "default"}
    entries = [Entry("bad", "ours", "step", {"architecture": "top_q"}), Entry("good", "ours", "matmul", sizes)]
    with Workers(1) as workers:
        bad, good = take_turns(workers, entries, rounds=1)
    assert "missing 5 required" in bad["skipped"] and "rounds" not in bad
    assert len(good["rounds"]) == 1


def test_ratios_are_taken_within_a_round():
    ours = {"rounds": [[1.0, 1.0], [10.0], [2.0]], "units": [[8, 8], [8], [8]]}
    peer = {"rounds": [[3.0, 3.0], [30.0], [5.0]], "units": [[8, 8], [8], [8]]}
    assert times_faster(ours, peer) == 3.0
    assert milliseconds(ours) == 2000.0
    assert rate(ours) == 32 / 14
    assert rate_ratio(ours, peer) == 3.0


def test_stream_measures_harvest_and_dictionaries_and_tells_their_rates():
    options = stream.Options(**TINY_STREAM)
    data = stream.measure(options, threads=1)
    report = stream.report(data, vars(options))
    names = [stream.HARVEST, "ours, 1 TopK", "ours, 2 TopK"]
    assert [cells(report, 0, row)[0] for row in range(3)] == names
    assert not report.remarks
    for row, entry in enumerate(data["entries"]):
        units, seconds = sum(map(sum, entry["units"])), sum(map(sum, entry["rounds"]))
        assert cells(report, 0, row)[1] == f"{units / seconds:,.0f}"
    assert data["entries"][1]["units"] == [[64] * 5] * 2
    # Of a context's positions its first one (BOS) and the separators of texts are masked.
    assert all(2 * 28 <= rows <= 2 * 31 for rows in data["entries"][0]["units"][0])
    assert cells(report, 0, 0)[2] == "1.000"


def test_scaling_has_a_row_for_every_size_and_its_memory(tmp_path):
    shape = TINY_STREAM["shape"]
    options = scaling.Options(
        d=64, m=128, k=4, batch=64, widths=[8192], ks=[4], batches=[32], dictionaries=[1, 3], contexts=[32],
        layer=1, shape=shape, rounds=1, steps=1,
    )  # fmt: skip
    data = scaling.measure(options, threads=1)
    report = scaling.report(data, vars(options))
    assert not report.remarks
    assert [len(table.rows) for table in report.tables] == [1, 1, 1, 2, 1]
    floor = 4 * (3 * 2 * 8192 * 64 + 64 * 8192)
    peak = data["m"][0]["alone"]["info"]["peak_bytes"]
    assert cells(report, 0, 0)[-1] == f"{peak / 2**20:,.0f} ({peak / floor:.2f}x)"
    assert 0.8 * floor < peak
    ours = data["dictionaries"][1]["entries"][0]
    assert cells(report, 3, 1)[1:3] == [f"{median_ms(ours):.1f}", f"{median_ms(ours) / 3:.1f}"]
    scaling.plot(data, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(report.plots)


def test_memory_reports_the_peaks_and_the_curve(tmp_path):
    options = memory.Options(tokens=5 * 256, buffer_contexts=256, batch=256)
    data = memory.measure(options, threads=1)
    report = memory.report(data, vars(options))
    assert [tokens for tokens, _ in data["curve"]] == [256, 512, 768, 1024, 1280]
    assert data["sizes"][1] >= 256 * 127 * 192 * 4
    times = (data["peaks"][1] - data["peaks"][0]) / (data["sizes"][1] - data["sizes"][0])
    assert f"{times:.3f} x" in report.remarks[0]
    assert cells(report, 0, 0)[1] == f"{data['curve'][0][1] / 2**20:.0f}"
    memory.plot(data, tmp_path)
    assert (tmp_path / "memory.svg").exists()


def test_a_section_rewrites_itself_and_nothing_else(steps, tmp_path):
    data, options = steps
    (tmp_path / "RESULTS.md").write_text("# Measurements\n\nWritten by hand.\n")
    results.save(tmp_path, "step", "python -m benchmarks run --only step", 1, options, data)
    assert main(["report", "--only", "step", "--out", str(tmp_path)]) == 0
    first = (tmp_path / "RESULTS.md").read_text()
    assert first.startswith("# Measurements\n\nWritten by hand.\n")
    assert "`python -m benchmarks run --only step`" in first and re.search(r"torch \d+\.\d+", first)
    assert (tmp_path / "plots" / "step.svg").exists()
    (tmp_path / "RESULTS.md").write_text(first + "\nAnother section.\n")
    saved = json.loads((tmp_path / "results" / "step.json").read_text())
    saved["data"]["groups"] = saved["data"]["groups"][:1]
    (tmp_path / "results" / "step.json").write_text(json.dumps(saved))
    main(["report", "--only", "step", "--out", str(tmp_path)])
    second = (tmp_path / "RESULTS.md").read_text()
    assert second.startswith("# Measurements\n\nWritten by hand.\n") and second.endswith("\nAnother section.\n")
    assert "| standard, dense |" in first and "| standard, dense |" not in second
    assert second.count("## One training step") == 1


def test_run_writes_what_it_measured_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory, "measure", lambda options, threads: {"peaks": [1, 3], "sizes": [0, 2], "curve": [(5, 7)]}
    )
    assert main(["run", "--only", "memory", "--out", str(tmp_path), "--memory.tokens", "1024"]) == 0
    saved = results.load(tmp_path, "memory")
    assert saved["data"]["curve"] == [[5, 7]] and saved["options"]["tokens"] == 1024
    assert (
        f"`python -m benchmarks run --only memory --out {tmp_path} --memory.tokens 1024`"
        in (tmp_path / "RESULTS.md").read_text()
    )


def test_a_quick_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "HERE", tmp_path)
    asked = []
    data = {"peaks": [1, 3], "sizes": [0, 2], "curve": [(5, 7)]}
    monkeypatch.setattr(memory, "measure", lambda options, threads: asked.append(options) or data)
    assert main(["run", "--quick", "--only", "memory"]) == 0
    assert asked[0] == dataclasses.replace(memory.Options(), tokens=200_000, buffer_contexts=2048)
    assert not list(Path(tmp_path).iterdir())


def test_an_unknown_section_is_named(capsys):
    assert main(["run", "--only", "steps"]) == 2
    assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_every_peer_trains_only_what_the_registry_knows(name):
    from dictionary_learning.trainers import TRAINERS

    assert peers.PEERS[name].script.exists()
    assert {"top_k", "standard", "jump_relu"} & set(peers.PEERS[name].architectures) & set(TRAINERS)
