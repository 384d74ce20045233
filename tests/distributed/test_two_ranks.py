"""Two ranks over Gloo: what they say to each other, the split harvest, states that move, a split dictionary.

The ranks are started once (a start costs seconds) and write down what they found (`two_ranks.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_launching import run_ranks

WORKER = Path(__file__).with_name("two_ranks.py")
START_LIMIT = 900  # seconds, on a very busy machine
pytestmark = pytest.mark.timeout(START_LIMIT + 100)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote down."""
    folder = tmp_path_factory.mktemp("two_ranks")
    ended = run_ranks([str(WORKER), str(folder)], 2, START_LIMIT)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.said for rank in ended)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def test_what_ranks_say_to_each_other(found: list[dict[str, Any]]) -> None:
    for rank, talk in enumerate(result["talk"] for result in found):
        assert talk["everyone"] == [0, 1]
        assert talk["of_first"] == 5
        assert talk["agreed"] == ["", "SIGTERM", "", "nothing left"]
        assert list(talk["merged"].items()) == [("trainer_9", 1), ("trainer_10", 0)]
        assert talk["together"] == "On rank 1: the disk is full."
        assert "Rank 1 differs from rank 0 in seed:" in talk["check_same"]
        assert talk["same"] == ""
        assert talk["total"].tolist() == [2.0, 1.0]
        assert talk["smallest"].tolist() == [1.0, 0.0]
        assert talk["stacked"].tolist() == [[0.0, 1.0], [0.0, 1.0]]
        assert talk["stacked_by_first"].tolist() == ([[0.0, 1.0]] * 2 if rank == 0 else [[1.0]] * 2)
        assert talk["exchanged"].tolist() == ([0.0, 10.0] if rank == 0 else [1.0, 2.0, 11.0, 12.0])


def test_the_harvest_is_split_and_each_record_read_once(found: list[dict[str, Any]]) -> None:
    first, second = (result["harvest"] for result in found)
    assert len(first["reads"]) == len(set(first["reads"])) == 160
    assert second["reads"] == []
    forwarded = [first["forwarded"], second["forwarded"]]
    contexts = {int(number) for _, provenance in first["alone"] for number in provenance.context_N}
    assert sum(forwarded) == max(contexts) + 1
    assert abs(forwarded[0] - forwarded[1]) <= 6  # one forward


def test_the_batches_of_two_ranks_are_those_of_one(found: list[dict[str, Any]]) -> None:
    first, second = (result["harvest"] for result in found)
    assert len(first["alone"]) == len(first["batches"]) == len(second["batches"]) > 20
    for alone, here, there in zip(first["alone"], first["batches"], second["batches"], strict=True):
        assert list(here[0]) == list(alone[0]) and list(there[0]) == ["resid_post_layer_2"]
        for name, rows in alone[0].items():
            torch.testing.assert_close(here[0][name], rows, rtol=0, atol=1e-6)
        torch.testing.assert_close(there[0]["resid_post_layer_2"], alone[0]["resid_post_layer_2"], rtol=0, atol=1e-6)
        for column, mine, theirs in zip(alone[1], here[1], there[1], strict=True):
            assert torch.equal(column, mine) and torch.equal(column, theirs)
    assert first["dropped"] == second["dropped"] == first["alone_dropped"] > 0
    assert first["rows_seen"] == second["rows_seen"] == first["alone_rows_seen"]
    for result in (first, second):
        assert len(result["plain"]) == len(result["plain_alone"])
        torch.testing.assert_close(torch.cat(result["plain"]), torch.cat(result["plain_alone"]), rtol=0, atol=1e-6)


def test_a_damaged_record_is_met_by_all_ranks_behind_the_batches_before_it(found: list[dict[str, Any]]) -> None:
    first, second = (result["damaged"] for result in found)
    assert first["problem"] == second["problem"] == first["alone_problem"] == "record 150 is damaged."
    assert first["before"] == second["before"] == first["alone_before"] > 0


