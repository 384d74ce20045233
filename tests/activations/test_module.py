"""Any torch module as a source: what is read, where the forward stops, and a dictionary on sounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dictionary_learning import ActivationBuffer, ModuleActivations, trainSAE
from dictionary_learning.activations import ActivationSource
from dictionary_learning.errors import UserError
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers import TopKTrainer

D = 6


class Block(nn.Module):
    """Gives a tuple and adds in place to what it was given, as some transformer blocks do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix, self.drop, self.calls = nn.Linear(D, D), nn.Dropout(0.5), 0

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        self.calls += 1
        y = self.drop(self.mix(x)) * scale
        x += 100.0
        return y, "attention weights"


class Net(nn.Module):
    """Blocks over [B, T, D], a head after them, and a module that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(seed) for seed in range(3))
        self.shared, self.unused = nn.Identity(), nn.Linear(D, D)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = x.clone()
        for layer in self.layers:
            x, _ = layer(self.shared(x), scale=scale)
        return {"states": x, "mean": x.mean(1)}


def batches(number: int = 4, examples: int = 3, length: int = 5) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(examples, length, D, generator=g) for _ in range(number)]


def rows(source: ModuleActivations) -> dict[str, Tensor]:
    parts = list(source)
    return {name: torch.cat([part.acts[name] for part in parts]) for name in source.widths}


def by_hand(net: Net, x: Tensor, layer: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(input, output) of a layer, computed with its weights."""
    for block in list(net.layers)[:layer]:
        x = block.mix(x) * scale
    return x, net.layers[layer].mix(x) * scale


# ------------------------------------------------------------------------------------------------- what is read


def test_rows_are_what_passes_at_the_hook_points_with_dropout_off_and_before_it_is_changed_in_place() -> None:
    net, data = Net().train(), batches()
    source = ModuleActivations(net, data, ["layers.0", "layers.2:in", net.layers[1]])
    assert isinstance(source, ActivationSource)
    assert source.widths == {"layers.0": D, "layers.2:in": D, "layers.1": D}
    got = rows(source)
    with torch.no_grad():
        expected = [
            torch.cat([by_hand(net, x, n)[io].flatten(0, 1) for x in data]) for n, io in ((0, 1), (2, 0), (1, 1))
        ]
    for acts, wanted in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(acts, wanted)
        assert not acts.requires_grad


def test_the_forward_stops_behind_the_last_hook_point() -> None:
    net = Net()
    list(ModuleActivations(net, batches(4), ["layers.1:in", "layers.0"]))
    assert [layer.calls for layer in net.layers] == [4, 1, 1]  # the first forward runs to its end, to be looked at


def test_input_and_output_of_a_module_are_aligned_for_a_transcoder() -> None:
    net, data = Net(), batches(4, 3, 5)
    buffer = ActivationBuffer(
        None,
        ModuleActivations(net, data, "layers.1", io="in_and_out"),
        io="in_and_out",
        n_ctxs=8,
        ctx_len=5,
        out_batch_size=10,
    )
    for pair in buffer:
        assert pair.shape[1:] == (2, D)
        torch.testing.assert_close(net.layers[1].mix(pair[:, 0]), pair[:, 1])
    assert buffer.rows_drawn == 60


class Pair(NamedTuple):
    x: Tensor
    scale: float


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (lambda x: (x, 2.0), None),
        (lambda x: Pair(x, 2.0), None),
        (lambda x: {"x": x, "scale": 2.0}, None),
        (lambda x: [x, "label"], lambda module, batch: module(batch[0], scale=2.0)),
    ],
    ids=["tuple", "namedtuple", "mapping", "forward"],
)
def test_a_batch_is_fed_as_it_is_or_as_forward_says(batch: Any, forward: Any) -> None:
    net, data = Net(), batches()
    got = rows(ModuleActivations(net, [batch(x) for x in data], "layers.1", forward=forward))["layers.1"]
    with torch.no_grad():
        torch.testing.assert_close(got, torch.cat([by_hand(net, x, 1, 2.0)[1].flatten(0, 1) for x in data]))


