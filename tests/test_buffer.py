"""The ring: every row once, drawn uniformly, replaced in place, with its provenance, and resumed bit for bit."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.activations.types import ActivationBatch, ActivationSource, Provenance
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.errors import UserError

WIDTH = 4


class NumberedRows:
    """A source whose row n is [n, n, n, n] at its first hook point and [-n, ...] at the second, in context n // 8.

    It gives between 1 and `max_rows` rows at a time, as a language model does whose special tokens are left out.
    """

    def __init__(self, rows: int, max_rows: int = 32, points: tuple[str, ...] = ("a",), context: int = 8) -> None:
        self.rows, self.max_rows, self.context = rows, max_rows, context
        self.widths = dict.fromkeys(points, WIDTH)
        self.dtype = torch.float32
        self.given = 0

    def __iter__(self):
        return self

    def __next__(self) -> ActivationBatch:
        if self.given >= self.rows:
            raise StopIteration
        count = 1 + int(np.random.default_rng(self.given).integers(self.max_rows))
        numbers = torch.arange(self.given, min(self.given + count, self.rows))
        self.given += len(numbers)
        signs = (1.0, -1.0, 2.0)
        acts = {p: (s * numbers[:, None]).repeat(1, WIDTH) for p, s in zip(self.widths, signs, strict=False)}
        return ActivationBatch(
            acts, Provenance(numbers // 16, numbers % 16, numbers * 7, numbers % 3, numbers // self.context)
        )

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def buffer_of(rows=1000, *, max_rows=32, capacity=128, batch=16, points=("a",), context=8, **settings):
    source = NumberedRows(rows, max_rows, points, context)
    return ActivationBuffer(None, source, n_ctxs=capacity // 8, ctx_len=8, out_batch_size=batch, **settings)


def numbers_of(batch) -> list[int]:
    assert (batch == batch[:, :1]).all()
    return batch[:, 0].long().tolist()


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------- what is drawn


@given(
    rows=st.integers(1, 700),
    max_rows=st.integers(1, 60),
    batch=st.integers(1, 60),
    spare=st.integers(0, 100),
    seed=st.integers(0, 3),
)
def test_every_harvested_row_is_drawn_exactly_once(rows, max_rows, batch, spare, seed):
    source = NumberedRows(rows, max_rows)
    buffer = ActivationBuffer(None, source, n_ctxs=max_rows + batch + spare, ctx_len=1, out_batch_size=batch, seed=seed)
    batches = [numbers_of(b) for b in buffer]
    assert sorted(n for b in batches for n in b) == list(range(rows))
    assert all(len(b) == batch for b in batches[:-1])
    assert buffer.rows_drawn == rows


def test_every_row_of_a_full_buffer_is_as_likely_to_be_drawn():
    buffer = buffer_of(10_000)
    for _ in range(40):  # into the steady state
        next(buffer)
    buffer.refresh()
    state = buffer.state_dict()
    counts: dict[int, int] = {}
    draws = 800
    for seed in range(draws):
        buffer.load_state_dict({**state, "rng": np.random.default_rng(seed).bit_generator.state})
        for number in numbers_of(next(buffer)):
            counts[number] = counts.get(number, 0) + 1
    level = state["n_live"]
    assert len(counts) == level > 90
    # Each row's count is binomial with p = 16 / level; the sum of squares of its z-scores is chi-squared, near `level`.
    p = 16 / level
    chi = sum((count - draws * p) ** 2 for count in counts.values()) / (draws * p * (1 - p))
    assert level - 4 * (2 * level) ** 0.5 < chi < level + 4 * (2 * level) ** 0.5


def test_neighbours_in_the_stream_are_spread_over_many_batches():
    batches = [numbers_of(b) for b in buffer_of(8000, capacity=1024)]
    batch_of = {number: i for i, numbers in enumerate(batches) for number in numbers}
    waits = [batch_of[n] for n in range(4000, 4032)]  # one forward's worth in the middle
    assert len(set(waits)) > 20 and np.std(waits) > 20


def test_batches_depend_on_the_seed_alone():
    def drawn(seed):
        return [numbers_of(b) for b in buffer_of(300, seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)


# ---------------------------------------------------------------------------------------------- the ring


def test_the_ring_stays_in_its_place_and_between_full_and_one_forward_short_of_full():
    buffer = buffer_of(2000, capacity=128, max_rows=32, batch=16)
    place = buffer.activations.data_ptr()
    levels = []
    for batch in buffer:
        assert buffer.activations.data_ptr() == place != batch.data_ptr()
        if buffer.source.given < 2000:
            levels.append(buffer.source.given - buffer.rows_drawn)
    assert len(levels) > 100
    assert 128 - 32 - 16 < min(levels) and max(levels) <= 128 - 16
    assert buffer.nbytes == 128 * WIDTH * 4


def test_exactly_the_freed_slots_are_filled_again():
    source = TensorStream(torch.arange(start, start + 16.0)[:, None] for start in range(0, 4800, 16))
    buffer = ActivationBuffer(None, source, n_ctxs=80, ctx_len=1, out_batch_size=16)
    buffer.refresh()
    for _ in range(50):
        before = buffer.activations.flatten().tolist()
        drawn = set(next(buffer).flatten().tolist())
        assert buffer.activations.flatten().tolist() == before
        buffer.refresh()
        after = buffer.activations.flatten().tolist()
        assert {old for old, new in zip(before, after, strict=True) if old != new} == drawn


def test_a_drawn_batch_is_not_overwritten_by_later_rows():
    buffer = buffer_of()
    first = next(buffer)
    kept = first.clone()
    for _ in range(40):
        next(buffer)
    assert torch.equal(first, kept)


def test_a_ring_of_128_mb_needs_less_than_a_tenth_more_at_its_peak():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads the peak of the resident memory from /proc")
    script = """