def test_a_state_moves_between_numbers_of_ranks(found: list[dict[str, Any]]) -> None:
    first, second = (result["moved"] for result in found)
    assert [trainer["weights"][0].item() for trainer in first["trainers"]] == [0, 1, 2]
    assert dict(first["factors"]) == {"resid_post_layer_1": 2.0, "resid_post_layer_2": 2.0}
    assert first["step"] == second["step"] == 5
    assert [t["weights"][0].item() for t in first["own_trainers"]] == [1]
    assert [t["weights"][0].item() for t in second["own_trainers"]] == [0, 2]
    assert [settings["lr"] for settings in first["settings"]] == [0, 1, 2]
    assert [settings["lr"] for settings in second["own_settings"]] == [0, 2]
    assert first["too_few"] == second["too_few"] == "The saved run has 3 dictionaries, this one 2."
    assert "no activations of mlp_out_layer_0" in first["other_points"]
    for unbroken, one, two in zip(first["after"], first["after_on_one"], first["after_on_two"], strict=True):
        for name, rows in unbroken[0].items():
            torch.testing.assert_close(one[0][name], rows, rtol=0, atol=1e-6)
            torch.testing.assert_close(two[0][name], rows, rtol=0, atol=1e-6)
    for unbroken, two in zip(second["after"], second["after_on_two"], strict=True):
        torch.testing.assert_close(two[0]["resid_post_layer_2"], unbroken[0]["resid_post_layer_2"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", ["text", "token"])
def test_the_texts_of_a_sentence_encoder_are_read_and_encoded_once(found: list[dict[str, Any]], level: str) -> None:
    first, second = (result[level] for result in found)
    if first is None:
        pytest.skip("sentence-transformers or its model is not installed")
    epochs = 2 if level == "text" else 1
    assert len(first["reads"]) == 72 * epochs and second["reads"] == []
    encoded = len(set(first["reads"])) if level == "text" else 72  # embeddings are kept for the second epoch
    assert first["texts_encoded"] == second["texts_encoded"] == first["encoded"] + second["encoded"] == encoded
    assert min(first["encoded"], second["encoded"]) > 0.3 * encoded
    assert first["rows_seen"] == second["rows_seen"] >= 72 * epochs
    assert first["problem"] == second["problem"] == "record 52 is damaged."
    for result, points in ((first, 2), (second, 1)):
        for part, alone in (("batches", "alone"), ("from_there", "alone_from_there")):
            assert len(result[part]) == len(first[alone]) > 10
            for (acts, provenance), (expected, expected_provenance) in zip(result[part], first[alone], strict=True):
                assert len(acts) == (1 if level == "text" else points)
                for name, rows in acts.items():
                    torch.testing.assert_close(rows, expected[name], rtol=0, atol=1e-5)
                assert all(map(torch.equal, provenance, expected_provenance))
        assert result["taken"][0] == result["taken"][1] > 0
    assert first["epoch"] == epochs - 1


@pytest.mark.parametrize("architecture", ["top_k", "batch_top_k"])
def test_a_split_dictionary_learns_as_a_whole_one(found: list[dict[str, Any]], architecture: str) -> None:
    for result in (rank[architecture] for rank in found):
        assert result["own_latents"] == 32
        for whole, split in (result["begins"], result["ends"]):
            assert whole.keys() == split.keys()
            for name, values in whole.items():
                assert split[name].shape == values.shape
                torch.testing.assert_close(split[name], values, rtol=1e-5, atol=1e-5)
        moved = (result["ends"][0]["encoder.weight"] - result["begins"][0]["encoder.weight"]).abs().max()
        assert moved > 5e-3
        whole, split = result["metrics"]
        assert whole["dead_latents"] > 0 and "auxk_loss" in whole
        assert split == pytest.approx(whole, rel=1e-3, abs=1e-5)
        whole, split = result["configs"]
        assert split == whole
        unbroken, from_split, unbroken_split, from_whole = result["went_on"]
        for name, values in unbroken.items():
            for other in (from_split, unbroken_split, from_whole):
                torch.testing.assert_close(other[name], values, rtol=1e-4, atol=1e-4)


def test_of_equal_values_exactly_k_are_chosen(found: list[dict[str, Any]]) -> None:
    assert (found[0]["ties"] + found[1]["ties"]).tolist() == [4] * 5


def test_a_width_that_can_not_be_split_is_refused(found: list[dict[str, Any]]) -> None:
    assert found[0]["uneven"] == "The 63 latents can't be split over 2 ranks: choose a multiple of it."