def test_module_and_batches_meet_on_the_device_and_the_places_of_the_rows_stay_on_the_host() -> None:
    source = ModuleActivations(Net(), [{"x": x} for x in batches()], "layers.1", device="meta")
    batch = next(source)
    assert batch.acts["layers.1"].device.type == "meta" and batch.acts["layers.1"].shape == (15, D)
    assert batch.provenance is not None and batch.provenance.position_N.tolist() == [0, 1, 2, 3, 4] * 3


def test_provenance_counts_examples_and_places_and_the_mask_leaves_rows_out() -> None:
    def mask(batch: Tensor) -> Tensor:
        return torch.arange(batch[..., 0].numel()).view(batch.shape[:2]) % 4 != 1

    net, data = Net(), batches(2, 3, 5)
    everything = rows(ModuleActivations(net, data, "layers.0"))["layers.0"]
    source = ModuleActivations(net, data, "layers.0", mask=mask)
    parts = list(source)
    keep = [n for n in range(30) if (n % 15) % 4 != 1]
    torch.testing.assert_close(torch.cat([p.acts["layers.0"] for p in parts]), everything[keep])
    provenance = [torch.cat(column) for column in zip(*(p.provenance for p in parts if p.provenance), strict=True)]
    assert provenance[0].tolist() == provenance[4].tolist() == [n // 5 for n in keep]
    assert provenance[1].tolist() == [n % 5 for n in keep]
    assert set(provenance[2].tolist()) == {-1} and set(provenance[3].tolist()) == {0}
    assert source.examples == 6


def test_a_table_has_a_row_an_example() -> None:
    x = torch.randn(20, D)
    net = nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, 2))
    source = ModuleActivations(net, DataLoader(TensorDataset(x), batch_size=8), "1")
    torch.testing.assert_close(rows(source)["1"], net[0](x).relu())


def test_a_batch_larger_than_max_rows_is_handed_out_in_parts() -> None:
    data = [*batches(1, 2, 5), *batches(1, 4, 6)]
    source = ModuleActivations(Net(), data, "layers.0")
    assert source.max_rows == 10
    sizes = [len(part.acts["layers.0"]) for part in source]
    assert sizes == [10, 10, 10, 4]
    assert [len(part.acts["layers.0"]) for part in ModuleActivations(Net(), data, "layers.0", max_rows=7)][:2] == [7, 3]


def test_feature_maps_are_refused_until_to_rows_says_where_the_channels_are() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 2))
    images = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    with pytest.raises(UserError, match=r"'1' passes \[2, 5, 6, 6\].*to_rows=lambda x: x\.permute\(0, 2, 3, 1\)"):
        ModuleActivations(net, images, "1")
    got = rows(ModuleActivations(net, images, "1", to_rows=lambda x: x.permute(0, 2, 3, 1)))["1"]
    assert got.shape == (2 * 2 * 36, 5)
    with torch.no_grad():
        torch.testing.assert_close(got[36 + 7], net[1](net[0](images[0]))[1, :, 1, 1])


def test_one_dimensional_feature_maps_are_refused_too_but_not_a_linear_layer() -> None:
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.GELU())
    both = nn.Sequential(net, nn.Linear(8, 3))
    sound = [torch.randn(2, 1, 10)]
    with pytest.raises(UserError, match=r"permute\(0, 2, 1\)"):
        ModuleActivations(both, sound, "0")
    assert ModuleActivations(both, sound, "1").widths == {"1": 3}
    assert ModuleActivations(nn.Sequential(both), sound, "0").widths == {"0": 3}
    assert ModuleActivations(both, sound, "0", to_rows=lambda x: x.permute(0, 2, 1)).widths == {"0": 4}


