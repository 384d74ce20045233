"""Activations on the Hub: pushed in one commit, streamed back shard by shard, pinned, and refused in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from dictionary_learning.activations.publish import card, push_harvest
from dictionary_learning.activations.saved import SavedActivations
from dictionary_learning.activations.shards import read_manifest
from dictionary_learning.activations.types import ActivationBatch, Provenance
from dictionary_learning.activations.writer import ShardWriter
from dictionary_learning.cli import main as cli
from dictionary_learning.errors import UserError
from tests.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def write(folder: Path, shards: int, offset: float = 0.0) -> dict:
    """A complete harvest of made-up rows, 10 a shard in batches of 4 and 6."""
    folder.mkdir()
    model = {"name": "tiny <b>`x`", "architecture": "A", "parameters": 7, "dtype": "float32", "digest": "0"}
    header = {
        "format": "sae-factory activations",
        "version": 1,
        "model": model,
        "hook_points": {"resid": {"width": 3, "layer": None, "path": "h", "io": "out"}},
        "dtype": "float32",
        "max_rows": 6,
        "corpus": {"name": "texts", "fingerprint": "f", "split": "train"},
        "settings": {"ctx_len": 8, "remove_bos": True, "max_activation_norm_multiple": None},
    }
    writer, n = ShardWriter(folder, header, 10), 0
    state = {"contexts": {"pending": torch.zeros(5, 0, dtype=torch.long)}}
    for _ in range(shards):
        for size in (4, 6):
            place = torch.arange(n, n + size)
            acts = {"resid": place[:, None].float().repeat(1, 3) + offset}
            writer.add(ActivationBatch(acts, Provenance(*[place] * 5)))
            n += size
        writer.flush(state)
    manifest = writer.finish(state, ["medqa", "a\nb](http://x)"])
    (folder / "README.md").write_text(card(manifest, "cc0-1.0", "user/acts"))
    return manifest


def test_a_push_is_one_commit_and_streams_back(hub: HubServer, tmp_path: Path) -> None:
    manifest = write(tmp_path / "acts", 3)
    assert push_harvest(tmp_path / "acts", manifest, "user/acts") == f"{hub.url}/datasets/user/acts"
    repo = hub.repos["datasets/user/acts"]
    assert len(repo.commits) == 2 and not repo.private and len(repo.files) == 8
    hub.requests.clear()
    source = SavedActivations("hf://user/acts")
    assert source.revision == repo.commits[-1][1] and source.rows == 30
    assert not any("shard" in request for request in hub.requests)  # nothing but the manifest so far
    first = next(source)
    assert not any("shard-00001" in request for request in hub.requests)
    batches = [first, *source]
    assert [len(batch.acts["resid"]) for batch in batches] == [4, 6] * 3
    assert torch.cat([batch.acts["resid"] for batch in batches])[:, 0].tolist() == list(range(30))
    assert batches[-1].provenance is not None and batches[-1].provenance.token_N.tolist() == list(range(24, 30))
    hub.requests.clear()
    assert len(list(SavedActivations("hf://datasets/user/acts", seed=0))) == 6
    assert not any("GET" in request and "shard" in request for request in hub.requests)  # from the cache


def test_the_command_pushes_and_says_where(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["harvest", "--out", str(tmp_path / "h"), "--num_tokens", "300", "--ctx_len", "32", "--layers", "1"]
    hub.refuse["/commit/"] = 500
    assert cli([*command, "--push_to", "user/h", "--private"]) == 4
    out, err = capsys.readouterr()
    assert "the same command pushes them again" in err and hub.token not in out + err
    assert hub.repos["datasets/user/h"].files == {} and SavedActivations(tmp_path / "h").rows == 300
    hub.refuse.clear()
    assert cli([*command, "--push_to", "user/h", "--private"]) == 0
    assert f"Pushed to {hub.url}/datasets/user/h" in capsys.readouterr().out
    assert hub.repos["datasets/user/h"].private
    assert 'SavedActivations("hf://user/h")' in hub.repos["datasets/user/h"].files["README.md"].decode()
    for here, there in zip(SavedActivations(tmp_path / "h"), SavedActivations("hf://user/h"), strict=True):
        assert torch.equal(here.acts["resid_post_layer_1"], there.acts["resid_post_layer_1"])
    assert all(hub.token.encode() not in p.read_bytes() for p in (tmp_path / "h").rglob("*") if p.is_file())


def test_a_revision_stays_what_it_was_and_stale_shards_go(hub: HubServer, tmp_path: Path) -> None:
    push_harvest(tmp_path / "a", write(tmp_path / "a", 3), "user/acts")
    repo = hub.repos["datasets/user/acts"]
    old = repo.commits[-1][1]
    repo.files["mine.txt"] = b"kept"
    push_harvest(tmp_path / "b", write(tmp_path / "b", 1, offset=0.5), "user/acts")
    assert sorted(repo.files) == [
        "README.md",
        "manifest.json",
        "mine.txt",
        "shard-00000.safetensors",
        "tokens/shard-00000.safetensors",
    ]
    assert SavedActivations("hf://user/acts").rows == 10
    pinned = SavedActivations(f"hf://user/acts@{old}")
    assert (pinned.rows, pinned.revision) == (30, old)
    assert next(pinned).acts["resid"][0, 0] == 0.0 != next(SavedActivations("hf://user/acts")).acts["resid"][0, 0]
    with pytest.raises(UserError, match="in other files"):
        SavedActivations(f"hf://user/acts@{old}", first_rows=10).load_state_dict(
            SavedActivations("hf://user/acts").state_dict()
        )


def test_an_interrupted_upload_leaves_the_head_alone_and_goes_on(hub: HubServer, tmp_path: Path) -> None:
    manifest = write(tmp_path / "a", 3)
    hub.lfs = (".safetensors",)
    hub.refuse[f"/storage/{manifest['shards'][1]['sha256']}"] = 403
    with pytest.raises(UserError, match="Could not push to 'user/acts' .the files in '.*' are whole: the same command"):
        push_harvest(tmp_path / "a", manifest, "user/acts")
    repo = hub.repos["datasets/user/acts"]
    assert repo.files == {} and len(repo.commits) == 1
    hub.refuse.clear()
    arrived = set(hub.objects)
    hub.requests.clear()
    push_harvest(tmp_path / "a", manifest, "user/acts")
    sent = {request.split("/storage/")[1] for request in hub.requests if "/storage/" in request}
    assert manifest["shards"][1]["sha256"] in sent and not sent & arrived
    assert len(repo.commits) == 2 and len(repo.files) == 8
    hub.cut["shard-00001"] = 1  # a download that breaks off in the middle is taken up again
    assert [len(batch.acts["resid"]) for batch in SavedActivations("hf://user/acts")] == [4, 6] * 3


def test_without_a_network_the_cache_serves(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_harvest(tmp_path / "a", write(tmp_path / "a", 2), "user/acts")
    first = SavedActivations("hf://user/acts")
    list(first)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    again = SavedActivations("hf://user/acts")
    assert again.revision == first.revision and len(list(again)) == 4
    with pytest.raises(UserError, match="Could not read the dataset 'hf://user/other': no connection"):
        SavedActivations("hf://user/other")


def test_plain_shards_on_the_hub_are_read_by_their_headers(hub: HubServer) -> None:
    repo = hub.create("dataset", "user/plain")
    for name, start in (("b", 5), ("a", 0)):
        repo.files[f"{name}.safetensors"] = save({"resid": torch.arange(start, start + 5.0)[:, None].repeat(1, 2)})
    repo.commit("shards")
    source = SavedActivations("hf://user/plain", batch_rows=3)
    assert source.widths == {"resid": 2} and source.dtype == torch.float32 and source.manifest is None
    assert torch.cat([batch.acts["resid"] for batch in source])[:, 0].tolist() == list(range(10))
    repo.files["c.safetensors"] = save({"resid": torch.zeros(2, 3)})
    repo.commit("another width")
    with pytest.raises(UserError, match="c.safetensors' has widths {'resid': 3}"):
        SavedActivations("hf://user/plain")
    repo.files["c.safetensors"] = b"\xff" * 40
    repo.commit("no safetensors")
    with pytest.raises(UserError, match="c.safetensors"):
        SavedActivations("hf://user/plain")


def test_a_damaged_shard_on_the_hub_is_named(hub: HubServer, tmp_path: Path) -> None:
    push_harvest(tmp_path / "a", write(tmp_path / "a", 2), "user/acts")
    repo = hub.repos["datasets/user/acts"]
    data = repo.files["shard-00001.safetensors"]
    repo.files["shard-00001.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
    repo.commit("oops")
    with pytest.raises(UserError, match="hf://user/acts/shard-00001.safetensors' does not match its checksum"):
        list(SavedActivations("hf://user/acts"))
    manifest = json.loads(repo.files["manifest.json"])
    manifest["shards"][0]["file"] = "../../../etc/passwd"
    repo.files["manifest.json"] = json.dumps(manifest).encode()
    repo.commit("worse")
    with pytest.raises(UserError, match="can't be"):
        SavedActivations("hf://user/acts")


def test_refusals_are_one_sentence_without_the_token(hub: HubServer, tmp_path: Path) -> None:
    manifest = write(tmp_path / "a", 1)
    hub.create("dataset", "user/open")
    with pytest.raises(UserError, match="is public: nothing was pushed"):
        push_harvest(tmp_path / "a", manifest, "user/open", private=True)
    assert hub.repos["datasets/user/open"].files == {}
    for name, match in (
        ("hf://user/none", "Could not read the dataset 'hf://user/none'"),
        ("hf://user/open", "holds no .safetensors shard"),
        ("hf://user", "is not a dataset on the Hub: write hf://user/name"),
    ):
        with pytest.raises(UserError, match=match):
            SavedActivations(name)
    push_harvest(tmp_path / "a", manifest, "user/acts")
    source = SavedActivations("hf://user/acts")
    hub.refuse["shard-00000"] = 403
    with pytest.raises(UserError, match="Could not read 'shard-00000.safetensors' of 'hf://user/acts'") as caught:
        next(source)
    assert hub.token not in str(caught.value)


def test_a_card_takes_no_markup_from_names(tmp_path: Path) -> None:
    text = card(write(tmp_path / "a", 1) | {"corpora": ["a\nb](http://x)", *[f"c{i}" for i in range(30)]]}, "cc0-1.0")
    assert "<b>" not in text and "](http" not in text and "and 11 more" in text and "`cc0-1.0`" in text
    assert read_manifest(tmp_path / "a") is not None and os.listdir(tmp_path / "a")
    save_file({"x": torch.zeros(1, 1)}, tmp_path / "x.safetensors")
    assert read_manifest(tmp_path) is None
