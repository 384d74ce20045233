"""A run goes to the Hub in one commit, or not at all, and the same command finishes what was cut off."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from dictionary_learning import demo
from dictionary_learning import hub as hub_module
from dictionary_learning.cli import main as cli
from dictionary_learning.errors import UserError
from dictionary_learning.hub import push_run
from tests.hub.conftest import PATIENT, SMALL, fresh_process
from tests.hub_server import HubServer, Pull

REPO = "user/first"
ADDS_UP_WAITS = """
import atexit, sys, time
waits = []
time.sleep = waits.append
atexit.register(lambda: print(sum(waits)))
from dictionary_learning.cli import main
sys.exit(main(sys.argv[1:]))
"""
TRAINER = ("ae.safetensors", "config.json", "eval_results.json")


def whole(repo_files: dict[str, bytes]) -> bool:
    """Whether the head holds a run whose every file is what checksums.json says."""
    manifest = json.loads(repo_files["checksums.json"])
    assert set(manifest["files"]) == set(repo_files) - {"checksums.json"}
    return all(
        (entry["sha256"], entry["size"]) == (hashlib.sha256(repo_files[path]).hexdigest(), len(repo_files[path]))
        for path, entry in manifest["files"].items()
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_is_one_commit_of_everything_but_states_and_checkpoints(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (run / "trainer_0" / "checkpoints").mkdir()
    (run / "trainer_0" / "checkpoints" / "ae_1.safetensors").write_bytes(b"x")
    (run / "wandb").mkdir()
    (run / "wandb" / "log").write_text("x")
    (run / "report.html").write_text("<html></html>")
    before = tree(run)
    assert cli(["push", str(run), REPO]) == 0
    repo = hub.repos[f"models/{REPO}"]
    trainers = [f"trainer_{index}/{name}" for index in range(3) for name in TRAINER]
    others = ["README.md", "checksums.json", "front.png", "metrics.jsonl", "report.html", "run.json", "summary.csv"]
    assert sorted(repo.files) == sorted([*others, *trainers])
    assert whole(repo.files) and len(repo.commits) == 2 and not repo.private
    assert repo.files["trainer_1/ae.safetensors"] == (run / "trainer_1/ae.safetensors").read_bytes()
    assert f"Pushed to {hub.url}/{REPO} (commit {repo.commits[-1][1][:12]})" in capsys.readouterr().out
    assert tree(run) == before, "a push only reads the run"


def test_a_second_push_of_the_same_run_changes_nothing(hub: HubServer, run: Path) -> None:
    first, second = push_run(run, REPO), push_run(run, REPO)
    assert first == second and len(hub.repos[f"models/{REPO}"].commits) == 2


def test_only_best_takes_one_dictionary_and_drops_the_others_of_an_earlier_push(hub: HubServer, run: Path) -> None:
    push_run(run, REPO)
    repo = hub.repos[f"models/{REPO}"]
    repo.files["trainer_0/notes.md"] = b"mine"
    repo.commit("notes")
    best = json.loads(repo.files["checksums.json"])["best"]
    assert cli(["push", str(run), REPO, "--only", "best"]) == 0
    weights = [path for path in repo.files if path.endswith("safetensors")]
    assert weights == [f"{best}/ae.safetensors"] and len(repo.commits) == 4
    assert repo.files.pop("trainer_0/notes.md") == b"mine", "files of others stay"
    assert whole(repo.files) and f"only `{best}` is here" in repo.files["README.md"].decode()


def test_private_makes_a_private_repository_and_never_publishes_into_a_public_one(hub: HubServer, run: Path) -> None:
    push_run(run, "user/secret", private=True)
    assert hub.repos["models/user/secret"].private
    hub.create("model", "user/open")
    with pytest.raises(UserError, match="is public: nothing was pushed"):
        push_run(run, "user/open", private=True)
    assert hub.repos["models/user/open"].files == {}


def test_local_paths_stay_at_home(hub: HubServer, run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home_of_somebody"
    record = json.loads((run / "run.json").read_text())
    record["config"]["corpus"] = str(home / "notes.jsonl")
    record["config"]["model_name"] = str(home / "model")
    (run / "run.json").write_text(json.dumps(record))
    push_run(run, REPO)
    files = hub.repos[f"models/{REPO}"].files
    assert whole(files)
    assert [path for path, data in files.items() if str(tmp_path).encode() in data] == []
    assert json.loads(files["run.json"])["config"]["corpus"] == "notes.jsonl"
    card = files["README.md"].decode()
    assert "--corpus PATH/TO/notes.jsonl --model_name PATH/TO/model" in card and "base_model" not in card


def test_a_large_sweep_goes_through_a_pull_request_and_appears_at_once(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_run(run, REPO)
    repo = hub.repos[f"models/{REPO}"]
    head = dict(repo.files)
    monkeypatch.setattr(hub_module, "COMMIT_FILES", 4)
    (run / "metrics.jsonl").unlink()
    (run / "summary.csv").write_bytes((run / "summary.csv").read_bytes().replace(b"resid", b"Resid"))
    hub.refuse["/merge"] = 500
    with pytest.raises(UserError, match="the Hub has trouble"):
        push_run(run, REPO)
    assert repo.files == head and len(repo.commits) == 2, "nothing of it is on the main branch"
    assert len(repo.pulls) == 1
    hub.refuse.clear()
    hub.requests.clear()
    repo.pulls[0].author, strangers = "stranger", repo.pulls[0]
    repo.pulls.append(Pull(strangers.title, dict(strangers.files)))
    assert push_run(run, REPO).commit == repo.commits[-1][1]
    assert [pull.status for pull in repo.pulls] == ["open", "merged"], "it goes on with its own pull request that waits"
    assert not any("PUT /storage/" in request for request in hub.requests), "nothing was sent twice"
    assert whole(repo.files) and "metrics.jsonl" not in repo.files and len(repo.commits) == 3


# ------------------------------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize(
    ("status", "part", "message"),
    [
        (401, "/api/repos/create", "does not accept the token: set HF_TOKEN or run `hf auth login`"),
        (403, "/api/repos/create", "no right to do this: use one with write access"),
        (404, "/preupload/", "no such repository"),
        (409, "/commit/", "being changed by someone else: try again"),
        (412, "/commit/", "changed by someone else meanwhile: try again"),
        (429, "/commit/", "asks to slow down"),
        (500, "/preupload/", "the Hub has trouble: try again later"),
        (500, "/storage/", "the Hub has trouble: try again later"),
    ],
)
def test_a_refusal_is_one_sentence_without_the_token_and_the_head_stays(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], status: int, part: str, message: str
) -> None:
    hub.refuse[part] = status
    assert cli(["push", str(run), REPO]) == 2
    error = capsys.readouterr().err
    (sentence,) = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert f"Could not push to {REPO}: " in sentence and message in sentence and f"HTTP {status}: " in sentence
    assert hub.token not in error and "Traceback" not in error
    repo = hub.repos.get(f"models/{REPO}")
    assert repo is None or repo.files == {}
    hub.refuse.clear()
    assert cli(["push", str(run), REPO]) == 0
    assert whole(hub.repos[f"models/{REPO}"].files)


def test_a_connection_cut_in_the_middle_of_a_file_is_tried_again(hub: HubServer, run: Path) -> None:
    hub.cut["/storage/"] = 2
    push_run(run, REPO)
    assert hub.cut["/storage/"] <= 0 and whole(hub.repos[f"models/{REPO}"].files)


def test_a_lost_answer_to_the_commit_is_found_to_be_done_by_the_same_command(hub: HubServer, run: Path) -> None:
    hub.cut["/commit/"] = 1
    with pytest.raises(UserError, match="no connection to .*check the network"):
        push_run(run, REPO)
    push_run(run, REPO)
    assert whole(hub.repos[f"models/{REPO}"].files) and len(hub.repos[f"models/{REPO}"].commits) == 2


@pytest.mark.parametrize("place", ["/storage/", "/commit/"])
def test_killed_in_the_middle_the_same_command_finishes(hub: HubServer, run: Path, tmp_path: Path, place: str) -> None:
    script = f"{PATIENT}\nimport sys\nfrom dictionary_learning.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "push", str(run), REPO]
    environment = fresh_process(hub.url, tmp_path / "home")
    hub.slow[place] = 1e6  # nothing of what it asked for there ever happens
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not any(place in request for request in hub.requests):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert hub.repos[f"models/{REPO}"].files == {}, "the head is what it was"
    hub.slow.clear()
    push_run(run, REPO)
    assert whole(hub.repos[f"models/{REPO}"].files)


def test_a_run_that_is_not_whole_is_refused_before_the_hub_is_asked(hub: HubServer, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run in"):
        push_run(tmp_path, REPO)
    (run / "trainer_1" / "eval_results.json").unlink()
    with pytest.raises(UserError, match=r"not finished \(trainer_1/eval_results.json is missing\).*--resume"):
        push_run(run, REPO)
    (run / "trainer_1" / "eval_results.json").write_text("{}")
    (run / "summary.csv").write_text("trainer,l0\n")
    with pytest.raises(UserError, match="is not a run's summary"):
        push_run(run, REPO)
    (run / "run.json").write_text((run / "run.json").read_text().replace('"complete"', '"stopped: SIGINT"'))
    with pytest.raises(UserError, match="stopped: SIGINT"):
        push_run(run, REPO)
    assert not any("/api/" in request for request in hub.requests)


@pytest.mark.parametrize("name", ["metrics.jsonl", "trainer_1/config.json", "trainer_0"])
def test_what_a_run_points_at_is_not_pushed(hub: HubServer, run: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(run, theirs)
    (theirs / name).rename(tmp_path / "mine")
    (theirs / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name}.*' is a link out of the run"):
        push_run(theirs, REPO)
    assert hub.repos == {}


def test_what_can_be_known_before_the_training_is_said_before_it(
    hub: HubServer, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    command = ["--save_dir", str(tmp_path / "new"), *SMALL]
    assert demo.main([*command, "--hf_repo_id", "a/b/c"]) == 2
    assert "--hf_repo_id 'a/b/c' is not a name of a Hub repository" in capsys.readouterr().err
    assert demo.main([*command, "--hf_private"]) == 2
    assert "needs --hf_repo_id" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert demo.main([*command, "--hf_repo_id", REPO]) == 2
    assert "--hf_repo_id needs a Hugging Face token: set HF_TOKEN or run `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_a_network_the_run_is_whole_and_the_command_for_later_works(
    hub: HubServer,
    workplace: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The end of the main job (of a resumed run, which is quick), and no byte of it holds the token."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    save_dir = run.rename(tmp_path / "a run")
    code = demo.main(["--save_dir", str(save_dir), *SMALL, "--resume", "--hf_repo_id", REPO, "--hf_private"])
    out, err = capfd.readouterr()
    assert code == hub_module.PUSH_FAILED_EXIT == 4
    assert f"Could not push to {REPO}: no connection to http://127.0.0.1:9" in err and "Traceback" not in err
    command = f"sae-factory push '{save_dir}' {REPO} --private"
    assert "The results are whole in" in out and command in out
    assert json.loads((save_dir / "run.json").read_text())["status"] == "complete"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert cli(["push", str(save_dir), REPO, "--private"]) == 0
    files = hub.repos[f"models/{REPO}"].files
    assert whole(files) and hub.repos[f"models/{REPO}"].private
    out2, err2 = capfd.readouterr()
    assert hub.token not in out + err + out2 + err2
    for path, data in {**tree(tmp_path), **files}.items():
        assert hub.token.encode() not in data, path


@pytest.mark.parametrize("kind", ["refused", "silent", "offline"])
def test_no_network_is_said_soon(run: Path, tmp_path: Path, kind: str) -> None:
    """A whole process with the waits between its tries, which are added up: no clock tells on a busy machine.

    `silent` is an address that takes the call and never answers; the client by itself would wait for ever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1] if kind == "silent" else 9
        more = {"HF_HUB_OFFLINE": "1"} if kind == "offline" else {}
        environment = fresh_process(f"http://127.0.0.1:{port}", tmp_path / "home", **more)
        command = [sys.executable, "-c", ADDS_UP_WAITS, "push", str(run), REPO]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)  # it ends by itself
    assert done.returncode == 2 and "Traceback" not in done.stderr and float(done.stdout) < 5
    (sentence,) = done.stderr.strip().splitlines()
    refused = "no connection to http://127.0.0.1:9"
    expected = {"refused": refused, "silent": "Timeout", "offline": "HF_HUB_OFFLINE forbids the network"}[kind]
    assert sentence.startswith(f"Error: Could not push to {REPO}: ") and expected in sentence
    assert HubServer.token not in done.stdout + done.stderr


