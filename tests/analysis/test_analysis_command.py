"""`sae-factory analyze`: what it prints, its exit codes, and that every option reaches the analysis."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from analysis_cases import make_run, write_texts

from dictionary_learning import diagnosis
from dictionary_learning.analysis import command, concepts, one_pass, plan
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
    assert out.startswith("Memory: at most ") and "Written to" in out
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


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--against", f"other={write_texts(tmp_path / 'o.jsonl', ['A river.'])}", "--out", str(tmp_path / "out")]
    assert main([str(original), *SMALL, *options, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "The plan" in out and "2 of 48 latents" in out and "up to 1,200 tokens, of embedded, other" in out
    assert "resid_post_layer_1, mlp_in_layer_2" in out and "at most 256 tokens" in out and "saved states" in out
    assert not (tmp_path / "out").exists()
    assert main([str(original), *SMALL, *options]) == 0
    capsys.readouterr()
    assert main([str(original), *SMALL, *options, "--dry_run"]) == 0  # there is nothing left to do
    assert "The plan" not in (out := capsys.readouterr().out) and "Latents on 1,200 tokens" in out
    assert main([str(original), *SMALL, *options, "--dry_run", "--overwrite"]) == 0
    assert "The plan" in (out := capsys.readouterr().out) and "Latents on" not in out  # those that it would replace


def test_the_plan_holds_what_the_files_take_and_memory_is_checked(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned, sizes = plan._file_bytes, []
    monkeypatch.setattr(plan, "_file_bytes", lambda *given: sizes.append(planned(*given)) or sizes[-1])
    monkeypatch.setattr(diagnosis, "free_memory", lambda: 5_000_000)
    arguments = [str(original), *SMALL, "--tokens", "20000", "--window", "32", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry_run"]) == 0
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "Warning: this may need" in captured.err and "5 MB are free: --dictionaries front" in captured.err
    files = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.name != "statistics.safetensors")
    assert 0.4 * sum(sizes) < files < 2.5 * sum(sizes)  # of tiny dictionaries; statistics hold all pairs of latents


def test_the_dictionary_whose_latents_tell_most_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(concepts, "print_concepts", lambda folder, name: shown.append(name))

    labels = {"sparse": ["heart", "of"], "telling": ["heart", "nerve"], "dense": ["", ""]}

    def table(name: str) -> dict[str, Any]:
        columns: dict[str, Any] = {"status": [""] * 2, "label": labels[name], "label_share": [0.5] * 2}
        columns |= {"documents": [20] * 2, "density": [0.01] * 2, "corpus": [""] * 2}
        return {column: np.array(values) for column, values in columns.items()}

    facts = dict.fromkeys(("l0", "dict_size", "alive", "dead", "dense"), 2)
    facts |= {"architecture": "top_k", "hook_point": "mlp_out_layer_0"}
    info = {"corpora": {"a": ""}, "settings": {}, "rows": 9, "unit": "token", "documents": 99}
    info["dictionaries"] = [{"name": name, **facts} for name in labels]
    command.print_analysis(SimpleNamespace(path=Path("x"), info=info, table=table))  # type: ignore[arg-type]
    assert shown == ["telling"]


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
        (["--dictionaries", "fron"], "Did you mean 'front'?"),
        (["--dictionaries", "best"], "has no summary yet, which says which are best: name a dictionary of it."),
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
