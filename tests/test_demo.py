"""The main job from the command line: a small sweep on the embedded model, stopped, resumed, and fed bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dictionary_learning import demo, storage
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.cli import main as cli
from dictionary_learning.utils import load_dictionary

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--num_tokens",
    "6144",
    "--batch_size",
    "256",
    "--widths",
    "64",
    "--buffer_contexts",
    "64",
    "--eval_tokens",
    "1500",
    "--no-report",
]
ONE = ["--architectures", "top_k", "--layers", "1"]
CONFIG = """
from dictionary_learning.config import Sweep
from demo_config_original import PRESETS
SWEEP = Sweep(architectures=("top_k", "standard", "jump_relu"), sparsities={sparsities})
"""

WAITS_FOR_A_SIGNAL = """
import time
from pathlib import Path
from dictionary_learning.training_run import TrainingRun
one_step = TrainingRun._one_step
def waiting(run):
    one_step(run)
    while run.step == 13 and not run.stop_requested:
        Path("broken/waits").touch()
        time.sleep(0.01)
TrainingRun._one_step = waiting
"""


@pytest.fixture
def small_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose demo_config.py has one sparsity an architecture."""
    write_sweep(tmp_path, {"top_k": {"k": (8,)}, "standard": {"l1_penalty": (0.1,)}, "jump_relu": {"target_l0": (8,)}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_sweep(folder: Path, sparsities: dict[str, dict[str, tuple[float, ...]]]) -> None:
    shutil.copy(ROOT / "demo_config.py", folder / "demo_config_original.py")
    (folder / "demo_config.py").write_text(CONFIG.format(sparsities=sparsities))


def test_a_sweep_leaves_everything_on_disk_and_a_table(small_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--save_dir", "run", "--layers", "1", "2", "--save_checkpoints", *SMALL]) == 0
    run = small_sweep / "run"
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["config"]["dictionaries"][3]["hook_point"] == "resid_post_layer_2"
    assert len(record["corpus_fingerprint"]) == 64
    rows = list(csv.DictReader((run / "summary.csv").open()))
    assert [float(row["l0"]) for row in rows[:3]] == sorted(float(row["l0"]) for row in rows[:3])
    assert {row["hook_point"] for row in rows[:3]} == {"resid_post_layer_1"}
    assert len(rows) == 6
    for index in range(6):
        folder = run / f"trainer_{index}"
        dictionary, config = load_dictionary(folder)
        assert (dictionary.dict_size, dictionary.activation_dim) == (64, 192)
        assert config["trainer"]["layer"] == (1 if index < 3 else 2)
        assert config["trainer"]["norm_factor"] > 1
        results = json.loads((folder / "eval_results.json").read_text())
        assert results["tokens"] >= 1500
        assert results["loss_original"] < results["loss_reconstructed"] < results["loss_zero"]
        assert list((folder / "checkpoints").iterdir())
    top_k = json.loads((run / "trainer_0" / "eval_results.json").read_text())
    assert top_k["l0"] == pytest.approx(8, abs=0.01)
    assert top_k["frac_variance_explained"] > 0.3
    out = capsys.readouterr().out
    assert "trainer_0" in out and "loss recovered" in out and "rows a context" in out
    assert "step 24, loss" in out


def test_a_sweep_ends_with_an_analysis_and_a_report(small_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each architecture one dictionary is analysed; the page, its data and the run are of the same run."""
    small = [word for word in SMALL if word != "--no-report"]
    assert demo.main(["--save_dir", "run", "--layers", "1", *small, "--eval_tokens", "400"]) == 0
    out, folder = capsys.readouterr().out, AnalysisFolder(Path("run/analysis"))
    assert folder.info["status"] == "complete" and len(folder.names) == 3 and folder.info["rows"] >= 1600
    assert (len(folder.table("trainer_0")["label"]), folder.info["settings"]["ablate"]) == (64, 32)
    page = Path("run/report.html").read_text()
    assert page.startswith("<!doctype html>") and len(page) > 100_000  # its data is in it, compressed
    assert "The report: run/report.html" in out and json.loads(Path("run/run.json").read_text())["status"] == "complete"


def test_a_report_that_fails_does_not_fail_the_run(
    small_sweep: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("dictionary_learning.analysis.job.analyze", broken)
    small = [word for word in SMALL if word != "--no-report"]
    assert demo.main(["--save_dir", "run", *ONE, *small]) == 0
    assert "The run was not analysed (RuntimeError: no such thing); again with: sae-factory analyze run" in caplog.text
    assert Path("run/report.html").is_file()  # without its latents


def test_evaluation_reproduces_from_the_saved_files_alone(small_sweep: Path) -> None:
    """What is on disk takes raw activations: no norm factor or other hidden state is needed."""
    from dictionary_learning.config import load_config
    from dictionary_learning.corpus import open_corpus
    from dictionary_learning.evaluation import evaluate_dictionaries

    assert demo.main(["--save_dir", "run", "--layers", "1", *SMALL]) == 0
    config = load_config(Path("run/run.json"))
    lm = demo.load_model(config, torch.device("cpu"))
    for index in range(3):
        dictionary, _ = load_dictionary(f"run/trainer_{index}")
        result = evaluate_dictionaries(
            lm,
            demo.make_contexts(config, lm, open_corpus("embedded"), heldout=True),
            [("resid_post_layer_1", dictionary)],
            max_tokens=config.eval_tokens,
            max_activation_norm_multiple=config.max_activation_norm_multiple,
        )[0]
        saved = json.loads(Path(f"run/trainer_{index}/eval_results.json").read_text())
        assert result.to_dict() == pytest.approx(saved, rel=1e-5)


def test_the_same_command_gives_the_same_bytes(small_sweep: Path) -> None:
    for name in ("first", "second"):
        assert demo.main(["--save_dir", name, *ONE, *SMALL]) == 0
    for file in ("trainer_0/ae.safetensors", "trainer_0/eval_results.json", "metrics.jsonl", "summary.csv"):
        assert Path("first", file).read_bytes() == Path("second", file).read_bytes(), file


def test_an_interrupted_run_resumes_to_the_same_bytes(small_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(ROOT / "dictionary_learning" / "demo.py"), "--layers", "1", "--log_steps", "2"]
    command += SMALL
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    unbroken = subprocess.run([*command, "--save_dir", "unbroken"], env=environment, capture_output=True, text=True)
    assert unbroken.returncode == 0, unbroken.stderr
    sweep = Path("demo_config.py").read_text()
    Path("demo_config.py").write_text(sweep + WAITS_FOR_A_SIGNAL)
    process = subprocess.Popen(
        [*command, "--save_dir", "broken"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not Path("broken/waits").exists():
        assert process.poll() is None
        time.sleep(0.02)
    Path("demo_config.py").write_text(sweep)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Go on with:" in out and "--resume" in out and "Traceback" not in err
    assert not Path("broken/summary.csv").exists()
    resumed = subprocess.run(
        [*command, "--save_dir", "broken", "--resume"], env=environment, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming at step" in resumed.stdout
    for index in range(3):
        for file in ("ae.safetensors", "eval_results.json"):
            assert (
                Path("broken", f"trainer_{index}", file).read_bytes()
                == Path("unbroken", f"trainer_{index}", file).read_bytes()
            )
    assert Path("broken/metrics.jsonl").read_text() == Path("unbroken/metrics.jsonl").read_text()

    assert demo.main(["--save_dir", "broken", "--resume", "--layers", "2", *SMALL]) == 2
    assert (
        "began with other settings (dictionaries[0].hook_point: 'resid_post_layer_1' -> 'resid_post_layer_2'; "
        in capsys.readouterr().err
    )


def test_dry_run_prints_the_plan_and_writes_nothing(
    small_sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dictionary_learning.planning.PROBE_SECONDS", 0.5)
    assert demo.main(["--save_dir", "run", "--dry_run", "--layers", "1", *SMALL]) == 0
    out = capsys.readouterr().out
    for words in ("dictionaries", "parameters", "6,144 in 24 steps", "on the device", "on disk", "estimated time"):
        assert words in out
    assert not Path("run").exists()


def test_a_configuration_file_replaces_the_sweep(small_sweep: Path) -> None:
    assert demo.main(["--save_dir", "run", *ONE, *SMALL]) == 0
    assert demo.main(["--save_dir", "again", "--config", "run/run.json"]) == 0
    assert Path("run/trainer_0/ae.safetensors").read_bytes() == Path("again/trainer_0/ae.safetensors").read_bytes()


def test_a_corpus_of_real_records_trains(small_sweep: Path) -> None:
    records = ROOT.parent / "shared" / "data" / "medical_qa"
    if not records.is_dir():
        pytest.skip("the real records are not beside this checkout")
    assert demo.main(["--save_dir", "run", "--corpus", str(records), *ONE, *SMALL]) == 0


def test_mlp_and_attention_and_module_paths_are_hook_points(small_sweep: Path) -> None:
    points = ["mlp_out_layer_1", "attn_out_layer_1", "transformer.h.1.mlp:in"]
    assert demo.main(["--save_dir", "run", "--architectures", "top_k", "--hook_points", *points, *SMALL]) == 0
    assert {row["hook_point"] for row in csv.DictReader(Path("run/summary.csv").open())} == set(points)


BAD_INPUT = {
    "unknown architecture": (["--architectures", "topk"], "Unknown architecture 'topk'.*Did you mean 'top_k'"),
    "unknown preset": (["--preset", "gtp2"], "Unknown preset 'gtp2'.*Did you mean 'gpt2'"),
    "unknown model": (["--model_name", "no/such_model"], "no/such_model"),
    "layer out of range": (["--layers", "9"], "layer.*9|9.*layer"),
    "unknown site": (["--site", "resid_pst"], "resid_pst.*Did you mean"),
    "unknown hook point": (["--hook_points", "transformer.h.1.mlpp:out"], "mlpp.*Did you mean|mlpp.*mlp"),
    "missing corpus": (["--corpus", "nowhere"], "Corpus 'nowhere' not found"),
    "width zero": (["--widths", "0"], "width of a dictionary must be positive, got 0"),
    "width negative": (["--widths", "-5"], "width of a dictionary must be positive, got -5"),
    "k above the width": (["--widths", "4"], "k must be a positive integer of at most the width 4, got 8"),
    "absent device": (["--device", "cuda:99"], "[Dd]evice 'cuda:99'"),
    "device that is no device": (["--device", "gpu"], "'gpu' is not a device"),
    "batch above the buffer": (["--batch_size", "6144", "--buffer_contexts", "40"], "The buffer is too small"),
    "no tokens": (["--num_tokens", "0"], "num_tokens must be positive"),
    "fewer tokens than a batch": (["--num_tokens", "100"], "less than one batch"),
    "context longer than the model": (["--ctx_len", "5000"], "ctx_len 5000 is longer than the 256 positions"),
    "negative learning rate": (["--learning_rates", "-1"], "learning rate must be positive"),
    "layers and hook points": (["--hook_points", "mlp_out_layer_1"], "either --hook_points or --layers"),
    "unknown dtype": (["--dtype", "float7"], "float7"),
    "nothing to resume": (["--resume"], "no run to resume"),
    "no steps between log entries": (["--log_steps", "0"], "log_steps must be at least 1, got 0"),
    "negative steps between states": (["--state_every", "-1"], "state_every must be at least 1, got -1"),
    "site beside hook points": (["--hook_points", "mlp_out_layer_1", "--site", "mlp_in"], "either --hook_points or"),
    "missing configuration": (["--config", "absent.yaml"], "absent.yaml"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    name: str, small_sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_INPUT[name]
    layers = [] if set(arguments) & {"--layers", "--config"} or name == "unknown hook point" else ["--layers", "1"]
    small = [] if "--config" in arguments else ["--architectures", "top_k", *SMALL]
    assert demo.main(["--save_dir", "run", *small, *layers, *arguments]) == 2
    assert_one_sentence(capsys.readouterr().err, message)
    assert not Path("run").exists(), "a run that can't be leaves nothing behind"


def assert_one_sentence(err: str, message: str) -> None:
    import re

    lines = [line for line in err.strip().splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    assert "Traceback" not in err


def test_bad_corpora_get_one_sentence(small_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("blank.jsonl").write_text('{"text": "  "}\n')
    Path("no_text.jsonl").write_text('{"body": "x", "txt": "y"}\n')
    Path("cut.jsonl").write_text('{"text": "fine"}\n{"text": "cut sho')
    Path("tiny.jsonl").write_text('{"text": "one document only"}\n')
    for corpus, message in (
        ("empty", "holds no .jsonl"),
        ("blank.jsonl", "holds no text"),
        ("no_text.jsonl", "has no 'text'.*body, txt.*Did you mean 'txt'"),
        ("cut.jsonl", "cut.jsonl', line 2, is not valid JSON"),
        ("tiny.jsonl", "holds no text in its (heldout|train) part"),
    ):
        assert demo.main(["--save_dir", "run", *ONE, *SMALL, "--corpus", corpus]) == 2
        assert_one_sentence(capsys.readouterr().err, message)


def test_bad_folders_get_one_sentence(
    small_sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("x")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    for folder, message in (
        ("file", "is a file"),
        ("file/below", "can't be written"),
        ("full", "holds other files"),
        ("run", "holds another run.*--resume.*--overwrite"),
    ):
        assert demo.main(["--save_dir", folder, *ONE, *SMALL]) == 2
        assert_one_sentence(capsys.readouterr().err, message)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert demo.main(["--save_dir", "new", *ONE, *SMALL]) == 2
    assert_one_sentence(capsys.readouterr().err, "0.0 GB left, but the run needs")
    assert Path("full/thesis.tex").read_text() == "x"


def test_a_sweep_with_a_bad_sparsity_gets_one_sentence(small_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(small_sweep, {"top_k": {"k": (0,)}})
    assert demo.main(["--save_dir", "run", *ONE, *SMALL]) == 2
    assert_one_sentence(capsys.readouterr().err, "k must be a positive integer")
    (small_sweep / "demo_config.py").write_text("SWEEP = 1 / 0")
    assert demo.main(["--save_dir", "run", *ONE, *SMALL]) == 2
    assert_one_sentence(capsys.readouterr().err, "demo_config.py can't be read: ZeroDivisionError")


def test_a_refused_command_leaves_the_earlier_run_alone(small_sweep: Path) -> None:
    assert demo.main(["--save_dir", "run", *ONE, *SMALL]) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert demo.main(["--save_dir", "run", *ONE, *SMALL, "--overwrite", "--log_steps", "-1"]) == 2
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_an_interrupted_evaluation_is_taken_up_without_training_again(
    small_sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dictionary_learning.evaluation.evaluate_dictionaries", interrupted)
        assert demo.main(["--save_dir", "run", *ONE, *SMALL, "--state_every", "0"]) == 130
    assert "Go on with:" in capsys.readouterr().out
    trained = Path("run/trainer_0/ae.safetensors").read_bytes()
    assert demo.main(["--save_dir", "run", *ONE, *SMALL, "--resume"]) == 0
    assert "Resuming at step 24 of 24" in capsys.readouterr().out
    assert Path("run/trainer_0/ae.safetensors").read_bytes() == trained
    assert Path("run/summary.csv").exists()


def test_a_run_interrupted_before_its_first_state_resumes_from_the_start(
    small_sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # in the first fill of the buffer
        patch.setattr("dictionary_learning.buffer.ActivationBuffer.mean_squared_norm", interrupted)
        assert demo.main(["--save_dir", "run", *ONE, *SMALL]) == 130
    assert demo.main(["--save_dir", "run", *ONE, *SMALL, "--resume"]) == 0
    assert "begins anew" in capsys.readouterr().out
    assert demo.main(["--save_dir", "unbroken", *ONE, *SMALL]) == 0
    for file in ("trainer_0/ae.safetensors", "metrics.jsonl"):
        assert Path("run", file).read_bytes() == Path("unbroken", file).read_bytes(), file


def test_a_model_that_changed_is_not_resumed(small_sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--save_dir", "run", *ONE, *SMALL]) == 0
    record = json.loads(Path("run/run.json").read_text())
    record["model"]["weights"] = "0" * 16
    Path("run/run.json").write_text(json.dumps(record))
    assert demo.main(["--save_dir", "run", *ONE, *SMALL, "--resume"]) == 2
    assert_one_sentence(capsys.readouterr().err, "weights of 'embedded' have changed since.*--override")


def test_overwrite_replaces_a_run_and_only_it(small_sweep: Path) -> None:
    assert demo.main(["--save_dir", "run", "--layers", "1", *SMALL]) == 0
    Path("run/notes.txt").write_text("mine")
    assert demo.main(["--save_dir", "run", *ONE, *SMALL, "--overwrite"]) == 0
    assert sorted(path.name for path in Path("run").glob("trainer_*")) == ["trainer_0"]
    assert Path("run/notes.txt").read_text() == "mine"


def test_the_command_line_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert cli(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli(["train", "--save_dir", "x", "--layrs", "1"])
    assert stop.value.code == 2
