"""train_sae.ipynb runs from top to bottom, and its committed outputs are small and clean.

`python tests/test_notebook.py` runs it and writes those outputs anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
Config = pytest.importorskip("traitlets.config").Config
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "train_sae.ipynb"
SETTINGS, PUSH = "settings", "push"  # cells, by id
BYTES = 400_000
TAGS = {"h4", "div", "span", "b"}  # of the examples


def execute(folder: Path, environment: Mapping[str, str] | None = None, **settings: Any) -> Any:
    """The notebook with its outputs, run in `folder`; `settings` replace the values in its first cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if cell["id"] == SETTINGS)
    for name, value in settings.items():
        cell["source"], found = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value!r}", cell["source"])
        assert found == 1, name
    before = dict(os.environ)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads that wait for each other cost more than they give
    # Sockets of this folder: a free TCP port may be somebody else's by the time that the kernel binds it.
    short = Path(tempfile.mkdtemp(dir="/tmp" if os.path.isdir("/tmp") else None))  # their paths may have 107 characters
    ours = Config({"KernelManager": {"transport": "ipc", "connection_file": str(short / "kernel.json")}})
    try:
        client = nbclient.NotebookClient(
            notebook,
            config=ours,
            timeout=500,
            startup_timeout=500,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        return client.execute()
    finally:
        shutil.rmtree(short, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)


def cleaned(notebook: Any) -> Any:
    """Without progress bars and warnings, which differ from run to run."""
    for cell in notebook.cells:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            for output in cell["outputs"]:
                output.pop("transient", None)
    notebook["metadata"] = {"kernelspec": notebook["metadata"]["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def texts(notebook: Any, cell_id: str) -> str:
    """Everything that a cell printed or showed, but pictures."""
    cell = next(cell for cell in notebook.cells if cell["id"] == cell_id)
    shown = [output.get("text", "") for output in cell["outputs"]]
    shown += [output.get("data", {}).get("text/html", "") for output in cell["outputs"]]
    return "".join(shown)


@pytest.mark.timeout(600)  # under a minute alone
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = cleaned(execute(tmp_path))
    assert re.search(r"54,000 \+ 6,000 activations of width 192", texts(notebook, "activations"))
    explained = re.search(r"frac_variance_explained +(\S+)", texts(notebook, "evaluate"))
    l0 = re.search(r"l0 +(\S+)", texts(notebook, "evaluate"))
    assert explained and 0.6 < float(explained[1]) < 1 and l0 and 10 < float(l0[1]) < 25
    page = texts(notebook, "examples")
    assert len(re.findall(r"<h4>Latent \d+", page)) == 5 and page.count("<div") == 25
    assert not set(re.findall(r"<[/!]?(\w*)", page)) - TAGS
    assert "['ae.safetensors', 'config.json']" in texts(notebook, "save")
    assert texts(notebook, PUSH) == "", "nothing is pushed unasked"
    assert len(nbformat.writes(notebook)) < BYTES
    assert (tmp_path / "runs" / "notebook" / "trainer_0" / "ae.safetensors").is_file()


@pytest.mark.timeout(600)
def test_with_the_hub_it_reads_activations_from_there_and_pushes_the_dictionary(tmp_path: Path) -> None:
    from tests.hub_server import HubServer

    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE")
    with HubServer() as server:
        kept = {name: value for name, value in os.environ.items() if name not in offline}
        environment = kept | {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        hostile = [
            {"text": f"Case {i}: <script>alert({i})</script> <img src=x onerror=y> &amp; pain." * 5} for i in range(300)
        ]
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in hostile))
        command = [sys.executable, "-m", "dictionary_learning", "harvest", "--out", "saved", "--layers", "1"]
        command += ["--corpus", "texts.jsonl", "--num_tokens", "20000", "--push_to", "me/activations"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        notebook = execute(tmp_path, environment, REPO="me/activations", PUSH_TO="me/dictionary", STEPS=40)
    assert "18,000 + 2,000 activations of width 192 at resid_post_layer_1" in texts(notebook, "activations")
    page = texts(notebook, "examples")
    assert "&lt;" in page and not set(re.findall(r"<[/!]?(\w*)", page)) - TAGS, "text was not escaped"
    assert "load_dictionary('hf://me/dictionary/trainer_0')" in texts(notebook, PUSH)
    head = server.repos["models/me/dictionary"].at("main")
    assert head is not None and {"trainer_0/ae.safetensors", "trainer_0/config.json"} <= set(head[1])
    assert server.token not in nbformat.writes(notebook)


def test_the_committed_outputs_are_those_of_one_clean_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert texts(notebook, "examples").count("<div") == 25
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < BYTES
    assert not re.search(r"/(home|root|tmp|work|Users)/", re.sub(r'"image/png": "[^"]*"', "", text))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(cleaned(execute(Path(folder))), NOTEBOOK)
    sys.exit(0)
