"""The snippets of docs/coming-from.md run, in their order, and give what they are for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "coming-from.md").read_text(encoding="utf-8")


def test_the_snippets_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/coming-from.md", "exec"), names)
    assert len(snippets) == 7
    x = names["acts"]
    assert torch.allclose(names["again"](x), names["dictionary"](x), atol=1e-5)
    assert names["transcoder"].W_skip.any(), "the skip connection learned nothing"
    assert names["autoencoder"](x).shape == x.shape
    assert next(iter(names["train_loader"])) is not None
    assert names["found"].kl_T[-1] > 0 and names["text"].prompt == names["found"].prompt
    assert 0 < float(capsys.readouterr().out.splitlines()[0]) < 1
