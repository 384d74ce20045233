"""The analysis of a run: exact, whatever the dictionaries it is made for, and clear about bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_cases import CTX_LEN, LATENTS, POINTS, SMALL, WIDTH, K, files_of, make_run

from data_prep.embedded import MODEL_DIR
from dictionary_learning import TracedLM, formats, load_dictionary, open_corpus
from dictionary_learning.activations.language_model import LanguageModelActivations
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.analysis.job import analyze
from dictionary_learning.analysis.one_pass import Measures
from dictionary_learning.analysis.subjects import load_subjects
from dictionary_learning.corpus import TextStream
from dictionary_learning.dictionary import AutoEncoderTopK
from dictionary_learning.errors import UserError
from dictionary_learning.evaluate_command import main as evaluate
from dictionary_learning.packing import ContextPacker


def test_it_is_what_a_loop_over_rows_counts(original: Path) -> None:
    folder = AnalysisFolder.open(original)
    stream = TextStream(open_corpus("embedded"), seed=0)
    lm = TracedLM.load(str(MODEL_DIR))
    source = LanguageModelActivations(
        lm,
        ContextPacker(stream, lm.tokenizer, ctx_len=CTX_LEN, batch_contexts=8),
        POINTS,
        max_activation_norm_multiple=10.0,
        provenance=True,
    )
    batches, rows = [], 0
    while rows < 2000:
        batches.append(next(source))
        rows += len(batches[-1].acts[POINTS[0]])
    document_N = torch.cat([batch.provenance.document_N for batch in batches])[:2000].numpy()  # type: ignore[union-attr]
    token_N = torch.cat([batch.provenance.token_N for batch in batches])[:2000].numpy()  # type: ignore[union-attr]
    for name, point in zip(("trainer_0", "trainer_1"), POINTS, strict=True):
        dictionary = load_dictionary(original / name)[0]
        with torch.no_grad():
            codes_NF = torch.cat([dictionary.encode(batch.acts[point]) for batch in batches])[:2000].numpy()
        table = folder.table(name)
        assert (codes_NF > 0).any(0).sum() > 20
        assert np.array_equal(table["active"], (codes_NF > 0).sum(0))
        assert np.array_equal(table["density"], (codes_NF > 0).sum(0) / 2000)
        assert np.array_equal(
            table["documents"], [len(set(document_N[codes_NF[:, f] > 0].tolist())) for f in range(LATENTS)]
        )
        assert table["max"] == pytest.approx(codes_NF.max(0), rel=1e-5)
        top, _ = folder.examples(name)
        alive = table["active"] > 0
        place = (np.arange(LATENTS), 0, top.peak_FE[:, 0])
        assert np.array_equal(top.token_FEW[place][alive], token_N[codes_NF.argmax(0)][alive])
        assert top.act_FEW[place][alive] == pytest.approx(codes_NF.max(0)[alive], rel=1e-5)
        assert set(table["status"]) <= {"dead", "dense", ""}
        assert np.array_equal(table["status"] == "dead", ~alive)
        assert np.array_equal(table["status"] == "dense", table["density"] > 0.1)
        both = ((codes_NF > 0).T.astype(float)) @ (codes_NF > 0)
        latent = int(np.argmax(table["active"]))
        best, share = table["coactive"][latent][0], table["coactive_jaccard"][latent][0]
        assert share == both[latent, best] / (both[latent, latent] + both[best, best] - both[latent, best])
        entry = next(entry for entry in folder.info["dictionaries"] if entry["name"] == name)
        assert entry["l0"] == pytest.approx((codes_NF > 0).sum() / 2000)
        assert (entry["dead"], entry["alive"]) == ((~alive).sum(), alive.sum())


def test_what_latents_do_stands_in_the_table(original: Path) -> None:
    folder = AnalysisFolder.open(original)
    residual, inside = folder.table("trainer_0"), folder.table("trainer_1")
    assert all(len(tokens) == 10 for tokens in residual["top_tokens"])
    assert all(np.all(np.diff(logits) <= 0) for logits in residual["top_logits"])
    assert set(sum(residual["top_tokens"], [])) <= set(folder.vocabulary().values())
    assert all(tokens == [] for tokens in inside["top_tokens"])  # what an MLP reads has no direct path to the tokens
    directions = load_dictionary(original / "trainer_0")[0].decoder_rows.detach()
    cosines = torch.nn.functional.cosine_similarity(directions[3], directions, dim=1)
    cosines[3] = -1
    assert residual["neighbours"][3][0] == int(cosines.argmax())
    assert residual["neighbour_cosines"][3][0] == pytest.approx(float(cosines.max()), abs=1e-5)
    for table in (residual, inside):
        measured = ~np.isnan(table["ablation_loss"])
        assert 0 < measured.sum() <= 5
        assert table["active"][measured].min() >= np.sort(table["active"])[-5]
    assert folder.info["model"]["name"] == "embedded"
    assert folder.info["rows"] == 2000 and folder.info["unit"] == "token"


def test_effects_and_ablation_can_be_left_out(run: Path) -> None:
    folder = analyze(run, measures=Measures(**{**SMALL, "effects": False, "ablate": 0}))
    table = folder.table("trainer_0")
    assert table["top_tokens"].tolist() == [[]] * LATENTS and np.isnan(table["ablation_loss"]).all()
    assert len(table["neighbours"][0]) == 10


def test_one_forward_serves_all_and_nothing_depends_on_the_others(
    original: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    capture = TracedLM.capture

    def counted(self: TracedLM, *args: Any, **options: Any) -> Any:
        forwards.append(1)
        return capture(self, *args, **options)

    monkeypatch.setattr(TracedLM, "capture", counted)
    analyze(run, dictionaries=["trainer_1"], measures=Measures(**SMALL))
    alone = len(forwards)
    assert files_of(run / "analysis" / "trainer_1") == files_of(original / "analysis" / "trainer_1")
    analyze(run, measures=Measures(**SMALL), overwrite=True)
    assert len(forwards) == 2 * alone


def test_a_dictionary_of_a_run_can_be_named_by_its_folder(original: Path, run: Path) -> None:
    folder = analyze(run / "trainer_0", measures=Measures(**SMALL))
    assert folder.path == run / "analysis" and folder.names == ["trainer_0"]
    assert files_of(folder.path / "trainer_0") == files_of(original / "analysis" / "trainer_0")


def test_top_activations_hold_text_and_tokens(original: Path) -> None:
    data = json.loads((original / "analysis" / "trainer_0" / "top_activations_trainer_0.json").read_text())
    entry = next(iter(data.values()))[0]
    assert entry["text"] == "".join(entry["tokens"]) and len(entry["tokens"]) == len(entry["activations"])
    assert max(entry["activations"]) >= entry["activation"] * 0.999
    texts = [text.text for text in TextStream(open_corpus("embedded"), seed=0)]
    assert entry["text"] in texts[entry["document"]]


def test_dictionaries_of_other_libraries(original: Path, tmp_path: Path) -> None:
    dictionary, config = load_dictionary(original / "trainer_0")
    formats.write(dictionary, config, tmp_path / "sae" / "layer_1", "saelens")
    options: dict[str, Any] = {"corpus": ["embedded"], "measures": Measures(**SMALL), "batch_contexts": 8}
    with pytest.raises(UserError, match="add --out"):
        analyze(tmp_path / "sae", **options)
    folder = analyze(tmp_path / "sae", out=tmp_path / "out", **options)
    assert folder.names == ["layer_1"] and folder.info["settings"]["ctx_len"] == CTX_LEN
    assert folder.table("layer_1")["active"] == pytest.approx(
        AnalysisFolder.open(original).table("trainer_0")["active"], abs=30
    )  # SAELens' form of it has no filter of extreme norms


def test_a_dictionary_on_the_hub_is_read_as_its_run_says(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written to the Hub's cache, where its files are."""
    shutil.copytree(original, tmp_path / "cache", ignore=shutil.ignore_patterns("analysis"))
    monkeypatch.setattr("dictionary_learning.hub_load.local_folder", lambda *_: tmp_path / "cache" / "trainer_1")
    with pytest.raises(UserError, match="no run on this disk .* add --out"):
        analyze("hf://user/repo", measures=Measures(**SMALL))
    folder = analyze("hf://user/repo", measures=Measures(**SMALL), out=tmp_path / "out")
    assert files_of(folder.path / "trainer_1") == files_of(original / "analysis" / "trainer_1")
    assert not (tmp_path / "cache" / "analysis").exists()


