"""The command: what it writes, splits, counts and prints, and what it leaves when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from data_prep import stream_texts
from data_prep.__main__ import PrepConfig, main, prepare
from data_prep.publish import TableWriter
from data_prep.splits import question_key, split_of
from dictionary_learning.errors import UserError
from tests.data_prep.records import MEDQA, PUBMEDQA, changed, medmcqa, write_jsonl

ROOT = Path(__file__).parents[2]
REAL_RECORDS = ROOT.parent / "shared" / "data" / "medical_qa"


def load(folder, tmp_path):
    import datasets

    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


def skipped_lines(out):
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    records = [medmcqa(i) for i in range(300)] + [medmcqa(300, cop=-1), medmcqa(301, cop=-1), "{"]
    write_jsonl(tmp_path / "in" / "medmcqa" / "train.jsonl", records)
    write_jsonl(tmp_path / "in" / "medqa" / "train.jsonl", [MEDQA, changed(MEDQA, Correct_Option="E")])
    write_jsonl(tmp_path / "in" / "pubmedqa" / "train.jsonl", [PUBMEDQA])
    return tmp_path / "in"


def test_the_table_loads_with_datasets_and_the_card_counts_it(folder, tmp_path, capsys):
    out = tmp_path / "out"
    report = prepare(PrepConfig(source=str(folder), out=out))
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "README.md",
        "data/train-00000-of-00001.parquet",
        "skipped.jsonl",
    ]
    table = load(out, tmp_path)
    assert table["train"].column_names == ["text", "source_dataset"] and table.num_rows == {"train": 302}
    assert table["train"][0]["source_dataset"] == "medqa"
    assert report.skipped == {
        ("medqa", "unknown option letter 'E'"): 1,
        ("medmcqa", "unlabelled (cop = -1)"): 2,
        ("medmcqa", "invalid JSON"): 1,
    }
    assert skipped_lines(out)[1] == {
        "corpus": "medmcqa",
        "where": "medmcqa/train.jsonl:301",
        "id": "m300",
        "reason": "unlabelled (cop = -1)",
    }
    assert len(skipped_lines(out)) == 4
    assert report.tokens() == sum(map(len, table["train"]["text"])) // 4
    card = (out / "README.md").read_text()
    assert "| medmcqa | 300 |" in card and "| medmcqa | unlabelled (cop = -1) | 2 |" in card
    assert "license:\n- apache-2.0\n- mit\n" in card and "characters / 4" in card and str(tmp_path) not in card
    printed = capsys.readouterr().out
    assert "unlabelled (cop = -1)" in printed and f"Written to {out}" in printed


def test_every_question_is_in_one_split_and_the_splits_have_the_asked_sizes(folder, tmp_path):
    same = [
        medmcqa(i + 400, question=f"question  {i} {' '.join(f'WORD{i}x{j}' for j in range(12))} ?") for i in range(300)
    ]
    write_jsonl(folder / "medmcqa" / "again.jsonl", same)
    report = prepare(PrepConfig(source=str(folder), out=tmp_path / "out", split=(0.7, 0.2, 0.1)))
    table = load(tmp_path / "out", tmp_path)
    keys = {
        split: {question_key(text.removeprefix("Context:").split("\nThe options are:")[0]) for text in rows["text"]}
        for split, rows in table.items()
    }
    assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"] and sum(map(len, keys.values())) == 302
    total = sum(table.num_rows.values())
    for split, fraction in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        assert abs(table.num_rows[split] / total - fraction) < 0.06
    assert total == report.texts.total() == 602
    assert "path: data/validation-00000-of-00001.parquet" in (tmp_path / "out" / "README.md").read_text()


def test_the_split_of_a_question_depends_on_nothing_but_question_and_seed():
    keys = [question_key(f"question {i}") for i in range(2_000)]
    fractions = (0.5, 0.3, 0.2)
    splits = [split_of(key, fractions, seed=3) for key in keys]
    assert splits == [split_of(key, fractions, seed=3) for key in keys]
    assert splits != [split_of(key, fractions, seed=4) for key in keys]
    shares = [splits.count(split) / len(keys) for split in ("train", "validation", "test")]
    assert shares == pytest.approx(fractions, abs=0.04)  # 3.5 standard deviations of 2,000 draws


def test_the_split_of_a_question_never_changes_between_versions():
    """Published tables rely on it: whoever prepares them again must get the same splits."""
    drawn = [
        split_of(question_key(f"What is {word}?"), (0.4, 0.3, 0.3))
        for word in ("X", "Y", "Z", "scurvy", "β", "gout", "croup", "lupus")
    ]
    assert " ".join(drawn) == "train train validation train train train test train"


@pytest.mark.parametrize(
    ("fractions", "words"),
    [
        ((0.9, 0.2, 0.1), "sum to 1"),
        ((1.5, -0.5, 0.0), "between 0 and 1"),
        ((float("nan"), 0.5, 0.5), "between 0 and 1"),
    ],
)
def test_fractions_that_are_none_are_refused(fractions, words):
    with pytest.raises(UserError, match=words):
        prepare(PrepConfig(split=fractions))


def test_duplicates_are_dropped_counted_and_listed_with_what_they_repeat(folder, tmp_path):
    repeats = [medmcqa(5), medmcqa(6, question=medmcqa(6)["question"].upper() + " ?"), medmcqa(5)]
    write_jsonl(folder / "medmcqa" / "z.jsonl", repeats)
    out = tmp_path / "out"
    report = prepare(PrepConfig(source=str(folder), out=out, dedupe=True, split=(0.5, 0.25, 0.25)))
    assert report.duplicates == {("medmcqa", "exact"): 2, ("medmcqa", "near"): 1}
    assert sum(load(out, tmp_path).num_rows.values()) == 302
    listed = [line for line in skipped_lines(out) if "of" in line]
    assert [(line["where"], line["reason"], line["of"]) for line in listed] == [
        ("medmcqa/z.jsonl:1", "exact duplicate", "medmcqa/train.jsonl:6"),
        ("medmcqa/z.jsonl:2", "near duplicate", "medmcqa/train.jsonl:7"),
        ("medmcqa/z.jsonl:3", "exact duplicate", "medmcqa/train.jsonl:6"),
    ]
    assert "3 duplicates were removed" in (out / "README.md").read_text()


def test_without_out_it_only_counts(folder, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert prepare(PrepConfig(source=str(folder))).texts.total() == 302
    assert "Nothing was written" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_use_is_refused_and_overwrite_replaces_only_the_table(folder, tmp_path):
    out = tmp_path / "out"
    write_jsonl(out / "notes.txt", ["mine"])
    with pytest.raises(UserError, match="not empty"):
        prepare(PrepConfig(source=str(folder), out=out))
    prepare(PrepConfig(source=str(folder), out=out, overwrite=True, split=(0.5, 0.25, 0.25)))
    prepare(PrepConfig(source=str(folder), out=out, overwrite=True, corpora=("pubmedqa",)))
    assert (out / "notes.txt").read_text() == "mine\n"
    assert [path.name for path in (out / "data").iterdir()] == ["train-00000-of-00001.parquet"]
    assert load(out, tmp_path).num_rows == {"train": 1}
    with pytest.raises(UserError, match="is a file"):
        prepare(PrepConfig(source=str(folder), out=out / "notes.txt"))


def test_an_existing_empty_folder_is_used(folder, tmp_path):
    (tmp_path / "out").mkdir()
    prepare(PrepConfig(source=str(folder), out=tmp_path / "out", corpora=("medqa",)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "data", "skipped.jsonl"}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2), (None, 2)]
)
def test_ctrl_c_a_full_disk_and_a_strict_stop_leave_nothing(folder, tmp_path, monkeypatch, capsys, exists, error, code):
    out = tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True)
    if error is not None:
        write = TableWriter.write

        def breaks(self, split, text, source_dataset):
            if self._rows.get(split) and len(self._rows[split]) == 100:
                raise error
            write(self, split, text, source_dataset)

        monkeypatch.setattr(TableWriter, "write", breaks)
    assert (
        main(["--source", str(folder), "--out", str(out), "--no_progress", *(["--strict"] if error is None else [])])
        == code
    )
    assert list((tmp_path / "deep").rglob("*")) == ([out] if exists else [])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


MEMORY_PROGRAM = """
import sys
from pathlib import Path
from data_prep.__main__ import PrepConfig, prepare

