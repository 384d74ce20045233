"""A dictionary comes back from a repository's name as it was pushed, or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dictionary_learning import AutoEncoder, AutoEncoderTopK, JumpReluAutoEncoder, demo, load_dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.hub import push_run
from dictionary_learning.hub_load import parse_reference, pull_dictionary
from tests.hub.conftest import PATIENT, SMALL, fresh_process
from tests.hub_server import HubServer, Repo

REPO = "user/first"
EVALUATE_AGAIN = f"""{PATIENT}
import json, sys
import torch
from dictionary_learning import demo, evaluate_dictionaries, load_dictionary, open_corpus
from dictionary_learning.config import load_config
from dictionary_learning.hub_load import parse_reference, pull_dictionary

dictionary, config = load_dictionary("hf://" + sys.argv[1])
folder = pull_dictionary(parse_reference(sys.argv[1]))
run = load_config(folder.parent / "run.json")
lm = demo.load_model(run, torch.device("cpu"))
contexts = demo.make_contexts(run, lm, open_corpus(run.corpus), heldout=True)
(result,) = evaluate_dictionaries(
    lm, contexts, [(config["trainer"]["submodule_name"], dictionary)], max_tokens=run.eval_tokens,
    remove_special=run.remove_bos, max_activation_norm_multiple=run.max_activation_norm_multiple,
)
saved = json.loads((folder / "eval_results.json").read_text())
print(json.dumps([folder.name, result.to_dict(), saved]))
"""


@pytest.fixture
def pushed(hub: HubServer, run: Path) -> Repo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # a picture takes longer than all else
        push_run(run, REPO)
    return hub.repos[f"models/{REPO}"]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_fresh_process_given_the_name_alone_reproduces_the_results_of_the_best(
    hub: HubServer, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the main job to the numbers it wrote, through nothing but the Hub."""
    run = tmp_path / "run"
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    assert demo.main(["--save_dir", str(run), *SMALL, "--hf_repo_id", REPO]) == 0
    assert f"Pushed to {hub.url}/{REPO} (commit " in capfd.readouterr().out
    environment = fresh_process(hub.url, tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE_AGAIN, REPO], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    best, again, saved = json.loads(done.stdout.splitlines()[-1])
    recovered = [json.loads((run / f"trainer_{i}/eval_results.json").read_text())["frac_recovered"] for i in range(3)]
    assert best == f"trainer_{recovered.index(max(recovered))}"
    assert saved == json.loads((run / best / "eval_results.json").read_text())
    assert again == pytest.approx(saved, rel=1e-5, abs=1e-5)
    assert hub.token not in done.stdout + done.stderr
    for file in (tmp_path / "home").rglob("*"):
        assert not file.is_file() or hub.token.encode() not in file.read_bytes(), file


def test_every_way_to_name_a_dictionary_gives_it(pushed: Repo, run: Path) -> None:
    local, config = load_dictionary(run / "trainer_1")
    assert isinstance(local, AutoEncoderTopK)
    for reference, revision in (("hf://user/first/trainer_1", None), ("hf://user/first@main/trainer_1", None),
                                ("hf://user/first/trainer_1/", pushed.commits[-1][1])):  # fmt: skip
        loaded, its_config = load_dictionary(reference, revision=revision)
        assert same(loaded, local) and its_config == config
    assert same(AutoEncoderTopK.from_pretrained(REPO, subfolder="trainer_1"), local)
    assert same(AutoEncoderTopK.from_pretrained(f"hf://{REPO}/trainer_1", dtype=torch.float32), local)
    jump, _ = load_dictionary("hf://user/first/trainer_2")
    assert same(JumpReluAutoEncoder.from_pretrained(REPO, subfolder="trainer_2", revision="main"), jump)
    with pytest.raises(UserError, match="does not hold a AutoEncoder:"):
        AutoEncoder.from_pretrained(REPO, subfolder="trainer_1")


def test_a_local_folder_goes_before_a_repository_of_that_name(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "trainer_0", tmp_path / "user" / "first")
    assert same(AutoEncoderTopK.from_pretrained("user/first"), load_dictionary(run / "trainer_0")[0])
    assert same(AutoEncoderTopK.from_pretrained(run, subfolder="trainer_0"), load_dictionary(run / "trainer_0")[0])
    with pytest.raises(UserError, match="has no revision 'v1'"):
        load_dictionary("user/first", revision="v1")
    assert hub.requests == []


