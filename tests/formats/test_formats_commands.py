"""`sae-factory export` and `import`, as a user types them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from format_cases import CASES, CONFIG, assert_same, expected, inputs

from dictionary_learning import cli, load_dictionary
from dictionary_learning.errors import UserError
from dictionary_learning.formats import FORMATS, find_dictionaries, format_named, read
from dictionary_learning.formats.files import save_ours
from dictionary_learning.storage import write_json

SWEEP = {"trainer_0": "relu", "trainer_1": "topk", "deeper/trainer_2": "jumprelu"}
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as far as the commands look at it."""
    folder = tmp_path / "run"
    for name, case in SWEEP.items():
        dictionary = CASES[case]()
        config = {"trainer": CONFIG["trainer"] | {"dict_class": type(dictionary).__name__}, "buffer": CONFIG["buffer"]}
        save_ours(dictionary, config, folder / name)
    write_json(folder / "run.json", {"config": {"corpus": "medical_qa"}})
    (folder / "trainer_0" / "checkpoints").mkdir()
    shutil.copy(folder / "trainer_0" / "ae.safetensors", folder / "trainer_0" / "checkpoints" / "ae_5.safetensors")
    return folder


def folders(root: Path) -> set[str]:
    return {path.parent.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["saelens", "gemma_scope", "dictionary_learning"])
def test_a_run_is_exported_folder_by_folder_and_imported_back(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert cli.main(["export", str(run), "--format", name, "--out", str(there)]) == 0
    out = capsys.readouterr().out
    assert f"Exported 3 of 3 as {name}" in out and str(there / "deeper/trainer_2") in out
    assert ("use_threshold=True" in out) == (name == "gemma_scope")
    assert folders(there) == set(SWEEP)
    assert {entry.name for _, _, entry in find_dictionaries(there)} == {name}
    assert cli.main(["import", str(there), "--out", str(back)]) == 0
    assert "Imported 3 of 3" in capsys.readouterr().out
    assert folders(back) == set(SWEEP)
    x = inputs()
    for folder, case in SWEEP.items():
        dictionary, config = load_dictionary(back / folder)
        assert_same((dictionary.encode(x).detach(), dictionary(x).detach()), expected(CASES[case](), name, x))
        assert config["trainer"]["submodule_name"] == "resid_post_layer_8"
    if name == "saelens":
        assert read(there / "trainer_0")[1]["trainer"]["imported_from"]["config"]["metadata"]["dataset_path"] == (
            "medical_qa"
        )


def test_what_a_format_cant_hold_is_left_out_with_the_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run), "--format", "sparsify", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "Exported 2 of 3 as sparsify" in said.out
    assert "Left out" in said.err and "deeper/trainer_2: sparsify has no thresholds" in said.err
    assert folders(tmp_path / "out") == {"trainer_0", "trainer_1"}


def test_a_single_dictionary_goes_into_the_folder_itself_or_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(run / "trainer_1")
    assert cli.main(["export", one, "--format", "saelens", "--out", str(tmp_path / "one")]) == 0
    assert folders(tmp_path / "one") == {"."}
    metadata = read(tmp_path / "one")[1]["trainer"]["imported_from"]["config"]["metadata"]
    assert metadata["dataset_path"] == "medical_qa"  # from the run that it lies in
    capsys.readouterr()
    two = str(run / "deeper" / "trainer_2")
    assert cli.main(["export", two, "--format", "sparsify", "--out", str(tmp_path / "two")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("Error: sparsify has no thresholds") and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "{run}", "--format", "sealens", "--out", "{out}"],
            "Unknown format 'sealens'.*Did you mean 'saelens'",
        ),
        (["export", "{out}/absent", "--format", "saelens", "--out", "{out}"], "There is nothing at"),
        (["export", "{empty}", "--format", "saelens", "--out", "{out}"], "holds no dictionary: expected"),
        (["export", "{run}", "--format", "saelens", "--out", "{run}/run.json"], "is a file: give a folder"),
        (["export", "{run}", "--format", "dictionary_learning", "--out", "{run}"], "holds files already"),
        (["import", "{empty}", "--out", "{out}"], "holds no dictionary: expected one of the formats"),
        (["import", "{run}", "--format", "saelens", "--out", "{out}"], "expected cfg.json and sae_weights.safetensors"),
        (["import", "{run}", "--out", "{out}", "--format", "gemma"], "Unknown format 'gemma'.*'gemma_scope'"),
    ],
)
def test_what_can_be_mended_is_one_sentence(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"run": run, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    assert cli.main([argument.format(**places) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("Error: ") and said.err.count("\n") == 1
    with pytest.raises(UserError, match=message):
        raise UserError(said.err)
    assert not (tmp_path / "out").exists()


def test_an_export_into_the_run_does_not_find_itself(run: Path) -> None:
    arguments = ["export", str(run), "--format", "dictionary_learning", "--out", str(run / "exports")]
    assert cli.main(arguments) == 0
    assert folders(run / "exports") == set(SWEEP)
    assert cli.main(arguments) == 2  # nothing is written over


def test_a_damaged_dictionary_ends_the_command_and_leaves_no_half_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "trainer_1" / "ae.safetensors").write_bytes(b"nothing")
    assert cli.main(["export", str(run), "--format", "saelens", "--out", str(tmp_path / "out")]) == 2
    assert "not a readable file of weights" in capsys.readouterr().err
    assert "trainer_1" not in folders(tmp_path / "out")


def test_the_package_itself_reads_what_is_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("export", "import"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert all(name in said for name in FORMATS) and "--out" in said and "--format" in said
    assert format_named("saelens").loading.format(folder="x") == 'sae_lens.SAE.load_from_disk("x")'


def test_a_dictionary_in_a_file_of_its_own_is_imported(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run / "trainer_1"), "--format", "gemma_scope", "--out", str(tmp_path / "g")]) == 0
    assert cli.main(["import", str(tmp_path / "g" / "params.npz"), "--out", str(tmp_path / "back")]) == 0
    x = inputs()
    torch.testing.assert_close(load_dictionary(tmp_path / "back")[0](x), expected(CASES["topk"](), "gemma_scope", x)[1])


def test_the_interop_tests_are_skipped_with_a_message_where_the_libraries_cant_be_installed(tmp_path: Path) -> None:
    (tmp_path / "tests" / "interop").mkdir(parents=True)
    for name in ("constraints.txt", "tests/interop/run.sh", "tests/interop/requirements.txt"):
        shutil.copy(REPO / name, tmp_path / name)
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable}
    done = subprocess.run([tmp_path / "tests/interop/run.sh"], env=os.environ | nowhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test-interop: skipped, because sae-lens and eai-sparsify can't be installed here" in done.stdout
