"""Reading: folders, parquet, damaged files, the Hub that fails, and where a stream starts."""

from __future__ import annotations

from itertools import islice

import pytest

from data_prep import CORPORA, looks_like_raw_records, sources, stream_texts
from dictionary_learning.errors import UserError
from tests.data_prep.records import MEDMCQA, MEDQA, PUBMEDQA, changed, medmcqa, write_jsonl


def read(*args, **kwargs):
    """All texts of a stream and the (where, reason) of what it skipped."""
    skipped = []
    texts = list(stream_texts(*args, skipped=skipped.append, **kwargs))
    return texts, [(record.where, record.reason) for record in skipped]


def test_the_registry_is_the_table_of_the_six_corpora():
    assert {name: (spec.hub_path, spec.split, spec.records, spec.licence) for name, spec in CORPORA.items()} == {
        "medqa": ("openlifescienceai/medqa", "train", 10_178, "mit"),
        "medmcqa": ("openlifescienceai/medmcqa", "train", 182_822, "apache-2.0"),
        "pubmedqa": ("openlifescienceai/pubmedqa", "train", 450, "mit"),
        "mmlu_college_medicine": ("openlifescienceai/mmlu_college_medicine", "test", 173, "mit"),
        "mmlu_clinical_knowledge": ("openlifescienceai/mmlu_clinical_knowledge", "test", 265, "mit"),
        "mmlu_professional_medicine": ("openlifescienceai/mmlu_professional_medicine", "test", 272, "mit"),
    }


def test_every_embedded_sample_is_usable():
    texts, skipped = read("embedded")
    assert skipped == [] and len(texts) >= 200
    assert {text["source_dataset"] for text in texts} == set(CORPORA)
    assert len({text["id"] for text in texts}) == len(texts)


def test_a_folder_may_hold_several_splits_and_files_and_both_formats(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "medqa" / "train.jsonl", [MEDQA])
    write_jsonl(tmp_path / "medqa" / "dev.jsonl", [changed(MEDQA, Question="Other?")])
    write_jsonl(tmp_path / "medqa" / ".cache" / "old.jsonl", [MEDQA])
    write_jsonl(tmp_path / "medmcqa.jsonl", [MEDMCQA])
    (tmp_path / "pubmedqa" / "data").mkdir(parents=True)
    rows = [PUBMEDQA, changed(PUBMEDQA, Question="Second?")]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "pubmedqa" / "data" / "train-00000-of-00001.parquet"
    )
    texts, skipped = read(tmp_path)
    assert skipped == []
    assert [(text["source_dataset"], text["where"]) for text in texts] == [
        ("medqa", "medqa/dev.jsonl:1"),
        ("medqa", "medqa/train.jsonl:1"),
        ("medmcqa", "medmcqa.jsonl:1"),
        ("pubmedqa", "pubmedqa/data/train-00000-of-00001.parquet:1"),
        ("pubmedqa", "pubmedqa/data/train-00000-of-00001.parquet:2"),
    ]
    assert texts[3]["text"] == CORPORA["pubmedqa"].formatter(PUBMEDQA) and texts[3]["id"] == "7"


def test_corpora_are_read_in_the_order_asked(tmp_path):
    write_jsonl(tmp_path / "medqa.jsonl", [MEDQA])
    write_jsonl(tmp_path / "medmcqa.jsonl", [MEDMCQA])
    texts, _ = read(tmp_path, ["medmcqa", "medqa", "medmcqa"])
    assert [text["source_dataset"] for text in texts] == ["medmcqa", "medqa"]


def test_bad_lines_are_skipped_with_place_and_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2_000)
    records = ['{"id": 1', "[]", "", medmcqa(1), "[" * 1_500, '"' + "x" * 5_000 + '"', {"id": {}}, medmcqa(2, cop=-1)]
    file = write_jsonl(tmp_path / "medmcqa" / "train.jsonl", records)
    with file.open("ab") as lines:
        lines.write(b"\xff\xfe\n")
    texts, skipped = read(tmp_path)
    assert [text["id"] for text in texts] == ["m1"]
    assert skipped == [
        ("medmcqa/train.jsonl:1", "invalid JSON"),
        ("medmcqa/train.jsonl:2", "not a JSON object"),
        ("medmcqa/train.jsonl:5", "invalid JSON"),
        ("medmcqa/train.jsonl:6", "line over 0 MiB"),
        ("medmcqa/train.jsonl:7", "missing question"),
        ("medmcqa/train.jsonl:8", "unlabelled (cop = -1)"),
        ("medmcqa/train.jsonl:9", "not UTF-8"),
    ]


def test_strict_stops_at_the_first_and_names_file_and_line(tmp_path):
    write_jsonl(tmp_path / "medmcqa" / "train.jsonl", [medmcqa(1), medmcqa(2, cop=-1), medmcqa(3, cop=7)])
    with pytest.raises(UserError, match=r"medmcqa/train\.jsonl:2 .*unlabelled \(cop = -1\)"):
        read(tmp_path, strict=True)


def test_start_gives_what_an_unbroken_stream_would_give_next(tmp_path):
    records = [medmcqa(i, cop=-1 if i % 3 == 0 else 1) for i in range(20)]
    write_jsonl(tmp_path / "medmcqa" / "train.jsonl", records)
    unbroken, all_skipped = read(tmp_path)
    seen = []
    before = list(islice(stream_texts(tmp_path, skipped=seen.append), 5))
    after, skipped_after = read(tmp_path, start=5)
    assert before + after == unbroken
    assert [(record.where, record.reason) for record in seen] + skipped_after == all_skipped
    assert read(tmp_path, start=1_000)[0] == []


