"""The endpoint that descriptions are asked of: what goes wrong there, and where its key goes."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from description_cases import WORDS
from openai_stub import ChatStub, Failure, knows

from dictionary_learning.analysis.describe import main
from dictionary_learning.analysis.endpoint import ChatEndpoint, NoAnswer
from dictionary_learning.analysis.folder import AnalysisFolder
from dictionary_learning.errors import UserError

KEY = "test-0123456789-SECRET"
ANOTHER_KEY = "sk-0123456789abcdef"  # which a careless server might tell


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    made = ChatEndpoint.__init__
    monkeypatch.setattr(
        ChatEndpoint, "__init__", lambda *args, **kwargs: made(*args, **kwargs | {"first_pause": 0.001})
    )


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    "failure",
    [
        Failure(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        Failure(500, b"<html>oops</html>"),
        Failure(503, b"\xff\xfe"),
        Failure(hang_up=True),
        Failure(200, b"{}", {"Content-Length": "100000"}, delay=0.0),
    ],
)
def test_passing_trouble_is_tried_again(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub, failure: Failure
) -> None:
    stub.failures = [failure, failure]
    assert describe("--features", "0", "--no-score") == 0
    assert analysis.descriptions("trainer_0")[0]["description"] == "fracture"
    assert len(stub.requests) == 3


def test_pauses_grow_and_follow_what_the_server_asks(stub: ChatStub, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = ChatEndpoint(stub.url, "stub")
    pauses: list[float] = []
    monkeypatch.setattr(endpoint._closed, "wait", lambda seconds: pauses.append(seconds))
    stub.failures = [
        Failure(500),
        Failure(500),
        Failure(429, {}, {"Retry-After": "7"}),
        Failure(429, {}, {"Retry-After": "9999"}),
    ]
    assert endpoint.ask("", 'Feature: "x"')
    assert pauses == [1.0, 2.0, 7.0, 60.0]


@pytest.mark.usefixtures("no_pauses")
def test_a_slow_answer_times_out_and_is_tried_again(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = ChatEndpoint._post

    def patient_from_then_on(self: ChatEndpoint, body: Any) -> bytes:
        try:
            return post(self, body)
        finally:
            while stub.failures:  # the first request has not taken it yet
                time.sleep(0.01)
            self._timeout = 60.0  # the second answer comes at once, but for how busy the machine is

    monkeypatch.setattr(ChatEndpoint, "_post", patient_from_then_on)
    stub.failures = [Failure(delay=30.0)]
    assert describe("--features", "0", "--no-score", "--timeout", "0.3") == 0
    assert len(stub.requests) == 2
    assert analysis.descriptions("trainer_0")[0]["description"] == "fracture"


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Failure(200, b"not json"), "no chat completion"),
        (Failure(200, {"choices": []}), "no chat completion"),
        (Failure(200, {"choices": [{"message": {"content": None}}]}), "is empty"),
        (Failure(200, {"choices": [{"message": {"content": "<think>hm"}, "finish_reason": "length"}]}), "cut before"),
        (Failure(200, {"choices": [{"message": {"content": '{"other": 1}'}}]}), "no description"),
        (Failure(422, {"error": {"message": "too\nlong"}}), r"refuses the request \(HTTP 422: too long\)"),
        (Failure(200, {"choices": [{"message": {"content": "?!\x1b["}}]}), "no description"),
    ],
)
def test_garbage_fails_one_latent_with_its_reason_and_the_others_go_on(
    describe: Callable[..., int],
    analysis: AnalysisFolder,
    stub: ChatStub,
    capsys: pytest.CaptureFixture[str],
    failure: Failure,
    reason: str,
) -> None:
    stub.failures = [failure]
    assert describe("--parallel", "1", "--no-score") == 0
    records = analysis.descriptions("trainer_0")
    assert re.search(reason, records[0]["reason"]) and records[0]["description"] is None
    assert all(records[feature]["description"] == WORDS[feature] for feature in range(1, 6))
    assert re.search(f"Latent 0: .*{reason}", capsys.readouterr().err)
    describe("--no-score")  # and is asked for again
    assert analysis.descriptions("trainer_0")[0]["description"] == "fracture"


@pytest.mark.usefixtures("no_pauses")
def test_a_server_that_stays_down_fails_every_latent(
    describe: Callable[..., int], stub: ChatStub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.always = Failure(503, {"error": "maintenance"})
    assert describe("--features", "0", "1") == 2
    assert "the server has trouble (HTTP 503: maintenance) (5 tries)" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pauses")
def test_a_failure_does_not_take_the_place_of_a_description(
    describe: Callable[..., int], analysis: AnalysisFolder, stub: ChatStub
) -> None:
    describe("--features", "0", "--no-score")
    stub.always = Failure(500)
    describe("--features", "0")
    assert analysis.descriptions("trainer_0")[0]["description"] == "fracture"


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (Failure(401, {"error": {"message": "bad"}}), r"asks for a key: set SAE_FACTORY_API_KEY \(HTTP 401: bad\)"),
        (Failure(404, b"<h1>gone</h1>"), r"no model 'stub' at http.*, or no chat completions \(HTTP 404: gone\)"),
        (Failure(400, {"error": {"message": "no such model: stub"}}), "no model 'stub'"),
        (Failure(405), "takes no chat completions"),
        (Failure(429, {"error": {"message": "pay", "code": "insufficient_quota"}}), "no credit left"),
        (Failure(307, headers={"Location": "/v2"}), "answers from somewhere else"),
    ],
)
def test_what_no_request_can_get_past_is_one_sentence(
    describe: Callable[..., int], capsys: pytest.CaptureFixture[str], stub: ChatStub, failure: Failure, said: str
) -> None:
    stub.always = failure
    assert describe() == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.startswith("Error: ") and error.strip().count("\n") == 0


def test_an_unknown_model_and_a_closed_port_are_one_sentence(
    analysis: AnalysisFolder, stub: ChatStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(analysis.path), "--endpoint", stub.url, "--model", "gtp"]) == 2
    assert re.search(r"There is no model 'gtp' at http.*does not exist", capsys.readouterr().err)
    with socket.socket() as closed:  # the port is taken, and nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        assert main([str(analysis.path), "--endpoint", url, "--model", "stub"]) == 2
    assert re.search(r"There is no connection to http.*refused", capsys.readouterr().err)


def test_options_that_a_model_does_not_take_are_left_out(stub: ChatStub) -> None:
    endpoint = ChatEndpoint(stub.url, "stub", first_pause=0.001, answer_tokens=77)
    stub.failures = [
        Failure(400, {"error": {"message": "'max_tokens' is not supported, use 'max_completion_tokens'"}}),
        Failure(400, {"error": {"message": "'temperature' does not support 0 with this model"}}),
    ]
    endpoint.ask("", 'Feature: "x"')
    endpoint.ask("", 'Feature: "x"')
    bodies = [body for _, body in stub.requests]
    assert bodies[0]["temperature"] == 0 and bodies[0]["max_tokens"] == 77
    for body in bodies[2:]:
        assert set(body) == {"model", "messages", "max_completion_tokens"} and body["max_completion_tokens"] == 77


# ---------------------------------------------------------------------------------------------- keys


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "SAE_FACTORY_API_KEY"])
def test_the_key_goes_into_the_header_and_nowhere_else(
    describe: Callable[..., int],
    analysis: AnalysisFolder,
    stub: ChatStub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, KEY)
    quoting = {"error": {"message": f"Bearer {KEY} is bad: {KEY}, {ANOTHER_KEY}"}}
    stub.failures = [
        Failure(500, quoting),
        Failure(422, quoting),
        Failure(200, {"choices": [{"message": {"content": f'{{"description": "the key is {KEY}"}}'}}]}),
        Failure(200, {"choices": [{"message": {"content": f"{{ {KEY}"}}]}),
    ]
    assert describe("--parallel", "1", "--no-score") == 0
    stub.always = Failure(401, quoting)
    assert describe("--parallel", "1") == 2
    assert {headers["Authorization"] for headers, _ in stub.requests} == {f"Bearer {KEY}"}
    said = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in analysis.path.parent.rglob("*") if path.is_file())
    assert f"does not accept the key in {variable}" in said.err and "***" in said.err
    for key in (KEY, ANOTHER_KEY):
        assert key not in said.out + said.err and key.encode() not in written
    assert KEY not in json.dumps([body for _, body in stub.requests])


def test_no_exception_shows_the_key(stub: ChatStub, monkeypatch: pytest.MonkeyPatch) -> None:
    import traceback

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = ChatEndpoint(stub.url, "stub", first_pause=0.001, timeout=0.5)
    assert KEY not in repr(endpoint)
    failures = [Failure(status, {"error": {"message": KEY}}) for status in (401, 403, 404, 422, 500)]
    for failure in [*failures, Failure(200, KEY.encode()), Failure(hang_up=True)]:
        stub.always = failure
        with pytest.raises((UserError, NoAnswer)) as caught:
            endpoint.ask("", "")
        assert KEY not in "".join(traceback.format_exception(caught.value))
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("bad", [f"{KEY}\nX-Header: 1", f"{KEY} b", "schlüssel-" + KEY])
def test_a_key_that_can_not_be_one_is_refused_unseen(stub: ChatStub, monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("SAE_FACTORY_API_KEY", bad)
    with pytest.raises(UserError, match="SAE_FACTORY_API_KEY holds characters") as caught:
        ChatEndpoint(stub.url, "stub")
    assert KEY not in str(caught.value)


def test_a_redirect_gets_no_key(stub: ChatStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatStub(knows) as other:
        for status in (301, 302, 303, 307, 308):
            stub.always = Failure(status, headers={"Location": f"{other.url}/chat/completions"})
            with pytest.raises(UserError, match="somewhere else"):
                ChatEndpoint(stub.url, "stub").ask("", "")
        assert other.requests == []


def test_the_general_key_is_not_sent_unencrypted_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert ChatEndpoint("http://198.51.100.7/v1", "m")._key == ""
    for safe in ("https://198.51.100.7/v1", "http://localhost:8000/v1", "http://[::1]/v1", "http://127.0.0.1/v1"):
        assert ChatEndpoint(safe, "m")._key == KEY
    monkeypatch.setenv("SAE_FACTORY_API_KEY", "for-this-server")
    assert ChatEndpoint("http://198.51.100.7/v1", "m")._key == "for-this-server"
    monkeypatch.setenv("SAE_FACTORY_API_KEY", "")
    assert ChatEndpoint("https://api.openai.com/v1", "m")._key == ""


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://h:x",
    ],
)
def test_an_address_that_is_none_or_holds_a_key_is_refused_unseen(
    analysis: AnalysisFolder, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert main([str(analysis.path), "--endpoint", url, "--model", "m"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: The endpoint ") and KEY not in error
