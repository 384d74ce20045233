"""The card says what a reader needs, and nothing in it can be more than text."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from dictionary_learning.config import load_config
from dictionary_learning.evaluation import best_of, read_summary, sorted_along_front, write_summary
from dictionary_learning.model_card import CardFacts, code, front_image, model_card, plain

HOSTILE = "x`|](javascript:alert(1))<script>alert(1)</script>\n---\nlicense: mit\n# Head\n```\n![i](//e.example/t.png)"


def facts_of(run: Path, **changes: Any) -> CardFacts:
    rows = read_summary(run / "summary.csv")
    config = dataclasses.replace(load_config(run / "run.json"), **changes)
    record = json.loads((run / "run.json").read_text())
    names = [f"trainer_{index}" for index in range(3)]
    return CardFacts("user/first", config, record, rows, best_of(rows)["trainer"], names, (), True)


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def html(card: str) -> str:
    """As the Hub would show it, which lets raw HTML through to its sanitizer."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])


def test_the_card_tells_what_a_reader_needs(trained: Path) -> None:
    facts = facts_of(trained)
    card = model_card(facts)
    assert header(card)["license"] == "mit" and "medical" in header(card)["tags"] and "datasets" not in header(card)
    told = (
        "`resid_post_layer_1`",
        "SAE Factory's embedded model",
        "4,096 activations",
        "sae-factory export run --format saelens",
        "SAE.load_from_disk",
        "do not use these dictionaries",
        "sae-factory train --config run.json",
        "torch 2",
    )
    for words in told:
        assert words in card, words
    shown = re.findall(r"^\| (\\?\*|) \| `(trainer_\d)` .*", card, re.MULTILINE)
    rows = read_summary(trained / "summary.csv")
    assert [name for _, name in shown] == [row["trainer"] for row in rows]
    assert [bool(star) for star, _ in shown] == [row["front"] for row in rows]
    for row in rows:
        assert f"{row['frac_recovered']:.4f}" in card
    assert model_card(facts) == card


def test_the_card_says_what_every_architecture_computes(trained: Path) -> None:
    from dictionary_learning.trainers import TRAINERS

    facts = facts_of(trained)
    specs = [dataclasses.replace(facts.config.dictionaries[0], architecture=name) for name in TRAINERS]
    shown = html(model_card(dataclasses.replace(facts, config=dataclasses.replace(facts.config, dictionaries=specs))))
    rows = dict(re.findall(r"<tr>\s*<td><code>(\w+)</code></td>\s*<td>(.*?)</td>\s*</tr>", shown, re.DOTALL))
    assert set(rows) >= set(TRAINERS)
    assert "f = ReLU(W_enc (x - b) + b_enc), x_hat = W_dec f + b" in rows["standard"]
    assert "f = 1[u + b_gate &gt; 0] * ReLU(exp(r_mag) u + b_mag)" in rows["gated"]
    assert all(len(rows[name]) > 40 for name in TRAINERS)


def test_group_max_is_loaded_in_sparsify_because_saelens_has_none(trained: Path) -> None:
    facts = facts_of(trained)
    rows = [{**row, "architecture": "group_max"} for row in facts.rows]
    card = model_card(dataclasses.replace(facts, rows=rows))
    assert "SparseCoder.load_from_disk" in card and "--format sparsify" in card and "sae_lens" not in card


def test_the_three_lines_of_the_card_load_the_best(hub: Any, run: Path) -> None:
    from dictionary_learning.hub import push_run

    push_run(run, "user/first")
    card = hub.repos["models/user/first"].files["README.md"].decode()
    lines = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert lines.count("\n") == 3
    import torch

    names: dict[str, Any] = {"activations": torch.randn(2, 192)}
    exec(lines, names)
    assert names["codes"].shape == (2, 64)


def test_hub_corpora_and_models_are_linked_with_their_licences(trained: Path) -> None:
    card = model_card(facts_of(trained, corpus="medical_qa", model_name="google/gemma-2-2b"))
    assert header(card)["base_model"] == "google/gemma-2-2b" and "license" not in header(card)
    assert header(card)["datasets"][1] == "openlifescienceai/medmcqa"
    assert '<a href="https://huggingface.co/datasets/openlifescienceai/medmcqa">' in html(card)
    assert "/openlifescienceai/medmcqa) | apache-2.0 |" in card
    other = model_card(facts_of(trained, corpus="hf://somebody/texts"))
    assert header(other)["datasets"] == ["somebody/texts"] and "see its page" in other