def test_an_exception_never_shows_the_token(hub: HubServer, run: Path) -> None:
    """Not its message, not its traceback, not what it was made from."""
    hub.refuse["/commit/"] = 403  # and the answer quotes the token
    with pytest.raises(UserError) as caught:
        push_run(run, REPO)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "***" in str(caught.value) and hub.token not in shown


def test_without_matplotlib_the_card_has_no_picture_and_the_push_says_so(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli(["push", str(run), REPO]) == 0
    files = hub.repos[f"models/{REPO}"].files
    assert "front.png" not in files and "front.png" not in files["README.md"].decode()
    assert "Its card has no picture: matplotlib is not installed" in capsys.readouterr().out


def test_a_run_that_changes_under_the_push_does_not_reach_the_head_half(hub: HubServer, run: Path) -> None:
    """The head has moved since it was looked at: somebody else pushed."""
    push_run(run, REPO)
    repo = hub.repos[f"models/{REPO}"]
    other = shutil.copytree(run, run.parent / "other")
    (other / "metrics.jsonl").write_text("{}\n")

    def somebody() -> None:
        repo.files["theirs.txt"] = b"theirs"
        repo.commit("theirs")

    hub.meanwhile["/preupload/"] = somebody
    with pytest.raises(UserError, match="changed by someone else meanwhile"):
        push_run(other, REPO)
    assert not hub.meanwhile
    push_run(other, REPO)
    assert repo.files.pop("theirs.txt") == b"theirs" and whole(repo.files)
