"""What is made of saved activations: a subset, disjoint parts, normalised rows, plain batches for training."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dictionary_learning.activations.saved import SavedActivations
from dictionary_learning.errors import UserError
from tests.test_saved_activations import folder as folder  # the fixture: 30 rows in four shards
from tests.test_saved_activations import numbers, rows

# ---------------------------------------------------------------------------------------------- subsets and splits


def test_the_first_rows_are_those_of_the_files_order(folder):
    source = SavedActivations(folder, batch_rows=4, first_rows=14, seed=0)
    assert source.rows == 14 and sorted(numbers(source)) == list(range(14))
    with pytest.raises(UserError, match="hold 30 rows, fewer than the 31 asked"):
        SavedActivations(folder, first_rows=31)
    with pytest.raises(UserError, match="first_rows must be at least 1, got 0"):
        SavedActivations(folder, first_rows=0)


@given(
    batch_rows=st.integers(1, 31),
    seed=st.integers(0, 5),
    shares=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_parts_of_a_split_are_disjoint_and_together_everything(tmp_path_factory, batch_rows, seed, shares):
    file = tmp_path_factory.mktemp("split") / "x.safetensors"
    save_file({"activations": rows(0, 100)}, file)
    fractions = {f"part{i}": share / sum(shares) for i, share in enumerate(shares)}

    def split(seed):
        return SavedActivations(file, batch_rows=batch_rows).split(fractions, seed=seed)

    parts = {name: numbers(part) for name, part in split(seed).items()}
    assert sorted(n for part in parts.values() for n in part) == list(range(100))
    for name, fraction in fractions.items():
        assert abs(len(parts[name]) - 100 * fraction) <= 1
        assert parts[name] == sorted(parts[name])  # in the order of the file
    assert parts == {name: numbers(part) for name, part in split(seed).items()}


def test_a_split_depends_on_its_seed_and_parts_resume_only_as_themselves(folder):
    def split(seed):
        return SavedActivations(folder, batch_rows=3, seed=1).split({"train": 0.8, "validation": 0.2}, seed=seed)

    parts, others = split(0), split(1)
    assert (parts["train"].rows, parts["validation"].rows) == (24, 6)
    state = json.loads(json.dumps(parts["train"].state_dict()))
    assert sorted(numbers(parts["train"])) != sorted(numbers(others["train"]))
    split(0)["train"].load_state_dict(state)
    with pytest.raises(UserError, match="in another part of them"):
        others["train"].load_state_dict(state)


@pytest.mark.parametrize(
    ("fractions", "said"),
    [
        ({"train": 0.9, "validation": 0.2}, "must be positive and sum to 1: train 0.9, validation 0.2 sum to 1.1"),
        ({"train": 1.2, "validation": -0.2}, "must be positive"),
        ({"train": 0.5}, "train 0.5 sum to 0.5"),
        ({}, "none sum to 0"),
        ({"train": 0.999, "validation": 0.001}, "part 'validation' of 30 rows has no row"),
        ({"train": float("nan"), "validation": 0.5}, "must be positive"),
    ],
)
def test_splits_that_cannot_be_are_refused(folder, fractions, said):
    with pytest.raises(UserError, match=said):
        SavedActivations(folder).split(fractions)


# ---------------------------------------------------------------------------------------------- what is wrong with rows


def test_rows_that_are_not_finite_can_be_left_out_of_all_hook_points(folder):
    x = rows(17, 30)
    second = torch.cat([-x, -x], dim=1)
    x[9, 2] = torch.nan
    second[3, 0] = second[9, 1] = torch.inf
    save_file({"activations": x, "second": second}, folder / "shard-d.safetensors")
    whole = [n for n in range(30) if n not in (17 + 9, 17 + 3)]
    for seed in (None, 0):
        source = SavedActivations(folder, batch_rows=6, seed=seed, non_finite="drop")
        batches = list(source)
        assert sorted(numbers(batches)) == whole and sorted(-n for n in numbers(batches, "second")) == whole
        assert source.rows_not_finite == {"activations": 1, "second": 2}
    with pytest.warns(UserWarning, match="'second': 2 of 30 rows|'activations': 1 of 29 rows"):
        moments = SavedActivations(folder).measure()
    assert moments["second"].rows_not_finite == 2 and moments["activations"].count == 28
    with pytest.raises(UserError, match="'error' or 'drop', got 'ignore'"):
        SavedActivations(folder, non_finite="ignore")
    save_file({"a": torch.full((9, 2), torch.nan)}, folder.parent / "nan.safetensors")
    with pytest.raises(UserError, match="None of the 9 saved rows is finite"):
        next(SavedActivations(folder.parent / "nan.safetensors", batch_rows=2, non_finite="drop", epochs=None))


def test_a_validation_part_is_normalised_by_the_training_part(folder):
    parts = SavedActivations(folder, batch_rows=2).split({"train": 0.7, "validation": 0.3})
    with pytest.raises(UserError, match="z-scores have widths {}"):
        parts["train"].normalized({})
    zscores = {name: moments.zscore() for name, moments in parts["train"].measure().items()}
    train, validation = parts["train"].normalized(zscores), parts["validation"].normalized(zscores)
    z = torch.cat([batch.acts["second"] for batch in train])
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(6), rtol=1e-5, atol=0)
    raw = torch.cat([batch.acts["second"] for batch in parts["validation"]])
    back = zscores["second"].invert(torch.cat([batch.acts["second"] for batch in validation]))
    torch.testing.assert_close(back, raw, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="normalised already"):
        train.normalized(zscores)


def test_a_folder_of_pt_files_says_how_to_give_one(tmp_path):
    torch.save(rows(0, 3), tmp_path / "x.pt")
    with pytest.raises(UserError, match="A .pt file is given by itself, as '.*x.pt'"):
        SavedActivations(tmp_path)


# ---------------------------------------------------------------------------------------------- plain batches


def test_a_loader_gives_batches_of_one_size_in_order(folder):
    source = SavedActivations(folder, batch_rows=6)
    loader = source.loader(8)
    batches = list(loader)
    assert [len(batch["activations"]) for batch in batches] == [8, 8, 8, 6]
    assert torch.cat([batch["second"] for batch in batches])[:, 0].tolist() == [-n for n in range(30)]
    assert loader.config == {"d_submodule": None, "out_batch_size": 8, "device": "cpu"}
    assert [len(b["second"]) for b in SavedActivations(folder).loader(8, drop_last=True)] == [8, 8, 8]
    save_file({"a": rows(0, 5)}, folder.parent / "one.safetensors")
    assert [batch.shape for batch in SavedActivations(folder.parent / "one.safetensors").loader(3)] == [(3, 3), (2, 3)]
    with pytest.raises(UserError, match="at least 1 row, got 0"):
        source.loader(0)


@given(batch=st.integers(1, 12), batch_rows=st.integers(1, 12), seed=st.none() | st.just(0), data=st.data())
def test_a_loader_resumed_anywhere_goes_on(tmp_path_factory, batch, batch_rows, seed, data):
    file = tmp_path_factory.mktemp("loader") / "x.safetensors"
    x = rows(0, 25)
    x[13, 1] = torch.nan
    save_file({"activations": x}, file)

    def make():
        return SavedActivations(file, batch_rows=batch_rows, seed=seed, epochs=2, non_finite="drop").loader(batch)

    whole = [b[:, 0].tolist() for b in make()]
    assert sum(map(len, whole)) == 48
    stop = data.draw(st.integers(0, len(whole)), label="stop")
    broken, resumed, again = make(), make(), make()
    begun = [b[:, 0].tolist() for b in islice(broken, stop)]
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    again.load_state_dict(resumed.state_dict())  # a state taken before the first batch behind a resume
    assert begun + [b[:, 0].tolist() for b in again] == whole


def test_a_loader_trains_and_a_resumed_training_is_the_same(folder, tmp_path):
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    torch.manual_seed(0)
    save_file({"a": torch.randn(200, 8)}, tmp_path / "x.safetensors")
    config = {
        "trainer": TopKTrainer,
        "activation_dim": 8,
        "dict_size": 16,
        "k": 2,
        "layer": 0,
        "lm_name": "x",
        "seed": 0,
    }

    def train(steps_of_run, run, resume=False):
        data = SavedActivations(tmp_path / "x.safetensors", batch_rows=30, seed=0, epochs=None).loader(16)
        callbacks = [lambda run, step: setattr(run, "stopped", "test" if step == steps_of_run else run.stopped)]
        return trainSAE(
            data, [config | {"steps": 20}], 20, save_dir=tmp_path / run, callbacks=callbacks, resume=resume
        )[0].state_dict()

    whole = train(20, "whole")
    train(7, "broken")
    resumed = train(20, "broken", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_loader_pins_and_copies_to_the_gpu(folder):
    batches = list(SavedActivations(folder, batch_rows=6).loader(8, device="cuda"))
    assert all(batch["activations"].is_cuda for batch in batches)
    assert torch.cat([batch["activations"] for batch in batches]).cpu()[:, 0].tolist() == list(range(30))