@pytest.mark.parametrize("point", ["mlp_out_layer_1", "transformer.h.1.mlp"])
def test_a_transcoder_reads_at_one_place_and_writes_at_another(point: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = make_run(tmp_path / "run", [AutoEncoderTopK(WIDTH, LATENTS, K, output_dim=WIDTH)])
    config = json.loads((run / "trainer_0" / "config.json").read_text())
    config["trainer"] |= {"submodule_name": point, "output_dim": WIDTH, "skip": False}
    config["buffer"]["io"] = "in_and_out"
    (run / "trainer_0" / "config.json").write_text(json.dumps(config))
    subject = load_subjects(run).dictionaries[0]
    assert subject.site == (("mlp_in_layer_1", "mlp_out_layer_1") if "layer" in point else (f"{point}:in", point))
    table = analyze(run, measures=Measures(**SMALL)).table("trainer_0")
    assert len(table["top_tokens"][0]) == 10 and np.isfinite(table["ablation_loss"]).sum() == 5
    assert evaluate([str(run), "--device", "cpu", "--tokens", "200"]) == 0


def test_a_module_path_is_read_on_the_side_that_the_buffer_read(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original / "trainer_0", tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    for point, io, site in (
        ("transformer.h.1.mlp", "in", "transformer.h.1.mlp:in"),
        ("transformer.h.1.mlp", "out", "transformer.h.1.mlp"),
        ("transformer.h.1.mlp:out", "in", "transformer.h.1.mlp:out"),
        ("resid_post_layer_1", "in", "resid_post_layer_1"),
    ):
        config["trainer"]["submodule_name"], config["buffer"]["io"] = point, io
        (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
        assert load_subjects(tmp_path / "alone").dictionaries[0].site == site


def test_checkpoints_below_a_dictionary_are_left_out(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original / "trainer_0", tmp_path / "alone")
    shutil.copytree(original / "trainer_0", tmp_path / "alone" / "checkpoints" / "step_1")
    assert [subject.name for subject in load_subjects(tmp_path / "alone").dictionaries] == ["alone"]
    assert [subject.name for subject in load_subjects(original).dictionaries] == ["trainer_0", "trainer_1"]


def test_numbered_dictionaries_are_in_the_order_of_their_numbers(original: Path, tmp_path: Path) -> None:
    for number in (10, 9, 2):
        shutil.copytree(original / "trainer_0", tmp_path / "many" / f"layer_{number}" / "sae")
    names = [subject.name for subject in load_subjects(tmp_path / "many").dictionaries]
    assert names == ["layer_2_sae", "layer_9_sae", "layer_10_sae"]


def test_front_and_best_are_those_of_the_summary(run: Path) -> None:
    from dictionary_learning.summary import write_summary

    base = {"architecture": "top_k", "hook_point": POINTS[0], "sparsity": "", "seed": 0, "width": LATENTS, "tokens": 9}
    rows = [
        {"trainer": "trainer_0", **base, "l0": 9.0, "frac_variance_explained": 0.5, "front": False},
        {"trainer": "trainer_1", **base, "l0": 8.0, "frac_variance_explained": 0.6, "front": True},
    ]
    write_summary(run / "summary.csv", rows)
    for word in ("front", "best"):
        assert [subject.name for subject in load_subjects(run, chosen=[word]).dictionaries] == ["trainer_1"]
    both = load_subjects(run, chosen=["best", "trainer_0"])
    assert [subject.name for subject in both.dictionaries] == ["trainer_0", "trainer_1"]