def test_an_output_with_fields_is_read_by_to_rows() -> None:
    outer = nn.Sequential(Net())
    with pytest.raises(
        UserError, match="passes a dict with the fields states, mean, not a tensor.*to_rows=lambda value"
    ):
        ModuleActivations(outer, batches(), "0")
    source = ModuleActivations(outer, batches(), "0", to_rows=lambda value: value["states"])
    inner = ModuleActivations(Net(), batches(), "layers.2")
    torch.testing.assert_close(rows(source)["0"], rows(inner)["layers.2"])


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook_points": "layers.7"}, r"Net has no module 'layers\.7'\. Did you mean 'layers\.\d'\?"),
        ({"hook_points": "layer.1"}, r"no module 'layer\.1'\. Did you mean 'layers\.1'\?"),
        ({"hook_points": []}, "No hook point given"),
        ({"hook_points": 3}, "a module's path or the module itself, not int"),
        ({"hook_points": nn.Linear(2, 2)}, "Linear given as hook point is not a submodule of Net"),
        ({"hook_points": "unused"}, "'unused' does not run in a forward pass of Net"),
        ({"hook_points": "shared"}, "'shared' runs 3 times, not once"),
        ({"io": "both"}, "io must be one of out, in, in_and_out, got 'both'"),
        ({"io": "in_and_out", "hook_points": "layers.1:in"}, "names no side: write 'layers.1'"),
        ({"io": "in_and_out", "hook_points": "resid_post_layer_1"}, "says its side by itself"),
        ({"batches": []}, "at least one batch"),
        ({"batches": iter(batches()), "epochs": 2}, "can be read once only"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"batches": [{"y": torch.ones(2, 3, D)}]}, r"Net can't take a batch of the fields y .*forward=lambda module"),
        (
            {"mask": lambda x: torch.ones(3, 4, dtype=torch.bool)},
            r"torch\.bool tensor \[3, 5\].*got torch\.bool \[3, 4\]",
        ),
        ({"mask": lambda x: torch.ones(3, 5)}, r"got torch\.float32 \[3, 5\]"),
        ({"to_rows": lambda x: x[0].sum()}, r"to_rows should give .*'layers\.1' it gave a float32 tensor \[\]"),
        ({"to_rows": lambda x: x["states"]}, r"to_rows fails on what 'layers\.1' passes, a tuple of .*TypeError"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModuleActivations(Net(), **({"batches": batches(), "hook_points": "layers.1"} | options))


def test_hook_points_of_different_positions_are_refused() -> None:
    net = nn.Sequential(nn.Linear(D, 4), nn.Flatten(), nn.Linear(20, 3))
    with pytest.raises(UserError, match=r"differ in their positions \(0 \[3, 5\], 2 \[3\]\)"):
        ModuleActivations(net, batches(), ["0", "2"])


def test_a_width_that_changes_is_refused_where_it_does() -> None:
    net = nn.Sequential(nn.Identity())
    source = ModuleActivations(net, [torch.ones(2, 3, 4), torch.ones(2, 3, 5)], "0")
    next(source)
    with pytest.raises(UserError, match="'0' has width 4 in the first batch and 5 in batch 1"):
        next(source)


def test_a_mask_that_wants_nothing_does_not_read_for_ever() -> None:
    source = ModuleActivations(
        Net(), batches(), "layers.1", epochs=None, mask=lambda x: torch.zeros(3, 5, dtype=torch.bool)
    )
    with pytest.raises(UserError, match="gave no row"):
        next(source)


def test_batches_that_are_gone_in_the_second_pass_are_not_waited_for() -> None:
    class Once:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            return iter(batches(2) if self.passes == 1 else [])

    source = ModuleActivations(Net(), Once(), "layers.1", epochs=None)
    assert [len(next(source).acts["layers.1"]) for _ in range(2)] == [15, 15]
    with pytest.raises(UserError, match="gave no row"):
        next(source)


def test_the_end_stays_the_end() -> None:
    source = ModuleActivations(Net(), batches(2), "layers.0", epochs=3)
    assert len(list(source)) == 6
    assert list(source) == []


# ------------------------------------------------------------------------------------------------- audio


class Sounds(Dataset):
    """A second tenth of two tones out of eight at 16 kHz in noise, each made from its number."""

    def __init__(self, number: int, seed: int) -> None:
        self.number, self.seed = number, seed

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.number:
            raise IndexError
        g = torch.Generator().manual_seed(self.seed * 100_000 + index)
        time = torch.arange(1600) / 16_000
        tones = 200.0 * 2 ** (torch.randperm(8, generator=g)[:2] / 2)
        phases = 2 * math.pi * torch.rand(2, 1, generator=g)
        gains = 0.3 + torch.rand(2, 1, generator=g)
        wave = (gains * torch.sin(2 * math.pi * tones[:, None] * time + phases)).sum(0)
        return wave + 0.05 * torch.randn(1600, generator=g)


@pytest.fixture(scope="module")
def wav2vec() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 4, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    return Wav2Vec2Model(config)


def test_a_dictionary_on_an_audio_encoder_learns(wav2vec: Any) -> None:
    k, layer = 4, "encoder.layers.1"
    sounds = DataLoader(Sounds(400, 0), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))
    source = ModuleActivations(wav2vec, sounds, layer, epochs=None)
    buffer = ActivationBuffer(None, source, n_ctxs=100, ctx_len=39, out_batch_size=256)
    config = {"trainer": TopKTrainer, "activation_dim": 32, "dict_size": 256, "k": k, "layer": 1, "lm_name": "wav2vec2"}
    (dictionary,) = trainSAE(buffer, [{**config, "seed": 0}], 400, normalize_activations=True)

    heldout = rows(ModuleActivations(wav2vec, DataLoader(Sounds(60, 1), batch_size=20), layer))[layer]
    train = rows(ModuleActivations(wav2vec, DataLoader(Sounds(200, 0), batch_size=20), layer))[layer]
    mean = train.mean(0)
    directions = torch.linalg.svd(train - mean, full_matrices=False)[2][:k]
    centred = heldout - mean
    left = centred - centred @ directions.T @ directions
    pca = 1 - (left.square().sum() / (heldout - heldout.mean(0)).square().sum()).item()
    result = evaluate(dictionary, [heldout])
    assert result["l0"] <= k + 0.5
    assert 0 < pca < 0.95
    assert result["frac_variance_explained"] > pca + 0.05, (result, pca)
    assert 1.0 < buffer.mixing()["rows_per_context"] < 2.0


