"""`sae-factory analyze`: what it prints, its exit codes, and that every option reaches the analysis."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from analysis_cases import make_run, write_texts

from dictionary_learning.analysis import one_pass
from dictionary_learning.analysis.command import main
from dictionary_learning.analysis.folder import AnalysisFolder

SMALL = ["--tokens", "1200", "--top", "2", "--samples", "3", "--window", "6", "--ablate", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("command") / "run")


def test_one_command_makes_the_analysis_of_a_run(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(original), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Latents on 1,200 tokens" in out and "trainer_1" in out and "mlp_in_layer_2" in out
    assert out.startswith("Memory of the statistics: at most ") and "Written to" in out
    assert main([str(original), *SMALL]) == 0  # which finds it complete
    assert capsys.readouterr().out == out[out.index("Latents") :]


def test_every_option_reaches_the_analysis(original: Path, tmp_path: Path) -> None:
    text = write_texts(tmp_path / "t.jsonl", [f"The femur is bone {number}." for number in range(200)])
    other = write_texts(tmp_path / "other.jsonl", [f"The river is {number} miles long." for number in range(200)])
    options = ["--corpus", f"bones={text}", "--against", other, "--dictionaries", "trainer_1", "--ctx_len", "16"]
    options += ["--tokens", "all", "--split", "train", "--coactive", "7", "--seed", "3", "--batch_contexts", "5"]
    options += ["--no-effects", "--out", str(tmp_path / "out"), "--top", "2", "--samples", "3", "--window", "6"]
    options += ["--ablate", "0", "--device", "cpu", "--hook_point", "resid_post_layer_0", "--model_name", "embedded"]
    assert main([str(original), *options]) == 0
    folder = AnalysisFolder.open(tmp_path / "out")
    settings = folder.info["settings"]
    wanted = {
        "tokens": None,
        "split": "train",
        "top": 2,
        "samples": 3,
        "window": 6,
        "coactive": 7,
        "seed": 3,
        "effects": False,
        "ablate": 0,
        "ctx_len": 16,
        "batch_contexts": 5,
        "against": ["other.jsonl"],
    }
    assert {name: settings[name] for name in wanted} == wanted
    assert [corpus["name"] for corpus in settings["corpora"]] == ["bones", "other.jsonl"]
    assert folder.names == ["trainer_1"]
    assert folder.info["dictionaries"][0]["hook_point"] == "resid_post_layer_0"
    assert set(folder.info["corpora"]) == {"bones", "other.jsonl"}  # what is compared with goes by one name


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_stops_it_with_the_command_to_go_on(
    original: Path, tmp_path: Path, name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    take = one_pass.OnePass._take

    def signalled(self: Any, batch: Any) -> None:
        take(self, batch)
        if self.batches == 2:
            signal.raise_signal(signal.Signals[name])

    arguments = [str(original), *SMALL, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["sae-factory", "analyze", *arguments, "--overwrite"])
    monkeypatch.setattr(one_pass.OnePass, "_take", signalled)
    assert main(arguments) == code
    out = capsys.readouterr().out
    assert f"Stopped by {name} after" in out and "the state is saved" in out
    assert out.splitlines()[-1].split() == ["sae-factory", "analyze", *arguments]
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["status"] == "running"
    monkeypatch.setattr(one_pass.OnePass, "_take", take)
    assert main(arguments) == 0
    assert "Going on after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--split", "test"], "Unknown split 'test': use all, train, heldout."),
        (["--tokens", "0"], "tokens must be at least 1, got 0."),
        (["--dictionaries", "trainer_9"], "There is no dictionary 'trainer_9', but trainer_0, trainer_1."),
        (["--corpus", "embeded"], "Did you mean 'embedded'?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    original: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(original), "--device", "cpu", "--out", str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ") and said in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_hostile_text_and_names_do_no_harm(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Markup, escape sequences, and a lone surrogate, which UTF-8 can't hold."""
    rows = [{"text": f"The \ud800 femur \x1b[31m is <b> {number}.", "source_dataset": "a\ud800"} for number in range(9)]
    rows += [{"text": "A river [red] runs.", "source_dataset": "\x1b[2J[bold]"}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert main([str(original), *SMALL, "--corpus", str(path), "--out", str(out), "--ablate", "0"]) == 0
    captured = capsys.readouterr()
    assert "too few documents" in captured.err and "\x1b" not in captured.out + captured.err
    folder = AnalysisFolder.open(out)
    assert set(folder.info["corpora"]) == {"a\N{REPLACEMENT CHARACTER}", "\x1b[2J[bold]"}
    assert {"rate:a\N{REPLACEMENT CHARACTER}", "rate:\x1b[2J[bold]"} < set(folder.table("trainer_0"))
