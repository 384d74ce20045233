"""The report's file: what goes in, how large it gets, that the same run gives the same bytes, and bad input."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dictionary_learning.analysis.types import Examples
from dictionary_learning.errors import UserError
from dictionary_learning.report import MAX_MB, command, write_report
from dictionary_learning.report.data import read_run
from dictionary_learning.report.page import SCRIPTS, STYLES
from dictionary_learning.report.parts import packed_columns
from dictionary_learning.report.windows import pooled_windows
from tests.report.report_cases import CORPORA, examples, make_analysis, make_run, part, told, vocabulary

ASSETS = Path(command.__file__).parent / "assets"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def columns(page: Path, name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A part of columns read back as the page does."""
    data = part(page, name)
    length = int(np.frombuffer(data[:4], np.uint32)[0])
    head = json.loads(data[4 : 4 + length])
    at, out = 4 + length, {}
    for key, kind, size in head["columns"]:
        width = int(kind[1])
        planes = np.frombuffer(data[at : at + size * width], np.uint8).reshape(width, size)
        out[key] = np.ascontiguousarray(planes.T).view({"u": "<u", "f": "<f"}[kind[0]] + str(width)).ravel()
        at += size * width
    assert at == len(data)
    return head["meta"], out


# ------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("kind", ["top", "samples"])
def test_examples_read_back_as_the_analysis_kept_them(run: Path, kind: str) -> None:
    folder = make_analysis(run, ["trainer_1"], features=70)
    page = write_report(run)
    number = read_run(run).names.index("trainer_1")
    strings = json.loads(part(page, "vocabulary"))
    bounds = told(page)["analysis"]["bounds"]
    token_T = np.concatenate([columns(page, f"texts/{i}")[1]["token"] for i in range(len(bounds) - 1)])
    kept = dict(zip(("top", "samples"), folder.examples("trainer_1"), strict=True))
    seen = 0
    for chunk, low in ((0, 0), (1, 64)):
        _, column = columns(page, f"d{number}/{chunk}")
        act_ends = np.cumsum(column["length"], dtype=np.int64)
        at = 0 if kind == "top" else int(column["tops"].sum())
        for inside, count in enumerate(column["tops" if kind == "top" else "samples"]):
            feature = low + inside
            there = np.flatnonzero(kept[kind].document_FE[feature] >= 0)
            assert count == len(there)
            for e in there:
                window = kept[kind].token_FEW[feature, e]
                expected = [vocabulary()[int(t)] for t in window if t >= 0]
                start, length = int(column["start"][at]), int(column["length"][at])
                assert [strings[t] for t in token_T[start : start + length]] == expected
                acts = column["act"][act_ends[at] - length : act_ends[at]].astype(np.float32) * column["scale"][inside]
                np.testing.assert_allclose(acts, kept[kind].act_FEW[feature, e][window >= 0], rtol=1e-3, atol=1e-6)
                assert column["value"][at] == kept[kind].value_FE[feature, e]
                assert column["document"][at] == kept[kind].document_FE[feature, e]
                assert expected[column["peak"][at]] == vocabulary()[int(window[kept[kind].peak_FE[feature, e]])]
                at += 1
                seen += 1
    assert seen == 69 * kept[kind].value_FE.shape[1]  # all but the dead one


def test_table_and_details_are_those_of_the_analysis(run: Path) -> None:
    table = make_analysis(run, ["trainer_0"]).table("trainer_0")
    page = write_report(run)
    meta, column = columns(page, "d0/table")
    np.testing.assert_array_equal(column["density"], table["density"].astype(np.float32))
    assert meta["label"] == list(table["label"])
    assert [CORPORA[i] if i != 255 else "" for i in column["corpus"]] == list(table["corpus"])
    _, chunk = columns(page, "d0/0")
    strings = json.loads(part(page, "vocabulary"))
    lengths = np.cumsum([0, *chunk["up_length"]])
    for feature in (0, 17, 63):
        span = slice(lengths[feature], lengths[feature + 1])
        assert [strings[i] for i in chunk["up"][span]] == table["top_tokens"][feature]
        np.testing.assert_allclose(chunk["up_value"][span].astype(float), table["top_logits"][feature], rtol=1e-3)
    rates = chunk["corpora"].reshape(64, 3, 4)
    np.testing.assert_allclose(
        rates[20, 1], [table[f"{k}:medmcqa"][20] for k in ("rate", "log2_ratio", "p", "q")], rtol=1e-6
    )
    histogram = told(page)["dictionaries"][0]["histogram"]
    assert histogram["dead"] == 1 and sum(histogram["counts"]) == 95


def test_windows_of_a_document_are_kept_once_and_clashing_ones_apart() -> None:
    rng = np.random.default_rng(0)
    text_DT = rng.integers(0, 50, (3, 40))
    part_ = examples(rng, text_DT, 30, 8, 12, np.ones(30), np.ones(30, bool))
    token_T, ((start, first, length),) = pooled_windows([part_])
    assert len(token_T) <= text_DT.size < part_.token_FEW.size / 10
    odd = part_.token_FEW.copy()
    odd[4, 2] = np.where(odd[4, 2] >= 0, 99, -1)  # other tokens at the same place
    for tokens in (part_.token_FEW, odd):
        token_T, ((start, first, length),) = pooled_windows([part_._replace(token_FEW=tokens)])
        for f in range(30):
            for e in range(8):
                inside = tokens[f, e][first[f, e] : first[f, e] + length[f, e]]
                np.testing.assert_array_equal(token_T[start[f, e] : start[f, e] + length[f, e]], inside)