def test_names_from_outside_are_text_wherever_they_stand(trained: Path) -> None:
    facts = facts_of(trained, corpus=HOSTILE, model_name=HOSTILE)
    specs = [dataclasses.replace(spec, hook_point=HOSTILE) for spec in facts.config.dictionaries]
    rows = [{**row, "hook_point": HOSTILE, "sparsity": HOSTILE} for row in facts.rows]
    record = {**facts.record, "versions": {HOSTILE: HOSTILE}, "git_revision": HOSTILE, "corpus_fingerprint": HOSTILE}
    config = dataclasses.replace(facts.config, dictionaries=specs)
    card = model_card(
        dataclasses.replace(facts, config=config, rows=rows, record=record, local=("corpus", "model_name"))
    )
    assert set(header(card)) == {"library_name", "tags"}
    shown = html(card)
    assert "<script" not in shown and "<a " not in shown
    assert re.findall(r'<img src="([^"]*)"', shown) == ["front.png"]
    assert re.findall(r"<h1>(.*?)</h1>", shown) == ["Sparse dictionaries of " + shown_of(HOSTILE)]
    assert len(re.findall(r"<h[1-6]>", shown)) == len(re.findall(r"<h[1-6]>", html(model_card(facts_of(trained)))))
    assert {len(re.findall(r"<td", row)) for row in re.findall(r"<tr>.*?</tr>", shown, re.DOTALL)} <= {0, 2, 11}


def shown_of(name: str) -> str:
    """How the last part of a hostile path reads in HTML."""
    return MarkdownIt().renderInline(plain(re.split(r"[/\\]", name)[-1]))


@pytest.mark.parametrize(
    "text", ["a_b_c", "*x*", "[a](b)", "<b>", "a|b", "`c`", "1. x", "&amp;", "https://e.org", "~~s~~"]
)
def test_plain_text_reads_as_it_is_written(text: str) -> None:
    import html as escapes

    assert MarkdownIt("gfm-like", {"linkify": False}).renderInline(plain(text)) == escapes.escape(text)
    assert "<code>" in MarkdownIt().renderInline(code(text))


def test_the_picture_is_a_png_and_holds_several_hook_points(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = read_summary(trained / "summary.csv")
    more = [{**row, "hook_point": f"$\\frac{number}$" * 9} for number in range(9) for row in rows]
    for some in (rows, [*rows, *more], [{**row, "frac_recovered": None} for row in rows], [{**rows[0], "l0": 0.0}]):
        image = front_image(some, "trainer_0")
        assert image is not None and image.startswith(b"\x89PNG") and len(image) > 5000
    assert front_image(rows, "trainer_0") == front_image(rows, "trainer_0")


def test_a_summary_comes_back_as_it_was_written_and_the_best_is_on_the_front(tmp_path: Path) -> None:
    def row(name: str, l0: float, recovered: float | None, explained: float | None) -> dict[str, Any]:
        words = {"architecture": "top_k", "hook_point": "p", "sparsity": "k=8"}
        return {"trainer": name, **words, "width": 64, "lr": 0.002, "seed": 0, "l0": l0, "tokens": 600,
                "frac_variance_explained": explained, "frac_recovered": recovered}  # fmt: skip

    rows = sorted_along_front(
        [row("a", 8, 0.7, 0.9), row("b", 16, 0.9, 0.5), row("c", 32, 0.9, 0.99), row("d", 4, None, None)]
    )
    write_summary(tmp_path / "summary.csv", rows)
    assert read_summary(tmp_path / "summary.csv") == rows
    assert best_of(rows)["trainer"] == "b"
    without_loss = sorted_along_front([row("a", 8, None, 0.9), row("b", 16, None, 0.95), row("c", 32, None, 0.9)])
    assert best_of(without_loss)["trainer"] == "b"
