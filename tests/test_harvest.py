"""`sae-factory harvest`: what it writes, that no interruption shows in it, and that it trains as the stream does."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dictionary_learning import harvest, storage
from dictionary_learning.activations.saved import SavedActivations
from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.cli import main as cli
from dictionary_learning.corpus import open_corpus
from dictionary_learning.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
POINTS = ("resid_post_layer_0", "transformer.h.1.mlp:out")
CONFIG = harvest.HarvestConfig(
    model_name="embedded",
    corpus="embedded",
    hook_points=POINTS,
    num_tokens=700,
    num_samples=None,
    ctx_len=32,
    harvest_contexts=4,
    dtype="float32",
    shard_mb=0.4,  # 260 rows
)
SMALL = ["--hook_points", *POINTS, "--ctx_len", "32", "--harvest_contexts", "4", "--shard_mb", "0.4"]


@pytest.fixture(scope="module")
def lm() -> TracedLM:
    from dictionary_learning.demo import load_model

    return load_model(CONFIG, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_model(lm: TracedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is loaded once; any other name is loaded as it would be."""
    from dictionary_learning import demo

    load = demo.load_model
    monkeypatch.setattr(demo, "load_model", lambda c, d: lm if c.model_name == "embedded" else load(c, d))


@pytest.fixture(scope="module")
def whole(lm: TracedLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken harvest."""
    out = tmp_path_factory.mktemp("harvest") / "whole"
    assert cli(["harvest", "--out", str(out), "--num_tokens", "700", *SMALL]) == 0
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------------------------------------- what is written


def test_the_folder_says_what_is_in_it(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["rows"] == 700 and manifest["state"] is None
    assert manifest["model"]["name"] == "embedded" and len(manifest["model"]["digest"]) == 64
    assert manifest["hook_points"]["transformer.h.1.mlp:out"]["width"] == 192
    assert manifest["corpus"]["fingerprint"] == open_corpus("embedded").fingerprint
    assert [sum(shard["batches"]) for shard in manifest["shards"]] == [shard["rows"] for shard in manifest["shards"]]
    names = [shard["file"] for shard in manifest["shards"]]
    assert len(names) >= 2 and all(shard["rows"] >= 260 for shard in manifest["shards"][:-1])
    assert set(files(whole)) == {"manifest.json", "README.md", *names, *(f"tokens/{name}" for name in names)}
    card = (whole / "README.md").read_text()
    for said in ("license: mit", "| `transformer.h.1.mlp:out` | 192 | 1 |", "700 rows", "`embedded` (train part)"):
        assert said in card
    assert str(ROOT) not in card + (whole / "manifest.json").read_text()


def test_saved_batches_are_those_of_the_stream(whole: Path, lm: TracedLM) -> None:
    saved = SavedActivations(whole)
    stream = harvest.make_source(CONFIG, lm, open_corpus("embedded"))
    assert (saved.widths, saved.dtype, saved.max_rows) == (stream.widths, stream.dtype, stream.max_rows)
    count = 0
    for batch, live in zip(saved, stream, strict=False):
        rows = len(batch.acts[POINTS[0]])
        assert rows == min(len(live.acts[POINTS[0]]), 700 - count)  # the last batch is cut at --num_tokens
        assert all(torch.equal(batch.acts[name], live.acts[name][:rows]) for name in POINTS)
        assert batch.provenance is not None and live.provenance is not None
        pairs = zip(batch.provenance, live.provenance, strict=True)
        assert all(ours.dtype == torch.int64 and torch.equal(ours, theirs[:rows]) for ours, theirs in pairs)
        count += rows
    assert count == saved.rows == 700


def test_a_seed_keeps_rows_and_their_provenance_together(whole: Path) -> None:
    def by_place(seed: int | None, **settings: Any) -> dict[tuple[int, ...], torch.Tensor]:
        found = {}
        for acts, provenance in SavedActivations(whole, seed=seed, **settings):
            assert provenance is not None
            for row, place in zip(acts[POINTS[0]], torch.stack(list(provenance), dim=1).tolist(), strict=True):
                found[tuple(place)] = row
        return found

    stored, mixed = by_place(None), by_place(3, batch_rows=50)
    assert list(stored) != list(mixed) and len(stored) == 700
    assert all(torch.equal(stored[place], mixed[place]) for place in stored)


def test_a_dictionary_from_shards_equals_one_from_the_stream(lm: TracedLM, tmp_path: Path) -> None:
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    config = dataclasses.replace(CONFIG, num_tokens=None, num_samples=30)
    harvest.run_harvest(config, tmp_path / "acts", device="cpu")
    sources = [harvest.make_source(config, lm, open_corpus("embedded")), SavedActivations(tmp_path / "acts")]
    found, seen = [], []
    for source in sources:
        buffer = ActivationBuffer(None, source, n_ctxs=24, ctx_len=32, out_batch_size=64, seed=5, provenance=True)
        configs = [
            {"trainer": TopKTrainer, "dict_size": 64, "k": 4, "seed": 0, "layer": 0, "lm_name": "x"}
            | {"activation_dim": 192, "submodule_name": name}
            for name in POINTS
        ]
        mixing: list[Any] = []
        found.append(trainSAE(buffer, configs, 25, callbacks=[lambda run, step, m=mixing: m.append(run.data.mixing())]))
        seen.append(mixing)
    assert seen[0] == seen[1] and len(seen[0]) == 25
    for ours, theirs in zip(*found, strict=True):
        theirs_state = theirs.state_dict()
        assert all(torch.equal(tensor, theirs_state[name]) for name, tensor in ours.state_dict().items())


def test_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["harvest", "--out", str(tmp_path / "docs"), "--num_samples", "3", *SMALL]) == 0
    saved = SavedActivations(tmp_path / "docs")
    assert saved.manifest is not None and saved.manifest["documents"] == 3
    documents = {int(n) for batch in saved for n in batch.provenance.document_N}
    assert documents == {0, 1, 2}
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "The heart pumps blood."}\n{"text": "Insulin lowers glucose."}\n')
    command = ["harvest", "--out", str(tmp_path / "end"), "--num_tokens", "500", "--corpus", str(text)]
    assert cli([*command, "--split", "all", "--no-remove_bos", *SMALL]) == 3
    assert "ended after" in capsys.readouterr().err
    assert "license: unknown" in (tmp_path / "end" / "README.md").read_text()
    saved = SavedActivations(tmp_path / "end")
    assert int(next(saved).provenance.position_N[0]) == -1  # BOS is kept on request


def test_the_default_limit_is_that_of_the_preset() -> None:
    args = harvest.HarvestArgs(out=Path("x"), preset="gpt2")
    config = harvest.resolve_harvest(args)
    assert config.num_tokens == 50_000_000 and config.hook_points == ("resid_post_layer_8",)
    assert harvest.resolve_harvest(dataclasses.replace(args, num_samples=5)).num_tokens is None


# ---------------------------------------------------------------------------------------------- interruptions


class Killed(BaseException):
    """As a kill: no handler of the program sees it coming."""


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_file_the_same_command_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    replace, calls, fatal = os.replace, 0, -1

    def deadly(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if after or calls != fatal:
            replace(source, target)
        if calls == fatal:
            if not after:  # what a real kill leaves behind, since nothing is tidied up
                Path(f"{Path(target).parent}/.{Path(target).name}.left").write_bytes(b"half")
            raise Killed

    monkeypatch.setattr(storage.os, "replace", deadly)
    for moment in range(1, 100):
        out = tmp_path / str(moment)
        calls, fatal = 0, moment
        try:
            harvest.run_harvest(CONFIG, out, device="cpu")
            break
        except Killed:
            pass
        calls, fatal = 0, -1
        harvest.run_harvest(CONFIG, out, device="cpu")
        assert files(out) == {name: data for name, data in files(whole).items() if name != "README.md"}
    assert moment > 8


def test_a_killed_process_leaves_what_goes_on(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dictionary_learning", "harvest", "--out", str(out), "--num_tokens", "700", *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "shard-00000.safetensors").exists() and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    harvest.run_harvest(CONFIG, out, device="cpu")
    ours, theirs = files(out), files(whole)
    assert all(ours[name] == theirs[name] for name in theirs if name != "README.md")


def test_a_complete_harvest_is_not_run_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(copy)
    monkeypatch.setattr(TracedLM, "capture", lambda *_: pytest.fail("the model ran"))
    assert cli(["harvest", "--out", str(copy), "--num_tokens", "700", *SMALL]) == 0
    assert "is complete: 700 rows" in capsys.readouterr().out and files(copy) == before


# ---------------------------------------------------------------------------------------------- bad input


def said(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli(["harvest", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("Error:") == 1 and "Traceback" not in err
    return err


def test_bad_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, expected in (
        (["--preset", "gpt3"], "Unknown preset 'gpt3'"),
        (["--layers", "1", "--hook_points", "resid_post_layer_1"], "either --hook_points or --layers"),
        (["--site", "mlp_in", "--hook_points", "resid_post_layer_1"], "either --hook_points or --site"),
        (["--layers", "9"], "Layer 9"),
        (["--hook_points", "transformer.h.1.mlpp"], "Did you mean 'transformer.h.1.mlp'?"),
        (["--num_tokens", "0"], "num_tokens must be positive, got 0"),
        (["--num_samples", "-1"], "num_samples must be positive"),
        (["--shard_mb", "0"], "shard_mb must be positive"),
        (["--seed", "-1"], "A seed must be at least 0"),
        (["--split", "test"], "Unknown split 'test'"),
        (["--corpus", "nowhere.jsonl"], "'nowhere.jsonl' not found"),
        (["--device", "tpu"], "'tpu' is not a device"),
        (["--max_activation_norm_multiple", "0.5"], "must be at least 1"),
        (["--private"], "add --push_to"),
        (["--push_to", "no/such/name"], "not a name of a Hub repository"),
        (["--licence", "do what\nyou: like"], "not an identifier such as mit"),
    ):
        assert expected in said(*out, *arguments, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file: give a folder" in said("--out", str(tmp_path / "file"), capsys=capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "of a web page"}')
    assert "holds something else (manifest.json)" in said("--out", str(tmp_path / "mine"), capsys=capsys)
    before = files(copy)
    here = ["--out", str(copy), "--num_tokens", "700", *SMALL]
    assert "other settings (num_tokens)" in said(*here, "--num_tokens", "800", capsys=capsys)
    assert "other settings (seed)" in said(*here, "--seed", "1", capsys=capsys)
    assert "other settings (split)" in said(*here, "--split", "heldout", capsys=capsys)
    assert "hook_points" in said("--out", str(copy), "--num_tokens", "700", *SMALL[3:], "--layers", "1", capsys=capsys)
    (tmp_path / "t.txt").write_text("Some text.\n" * 50)
    assert "of another corpus" in said(*here, "--corpus", str(tmp_path / "t.txt"), capsys=capsys)
    assert files(copy) == before


def test_another_model_is_refused(copy: Path, lm: TracedLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_prep.embedded import MODEL_DIR

    other = Path(shutil.copytree(MODEL_DIR, tmp_path / "finetuned"))
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    save_file({name: w + 0.01 for name, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    message = said("--out", str(copy), "--num_tokens", "700", *SMALL, "--model_name", str(other), capsys=capsys)
    assert "is of the model 'embedded'" in message and "not of 'finetuned'" in message


def test_a_cut_shard_stops_a_harvest_from_going_on(copy: Path) -> None:
    edit_manifest(copy, lambda m: m.update(status="harvesting"))
    shard = copy / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match="shard-00001.safetensors' is missing or cut"):
        harvest.run_harvest(CONFIG, copy, device="cpu")


def test_a_damaged_state_is_refused(copy: Path) -> None:
    edit_manifest(copy, lambda m: m.update(status="harvesting", state={"contexts": {"pending": {"zlib": "!"}}}))
    with pytest.raises(UserError, match="state in manifest.json is damaged"):
        harvest.run_harvest(CONFIG, copy, device="cpu")


def test_disk_space_is_checked_before_and_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"has 0.0 GB left, but the harvest needs about 0.3 GB"):
        harvest.run_harvest(dataclasses.replace(CONFIG, num_tokens=200_000), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="needs about"):
        harvest.run_harvest(dataclasses.replace(CONFIG, num_tokens=None, num_samples=20), tmp_path / "out")
    left = iter([10**12, 10**12, 10])  # before, first shard, second shard
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(left)))
    with pytest.raises(UserError, match="is full after .* saved rows: free some space and run the same command again"):
        harvest.run_harvest(CONFIG, tmp_path / "out", device="cpu")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert harvest.run_harvest(CONFIG, tmp_path / "out", device="cpu")["rows"] == 700


def test_a_model_that_gives_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = TracedLM.capture

    def sick(self: TracedLM, *arguments: Any) -> dict[str, torch.Tensor]:
        acts = capture(self, *arguments)
        acts[POINTS[1]][1, 5, 7] = torch.nan
        return acts

    monkeypatch.setattr(TracedLM, "capture", sick)
    config = dataclasses.replace(CONFIG, max_activation_norm_multiple=None)
    with pytest.raises(UserError, match=r"'transformer.h.1.mlp:out' hold a NaN or an infinity \(document 0, position"):
        harvest.run_harvest(config, tmp_path / "out", device="cpu")


# ---------------------------------------------------------------------------------------------- reading damaged ones


def test_damaged_shards_are_named(copy: Path) -> None:
    shard, tokens = copy / "shard-00001.safetensors", copy / "tokens" / "shard-00000.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="shard-00001.safetensors' does not match its checksum"):
        list(SavedActivations(copy))
    assert sum(len(batch.acts[POINTS[0]]) for batch in SavedActivations(copy, verify=False)) == 700
    shard.write_bytes(good[:-1])
    with pytest.raises(UserError, match="shard-00001.safetensors' is cut or was exchanged"):
        SavedActivations(copy)
    shard.unlink()
    with pytest.raises(UserError, match="shard-00001.safetensors' is missing"):
        SavedActivations(copy)
    shard.write_bytes(good)
    tokens.write_bytes(tokens.read_bytes()[::-1])
    with pytest.raises(UserError, match="tokens/shard-00000.safetensors' does not match its checksum"):
        next(SavedActivations(copy))


def test_manifests_that_lie_are_refused(copy: Path) -> None:
    original = (copy / "manifest.json").read_bytes()

    def refused(change: Callable[[dict[str, Any]], Any], match: str) -> None:
        (copy / "manifest.json").write_bytes(original)
        edit_manifest(copy, change)
        with pytest.raises(UserError, match=match):
            list(SavedActivations(copy))

    refused(lambda m: m.update(status="harvesting"), "is not finished: run the same harvest again")
    refused(lambda m: m.update(version=9), "version 9, not 1")
    refused(lambda m: m["shards"][0].update(file="../../secret.safetensors"), "can't be")
    refused(lambda m: m["shards"][0].update(rows=5), "can't be")
    refused(lambda m: m["shards"][0].update(batches=[-1, "x"]), "can't be")
    refused(lambda m: m["shards"][0].pop("sha256"), "it lacks 'sha256'")
    refused(lambda m: m.update(model=None), "does not say what was harvested")
    refused(lambda m: m.update(state="x"), "its state can't be")
    refused(lambda m: m.update(shards=3), "is damaged")
    refused(lambda m: m.update(max_rows=3), "max_rows is 3")
    refused(lambda m: m.update(dtype="int8"), "the dtype is 'int8'")
    refused(lambda m: m["hook_points"][POINTS[0]].update(width=191), "shard-00000.safetensors' has widths")
    refused(lambda m: m.update(shards=[]), "hold no rows")
    (copy / "manifest.json").write_bytes(original[:-20])
    with pytest.raises(UserError, match="not a readable JSON file"):
        SavedActivations(copy)
