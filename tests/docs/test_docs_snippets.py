"""Every Python snippet of the documentation runs as it stands, but for sizes and for models that would be downloaded.

The snippets of a page run one after the other in one namespace, in a folder that holds what the page takes for given.
`RUN` says which test runs which.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_wandb import FakeWandb, Server
from pages import PAGES, ROOT, commands, snippets

from data_prep.embedded import MODEL_DIR
from dictionary_learning import AutoEncoder, cli, load_dictionary, trainSAE
from dictionary_learning.corpus import open_corpus
from dictionary_learning.dictionary import DICTIONARIES, AutoEncoderTopK
from dictionary_learning.formats import read, write
from dictionary_learning.trainers import TRAINERS, TopKTrainer
from tests.hub_server import HubServer

HERE = "docs/test_docs_snippets.py"
RUN = {  # page -> {file of tests: how many of the page's snippets it runs}
    "README.md": {HERE: 1},
    "docs/activations.md": {HERE: 4, "activations/test_sentence_encoder.py": 2, "activations/test_module.py": 1},
    "docs/analysis.md": {HERE: 1},
    "docs/architecture.md": {HERE: 1},
    "docs/coming-from.md": {"dropin/test_coming_from.py": 7},
    "docs/dataset.md": {HERE: 1},
    "docs/descriptions.md": {HERE: 1},
    "docs/formats.md": {HERE: 3},
    "docs/hub.md": {HERE: 1},
    "docs/interventions.md": {"analysis/test_analysis_steer.py": 4},
    "docs/report.md": {HERE: 1},
    "docs/training.md": {"test_heldout.py": 1},
    "docs/wandb.md": {HERE: 1},
}
MODEL = {'"gpt2"': repr(str(MODEL_DIR)), "layer_8": "layer_2"}
SMALL = "--num_tokens 768 --batch_size 128 --widths 128 --ctx_len 32 --buffer_contexts 64 --eval_tokens 100".split()
SOME = ["trainer_3", "trainer_4", "trainer_5"]
QUICK = {"analyze": ["--tokens", "1000", "--ablate", "0", "--dictionaries", *SOME], "steer": ["--max_new_tokens", "2"]}


def test_every_snippet_is_run_by_a_test() -> None:
    assert {page: len(snippets(page)) for page in PAGES if snippets(page)} == {p: sum(RUN[p].values()) for p in RUN}
    for page, files in RUN.items():
        for file in files:
            assert Path(page).name in (ROOT / "tests" / file).read_text(encoding="utf-8"), (page, file)


def run(code: list[str], names: dict[str, Any], changes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Execute snippets in one namespace, which comes back. What is changed in them must be there."""
    for old, new in (changes or {}).items():
        assert any(old in snippet for snippet in code), old
        code = [snippet.replace(old, new) for snippet in code]
    for snippet in code:
        exec(compile(snippet, "snippet", "exec"), names)
    return names


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the README's first command has run at a small size; not to be changed."""
    folder = tmp_path_factory.mktemp("docs")
    (train,) = [words for words in commands("README.md") if "runs/first" in words and words[0] == "python"]
    assert train[1] == "dictionary_learning/demo.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", *train[2:], *SMALL, "--no-report"]) == 0
        few = ["--dictionaries", "trainer_3", "--tokens", "500", "--ablate", "0"]  # as the report would leave it
        assert cli.main(["analyze", "runs/first", *few]) == 0
    return folder