def test_a_pinned_revision_stays_what_it_was(pushed: Repo, run: Path) -> None:
    first = pushed.commits[-1][1]
    before, _ = load_dictionary(run / "trainer_0")
    shutil.copy(run / "trainer_1" / "ae.safetensors", run / "trainer_0" / "ae.safetensors")
    push_run(run, REPO)
    assert same(load_dictionary(f"hf://{REPO}@{first}/trainer_0")[0], before)
    assert not same(load_dictionary(f"hf://{REPO}/trainer_0")[0], before)
    with pytest.raises(UserError, match=r"Could not load hf://user/first@v9/trainer_0.*HTTP 404"):
        load_dictionary(f"hf://{REPO}/trainer_0", revision="v9")


def test_a_connection_cut_in_the_middle_of_a_file_is_taken_up_again(hub: HubServer, pushed: Repo, run: Path) -> None:
    hub.cut["/trainer_0/ae.safetensors"] = 2
    assert same(load_dictionary(f"hf://{REPO}/trainer_0")[0], load_dictionary(run / "trainer_0")[0])
    assert hub.cut["/trainer_0/ae.safetensors"] == 0
    hub.cut["/trainer_1/config.json"] = 1000
    with pytest.raises(UserError, match="Could not load hf://user/first/trainer_1: no connection to"):
        load_dictionary(f"hf://{REPO}/trainer_1")
    hub.cut.clear()
    load_dictionary(f"hf://{REPO}/trainer_1")


