"""Pushing a table, to a stand-in for the Hub on this machine."""

from __future__ import annotations

import pytest

from data_prep.__main__ import PrepConfig, main, prepare
from data_prep.publish import push_folder
from dictionary_learning.errors import UserError
from tests.data_prep.records import medmcqa, write_jsonl
from tests.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def folder(tmp_path):
    records = [medmcqa(i) for i in range(40)] + [medmcqa(40, cop=-1)]
    write_jsonl(tmp_path / "in" / "medmcqa" / "train.jsonl", records)
    return tmp_path / "in"


def test_a_push_is_one_commit_of_the_table_and_reads_back(hub, folder, tmp_path, capsys):
    report = prepare(PrepConfig(source=str(folder), push_to="user/texts", split=(0.5, 0.25, 0.25)))
    repo = hub.repos["datasets/user/texts"]
    data = [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")]
    assert sorted(repo.files) == ["README.md", *data, "skipped.jsonl"]
    assert len(repo.commits) == 2 and not repo.private  # the empty first one, and ours
    assert report.url == f"{hub.url}/datasets/user/texts" and report.url in capsys.readouterr().out

    import pyarrow.parquet
    from huggingface_hub import hf_hub_download

    rows = 0
    for name in data:
        file = hf_hub_download("user/texts", name, repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path / "cache")
        rows += pyarrow.parquet.read_table(file, columns=["text", "source_dataset"]).num_rows
    assert rows == 40


def test_a_second_push_leaves_no_split_of_the_first(hub, folder, tmp_path):
    prepare(PrepConfig(source=str(folder), push_to="user/texts", split=(0.5, 0.25, 0.25)))
    out = tmp_path / "out"
    write_jsonl(out / "private-notes.txt", ["mine"])
    prepare(PrepConfig(source=str(folder), push_to="user/texts", out=out, overwrite=True))
    assert sorted(hub.repos["datasets/user/texts"].files) == [
        "README.md",
        "data/train-00000-of-00001.parquet",
        "skipped.jsonl",
    ]


def test_private_makes_a_private_repository_and_never_publishes_into_a_public_one(hub, folder):
    prepare(PrepConfig(source=str(folder), push_to="user/secret", private=True))
    assert hub.repos["datasets/user/secret"].private
    hub.create("dataset", "user/open")
    with pytest.raises(UserError, match="is public: nothing was pushed"):
        prepare(PrepConfig(source=str(folder), push_to="user/open", private=True))
    assert hub.repos["datasets/user/open"].files == {}


def test_a_name_without_an_owner_goes_to_the_user(hub, folder):
    prepare(PrepConfig(source=str(folder), push_to="texts"))
    assert "README.md" in hub.repos["datasets/user/texts"].files


@pytest.mark.parametrize("part", ["/api/repos/create", "/commit/"])
def test_a_refused_push_is_one_sentence_without_the_token_and_the_table_stays(hub, folder, tmp_path, capsys, part):
    hub.refuse[part] = 403
    out = tmp_path / "out"
    assert main(["--source", str(folder), "--out", str(out), "--push_to", "user/texts"]) == 2
    error = capsys.readouterr().err
    assert "Could not push to user/texts" in error and f"The table itself is in {out}" in error
    assert "refused: Bearer ***" in error and hub.token not in error and error.count("\n") == 1
    assert (out / "README.md").exists()


def test_an_unreachable_hub_is_one_sentence(hub, tmp_path):
    (tmp_path / "README.md").write_text("# x")
    with pytest.raises(UserError, match="Could not push to user/texts"):
        push_folder(tmp_path, "user/texts", endpoint="http://127.0.0.1:9")


def test_what_can_be_known_before_the_work_is_said_before_the_work(hub, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("data_prep.__main__._write_table", lambda *_: pytest.fail("the work began"))
    with pytest.raises(UserError, match="not a name of a Hub repository"):
        prepare(PrepConfig(source=str(folder), push_to="a/b/c"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="HF_TOKEN"):
        prepare(PrepConfig(source=str(folder), push_to="user/texts"))