def test_one_question_has_one_key_however_it_is_spaced_or_cased(tmp_path):
    questions = ["What is X?", " what  is\tX ", "WHAT IS X:", "What is Y?"]
    write_jsonl(tmp_path / "medmcqa.jsonl", [medmcqa(i, question=q) for i, q in enumerate(questions)])
    keys = [text["question_key"] for text in read(tmp_path)[0]]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_bad_sources_are_named_in_one_sentence(tmp_path):
    def message(*args, **kwargs):
        with pytest.raises(UserError) as caught:
            list(stream_texts(*args, **kwargs))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "Did you mean 'hub'?" in message("hubb")
    assert "Did you mean 'medqa'?" in message("embedded", ["medqaa"])
    assert "No corpus was chosen" in message("embedded", [])
    assert "start" in message(start=-1)
    assert "1 try" in message("hub", hub_retries=0)
    assert all(name in message(tmp_path) for name in CORPORA)
    file = write_jsonl(tmp_path / "medqa" / "train.jsonl", [])
    assert "its files are empty" in message(tmp_path)
    assert "is a file" in message(file)
    assert "give the folder around it" in message(tmp_path / "medqa")
    assert "no records of medmcqa" in message(tmp_path, ["medqa", "medmcqa"])
    write_jsonl(file, ["{", "{"])
    assert "all 2 were skipped, the first for: invalid JSON" in message(tmp_path)
    (tmp_path / "pubmedqa.parquet").write_bytes(b"PAR1 no")
    assert "not a readable parquet file" in message(tmp_path, ["pubmedqa"])


def test_errors_in_the_arguments_come_before_the_first_text(tmp_path):
    with pytest.raises(UserError):
        stream_texts(tmp_path / "nowhere")


def test_raw_records_are_told_from_texts(tmp_path):
    write_jsonl(tmp_path / "raw" / "medmcqa" / "train.jsonl", ["{", MEDMCQA])
    write_jsonl(tmp_path / "texts" / "medmcqa" / "train.jsonl", [{"text": "x", "question": "y"}])
    write_jsonl(tmp_path / "other" / "train.jsonl", [{"text": "x"}])
    told = {name: looks_like_raw_records(tmp_path / name) for name in ("raw", "texts", "other", "absent")}
    assert told == {"raw": True, "texts": False, "other": False, "absent": False}


# ---------------------------------------------------------------------------------------------- the Hub


class FlakyHub:
    """Serves `records`; each opening gives `burst` rows from the row asked for and then fails, `failures` times."""

    def __init__(self, records, burst, failures, error=None):
        self.records, self.burst, self.failures = records, burst, failures
        self.error = error or ConnectionError("reset by peer")
        self.opened_at = []

    def __call__(self, hub_path, split, first_row):
        self.opened_at.append(first_row)
        breaks = self.failures > 0
        self.failures -= 1
        yield from self.records[first_row : first_row + self.burst if breaks else None]
        if breaks:
            raise self.error


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(sources.time, "sleep", waited.append)
    return waited


def test_a_broken_hub_read_goes_on_after_the_rows_already_read(monkeypatch, waits, caplog):
    hub = FlakyHub([medmcqa(i) for i in range(10)], burst=3, failures=2)
    monkeypatch.setattr(sources, "open_hub_split", hub)
    texts, _ = read("hub", ["medmcqa"], hub_retries=2, hub_wait=0.5)
    assert [text["id"] for text in texts] == [f"m{i}" for i in range(10)]
    assert hub.opened_at == [0, 3, 6] and waits == [0.5, 0.5]
    assert "ConnectionError: reset by peer; try 2 of 2" in caplog.text
    assert texts[9]["where"] == "openlifescienceai/medmcqa row 10"


def test_rows_read_in_between_give_the_hub_all_its_tries_again(monkeypatch, waits):
    hub = FlakyHub([medmcqa(i) for i in range(50)], burst=1, failures=40)
    monkeypatch.setattr(sources, "open_hub_split", hub)
    assert len(read("hub", ["medmcqa"], hub_retries=2, hub_wait=0)[0]) == 50


def test_a_hub_that_stays_away_ends_in_one_sentence_that_says_what_to_do(monkeypatch, waits):
    monkeypatch.setattr(sources, "open_hub_split", FlakyHub([medmcqa(0)], burst=0, failures=99))
    with pytest.raises(UserError) as caught:
        read("hub", ["medmcqa"], hub_retries=5, hub_wait=0.25)
    message = str(caught.value)
    assert "openlifescienceai/medmcqa" in message and "after 5 tries" in message and "\n" not in message
    assert "embedded samples" in message and "medmcqa/train.jsonl" in message
    assert waits == [0.25] * 4


def test_what_no_retry_can_mend_is_not_tried_again(monkeypatch, waits):
    from datasets.exceptions import DatasetNotFoundError

    hub = FlakyHub([], burst=0, failures=99, error=DatasetNotFoundError("gone"))
    monkeypatch.setattr(sources, "open_hub_split", hub)
    with pytest.raises(UserError, match="after 1 try"):
        read("hub", ["medmcqa"])
    assert hub.opened_at == [0] and waits == []


def test_the_hub_is_asked_for_a_stream_from_the_row_on(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, **kwargs):
        asked.update(path=path, **kwargs)
        rows = datasets.Dataset.from_list([{"id": str(i)} for i in range(5)])
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(sources.open_hub_split("openlifescienceai/mmlu_college_medicine", "test", 3))
    assert [row["id"] for row in rows] == ["3", "4"]
    path = "openlifescienceai/mmlu_college_medicine"
    assert asked == {"path": path, "split": "test", "streaming": True, "revision": None}