@pytest.fixture
def first_run(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test, with a copy of that run as runs/first."""
    shutil.copytree(workplace / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "first"


def test_readme_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [text.text for text in open_corpus("embedded").read(0)][:40]
    sizes = {"768": "192", "16384": "256", "10_000": "4", "2048": "256", "2000": "64"}
    names = run(snippets("README.md"), {"texts": texts}, MODEL | sizes)
    assert names["dictionary"].dict_size == 256
    assert load_dictionary("runs/notebook/trainer_0")[1]["trainer"]["steps"] == 4


def test_readme_on_the_command_line(first_run: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands on the run that its first one made."""
    Path("pages.jsonl").write_text("".join(json.dumps({"text": f"Page {i} is on trains."}) + "\n" for i in range(9)))
    shutil.rmtree(first_run / "analysis")  # of that run's own, which would give way
    done = []
    for program, *arguments in commands("README.md"):
        if program == "sae-factory" and any(word.startswith("runs/first") for word in arguments):
            assert cli.main([*arguments, *QUICK.get(arguments[0], [])]) == 0, capsys.readouterr().err
            done.append(arguments[0])
    assert done == ["analyze", "steer", "push", "export"]
    assert "general" in (first_run / "analysis" / "analysis.json").read_text()
    assert "trainer_4/ae.safetensors" in hub.repos["models/user/my-dictionaries"].files
    assert (Path("saelens") / "trainer_4" / "cfg.json").is_file()


def test_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> None:
    monkeypatch.chdir(tmp_path)
    harvest = commands("docs/activations.md")[0][1:]
    assert cli.main([*harvest, "--num_tokens", "5000", "--ctx_len", "32", "--push_to", "user/acts"]) == 0
    rows = torch.randn(20, 6)
    torch.save(rows, "acts.pt")
    np.save("acts.npy", rows.numpy())
    commit = hub.repos["datasets/user/acts"].commits[-1][1]
    code = snippets("docs/activations.md")[:4]
    changes = {"@1f2e3d": f"@{commit}", "n_ctxs=256": "n_ctxs=64", "ctx_len=128": "ctx_len=32", "2048": "256"}
    names = run(code, {}, MODEL | changes | {"1536": "256", "steps=200": "steps=3"})
    sample = names["sample"]
    assert sample.acts["resid_post_layer_2"].shape == (len(sample.tokens), 192)
    assert names["dictionary"].dict_size == 256
    assert names["validation"].widths == names["train"].widths == {"resid_post_layer_1": 192, "resid_post_layer_2": 192}
    mean = torch.cat([batch.acts["resid_post_layer_1"] for batch in names["train"]]).mean(0)
    assert mean.abs().max() < 1e-3


def test_analysis_report_and_descriptions(first_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("IPython")
    assert cli.main(["analyze", "runs/first", "--overwrite", *QUICK["analyze"]]) == 0
    names = run(snippets("docs/analysis.md"), {})
    assert len(names["table"]["density"]) == len(names["top"].value_FE) == 128
    run(snippets("docs/report.md"), {})
    shutil.copytree(first_run, "runs/demo")
    capsys.readouterr()
    run(snippets("docs/descriptions.md"), {})
    assert "trainer_5" in capsys.readouterr().out


def test_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    record = run(snippets("docs/dataset.md"), {})["record"]
    assert record["source_dataset"] == "pubmedqa" and capsys.readouterr().out.count("pubmedqa") >= 60


def test_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dictionary_learning.trainers.trainer.TRAINERS", registry := dict(TRAINERS))
    trainer = run(snippets("docs/architecture.md"), {})["LogPenaltyTrainer"]
    assert registry["log_penalty"] is trainer
    data = [torch.randn(128, 12, generator=torch.Generator().manual_seed(i)) for i in range(60)]
    sparse, dense = trainSAE(
        data,
        [{"trainer": trainer, "activation_dim": 12, "dict_size": 48, "penalty": p, "seed": 0} for p in (1.0, 0.01)],
        steps=60,
    )
    l0 = [(ae.encode(data[0]) > 0).sum(-1).float().mean() for ae in (sparse, dense)]
    assert isinstance(sparse, AutoEncoder) and l0[0] < l0[1] - 3
    assert (dense(data[0]) - data[0]).square().mean() < 0.3


def test_formats(first_run: Path) -> None:
    write(*load_dictionary("runs/first/trainer_0"), Path("some/folder"), "sparsify")

    class MyDictionary(AutoEncoderTopK):
        pass

    try:
        names = run(snippets("docs/formats.md"), {"MyDictionary": MyDictionary})
    finally:
        del DICTIONARIES["MyDictionary"]
    assert type(read("out")[0]) is type(names["dictionary"]) is AutoEncoderTopK
    x = torch.randn(5, 192)
    torch.testing.assert_close(
        names["sae"].decode(names["sae"].encode(x)), load_dictionary("runs/first/trainer_0")[0](x)
    )
    assert MyDictionary in names["as_coder"].registry


def test_hub(first_run: Path, hub: HubServer) -> None:
    pushes = [words[1:] for words in commands("docs/hub.md") if words[1] == "push"]
    assert cli.main(pushes[0]) == 0
    repo = hub.repos["models/user/my-dictionaries"]
    assert repo.private and "trainer_3/ae.safetensors" in repo.files
    commit = repo.commits[-1][1]
    names = run(snippets("docs/hub.md"), {}, {"9f1c...": commit, "@v1": f"@{commit}", '"v1"': repr(commit)})
    mine = load_dictionary("runs/first/trainer_3")[0].state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in names["dictionary"].state_dict().items())
    assert cli.main(pushes[1]) == 0
    best = json.loads(repo.files["checksums.json"])["best"]
    assert [path for path in repo.files if path.endswith("ae.safetensors")] == [f"{best}/ae.safetensors"]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "planted-" + "k" * 33)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(Server(tmp_path / "server")))
    config = {"trainer": TopKTrainer, "activation_dim": 8, "dict_size": 16, "k": 4, "layer": 0, "lm_name": "toy"}
    options: dict[str, Any] = {"use_wandb": True, "wandb_project": "project", "wandb_entity": "entity"}
    (trained,) = trainSAE([torch.randn(32, 8)] * 4, [config], 4, save_dir="first", **options)
    names = run(snippets("docs/wandb.md"), {})
    assert torch.equal(names["dictionary"].encoder.weight, trained.encoder.weight)