def test_a_wrong_checksum_is_one_error_and_a_damaged_cache_is_mended(pushed: Repo, run: Path) -> None:
    folder = pull_dictionary(parse_reference(f"{REPO}/trainer_0"))
    weights = (folder / "ae.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert same(load_dictionary(f"hf://{REPO}/trainer_0")[0], load_dictionary(run / "trainer_0")[0])
    whole = pushed.files["trainer_0/ae.safetensors"]
    pushed.files["trainer_0/ae.safetensors"] = whole[:-1] + bytes([whole[-1] ^ 1])
    pushed.commit("a flipped bit")
    with pytest.raises(UserError, match="trainer_0/ae.safetensors does not match its checksum"):
        load_dictionary(f"hf://{REPO}/trainer_0")
    load_dictionary(f"hf://{REPO}/trainer_1")


def test_the_cache_serves_without_a_network(hub: HubServer, pushed: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    online, _ = load_dictionary(f"hf://{REPO}/trainer_0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(load_dictionary(f"hf://{REPO}/trainer_0")[0], online)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids the network"):
        load_dictionary(f"hf://{REPO}/trainer_1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert same(load_dictionary(f"hf://{REPO}/trainer_0")[0], online)
    with pytest.raises(UserError, match="no connection to http://127.0.0.1:9"):
        load_dictionary(f"hf://{REPO}/trainer_1")


def test_a_private_repository_needs_the_token(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_run(run, "user/secret", private=True)
    load_dictionary("hf://user/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_anothertokenofnobody")
    with pytest.raises(UserError, match="or the token may not see it") as caught:
        load_dictionary("hf://user/secret/trainer_0")
    assert "hf_another" not in str(caught.value)


@pytest.mark.parametrize(("status", "message"), [(401, "does not accept the token"), (403, "no right to do this")])
def test_a_refusal_is_one_sentence(hub: HubServer, pushed: Repo, status: int, message: str) -> None:
    hub.refuse["/resolve/"] = status
    with pytest.raises(UserError, match=f"Could not load hf://user/first: .*{message}") as caught:
        load_dictionary(f"hf://{REPO}")
    assert hub.token not in str(caught.value)


def test_a_repository_of_the_dictionary_learning_package_loads(hub: HubServer, run: Path, tmp_path: Path) -> None:
    """No checksums, folders of their own, and a pickle, which is read as tensors or not at all."""
    repo = hub.create("model", "other/saes")
    dictionary, config = load_dictionary(run / "trainer_0")
    torch.save(dictionary.state_dict(), tmp_path / "ae.pt")
    for folder in ("resid_post_layer_1/trainer_0/", ""):
        repo.files[f"{folder}ae.pt"] = (tmp_path / "ae.pt").read_bytes()
        repo.files[f"{folder}config.json"] = json.dumps(config).encode()
    repo.commit("theirs")
    assert same(load_dictionary("hf://other/saes/resid_post_layer_1/trainer_0")[0], dictionary)
    assert same(load_dictionary("hf://other/saes")[0], dictionary)
    torch.save({"encoder.weight": print}, tmp_path / "ae.pt")
    repo.files["ae.pt"] = (tmp_path / "ae.pt").read_bytes()
    repo.commit("hostile")
    with pytest.raises(UserError, match="something other than plain tensors and was not loaded"):
        load_dictionary("hf://other/saes")
    del repo.files["config.json"]
    repo.commit("none at the top")
    with pytest.raises(UserError, match="no config.json at its top: name a folder"):
        load_dictionary("hf://other/saes")
    with pytest.raises(UserError, match="no config.json in its folder 'trainer_9'"):
        load_dictionary("hf://other/saes/trainer_9")


@pytest.mark.parametrize(
    "manifest",
    [
        {"version": 2, "best": "trainer_0", "files": {}},
        {"version": 1, "best": 3, "files": {}},
        {"version": 1, "best": "trainer_0", "files": {"trainer_0/config.json": {"sha256": 1, "size": "x"}}},
        {"version": 1, "best": "trainer_0", "files": []},
        [],
    ],
)
def test_a_manifest_that_is_none_is_refused(hub: HubServer, pushed: Repo, manifest: object) -> None:
    pushed.files["checksums.json"] = json.dumps(manifest).encode()
    pushed.commit("hostile")
    with pytest.raises(UserError, match="its checksums.json can't be used"):
        load_dictionary(f"hf://{REPO}")


@pytest.mark.parametrize("best", ["../../etc", "/etc", "trainer_0/../../..", "a\\b", "a//b", "..", "C:"])
def test_a_repository_can_not_point_outside_of_itself(hub: HubServer, pushed: Repo, best: str) -> None:
    manifest = json.loads(pushed.files["checksums.json"])
    pushed.files["checksums.json"] = json.dumps(manifest | {"best": best}).encode()
    pushed.commit("hostile")
    with pytest.raises(UserError, match="not a folder inside a repository"):
        load_dictionary(f"hf://{REPO}")
    with pytest.raises(UserError, match="not a folder inside a repository"):
        AutoEncoderTopK.from_pretrained(REPO, subfolder=best)
    assert not any(".." in request for request in hub.requests)


@pytest.mark.parametrize(
    "reference",
    ["hf://", "hf://user", "hf:///repo", "hf://user/", "hf://../x", "hf://user/repo@", "hf://us er/repo", "hf://u/r?x"],
)
def test_what_is_no_reference_is_said_without_asking(hub: HubServer, reference: str) -> None:
    with pytest.raises(UserError, match="write hf://user/repo or"):
        load_dictionary(reference)
    assert hub.requests == []


def test_two_revisions_or_folders_are_refused_and_a_near_name_is_offered(pushed: Repo) -> None:
    with pytest.raises(UserError, match="give one"):
        load_dictionary("hf://user/first@a/trainer_0", revision="b")
    with pytest.raises(UserError, match="give one"):
        AutoEncoderTopK.from_pretrained("hf://user/first/trainer_0", subfolder="trainer_1")
    with pytest.raises(UserError, match="no dictionary 'trainer_7', but trainer_0, trainer_1, trainer_2. Did you mean"):
        load_dictionary("hf://user/first/trainer_7")


def test_a_config_of_another_shape_is_refused(run: Path) -> None:
    config = json.loads((run / "trainer_0" / "config.json").read_text())
    config["trainer"]["dict_size"] = 65
    (run / "trainer_0" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="have dict_size 64, but config.json says 65"):
        load_dictionary(run / "trainer_0")


def test_no_network_is_said_at_once(tmp_path: Path) -> None:
    """A whole process with the client's own waits, which are added up: huggingface_hub by itself tries for 20 s."""
    environment = fresh_process("http://127.0.0.1:9", tmp_path / "home")
    script = """
import atexit, time
waits = []
time.sleep = waits.append
atexit.register(lambda: print(sum(waits)))
from dictionary_learning import load_dictionary
load_dictionary("hf://user/first")
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert float(done.stdout) < 5
    assert "UserError: Could not load hf://user/first: no connection to http://127.0.0.1:9" in done.stderr
