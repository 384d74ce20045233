"""A stand-in for an OpenAI-compatible server, on a free local port: POST /v1/chat/completions, and what can go wrong.

In: what the package sends. Out: answers of a `mind`, a function (system message, question) -> text. Misbehaviour is
queued: each of `failures` is taken by one request, in the order in which they come.

    with ChatStub(knows("hip")) as stub:
        ChatEndpoint(stub.url, "stub").ask("You are ...", "What ...?")
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Mind = Callable[[str, str], str]


@dataclass
class Failure:
    """An answer out of the ordinary. body: bytes as they are, or JSON. hang_up: close the connection in place of it."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False


class ChatStub:
    """The server as a context manager. `requests` lists (headers, body) of all that was asked; `most_at_once` is the
    largest number of requests that were being answered at the same time; `always` answers every request if set."""

    def __init__(self, mind: Mind = lambda system, question: "{}", model: str = "stub") -> None:
        self.mind, self.model = mind, model
        self.failures: list[Failure] = []
        self.always: Failure | None = None
        self.delay = 0.0
        self.together: threading.Barrier | None = None  # where requests wait for each other
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatStub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def questions(self) -> list[str]:
        """What the user's messages said, one for each request."""
        return [body["messages"][1]["content"] for _, body in self.requests]


class _Handler(BaseHTTPRequestHandler):
    stub: ChatStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """No lines on stderr: tests look at it."""

    def do_GET(self) -> None:
        self.stub.requests.append((dict(self.headers), {}))
        self._send(200, {"choices": [{"message": {"content": "of a redirect"}}]}, {})

    def do_POST(self) -> None:
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.requests.append((dict(self.headers), body))
            stub.paths.append(self.path)
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
            failure = stub.failures.pop(0) if stub.failures else stub.always
        if stub.together is not None:
            stub.together.wait()
        time.sleep(stub.delay if failure is None else failure.delay)
        with stub.lock:
            stub.at_once -= 1
        if failure is not None and failure.hang_up:
            self.close_connection = True
        elif failure is not None:
            self._send(failure.status, failure.body, failure.headers)
        elif self.path != "/v1/chat/completions" or body["model"] != stub.model:
            said = {"error": {"message": f"The model `{body['model']}` does not exist", "code": "model_not_found"}}
            self._send(404, said, {})
        else:
            system, question = (message["content"] for message in body["messages"])
            text = stub.mind(system, question)
            usage = {"prompt_tokens": len(question) // 4, "completion_tokens": len(text) // 4}
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self._send(200, {"object": "chat.completion", "choices": [choice], "usage": usage}, {})

    def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.close_connection |= "Content-Length" in headers  # more was promised than comes
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # whoever asked did not wait


# ---------------------------------------------------------------------------------------------- minds


def is_detection(question: str) -> bool:
    return question.startswith("Feature: ")


def numbered_texts(question: str) -> list[str]:
    """The texts of a question, in order; a text that broke out of its quotes would not be read."""
    return [json.loads(text) for text in re.findall(r"(?m)^\d+\. (?:\(.*?\) )?(\".*\")$", question)]


def knows(system: str, question: str) -> str:
    """Names the first marked word, and finds the texts that hold the word it is told."""
    if not is_detection(question):
        return json.dumps({"description": re.findall(r"<<(.+?)>>", question)[0]})
    word = json.loads(question.splitlines()[0].removeprefix("Feature: "))
    texts = numbered_texts(question)
    return json.dumps({"texts": [number for number, text in enumerate(texts, 1) if word in text.split()]})


def guesses(system: str, question: str) -> str:
    """Says something, and tosses a coin for each text."""
    if not is_detection(question):
        return "Something or other"
    coins = [hashlib.sha256(f"{text}{question[:40]}".encode()).digest()[0] % 2 for text in numbered_texts(question)]
    return f"I think it is {[number for number, coin in enumerate(coins, 1) if coin]}"
