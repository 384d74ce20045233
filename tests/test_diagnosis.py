"""What `sae-factory doctor` finds on a machine that lacks something: within what time, and what it never says."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dictionary_learning import diagnosis
from dictionary_learning.diagnosis import Finding

HUB_TOKEN, WANDB_KEY = "hf_PlantedTokenThatNobodyMaySee", "planted0wandb0key0that0nobody0may0see000"


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nobody is asked, but where a test says so
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def fails_to_import(monkeypatch: pytest.MonkeyPatch, broken: str, error: Exception) -> None:
    real = importlib.import_module

    def fake(name: str, *rest: Any) -> Any:
        if name == broken:
            raise error
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", fake)


# ------------------------------------------------------------------------------------------- versions


def test_a_version_outside_of_the_range_is_named_with_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "requires", lambda name: ["nnsight>=0.8,<0.9", 'wandb>=9 ; extra == "wandb"'])
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.1" if name == "nnsight" else real(name))
    findings = by_name(diagnosis.versions())
    assert findings["nnsight"] == Finding("versions", "nnsight", "warn", "0.5.1", "pip install 'nnsight<0.9,>=0.8'")
    assert findings["torch"].status == "ok"


def test_without_its_own_metadata_versions_are_only_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert {finding.status for finding in diagnosis.versions()} == {"ok"}


def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    finding = by_name(diagnosis.versions())["python"]
    assert finding.status == "fail" and finding.remedy == "use Python 3.11 or newer, below 3.13"


def test_a_torchvision_built_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.20" if name == "torchvision" else real(name))
    fails_to_import(monkeypatch, "torchvision", RuntimeError("operator torchvision::nms does not exist"))
    finding = by_name(diagnosis.versions())["torchvision"]
    assert finding.status == "warn" and "nms" in finding.found and "uninstall" in finding.remedy


def test_a_missing_extra_says_what_will_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_to_import(monkeypatch, "wandb", ImportError("no wandb"))
    finding = by_name(diagnosis.extras())["wandb"]
    assert finding.status == "warn" and "--use_wandb" in finding.found
    assert finding.remedy == "pip install 'sae-factory[wandb]'"


def test_what_is_for_a_gpu_is_missed_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_to_import(monkeypatch, "pynvml", ImportError("no pynvml"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "gpu" not in by_name(diagnosis.extras())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert by_name(diagnosis.extras())["gpu"].status == "warn"


def test_the_remedy_is_what_is_missing_and_not_what_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_to_import(monkeypatch, "nnsight", ModuleNotFoundError("No module named 'yaml.x'", name="yaml.x"))
    assert by_name(diagnosis.versions())["nnsight"].remedy == "pip install 'pyyaml'"
    fails_to_import(monkeypatch, "nnsight", ImportError("cannot import name 'x'", name="torch"))
    assert by_name(diagnosis.versions())["nnsight"].remedy == "pip install 'nnsight'"


# ------------------------------------------------------------------------------------------- devices


def test_a_cuda_build_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    finding = by_name(diagnosis.devices())["CUDA"]
    assert finding.status == "warn" and "12.8" in finding.found and "driver" in finding.remedy


def test_a_gpu_that_is_hidden_is_not_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    finding = by_name(diagnosis.devices())["CUDA"]
    assert finding.found == "CUDA_VISIBLE_DEVICES='7' leaves torch no GPU" and "nvidia-smi -L" in finding.remedy


def test_a_cpu_build_beside_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: "/bin/" + name)
    finding = by_name(diagnosis.devices())["CUDA"]
    assert finding.status == "warn" and finding.remedy.startswith("install torch's CUDA build")


def test_gpus_are_described_and_a_full_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="H100", major=9, minor=0)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ([70e9, 3e9][index], 80e9))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    findings = by_name(diagnosis.devices())
    assert findings["cuda:0"].status == "ok" and "H100, 80 GB (70 free), compute 9.0" in findings["cuda:0"].found
    assert findings["cuda:1"].status == "warn" and "another process" in findings["cuda:1"].remedy
    assert findings["NCCL"].status == findings["triton"].status == "warn"


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    finding = by_name(diagnosis.devices())["CPU"]
    assert finding.status == "warn" and finding.remedy.startswith("set OMP_NUM_THREADS=")


# ------------------------------------------------------------------------------------------- accounts


class Server:
    """An HTTP server that answers every request in one way, or not at all."""

    def __init__(self, status: int, body: str, hang: threading.Event | None = None) -> None:
        server = self
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(str(self.headers.get("authorization")))
                if hang is not None:
                    hang.wait()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("localhost", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://localhost:{self.http.server_address[1]}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Hub line with a planted token, as a server of a given kind answers."""

    def ask(
        status: int = 200, body: str = "{}", hang: threading.Event | None = None, token: str | None = HUB_TOKEN
    ) -> tuple[Finding, Server]:
        server = Server(status, body, hang)
        if hang is None:
            monkeypatch.setattr(diagnosis, "ANSWER_S", 60.0)  # the machine may be busy
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        try:
            return by_name(diagnosis.accounts())["Hugging Face Hub"], server
        finally:
            if hang is not None:
                hang.set()
            server.http.shutdown()
            server.http.server_close()

    return ask


