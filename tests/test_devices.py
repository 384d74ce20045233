"""Device names: "auto" is the best that is there, and what is absent is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dictionary_learning.devices import best_device, resolve_device
from dictionary_learning.errors import UserError


def with_devices(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("there", "best"), [({}, "cpu"), ({"mps": True}, "mps"), ({"cuda": 1}, "cuda"), ({"cuda": 2, "mps": True}, "cuda")]
)
def test_auto_takes_cuda_before_mps_before_the_cpu(
    there: dict[str, Any], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, **there)
    assert best_device() == resolve_device("auto") == torch.device(best)


def test_a_device_that_is_there_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert resolve_device(name) == resolve_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "cuda", "message"),
    [
        ("cuda", 0, "'cuda' is not available on this machine; use 'cpu'"),
        ("cuda:2", 2, "'cuda:2' is not available on this machine; use 'cuda:0' to 'cuda:1' or 'cpu'"),
        ("mps", 0, "'mps' is not available here"),
        ("gpu", 0, "'gpu' is not a device; use 'auto', 'cpu'"),
        ("cudda", 1, "Did you mean 'cuda'"),
        ("", 0, "'' is not a device"),
        (["cpu"], 0, "is not a device"),
    ],
)
def test_an_absent_device_is_refused_by_name(
    name: Any, cuda: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, cuda=cuda)
    with pytest.raises(UserError, match=message):
        resolve_device(name)
