"""Descriptions by a language model: what it is shown, how they are scored, and what is kept."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from description_cases import LATENTS, WORDS, write_analysis
from openai_stub import ChatStub, Failure, guesses, is_detection, knows

from dictionary_learning.analysis.describe import main
from dictionary_learning.analysis.description_prompts import JUDGED, Material
from dictionary_learning.analysis.descriptions import detection_score, whole_prompt
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.errors import UserError

# ---------------------------------------------------------------------------------------------- what comes out


def test_a_model_that_knows_describes_every_latent_and_scores_one(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe() == 0
    records = analysis.descriptions("trainer_0")
    assert {feature: record["description"] for feature, record in records.items()} == dict(enumerate(WORDS))
    for record in records.values():
        assert record["score"] == 1.0
        assert 0.7 < record["score_interval"][0] < record["score_interval"][1] == 1.0
        assert record["judged"] == {"active": 10, "found": 10, "silent": 10, "rejected": 10}
        assert record["model"] == "stub" and "reason" not in record
        assert record["usage"]["requests"] == 2 and record["usage"]["prompt_tokens"] > 100
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert all(body["messages"][0]["role"] == "system" for _, body in stub.requests)
    assert "insulin" in capsys.readouterr().out


def test_a_model_that_guesses_scores_about_a_half(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub
) -> None:
    stub.mind = guesses
    scores = []
    for seed in range(5):
        assert describe("--seed", str(seed)) == 0
        for record in analysis.descriptions("trainer_0").values():
            low, high = record["score_interval"]
            assert low <= record["score"] <= high and high - low > 0.2
            scores.append(record["score"])
        (analysis.folder("trainer_0") / "descriptions.json").unlink()
    assert len(scores) == 30 and 0.4 < np.mean(scores) < 0.6


def test_a_wrong_description_scores_a_half_with_a_model_that_knows(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub
) -> None:
    stub.mind = lambda system, text: knows(system, text) if is_detection(text) else '{"description": "nonsense"}'
    describe()
    assert {record["score"] for record in analysis.descriptions("trainer_0").values()} == {0.5}


def test_what_explains_a_latent_does_not_judge_it(analysis: AnalysisFolder) -> None:
    material = Material(analysis, "trainer_0")
    for feature in range(LATENTS - 1):
        split = material.split(feature)
        own = {place.plain.split()[0] for place in split.explain}
        held_out = {place.plain.split()[0] for place in split.active}
        assert len(own) == len(held_out) == JUDGED and not own & held_out
        assert all(WORDS[feature] in place.plain.split() for place in split.active)
        assert not any(WORDS[feature] in place.plain.split() for place in split.silent)
        assert material.split(feature) == split
    assert Material(analysis, "trainer_0", seed=1).split(0).silent != material.split(0).silent
    assert material.probes is not None
    material.probes.fired_RF[:, 0] |= material.probes.token_RW[:, 4] != 5  # latent 0 fires beside other words, too
    assert all(WORDS[5] in place.plain for place in material.split(0).silent)
    material.probes.fired_RF[:, 0] = True
    assert material.split(0).silent == material.split(0).active == []


def test_a_prompt_shows_marked_examples_the_strongest_first_corpora_and_logit_effects(analysis: AnalysisFolder) -> None:
    material = Material(analysis, "trainer_0")
    prompt = material.prompt(2, material.split(2).explain)
    shares = [int(share) for share in re.findall(r"\((\d+)%", prompt)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 100 and shares[-1] < 30
    assert prompt.count("<<kidney>>") == 10 and "<<" not in prompt.replace("<<kidney>>", "")
    assert '"medical" 0.400%' in prompt and 'from "medical"' in prompt
    assert '" of", "\\"quote"' in prompt
    assert "active on 0.200% of all tokens" in prompt


def test_probes_that_do_not_fit_are_refused(analysis: AnalysisFolder) -> None:
    statistics = analysis.statistics("trainer_0")
    assert statistics.probes is not None
    for field, said in (("fired_RF", "don't fit its table"), ("document_R", "not of one number of places")):
        cut = getattr(statistics.probes, field)[..., :-1]
        damaged = dataclasses.replace(statistics, probes=statistics.probes._replace(**{field: cut}))
        analysis.write_statistics("trainer_0", damaged)
        with pytest.raises(UserError, match=said):
            Material(analysis, "trainer_0")


def test_an_analysis_without_probes_gives_descriptions_but_no_scores(
    describe: Callable[..., int], analysis: AnalysisFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (analysis.folder("trainer_0") / "probes.safetensors").unlink()
    assert describe() == 2 and "make it again with --overwrite, or add --no-score" in capsys.readouterr().err
    assert describe("--no-score") == 0
    assert all(record["score"] is None for record in analysis.descriptions("trainer_0").values())


def test_whole_texts_are_shown_unmarked_and_cut(analysis: AnalysisFolder) -> None:
    top, samples = analysis.examples("trainer_0")
    whole = [kept._replace(token_FEW=kept.token_FEW[..., :0], act_FEW=kept.act_FEW[..., :0]) for kept in (top, samples)]
    material = Material(analysis, "trainer_0")
    assert "<<marks>>" in whole_prompt(material, 0)
    material.top, material.samples = whole
    assert material.probes is not None
    material.probes = material.probes._replace(token_RW=material.probes.token_RW[:, :0])
    material._texts = {at: {"corpus": "medical", "text": f"{at} " + "long " * 500} for at in range(1100)}
    split = material.split(0)
    numbers = [int(place.plain.split()[0]) for place in split.silent]
    assert len(numbers) == JUDGED and all(
        number >= 1000 and number % len(WORDS) != 1000 % len(WORDS) for number in numbers
    )
    assert all(len(place.plain) <= 601 and place.marked == place.plain for place in split.explain)
    assert "of all texts" in (prompt := whole_prompt(material, 0)) and "mark" not in prompt and "<<" not in prompt


def test_a_document_counts_once_and_one_alone_gives_a_description_without_a_score(
    describe: Callable[..., int], analysis: AnalysisFolder
) -> None:
    statistics = analysis.statistics("trainer_0")
    for kept in (statistics.top, statistics.samples):
        kept.document_FE[0] = np.where(kept.document_FE[0] < 5, 0, -1)
    analysis.write_statistics("trainer_0", statistics)
    split = Material(analysis, "trainer_0").split(0)
    assert [place.share for place in split.explain] == [1.0] and split.active == []
    assert describe("--features", "0") == 0
    record = analysis.descriptions("trainer_0")[0]
    assert record["description"] == "fracture" and record["score"] is None and "reason" not in record


def test_balanced_accuracy_and_its_interval() -> None:
    active = np.array([True] * 8 + [False] * 4)
    said = np.array([True] * 6 + [False] * 2 + [True] + [False] * 3)
    result = detection_score(said, active)
    assert result["score"] == 0.75
    assert result["judged"] == {"active": 8, "found": 6, "silent": 4, "rejected": 3}
    low, high = result["score_interval"]  # Wilson: (0.409, 0.929) of 6/8, (0.301, 0.954) of 3/4
    assert low == pytest.approx(0.75 - np.hypot(0.75 - 0.40927, 0.75 - 0.30064) / 2, abs=1e-4)
    assert high == pytest.approx(0.75 + np.hypot(0.92852 - 0.75, 0.95441 - 0.75) / 2, abs=1e-4)


# ---------------------------------------------------------------------------------------------- going on


def test_what_was_described_is_not_asked_again(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub, capsys: pytest.CaptureFixture[str]
) -> None:
    describe("--features", "0", "1", "--no-score")
    assert len(stub.requests) == 2
    first = analysis.descriptions("trainer_0")
    describe("--features", "0", "1", "2", "--no-score")
    assert len(stub.requests) == 3
    assert {feature: analysis.descriptions("trainer_0")[feature] for feature in (0, 1)} == first
    capsys.readouterr()
    describe("--features", "0", "1", "2")  # now with scores
    assert len(stub.requests) == 9
    describe("--features", "0", "1", "2")
    assert len(stub.requests) == 9
    assert "0 asked for now, 3 described before" in capsys.readouterr().out


def test_another_model_or_prompt_describes_anew(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub
) -> None:
    describe("--features", "0")
    stub.model = "other"
    assert main([str(analysis.path), "--endpoint", stub.url, "--model", "other", "--features", "0"]) == 0
    assert len(stub.requests) == 4
    analysis.write_vocabulary(analysis.vocabulary() | {0: " rupture"})
    assert main([str(analysis.path), "--endpoint", stub.url, "--model", "other", "--features", "0"]) == 0
    assert analysis.descriptions("trainer_0")[0]["description"] == "rupture"


def test_a_refused_key_on_the_way_keeps_what_was_answered_and_a_second_run_finishes(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub, capsys: pytest.CaptureFixture[str]
) -> None:
    def until_the_fifth(system: str, question: str) -> str:
        if len(stub.requests) == 5:
            stub.always = Failure(401, {"error": {"message": "no credit"}})
        return knows(system, question)

    stub.mind = until_the_fifth
    assert describe("--parallel", "1", "--no-score") == 2
    assert "asks for a key" in capsys.readouterr().err
    assert len(analysis.descriptions("trainer_0")) == 5
    stub.always, stub.mind = None, knows
    assert describe("--no-score") == 0
    assert len(analysis.descriptions("trainer_0")) == 6
    assert len(stub.requests) == 7


def test_requests_run_beside_each_other_but_not_more_than_asked(describe: Callable[..., int], stub: ChatStub) -> None:
    stub.together, stub.delay = threading.Barrier(3), 0.2
    describe("--parallel", "3", "--no-score")
    assert stub.most_at_once == 3


def test_the_most_telling_latents_come_first(describe: Callable[..., int], analysis: AnalysisFolder) -> None:
    describe("--top_features", "2", "--no-score")
    assert list(analysis.descriptions("trainer_0")) == [0, 1]


# ---------------------------------------------------------------------------------------------- the command


def test_nothing_is_sent_without_an_address(
    analysis: AnalysisFolder, stub: ChatStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(analysis.path)]) == 2
    assert "Nothing is sent without --endpoint and --model" in capsys.readouterr().err
    assert main([str(analysis.path), "--endpoint", stub.url, "--model", "stub", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "<<fracture>>" in out and re.search(r"6 latents of trainer_0: 12 requests, about [\d,]+ tokens", out)
    assert main([str(analysis.path), "--dry_run", "--no-score"]) == 0
    assert "6 requests" in capsys.readouterr().out
    assert stub.requests == [] and not (analysis.folder("trainer_0") / "descriptions.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--features", "99"], r"no latent 99 in trainer_0: they are numbered 0 to 6"),
        (["--features", "-1"], r"no latent -1 in trainer_0"),
        (["--features", "6"], r"Latent 6 of trainer_0 fired nowhere"),
        (["--dictionary", "trainer_9"], r"no dictionary 'trainer_9'.*trainer_0"),
        (["--parallel", "0"], r"--parallel must be at least 1, got 0"),
        (["--timeout", "0"], r"--timeout must be"),
        (["--timeout", "nan"], r"--timeout must be"),
        (["--top_features", "0"], r"--top_features must be at least 1"),
    ],
)
def test_bad_arguments_are_one_sentence(
    describe: Callable[..., int], stub: ChatStub, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert describe(*arguments) == 2
    assert re.search(said, capsys.readouterr().err)
    assert stub.requests == []


def test_a_run_folder_works_and_one_of_several_dictionaries_must_be_chosen(
    tmp_path: Path, stub: ChatStub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_analysis(tmp_path / "run" / "analysis", names=("trainer_0", "trainer_1"))
    arguments = [str(tmp_path / "run"), "--endpoint", stub.url, "--model", "stub", "--features", "1"]
    assert main(arguments) == 2
    assert "choose one with --dictionary: trainer_0, trainer_1" in capsys.readouterr().err
    assert main([*arguments, "--dictionary", "trainer_1"]) == 0
    assert folder.descriptions("trainer_1")[1]["description"] == "insulin"
    assert folder.descriptions("trainer_0") == {}


def test_a_folder_without_an_analysis_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--endpoint", "http://localhost:1", "--model", "m"]) == 2
    assert "There is no analysis in" in capsys.readouterr().err


def test_damaged_records_are_made_anew(describe: Callable[..., int], analysis: AnalysisFolder) -> None:
    path = analysis.folder("trainer_0") / "descriptions.json"
    path.write_text('{"0": "text", "1": {"model": "stub"}, "2": null}', encoding="utf-8")
    assert describe("--features", "0", "1", "2", "--no-score") == 0
    assert [analysis.descriptions("trainer_0")[f]["description"] for f in range(3)] == WORDS[:3]


def test_an_interrupt_keeps_what_was_answered(
    describe: Callable[..., int],
    analysis: AnalysisFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import dictionary_learning.analysis.descriptions as module

    wait, calls = module.wait, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return wait(*args, **kwargs)

    monkeypatch.setattr(module, "wait", interrupted)
    assert describe("--no-score", "--parallel", "1") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(analysis.descriptions("trainer_0")) == 3
