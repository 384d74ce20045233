"""A run whose model and corpus lie on a Hub where both are changed before it is resumed.

    python tests/faults/hub_harness.py

The Hub is the stand-in of `tests/hub_server.py`, in this process; it is read by the true `datasets` and `transformers`,
which is why this is a process of its own: the tests' own switch the network off before these are imported. Exit code:
0 if all is as promised.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
from hub_server import HubServer, Repo  # noqa: E402
from kill_harness import CONFIG, results  # noqa: E402

for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):  # kill_harness sets the first
    os.environ.pop(offline, None)


def push_texts(repo: Repo, word: str) -> str:
    texts = [f"Patient {i} takes {word} {i % 7} for {i % 11} days, and joint {i % 5} subsides." for i in range(240)]
    repo.files["train.jsonl"] = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    return repo.commit(word)


def push_model(repo: Repo, scale: float) -> str:
    from safetensors.torch import load, save

    from data_prep.embedded import MODEL_DIR

    files = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir() if path.is_file()}
    weights = {name: tensor * scale for name, tensor in load(files["model.safetensors"]).items()}
    repo.files = files | {"model.safetensors": save(weights, {"format": "pt"})}
    return repo.commit(f"times {scale}")


def job(folder: str, *arguments: str) -> tuple[int, str]:
    """(exit code, what was printed)."""
    from dictionary_learning import demo

    plain = ["--save_dir", folder, "--config", "config.json", "--device", "cpu", "--log_steps", "1", "--no-report"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = demo.main([*plain, *arguments])
    return code, out.getvalue()


def stop_at(step: int) -> None:
    """Send this process a SIGINT, once, behind a step."""
    from dictionary_learning.training_run import TrainingRun

    true_step = TrainingRun._one_step

    def one_step(run: TrainingRun) -> None:
        true_step(run)
        if run.step == step:
            TrainingRun._one_step = true_step  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGINT)

    TrainingRun._one_step = one_step  # type: ignore[method-assign]


def check(hub: HubServer) -> None:
    texts, model = hub.create("dataset", "user/texts"), hub.create("model", "user/model")
    old_texts, old_model = push_texts(texts, "drug"), push_model(model, 1.0)
    few = {"dictionaries": CONFIG["dictionaries"][:1], "num_tokens": 20 * 256}  # type: ignore[index]
    Path("config.json").write_text(json.dumps(CONFIG | few | {"corpus": "user/texts", "model_name": "user/model"}))
    assert job("unbroken")[0] == 0
    stop_at(8)
    assert job("run")[0] == 130
    record = json.loads(Path("run/run.json").read_text())
    assert record["corpus_commits"] == {"user/texts": old_texts} and old_texts in record["corpus_fingerprint"]
    assert record["model"]["revision"] == old_model, record["model"]

    new_texts, new_model = push_texts(texts, "syrup"), push_model(model, 1.5)
    code, said = job("run", "--resume")
    assert code == 0 and "Resuming at step 8" in said, said
    assert results(Path("run")) == results(Path("unbroken")), "the resumed run read something else"

    stop_at(8)
    assert job("run", "--overwrite")[0] == 130
    assert json.loads(Path("run/run.json").read_text())["corpus_commits"] == {"user/texts": new_texts}
    push_texts(texts, "powder")
    del texts.snapshots[new_texts]
    code, said = job("run", "--resume")
    assert code == 2 and f"commit {new_texts[:12]}" in said and "--override" in said and "Traceback" not in said, said
    code, said = job("run", "--resume", "--override")
    assert code == 0 and "Warning: The corpus 'user/texts' has changed" in said, said
    assert json.loads(Path("run/run.json").read_text())["model"]["revision"] == new_model


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="hub-") as work, HubServer() as hub:
        os.chdir(work)
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HOME=f"{work}/hub", HF_HUB_DISABLE_XET="1")
        os.environ.update(HF_HUB_ETAG_TIMEOUT="500", HF_HUB_DOWNLOAD_TIMEOUT="500")  # it always answers, if late
        from dictionary_learning import hub_client

        hub_client.REACH_SECONDS = hub_client.LOOK_SECONDS = 500.0
        check(hub)
    print("The resumed run read what it began with.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