def test_who_is_logged_in_and_never_the_token(hub: Any) -> None:
    finding, server = hub(body=json.dumps({"name": f"ann\x1b[31m {HUB_TOKEN}", "type": "user"}))
    assert finding.status == "ok" and finding.found == "logged in as ann?[31m ***"
    assert server.asked == [f"Bearer {HUB_TOKEN}"]


def test_a_token_that_is_not_accepted(hub: Any) -> None:
    finding, _ = hub(401, f"invalid token {HUB_TOKEN}")
    assert finding.status == "warn" and "HTTP 401" in finding.found and "hf auth login" in finding.remedy
    assert HUB_TOKEN not in repr(finding)


def test_who_is_not_logged_in_hears_whether_the_hub_answers(hub: Any) -> None:
    finding, server = hub(404, "no such model", token=None)
    assert finding.status == "warn" and finding.found.startswith("reached, not logged in")
    assert server.asked == ["None"]
    finding, _ = hub(500, "trouble", token=None)
    assert finding.found.startswith("not reached") and "network" in finding.remedy


def test_what_addresses_hold_is_not_shown() -> None:
    said = diagnosis.plain("no answer from http://ann:s3cret@proxy:8080, nor https://hub/x@y", "hub")
    assert said == "no answer from http://***@proxy:8080, nor https://***/x@y"


def test_a_server_in_trouble(hub: Any) -> None:
    finding, _ = hub(500, f"trouble {HUB_TOKEN}")
    assert finding.status == "warn" and "not reached" in finding.found
    assert HUB_TOKEN not in repr(finding)


def test_a_hub_that_hangs_is_not_waited_for(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "ANSWER_S", 0.5)
    finding, _ = hub(hang=threading.Event())  # which ends when there is a finding
    assert finding.status == "warn" and "no answer within" in finding.found


def test_offline_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(diagnosis, "within", lambda *_: pytest.fail("somebody is asked"))
    findings = by_name(diagnosis.accounts())
    assert findings["Hugging Face Hub"].remedy == "unset HF_HUB_OFFLINE to load from the Hub"
    assert findings["Weights & Biases"].found == "WANDB_MODE is offline"


def fake_wandb(viewer: Any) -> Any:
    class Api:
        def __init__(self, timeout: int, api_key: str) -> None:
            assert (timeout, api_key) == (5, WANDB_KEY)

        @property
        def viewer(self) -> Any:
            return viewer()

    return SimpleNamespace(Api=Api)


def planted(monkeypatch: pytest.MonkeyPatch, viewer: Any) -> Finding:
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(viewer))
    return by_name(diagnosis.accounts())["Weights & Biases"]


def test_weights_and_biases_says_who_and_never_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    finding = planted(monkeypatch, lambda: SimpleNamespace(username=f"ann {WANDB_KEY}"))
    assert (finding.status, finding.found) == ("ok", "logged in as ann ***")


def test_a_key_of_wandb_login_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {WANDB_KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    finding = planted(monkeypatch, lambda: SimpleNamespace(username="ann"))
    assert finding.found == "logged in as ann"


def test_a_refused_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise SystemExit(f"bad key {WANDB_KEY}")

    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    finding = planted(monkeypatch, refuse)
    assert finding.status == "warn" and "SystemExit: bad key ***" in finding.found


def test_nobody_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = planted(monkeypatch, lambda: None)
    assert (finding.status, finding.found) == ("warn", "not logged in")


# ------------------------------------------------------------------------------------------- room


def test_a_folder_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(diagnosis.tempfile, "TemporaryFile", refuse)
    finding = by_name(diagnosis.room(tmp_path))["writing"]
    assert finding.status == "fail" and "Read-only file system" in finding.found


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    findings = by_name(diagnosis.room(tmp_path / "absent"))
    assert findings["disk"].status == findings["writing"].status == "fail"


def test_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    monkeypatch.setattr(diagnosis, "free_memory", lambda: int(2e9))
    monkeypatch.setattr(diagnosis, "WRITE_MB_S", 1e9)
    findings = by_name(diagnosis.room(tmp_path))
    assert {findings[name].status for name in ("memory", "disk", "Hub cache", "writing")} == {"warn"}
    assert findings["memory"].found == "2.0 GB free" and findings["disk"].remedy.startswith("free some space")