def test_the_snippet_of_the_documentation_runs(wav2vec: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "activations.md").read_text(encoding="utf-8")
    snippet = page.split("## Any torch module")[1].split("```python\n")[1].split("```")[0]
    assert snippet.count("\n") <= 11
    names = {"wav2vec2": wav2vec, "DataLoader": DataLoader, "sounds": Sounds(60, 0), "steps": 30}
    exec(compile(snippet, "activations.md", "exec"), names)
    assert names["codes"].shape == (16 * 38, 256)  # type: ignore[attr-defined]


def test_frames_of_padding_are_left_out_of_an_audio_encoder(wav2vec: Any) -> None:
    samples = torch.tensor([1600, 900])
    wave = torch.stack([Sounds(2, 5)[0], Sounds(2, 5)[1]])
    wave[1, 900:] = 0
    batch = {"input_values": wave, "attention_mask": torch.arange(1600) < samples[:, None]}
    frames = wav2vec._get_feat_extract_output_lengths(samples)

    def mask(batch: dict[str, Tensor]) -> Tensor:
        return torch.arange(int(frames[0])) < frames[:, None]

    source = ModuleActivations(wav2vec, [batch], "encoder.layers.2", mask=mask)
    got = rows(source)["encoder.layers.2"]
    assert len(got) == int(frames.sum())
    with torch.no_grad():
        states = wav2vec(**batch, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(got[int(frames[0]) :], states[1, : int(frames[1])])


def test_the_convolutions_of_an_audio_encoder_have_their_channels_first(wav2vec: Any) -> None:
    sounds = DataLoader(Sounds(4, 0), batch_size=2)
    with pytest.raises(UserError, match=r"'feature_extractor' passes \[2, 32, 38\].*permute\(0, 2, 1\)"):
        ModuleActivations(wav2vec, sounds, "feature_extractor")
    source = ModuleActivations(wav2vec, sounds, "feature_extractor", to_rows=lambda x: x.permute(0, 2, 1))
    assert source.widths == {"feature_extractor": 32}