def peak_of(name):
    prepare(PrepConfig(source=f"{sys.argv[1]}/{name}", out=Path(sys.argv[1]) / f"{name}-out", split=(0.98, 0.01, 0.01)))
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024  # ru_maxrss would begin at the peak of the test process

peak_of("small")
print("MiB", peak_of("medium"), peak_of("large"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    """The peak of the process with 50,000 records (29 MB of text) is the peak with 10,000, within 4 MiB."""
    for name, count in (("small", 1_000), ("medium", 10_000), ("large", 50_000)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "medmcqa.jsonl").open("w") as lines:
            lines.writelines(json.dumps(medmcqa(number)) + "\n" for number in range(count))
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    medium, large = map(float, run.stdout.split("MiB")[1].split())
    assert large - medium < 4


def test_the_stream_itself_holds_a_record_at_a_time(tmp_path):
    with (tmp_path / "medmcqa.jsonl").open("w") as lines:
        lines.writelines(json.dumps(medmcqa(number)) + "\n" for number in range(10_000))
    tracemalloc.start()
    count = sum(1 for _ in stream_texts(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000 and peak < 300_000


def test_the_command_reads_flags_with_underscores_or_dashes(folder, tmp_path, capsys):
    arguments = [
        "--source",
        str(folder),
        "--corpora",
        "medqa",
        "pubmedqa",
        "--hub_retries",
        "3",
        "--dedupe-threshold",
        "0.9",
    ]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--split", "0.98", "0.01", "0.01"]) == 0
    assert "medmcqa" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "absent-folder"], "does not exist"),
        (["--corpora", "medqaa"], "Did you mean 'medqa'?"),
        (["--split", "0.5", "0.5", "0.5"], "sum to 1"),
        (["--private"], "--push_to"),
        (["--dedupe", "--dedupe_threshold", "2"], "threshold"),
        (["--hub_retries", "0"], "1 try"),
    ],
)
def test_bad_settings_end_with_one_sentence_and_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_the_module_runs_as_a_program_without_heavy_imports(folder):
    heavy = {"datasets", "pyarrow", "huggingface_hub", "torch", "numpy"}
    code = f"import sys, data_prep.__main__; print(sorted({heavy} & set(sys.modules)))"
    imports = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert imports.stdout.strip() == "[]"
    run = subprocess.run(
        [sys.executable, "-m", "data_prep", "--source", str(folder), "--strict"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "medqa/train.jsonl:2" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.skipif(not REAL_RECORDS.is_dir(), reason="the real records are not beside the repository")
def test_all_real_records_become_texts(tmp_path):
    report = prepare(PrepConfig(source=str(REAL_RECORDS), out=tmp_path / "out"))
    assert {corpus: number for (corpus, _), number in report.texts.items()} == {
        "medqa": 1_019,
        "medmcqa": 2_253,
        "pubmedqa": 800,
        "mmlu_college_medicine": 139,
        "mmlu_clinical_knowledge": 212,
        "mmlu_professional_medicine": 218,
    }
    assert not report.skipped


def test_progress_goes_to_stderr_only_on_a_terminal(folder, capsys):
    prepare(PrepConfig(source=str(folder), progress=True))
    assert capsys.readouterr().err == ""
    assert PrepConfig().hub_retries == 100 and PrepConfig().hub_wait == 20.0