def test_no_examples_at_all_are_no_windows() -> None:
    empty = Examples(
        *(np.zeros((4, 0), t) for t in (np.float32, np.int64, np.int32, np.int16)),
        *(np.zeros((4, 0, 8), t) for t in (np.int32, np.float32)),
        np.zeros((4, 0), np.int16),
    )
    token_T, ((start, _, length),) = pooled_windows([empty])
    assert len(token_T) == 0 and start.shape == length.shape == (4, 0)


# ------------------------------------------------------------------------------------------------ the file


def test_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    make_analysis(run)
    one, other = write_report(run, tmp_path / "one.html"), write_report(run, tmp_path / "other.html")
    assert one.read_bytes() == other.read_bytes()


def test_policy_allows_one_script_and_one_style_and_no_connection(run: Path) -> None:
    make_analysis(run)
    text = write_report(run).read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'; ") and "unsafe" not in policy[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "\\u" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)


def test_every_asset_is_used_and_none_is_long() -> None:
    files = {path.name for path in ASSETS.iterdir()}
    assert files == {*SCRIPTS, *STYLES, "page.html"}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 400 for path in ASSETS.iterdir())


@pytest.mark.parametrize("room", [0.05, 0.35])
def test_budget_holds_and_the_page_says_what_it_left_out(run: Path, room: float) -> None:
    make_analysis(
        run, features=600, top=10, samples=15, window=32, text_DT=np.random.default_rng(0).integers(0, 400, (2000, 200))
    )
    whole = write_report(run, run / "whole.html", max_mb=float("inf"))
    size = whole.stat().st_size
    fixed = 0.55  # MB that page, code and tables take
    small = write_report(run, run / "small.html", max_mb=fixed + room * size / 1e6)
    assert small.stat().st_size <= (fixed + room * size / 1e6) * 1e6 < size
    assert "To keep this file small" in told(small)["analysis"]["kept"] and told(whole)["analysis"]["kept"] == ""
    kept, all_ = (columns(path, "d0/0")[1] for path in (small, whole))
    assert all_["tops"].max() == 10 and all_["samples"].max() == 15
    assert kept["tops"].sum() + kept["samples"].sum() < all_["tops"].sum() + all_["samples"].sum()
    assert kept["samples"].max() == 0 or kept["tops"].max() == 10  # samples go first


def test_descriptions_are_in_the_table_and_the_details(run: Path) -> None:
    folder = make_analysis(run)
    said = {8: {"description": "names of </script> drugs", "score": 0.75, "model": "stub"}, 9: {"score": None}}
    folder.write_descriptions("trainer_0", said)
    page = write_report(run)
    assert columns(page, "d0/table")[0]["description"]["8"] == "names of </script> drugs"
    assert columns(page, "d0/0")[0]["8"] == {"model": "stub", "score": 0.75}


def test_columns_refuse_a_type_that_the_page_can_not_read() -> None:
    with pytest.raises(KeyError):
        packed_columns(None, {"x": np.zeros(3, np.int64)})


# ------------------------------------------------------------------------------------------------ command, figures


def test_command_writes_page_and_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    make_analysis(run)
    assert command.main([str(run), "--out", str(tmp_path / "a" / "page.html"), "--figures"]) == 0
    out = capsys.readouterr().out
    assert "page.html" in out and out.count("Written to") == 7
    figures = sorted(path.name for path in (tmp_path / "a" / "figures").iterdir())
    assert figures == sorted(f"{name}.{form}" for name in ("front", "curves", "densities") for form in ("png", "svg"))


def test_figures_are_the_same_bytes_again(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dictionary_learning.report.figures import write_figures

    make_analysis(run)
    one, other = write_figures(run, tmp_path / "1"), write_figures(run, tmp_path / "2")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other] and len(one) == 6


def test_without_matplotlib_the_page_works_and_figures_say_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command.main([str(run)]) == 0
    assert command.main([str(run), "--figures"]) == 2
    assert "sae-factory[report]" in capsys.readouterr().err


def test_command_tells_bad_input_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("Error: There is no run in")


def test_notebook_refuses_latents_that_are_not_there(run: Path) -> None:
    pytest.importorskip("matplotlib")
    from dictionary_learning.report.notebook import show_densities, show_feature, show_front

    with pytest.raises(UserError, match="no analysis of these"):
        show_densities(run)
    make_analysis(run)
    with pytest.raises(UserError, match="trainer_0 has latents 0 to 95, not 96"):
        show_feature(run, "trainer_0", 96)
    with pytest.raises(UserError, match="Did you mean 'trainer_0'"):
        show_feature(run, "trainer0", 1)
    assert (
        "data:image/svg+xml" in show_front(run)._repr_html_()
        and "<img" in show_densities(run, "trainer_1")._repr_html_()
    )


def test_default_budget_is_what_the_documentation_says() -> None:
    assert MAX_MB == 60
