"""Corpora of every kind, the split, the shuffle, and a cursor that resumes anywhere."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dictionary_learning.corpus import Corpus, Text, TextStream, as_text_stream, corpus_from_iterable, open_corpus
from dictionary_learning.errors import UserError

TEXTS = [f"text number {i}" for i in range(40)]


def texts_of(data) -> list[str]:
    return [text.text for text in as_text_stream(data)]


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def write_parquet(path, records):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def message(spec) -> str:
    """The sentence that a person reads who asked for this corpus."""
    with pytest.raises(UserError) as caught:
        list(as_text_stream(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


MEDMCQA = {
    "id": "m1",
    "question": "Which vitamin deficiency causes scurvy?",
    "opa": "Vitamin A",
    "opb": "Vitamin B12",
    "opc": "Vitamin C",
    "opd": "Vitamin K",
    "cop": 2,
    "choice_type": "single",
    "exp": None,
    "subject_name": "Biochemistry",
    "topic_name": None,
}


# ---------------------------------------------------------------------------------------------- kinds of corpora


@pytest.mark.parametrize(
    "data",
    [
        TEXTS[:3],
        tuple(TEXTS[:3]),
        iter(TEXTS[:3]),
        (text for text in TEXTS[:3]),
        [{"text": text, "other": 1} for text in TEXTS[:3]],
        [Text(text, "mine") for text in TEXTS[:3]],
        corpus_from_iterable(TEXTS[:3]),
        TextStream(corpus_from_iterable(TEXTS[:3])),
    ],
    ids=["list", "tuple", "iterator", "generator", "dicts", "Texts", "corpus", "stream"],
)
def test_texts_in_memory(data):
    assert texts_of(data) == TEXTS[:3]


def test_files_of_every_format(tmp_path):
    records = [{"text": text, "id": i} for i, text in enumerate(TEXTS[:3])]
    files = [write_jsonl(tmp_path / name, records) for name in ("a.jsonl", "a.ndjson")]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:3]), encoding="utf-8")
    files += [tmp_path / "a.jsonl.gz", tmp_path / "a.txt", write_parquet(tmp_path / "a.parquet", records)]
    for file in files:
        assert texts_of(file) == TEXTS[:3], file.name
        assert texts_of(str(file)) == TEXTS[:3], file.name
        assert open_corpus(file).name == file.name


def test_a_folder_is_read_in_order_of_name_without_hidden_files(tmp_path):
    write_jsonl(tmp_path / "b" / "2.jsonl", [{"text": "third"}, {"text": "fourth", "source_dataset": "medqa"}])
    write_jsonl(tmp_path / "a" / "1.jsonl", [{"text": "first"}])
    write_parquet(tmp_path / "a" / "2.parquet", [{"text": "second"}])
    write_jsonl(tmp_path / ".cache" / "x.jsonl", [{"text": "hidden"}])
    write_jsonl(tmp_path / ".x.jsonl", [{"text": "hidden"}])
    (tmp_path / "README.md").write_text("not text")
    found = [(text.text, text.corpus) for text in as_text_stream(tmp_path)]
    assert found == [("first", "a"), ("second", "a"), ("third", "b"), ("fourth", "medqa")]


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    write_jsonl(tmp_path / "notes" / "a.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path / "notes")
    assert open_corpus(".").name == "notes"


def test_a_table_that_data_prep_wrote_is_read_without_its_list_of_skipped_records(tmp_path):
    from data_prep.__main__ import PrepConfig, prepare

    write_jsonl(tmp_path / "raw" / "medmcqa" / "train.jsonl", [MEDMCQA, {**MEDMCQA, "cop": -1}])
    prepare(PrepConfig(source=str(tmp_path / "raw"), out=tmp_path / "table"))
    assert (tmp_path / "table" / "skipped.jsonl").stat().st_size > 0
    (text,) = as_text_stream(tmp_path / "table")
    assert text.corpus == "medmcqa" and "scurvy" in text.text


def test_a_folder_of_raw_medical_records_is_formatted(tmp_path):
    records = [{**MEDMCQA, "id": str(i), "question": f"Question {i}?"} for i in range(5)]
    write_jsonl(tmp_path / "medmcqa" / "train.jsonl", [*records[:2], {**MEDMCQA, "cop": -1}, *records[2:]])
    corpus = open_corpus(tmp_path)
    texts = list(corpus.read(0))
    assert [text.text.splitlines()[0] for text in texts] == [f"Question {i}?" for i in range(5)]
    assert {text.corpus for text in texts} == {"medmcqa"} and "Correct option: C. Vitamin C" in texts[0].text
    assert list(corpus.read(3)) == texts[3:]
    assert len({text.key for text in texts}) == 5 and all(text.key != text.text for text in texts)


def test_the_embedded_samples():
    texts = list(TextStream(open_corpus("embedded")))
    assert len(texts) > 100
    assert {"medqa", "medmcqa", "pubmedqa"} <= {text.corpus for text in texts}


class FlakyHub:
    """A Hub whose reads break off after `burst` rows, `failures` times."""

    def __init__(self, rows, burst=2, failures=3, error=ConnectionError):
        self.rows, self.burst, self.failures, self.error = rows, burst, failures, error
        self.opened = []

    def __call__(self, hub_path, split, first_row):
        self.opened.append((hub_path, split, first_row))
        self.failures -= 1
        if self.failures < 0:
            yield from self.rows[first_row:]
            return
        yield from self.rows[first_row : first_row + self.burst]
        raise self.error("broken off")


@pytest.fixture
def hub(monkeypatch):
    from data_prep import sources

    def serve(*args, **settings):
        served = FlakyHub(*args, **settings)
        monkeypatch.setattr(sources, "open_hub_split", served)
        return served

    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    return serve


@pytest.mark.parametrize("spec", ["user/texts", "hf://user/texts"])
def test_any_dataset_of_the_hub_is_read_on_after_breaks_and_from_any_row(hub, spec):
    served = hub([{"text": text} for text in TEXTS[:9]])
    corpus = open_corpus(spec, hub_split="validation")
    assert served.opened == [("user/texts", "validation", 0)]
    assert [(text.text, text.corpus) for text in corpus.read(0)] == [(text, "user/texts") for text in TEXTS[:9]]
    assert served.opened[1:] == [("user/texts", "validation", row) for row in (0, 2, 4)]
    assert [text.text for text in corpus.read(6)] == TEXTS[6:9] and served.opened[-1][2] == 6


def test_a_medical_corpus_of_the_hub_is_formatted(hub):
    served = hub([MEDMCQA, {**MEDMCQA, "cop": -1}, {**MEDMCQA, "question": "Another?"}])
    texts = list(TextStream(open_corpus("openlifescienceai/medmcqa")))
    assert [text.text.splitlines()[0] for text in texts] == [MEDMCQA["question"], "Another?"]
    assert {text.corpus for text in texts} == {"medmcqa"}
    assert {opened[:2] for opened in served.opened} == {("openlifescienceai/medmcqa", "train")}


def test_a_dataset_of_the_hub_without_a_text_or_a_split_is_refused(hub):
    hub([{"content": "x"}], failures=0)
    assert "no 'text' in split 'train', row 1: its fields are content" in message("user/texts")
    served = hub([], burst=0, failures=9, error=ValueError)  # how `datasets` refuses an unknown split
    assert "Could not read user/texts (split train) from the Hub after 1 try" in message("user/texts")
    assert len(served.opened) == 1


def test_a_name_that_only_the_hub_may_know_does_not_wait_for_it_offline(monkeypatch):
    from data_prep import sources

    monkeypatch.setattr(sources.time, "sleep", lambda seconds: pytest.fail("waited for the Hub"))
    assert "from the Hub after 1 try" in message("user/nothere")


# ---------------------------------------------------------------------------------------------- hostile and empty


def test_blank_and_null_texts_are_passed_over(tmp_path):
    records = [{"text": "a"}, {"text": None}, {"text": ""}, {"text": " \t\n "}, "", {"text": "b"}]
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", records)) == ["a", "b"]
    assert texts_of(["a", "", "  ", "b"]) == ["a", "b"]


def test_records_without_a_text_name_their_fields_and_the_nearest(tmp_path):
    said = message(write_jsonl(tmp_path / "a.jsonl", [{"Text": "x", "label": 1}]))
    assert "a.jsonl" in said and "record 1" in said and "Text, label" in said and "Did you mean 'Text'?" in said
    assert "content" in message(write_parquet(tmp_path / "a.parquet", [{"content": "x"}]))
    assert "is int, not a string" in message(write_jsonl(tmp_path / "b.jsonl", [{"text": 5}]))
    assert "yields list" in message(write_jsonl(tmp_path / "c.jsonl", [["x"]]))
    assert "yields int" in message([1, 2])
    assert "NoneType" in message(None)


def test_empty_corpora_are_refused_before_a_run_begins(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}, {"text": None}])
    (tmp_path / "folder").mkdir()
    for name in ("empty.jsonl", "blank.jsonl"):
        with pytest.raises(UserError, match=f"'{name}' is empty"):
            open_corpus(tmp_path / name)
    with pytest.raises(UserError, match="holds no .jsonl"):
        open_corpus(tmp_path / "folder")
    assert "holds no text" in message([])
    assert "has no name" in message("")


def test_a_misspelt_path_suggests_what_is_there_and_does_not_ask_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    asked = hub([{"text": "x"}], failures=0).opened
    write_jsonl(tmp_path / "data" / "notes.jsonl", [{"text": "x"}])
    for spec in (tmp_path / "data" / "note.jsonl", "data/note.jsonl", "./data/note.jsonl"):
        assert "Did you mean 'notes.jsonl'?" in message(spec)
    assert not asked
    assert "Did you mean 'data'?" in message("dat")
    assert "Did you mean 'embedded'?" in message("embeded")
    assert "none of .jsonl" in message(write_jsonl(tmp_path / "a.csv", ["text"]))


def test_a_broken_line_is_named_with_its_file(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, "", '{"text": '])
    assert f"'{file}', line 3," in message(file)
    assert "line 1" in message(write_jsonl(tmp_path / "deep.jsonl", ["[" * 200_000]))
    assert "line 1" in message(write_jsonl(tmp_path / "digits.jsonl", ['{"text": ' + "9" * 5000 + "}"]))


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    for name, content in {
        "cut.jsonl.gz": whole[:-20],
        "bits.jsonl.gz": whole[:30] + b"\xff\xff\xff" + whole[33:],
        "plain.jsonl.gz": b'{"text": "x"}\n',
        "a.parquet": b"PAR1 no",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert name in message(tmp_path / name)


def test_bytes_that_are_not_utf8_and_a_byte_order_mark_do_not_stop_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9 noir"}\n{"text": "b"}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["caf\ufffd noir", "b"]


# ---------------------------------------------------------------------------------------------- split and shuffle


def test_train_and_heldout_part_the_texts_the_same_way_in_every_run():
    texts = [f"text {i}" for i in range(2000)] + ["twice", "twice"]
    corpus = corpus_from_iterable(texts)

    def part(split, **settings):
        return [text.text for text in TextStream(corpus, split=split, heldout_fraction=0.1, **settings)]

    train, heldout = part("train"), part("heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert not set(train) & set(heldout)
    assert 150 < len(heldout) < 250
    assert sorted(part("heldout", seed=3, block=7)) == sorted(heldout)
    alone = [text.text for text in TextStream(corpus_from_iterable(texts[500:]), split="heldout", heldout_fraction=0.1)]
    assert alone == [text for text in heldout if text in set(texts[500:])]


def test_texts_with_one_key_stand_on_one_side():
    texts = [Text(f"text {i}", "c", key=f"question {i // 2}") for i in range(400)]
    heldout = list(TextStream(corpus_from_iterable(texts), split="heldout", heldout_fraction=0.3))
    keys = [text.key for text in heldout]
    assert heldout and all(keys.count(key) == 2 for key in keys)


def test_the_shuffle_permutes_is_fixed_by_its_seed_and_differs_between_epochs():
    def epochs(seed, block=50_000):
        texts = texts_of(TextStream(corpus_from_iterable(TEXTS), epochs=2, seed=seed, block=block))
        return texts[:40], texts[40:]

    first, second = epochs(1)
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != TEXTS and first != second
    assert epochs(1) == (first, second) and epochs(2)[0] != first
    blocks = epochs(1, block=16)[0]
    assert sorted(blocks[:16]) == sorted(TEXTS[:16]) and sorted(blocks[32:]) == sorted(TEXTS[32:])


def test_endless_epochs_go_round():
    stream = TextStream(corpus_from_iterable(["a", "b"]), epochs=None)
    assert [next(stream).text for _ in range(5)] == ["a", "b", "a", "b", "a"]
    assert stream.epoch == 2


@pytest.mark.parametrize("seed", [None, 0])
def test_an_empty_selection_raises_instead_of_going_round_for_ever(seed):
    corpus = corpus_from_iterable(["only"])
    with pytest.raises(UserError, match="no text in its heldout part"):
        next(TextStream(corpus, epochs=None, split="heldout", heldout_fraction=0.0, seed=seed))
    used_up = TextStream(corpus_from_iterable(iter(["a"])), epochs=None)
    assert next(used_up).text == "a"
    with pytest.raises(UserError, match="holds no text"):
        next(used_up)


def test_wrong_settings_are_named():
    corpus = corpus_from_iterable(TEXTS)
    for wrong in ({"split": "test"}, {"block": 0}, {"epochs": 0}):
        with pytest.raises(UserError, match=str(*wrong.values())):
            TextStream(corpus, **wrong)


# ---------------------------------------------------------------------------------------------- cursor


@given(
    size=st.integers(1, 30),
    block=st.integers(1, 12),
    seed=st.none() | st.integers(0, 5),
    split=st.sampled_from(["all", "train"]),
    data=st.data(),
)
def test_a_stream_resumed_anywhere_goes_on_as_if_unbroken(size, block, seed, split, data):
    corpus = corpus_from_iterable([f"text {i}" if i % 4 else " " for i in range(size + 1)])

    def stream():
        return TextStream(corpus, epochs=3, split=split, heldout_fraction=0.1, seed=seed, block=block)

    whole = list(stream())
    stop = data.draw(st.integers(0, len(whole)), label="stop")
    broken = stream()
    begun = [next(broken) for _ in range(stop)]
    state = json.loads(json.dumps(broken.state_dict()))
    resumed = stream()
    resumed.load_state_dict(state)
    assert begun + list(resumed) == whole
    assert resumed.state_dict() == {"epoch": 3, "position": 0}


def test_a_stream_can_be_set_back():
    stream = TextStream(corpus_from_iterable(TEXTS), seed=0)
    state = stream.state_dict()
    first = [next(stream) for _ in range(5)]
    stream.load_state_dict(state)
    assert [next(stream) for _ in range(5)] == first


def test_resuming_reads_from_the_block_on_and_not_from_the_start():
    asked = []

    def read(start):
        asked.append(start)
        return (Text(text, "c") for text in TEXTS[start:])

    stream = TextStream(Corpus("c", read, "f"), seed=0, block=10)
    stream.load_state_dict({"epoch": 0, "position": 25})
    assert len(list(stream)) == 15 and asked == [20]


# ---------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_changes_with_the_content(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    prints = [open_corpus(file).fingerprint]
    assert open_corpus(file).fingerprint == open_corpus(tmp_path).fingerprint == prints[0]
    write_jsonl(file, [{"text": "one"}, {"text": "tvo"}])
    prints.append(open_corpus(file).fingerprint)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}])
    prints.append(open_corpus(tmp_path).fingerprint)
    write_jsonl(tmp_path / "raw" / "medmcqa" / "train.jsonl", [MEDMCQA])
    prints.append(open_corpus(tmp_path / "raw").fingerprint)
    write_jsonl(tmp_path / "raw" / "medmcqa" / "train.jsonl", [{**MEDMCQA, "cop": 1}])
    prints.append(open_corpus(tmp_path / "raw").fingerprint)
    prints += [corpus_from_iterable(texts).fingerprint for texts in (["a", "b"], ["a", "c"], ["a", "b", "c"])]
    assert len(set(prints)) == len(prints)
    assert corpus_from_iterable(["a", "b"]).fingerprint == prints[-3]
    assert open_corpus("embedded").fingerprint == open_corpus("embedded").fingerprint