import torch
from dictionary_learning.activations.saved import TensorStream
from dictionary_learning.buffer import ActivationBuffer

torch.set_num_threads(1)
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
def run(n_ctxs, draws):
    batches = (torch.full((256, 512), float(i)) for i in range(10**9))
    buffer = ActivationBuffer(None, TensorStream(batches), n_ctxs=n_ctxs, ctx_len=128, out_batch_size=256)
    for _ in range(draws):
        next(buffer)
    buffer.mean_squared_norm()
    return buffer.nbytes
run(4, 5)  # what torch and numpy load on first use
before = peak()
size = run(512, 100)
print(size, peak() - before)
"""
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    size, grown = map(int, out.stdout.split())
    assert size == 128 * 2**20
    assert 0.9 * size < grown < 1.1 * size


# ---------------------------------------------------------------------------------------------- several hook points


def test_hook_points_stay_aligned():
    buffer = buffer_of(500, points=("a", "b", "c"))
    assert buffer.hook_points == ["a", "b", "c"] and buffer.nbytes == 3 * 128 * WIDTH * 4
    for batch in buffer:
        assert list(batch) == ["a", "b", "c"]
        assert torch.equal(batch["b"], -batch["a"]) and torch.equal(batch["c"], 2 * batch["a"])


def test_provenance_stays_with_its_row():
    buffer = buffer_of(500, points=("a", "b"), provenance=True)
    seen = 0
    while True:
        try:
            acts, provenance = buffer.draw()
        except StopIteration:
            break
        n = acts["a"][:, 0].long()
        expected = Provenance(n // 16, n % 16, n * 7, n % 3, n // 8)
        assert all(map(torch.equal, provenance, expected))
        seen += len(n)
    assert seen == 500
    assert buffer_of().draw().provenance is None


def test_provenance_of_a_source_without_any_is_refused():
    source = TensorStream([torch.zeros(4, 2)])
    with pytest.raises(UserError, match="does not know it"):
        next(ActivationBuffer(None, source, n_ctxs=8, ctx_len=1, out_batch_size=2, provenance=True))


def test_input_and_output_are_stacked():
    for batch in buffer_of(100, points=("in", "out"), io="in_and_out"):
        assert batch.shape[1:] == (2, WIDTH)
        assert torch.equal(batch[:, 0], -batch[:, 1]) and (batch[:, 0] >= 0).all()
    with pytest.raises(UserError, match="one input and one output"):
        buffer_of(points=("a", "b", "c"), io="in_and_out")


# ---------------------------------------------------------------------------------------------- the end of the stream


def test_a_finished_buffer_ends_for_loops_also_inside_generators():
    def through(buffer):
        for batch in buffer:  # PEP 479: a StopIteration that leaks into a generator becomes a RuntimeError
            yield len(batch)

    buffer = buffer_of(40)
    assert sum(through(buffer)) == 40
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(buffer)
    assert list(buffer) == []


def test_a_source_that_breaks_its_promise_is_caught_before_it_overwrites_rows():
    class TooMany(NumberedRows):
        def __next__(self):
            return ActivationBatch({"a": torch.ones(self.max_rows + 1, WIDTH)})

    with pytest.raises(ValueError, match="gave 33 rows at once, above its max_rows 32"):
        next(ActivationBuffer(None, TooMany(100, 32), n_ctxs=64, ctx_len=1, out_batch_size=8))


# ---------------------------------------------------------------------------------------------- measures


def test_mixing_counts_the_rows_that_share_a_context():
    source = NumberedRows(12, 12, context=5)  # contexts of 5, 5 and 2 rows
    buffer = ActivationBuffer(None, source, n_ctxs=24, ctx_len=1, out_batch_size=12)
    assert buffer.mixing() == {}
    next(buffer)
    assert buffer.mixing() == {"rows_per_context": 4.0, "rows_alone": 0.0}

    source = NumberedRows(11, 11, context=5)  # contexts of 5, 5 and 1 rows
    buffer = ActivationBuffer(None, source, n_ctxs=24, ctx_len=1, out_batch_size=12)
    next(buffer)
    assert buffer.mixing() == {"rows_per_context": 11 / 3, "rows_alone": 1 / 11}

    buffer = buffer_of(points=("a", "b"), provenance=True)
    for _ in range(20):
        where = buffer.draw().provenance
        buffer.refresh()  # the slots of the batch are taken by other rows, and the measure is still of the batch
        assert buffer.mixing()["rows_per_context"] == 16 / len(where.context_N.unique())


def test_a_large_buffer_mixes_well_and_a_small_one_badly():
    def alone(capacity):
        buffer = buffer_of(40_000, capacity=capacity, max_rows=64, batch=64)
        shares = []
        for _ in range(100):
            next(buffer)
            shares.append(buffer.mixing()["rows_alone"])
        return np.mean(shares)

    assert alone(16_384) > 0.95  # the chance of meeting one of 7 siblings is 7 x 64 / 16,384 = 0.03
    assert alone(136) < 0.3


def test_mixing_says_nothing_where_contexts_are_unknown():
    buffer = ActivationBuffer(None, TensorStream([torch.ones(8, 2)]), n_ctxs=16, ctx_len=1, out_batch_size=4)
    next(buffer)
    assert buffer.mixing() == {}


def test_the_mean_squared_norm_is_of_the_rows_in_the_buffer():
    buffer = buffer_of(100, capacity=128, points=("a", "b", "c"))
    drawn = next(buffer)
    left = np.setdiff1d(np.arange(100), drawn["a"][:, 0].numpy())  # the source ends before the buffer is full
    assert buffer.mean_squared_norm() == pytest.approx(WIDTH * (left**2).mean())
    assert buffer.mean_squared_norm("c") == pytest.approx(4 * WIDTH * (left**2).mean())
    for _ in buffer:
        pass
    with pytest.raises(UserError, match="empty"):
        buffer.mean_squared_norm()


def test_measuring_does_not_change_what_is_drawn():
    plain, measured = buffer_of(500), buffer_of(500)
    for batch in plain:
        measured.mean_squared_norm()
        assert torch.equal(batch, next(measured))
        measured.mixing()


# ---------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("stop", [0, 1, 7, 30, 58, 63])
def test_a_buffer_resumed_anywhere_goes_on_bit_for_bit(stop):
    def make():
        return buffer_of(1000, points=("a", "b"), provenance=True, seed=5)

    unbroken, broken, resumed = make(), make(), make()
    for _ in range(stop):
        unbroken.draw()
        broken.draw()
    state = saved_and_loaded(broken.state_dict())
    for _ in range(min(3, 62 - stop)):  # the saved state is a copy, and the other buffer's past is forgotten
        resumed.draw()
        broken.draw()
    resumed.load_state_dict(state)
    batches = 0
    for expected in iter(lambda: next(iter_draw(unbroken), None), None):
        found = resumed.draw()
        assert all(torch.equal(found.acts[name], acts) for name, acts in expected.acts.items())
        assert all(map(torch.equal, found.provenance, expected.provenance))
        assert resumed.mixing() == unbroken.mixing()
        batches += 1
    assert batches == 63 - stop
    assert resumed.rows_drawn == 1000
    with pytest.raises(StopIteration):
        resumed.draw()


def iter_draw(buffer):
    try:
        yield buffer.draw()
    except StopIteration:
        return


def test_a_buffer_that_went_on_to_its_end_can_be_set_back():
    buffer = buffer_of(300, points=("a", "b"), provenance=True)
    next(buffer)
    state = buffer.state_dict()
    rest = list(buffer)
    buffer.load_state_dict(state)
    again = list(buffer)
    assert len(again) == len(rest) > 10
    assert all(torch.equal(x["b"], y["b"]) for x, y in zip(again, rest, strict=True))


def test_a_state_of_another_buffer_is_refused():
    state = buffer_of().state_dict()
    for other in (buffer_of(capacity=256), buffer_of(points=("b",)), buffer_of(points=("a", "b"))):
        with pytest.raises(UserError, match="another size or other hook points"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="kept no provenance"):
        buffer_of(provenance=True).load_state_dict(state)


# ---------------------------------------------------------------------------------------------- settings


def test_the_constructor_takes_what_the_field_knows_in_its_order():
    parameters = inspect.signature(ActivationBuffer).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    required = inspect.Parameter.empty
    assert list(positional.items()) == [
        ("data", required),
        ("model", required),
        ("submodule", None),
        ("d_submodule", None),
        ("io", "out"),
        ("n_ctxs", 3e4),
        ("ctx_len", 128),
        ("refresh_batch_size", 512),
        ("out_batch_size", 8192),
        ("device", "cpu"),
        ("remove_bos", False),
        ("add_special_tokens", True),
        ("max_activation_norm_multiple", None),
    ]
    assert isinstance(NumberedRows(1), ActivationSource)


def test_a_buffer_that_is_too_small_says_what_would_do():
    with pytest.raises(UserError, match=r"= 40 rows must hold one forward \(32 rows\) and one batch \(16\)") as caught:
        buffer_of(capacity=40)
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert len(next(buffer_of(capacity=enough * 8))) == 16
    with pytest.raises(UserError):
        buffer_of(capacity=enough * 8 - 8)


def test_wrong_settings_are_named():
    for wrong, said in (
        ({"io": "both"}, "in, out, in_and_out, got 'both'"),
        ({"batch": 0}, "at least 1, got 0"),
        ({"d_submodule": 5}, r"d_submodule is 5, but the activations have width \[4\]"),
        ({"remove_bos": True}, "remove_bos"),
        ({"max_activation_norm_multiple": 10.0}, "max_activation_norm_multiple"),
    ):
        with pytest.raises(UserError, match=said):
            buffer_of(**wrong)
    with pytest.raises(UserError, match="data and submodule must be None"):
        ActivationBuffer(["text"], NumberedRows(10))
    with pytest.raises(UserError, match="not texts"):
        buffer_of().text_batch()


# ---------------------------------------------------------------------------------------------- with a language model

TEXTS = [f"Patient {i} was given {i * i} mg of aspirin{'.' * (i % 9)}" for i in range(60)]
SETTINGS = {"n_ctxs": 40, "ctx_len": 16, "refresh_batch_size": 4, "out_batch_size": 32}


@pytest.fixture(scope="module")
def lm(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    from dictionary_learning.activations import TracedLM

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_layer=2, n_embd=8, n_head=2, n_positions=32, bos_token_id=256, eos_token_id=256
    )
    return TracedLM.load(GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.mark.parametrize("remove_bos", [False, True])
def test_the_rows_are_the_models_activations_at_the_place_their_provenance_names(lm, tokenizer, remove_bos):
    from dictionary_learning.packing import ContextPacker

    buffer = ActivationBuffer(
        iter(TEXTS), lm, "resid_post_layer_1", **SETTINGS, remove_bos=remove_bos, provenance=True, seed=1
    )
    assert buffer.d_submodule == 8
    found = {}
    for acts, where in iter(lambda: next(iter_draw(buffer), None), None):
        for row, document, position, context in zip(
            *acts.values(), where.document_N.tolist(), where.position_N.tolist(), where.context_N.tolist(), strict=True
        ):
            found.setdefault((context, document, position), []).append(row)
    expected = 0
    for tokens in ContextPacker(TEXTS, tokenizer, ctx_len=16, batch_contexts=4):
        with torch.no_grad():
            hidden = lm.module.transformer(
                tokens.tokens_CL, output_hidden_states=True, use_cache=False
            ).last_hidden_state
            outputs = lm.capture(tokens.tokens_CL, "resid_post_layer_1")["resid_post_layer_1"]
        torch.testing.assert_close(lm.module.transformer.ln_f(outputs), hidden)
        wanted = tokens.keep_CL if remove_bos else tokens.real_CL
        for c, at in wanted.nonzero().tolist():
            key = (tokens.first_context + c, int(tokens.document_CL[c, at]), int(tokens.position_CL[c, at]))
            assert any(torch.allclose(row, outputs[c, at], atol=1e-5) for row in found[key])
            expected += 1
    assert buffer.rows_drawn == expected == sum(map(len, found.values()))


def test_code_for_the_fields_library_runs_unchanged(lm, tokenizer):
    from nnsight import NNsight

    model = NNsight(lm.module)
    model.tokenizer = tokenizer
    submodule = model.transformer.h[1]
    buffer = ActivationBuffer((text for text in TEXTS), model, submodule, 8, "out", 40, 16, 4, 32, "cpu", True)
    assert next(buffer).shape == (32, 8)
    both = ActivationBuffer(TEXTS, model, submodule, io="in_and_out", **SETTINGS)
    assert next(both).shape == (32, 2, 8)
    several = ActivationBuffer(TEXTS, model, [submodule, model.transformer.h[0]], **SETTINGS)
    assert [acts.shape for acts in next(several).values()] == [(32, 8), (32, 8)]


def test_config_is_what_config_json_keeps(lm):
    import json

    buffer = ActivationBuffer(TEXTS, lm, "resid_post_layer_0", **SETTINGS, remove_bos=True, seed=3)
    config = json.loads(json.dumps(buffer.config))
    assert config == {
        "d_submodule": 8,
        "io": "out",
        **SETTINGS,
        "device": "cpu",
        "remove_bos": True,
        "add_special_tokens": True,
        "packing": True,
        "max_activation_norm_multiple": None,
        "seed": 3,
    }


def test_texts_and_tokens_can_be_taken_from_the_stream(lm):
    buffer = ActivationBuffer(TEXTS, lm, "resid_post_layer_0", **SETTINGS)
    assert buffer.text_batch() == TEXTS[:4] and buffer.text_batch(2) == TEXTS[4:6]
    tokens = buffer.tokenized_batch(3)
    assert tokens["input_ids"].shape == (3, 16) == tokens["attention_mask"].shape
    assert lm.tokenizer.decode(tokens["input_ids"][0]) == TEXTS[6][:16]
    with pytest.raises(StopIteration):
        buffer.text_batch(100)


def test_a_missing_hook_point_or_text_is_named(lm):
    with pytest.raises(UserError, match="needs a hook point"):
        ActivationBuffer(TEXTS, lm, **SETTINGS)
    with pytest.raises(UserError, match="texts or a path, got NoneType"):
        ActivationBuffer(None, lm, "resid_post_layer_0", **SETTINGS)
    with pytest.raises(UserError, match="Corpus 'nowhere' not found"):
        ActivationBuffer("nowhere", lm, "resid_post_layer_0", **SETTINGS)


def test_a_language_model_buffer_resumes_in_the_middle_of_a_document(lm):
    def make():
        return ActivationBuffer(list(TEXTS), lm, "resid_post_layer_0", **SETTINGS, seed=2)

    whole, broken, resumed = list(make()), make(), make()
    for _ in range(10):
        next(broken)
    resumed.load_state_dict(saved_and_loaded(broken.state_dict()))
    rest = list(resumed)
    assert len(rest) == len(whole) - 10 > 10
    assert all(map(torch.equal, rest, whole[10:]))
