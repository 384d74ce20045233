"""`sae-factory fit`: a config.yaml and saved activations in, a trained and measured autoencoder out, in one command."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from dictionary_learning import cli, fit
from dictionary_learning.activations.in_memory import split_rows
from dictionary_learning.evaluation import PooledMetrics
from dictionary_learning.heldout import HeldOut
from dictionary_learning.sae_config import load_sae_config
from dictionary_learning.utils import load_dictionary

D, ROWS = 12, 600
CONFIG: dict[str, Any] = {"input_dims": D, "n_features": 32, "k": 4, "batch_size": 64, "epochs": 3, "device": "cpu"}


def activations(rows: int = ROWS, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 24, generator=g) * (torch.rand(rows, 24, generator=g) < 0.1)
    clean = codes @ torch.randn(24, D, generator=torch.Generator().manual_seed(99)) + 0.5
    return 3 * clean + 0.01 * torch.randn(rows, D, generator=g)  # so that no two rows are equal


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(activations(), "acts.pt")
    write()
    return tmp_path


def write(**changes: Any) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG | changes))


def run(*arguments: str) -> int:
    return cli.main(["fit", "config.yaml", "--activations", "acts.pt", "--save_dir", "run", *arguments])


def results(folder: str = "run") -> dict[str, Any]:
    return json.loads((Path(folder) / "trainer_0" / "eval_results.json").read_text())


def weights(folder: str = "run") -> bytes:
    return (Path(folder) / "trainer_0" / "ae.safetensors").read_bytes()


def test_one_command_trains_and_measures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(epochs=30, save_best_only=True, lr=3e-3)
    assert run() == 0
    out = capsys.readouterr().out
    assert "270 steps of 64 rows, 540 to train on, 60 held out" in out and "variance explained" in out
    assert results()["frac_variance_explained"] > 0.6 and results()["tokens"] == 60 and results()["l0"] <= 4
    dictionary, saved = load_dictionary("run/trainer_0")
    pooled = PooledMetrics(dictionary)
    pooled.update(split_rows(activations(), 0.1)[1])
    assert pooled.result().mse == pytest.approx(results()["mse"], rel=1e-5)
    assert saved["trainer"]["best_step"] == results()["best_step"] > 0
    assert load_sae_config(Path("run/config.yaml")) == load_sae_config(Path("config.yaml"))
    assert json.loads(Path("run/run.json").read_text())["status"] == "complete"
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert sum("heldout_loss" in row for row in rows) >= 20


def test_the_default_folder_is_named_after_the_config(here: Path) -> None:
    assert cli.main(["fit", "config.yaml", "--activations", "acts.pt"]) == 0
    assert Path("runs/config/trainer_0/ae.safetensors").is_file()


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors", "folder"])
def test_every_form_of_activations_gives_the_same_dictionary(form: str, here: Path) -> None:
    x = activations()
    if form == "npy":
        np.save("other.npy", x.numpy())
    elif form == "npz":
        np.savez("other.npz", acts=x.numpy())
    elif form == "safetensors":
        save_file({"acts": x}, "other.safetensors")
    else:
        Path("other.folder").mkdir()
        save_file({"acts": x[:250].contiguous()}, "other.folder/0.safetensors")
        save_file({"acts": x[250:].contiguous()}, "other.folder/1.safetensors")
    assert run() == 0
    assert cli.main(["fit", "config.yaml", "--activations", f"other.{form}", "--save_dir", "other"]) == 0
    assert weights("other") == weights("run")


def test_activations_larger_than_the_memory_come_from_their_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "IN_MEMORY_MB", 0)
    monkeypatch.setattr(fit, "BUFFER_MB", 0.005)
    torch.save(activations(12_000), "acts.pt")
    write(epochs=2, lr=3e-3)
    assert run() == 0
    assert results()["tokens"] == 1200 and results()["frac_variance_explained"] > 0.6
    record = json.loads(Path("run/run.json").read_text())
    assert record["activations"]["rows"] == 10_800 and record["status"] == "complete"
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["tokens"]) == (338, 21_600), "every row twice"


def test_a_hook_point_is_chosen_among_several(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": activations(), "b": activations(seed=1)}, "acts.pt")
    assert run() == 2
    assert "hold a, b: choose one with --hook_point" in capsys.readouterr().err
    assert run("--hook_point", "b") == 0
    assert load_dictionary("run/trainer_0")[1]["trainer"]["submodule_name"] == "b"
    assert cli.main(["fit", "config.yaml", "--activations", "acts.pt", "--save_dir", "c", "--hook_point", "bb"]) == 2
    assert "hold no 'bb', but a, b. Did you mean 'b'?" in capsys.readouterr().err


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_interrupted_fit_goes_on_to_the_same_bytes(
    in_memory: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not in_memory:
        monkeypatch.setattr(fit, "IN_MEMORY_MB", 0)
        torch.save(activations(5000), "acts.pt")
    write(scheduler="plateau", save_best_only=True, eval_steps=4, epochs=1 if not in_memory else 3)
    assert run() == 0
    unbroken, told = weights(), Path("run/metrics.jsonl").read_text()
    look = HeldOut.__call__

    def interrupting(self: HeldOut, training: Any, step: int) -> Any:
        if step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return look(self, training, step)

    with monkeypatch.context() as patched:
        patched.setattr(HeldOut, "__call__", interrupting)
        assert run("--overwrite") == 130
    out = capsys.readouterr().out
    assert "after step 11; its state is saved. Go on with:" in out and out.splitlines()[-1].endswith("--resume")
    assert json.loads(Path("run/run.json").read_text())["status"] == "stopped: SIGINT"
    assert run("--resume") == 0
    assert weights() == unbroken and Path("run/metrics.jsonl").read_text() == told


def test_a_fit_whose_disk_is_full_claims_no_state_and_ends_in_a_sentence(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(here / "run" / "file"))

    def interrupting(self: HeldOut, training: Any, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(fit.storage, "save_state", full)
        patched.setattr(HeldOut, "__call__", interrupting)
        assert run() == 130
    assert "after step 3; no state could be saved. Go on with:" in capsys.readouterr().out
    monkeypatch.setattr(fit.storage, "write_json", full)
    assert run("--overwrite") == 2
    assert "Error: 'run' can't be written (No space left on device): free some space" in capsys.readouterr().err


def test_a_resume_with_other_settings_or_activations_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    write(k=5, lr=1e-3)
    assert run("--resume") == 2
    assert "began with other settings (k: 4 -> 5; learning_rate: None -> 0.001)" in capsys.readouterr().err
    write(epochs=2)
    assert run("--resume") == 2
    assert "(epochs: 3 -> 2)" in capsys.readouterr().err
    write()
    torch.save(activations(700), "acts.pt")
    assert run("--resume") == 2
    assert "(rows: 540 -> 630; heldout_rows: 60 -> 70)" in capsys.readouterr().err
    torch.save(activations(seed=5), "acts.pt")
    assert run("--resume") == 2
    assert "saved position is in other activations" in capsys.readouterr().err


def test_other_settings_are_allowed_when_told_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    write(lr=1e-3, epochs=4)
    assert run("--resume", "--override") == 0
    out = capsys.readouterr().out
    assert "Resuming at step 27 of 36" in out
    assert "Warning: learning_rate: None -> 0.001: from here on it is not the run that began." in out
    assert load_dictionary("run/trainer_0")[1]["trainer"]["lr"] == 1e-3
    record = json.loads(Path("run/run.json").read_text())
    assert record["resumed"] == [{"changed": ["learning_rate: None -> 0.001"]}]
    assert run("--override", "--overwrite") == 2, "without --resume there is nothing to override"


def test_a_finished_fit_can_be_made_longer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(scheduler="constant", epochs=1, lr=1e-3)
    assert run() == 0
    rate = load_dictionary("run/trainer_0")[1]["trainer"]["warmup_steps"]
    write(scheduler="constant", epochs=5, lr=1e-3)
    assert run("--resume") == 0
    out, steps = capsys.readouterr().out, [json.loads(line)["step"] for line in open("run/metrics.jsonl")]
    assert "Resuming at step" in out and "Warning" not in out and steps == sorted(set(steps))
    assert load_dictionary("run/trainer_0")[1]["trainer"]["warmup_steps"] == rate


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {"n_feature": 3}, "unknown key 'n_feature'. Did you mean 'n_features'?"),
        ([], {"input_dims": 13}, "input_dims 13, but the activations 'acts.pt' are 12 wide"),
        ([], {"device": "cuda:77"}, "'cuda:77' is not available"),
        (["--device", "gpu"], {}, "'gpu' is not a device"),
        (["--activations", "act.pt"], {}, "'act.pt' do not exist. Did you mean 'acts.pt'?"),
        (["--activations", "config.yaml"], {}, "none of .safetensors, .pt, .npy, .npz"),
        (["--resume"], {}, "no run to resume"),
        (["--max_temperature", "60", "--resume_temperature", "70"], {}, "below max_temperature 60, got 70"),
        (["--resume_temperature", "70"], {}, "give that too"),
        ([], {"heldout_fraction": 0.0001}, "leaves no row to measure on"),
        (["--save_dir", "config.yaml"], {}, "is a file"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing_behind(
    arguments: list[str], changes: dict[str, Any], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(**changes)
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("Error: ") and err.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", b"no array"),
        ("b.npy", b""),
        ("c.npz", b"no zip"),
        ("d.pt", b"no tensor"),
        ("e.safetensors", b"\x00" * 4),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_bytes(content)
    assert run("--activations", name) == 2
    err = capsys.readouterr().err
    assert name in err and "not readable" in err or "something else than tensors" in err


def test_a_pickled_array_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("acts.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert run("--activations", "acts.npy") == 2
    assert "not readable" in capsys.readouterr().err


def test_rows_that_are_not_finite_are_refused_or_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = activations()
    x[17, 3] = float("nan")
    torch.save(x, "acts.pt")
    assert run() == 2
    assert "in row 17" in capsys.readouterr().err
    assert run("--drop_non_finite") == 0
    assert "539 to train on, 60 held out" in capsys.readouterr().out


def test_a_used_folder_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    before = weights()
    assert run() == 2
    assert "holds another run" in capsys.readouterr().err and weights() == before
    write(k=5)
    assert run("--overwrite") == 0
    assert weights() != before


def test_help_and_the_list_of_commands_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "fit" in cli.usage()
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--help"])
    assert ended.value.code == 0 and "--activations" in capsys.readouterr().out
