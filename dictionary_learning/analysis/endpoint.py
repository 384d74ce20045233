"""Asking a language model behind an OpenAI-compatible address (`POST BASE/chat/completions`).

In: messages. Out: the text of the answer and what it cost in tokens, or one sentence why there is none. The standard
library is enough for that; any number of threads may ask.

The key comes from the environment (SAE_FACTORY_API_KEY, else OPENAI_API_KEY) and goes into one header of one host:
redirects are not followed, no message or file shows it, and the general key is not sent unencrypted to another machine.
What a server says is shortened, and cut out of it is what a careless server might quote.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import re
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dictionary_learning.errors import UserError

KEYS = ("SAE_FACTORY_API_KEY", "OPENAI_API_KEY")  # the first that is set
TRIES = 5
LONGEST_PAUSE = 60.0  # seconds between two tries, whatever a server asks for
ANSWER_BYTES = 4 << 20
MESSAGE_CHARACTERS = 200
OPTIONS = ("temperature", "max_tokens", "max_completion_tokens")  # which not every model takes
PASSING = (408, 409, 425, 429)  # of the refusals (4xx) those that pass, as all troubles of the server (5xx) may


class NoAnswer(Exception):
    """This request has no usable answer; another one may. `str()` is one sentence."""


class Answer(NamedTuple):
    """text: what the model said, as it came. prompt_tokens, completion_tokens: 0 where the server does not tell."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class ChatEndpoint:
    """A model at an address.

    Args:
        url: the base, as "http://localhost:8000/v1"; "/chat/completions" is added where it is missing.
        model: its name there.
        answer_tokens: an answer has at most so many.
        timeout: seconds without a byte, after which a try has failed.
        first_pause: seconds before the second try; each later pause is twice as long, or as long as the server asks.

    Raises:
        UserError: not an address, or one with a key in it; a key that can't be one.
    """

    def __init__(
        self, url: str, model: str, *, answer_tokens: int = 1024, timeout: float = 60.0, first_pause: float = 1.0
    ) -> None:
        parts = _checked(url)
        self.model = model
        self.base = url.rstrip("/").removesuffix("/chat/completions")
        self.key_name, self._key = _key_for(parts.scheme, parts.hostname or "")
        self._timeout, self._first_pause = timeout, first_pause
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": answer_tokens}
        self._lock, self._closed = threading.Lock(), threading.Event()
        proxies = urllib.request.ProxyHandler({}) if _is_here(parts.hostname or "") else urllib.request.ProxyHandler()
        self._opener = urllib.request.build_opener(proxies, _NoRedirects)

    def __repr__(self) -> str:
        return f"ChatEndpoint({self.base!r}, {self.model!r})"

    def ask(self, system: str, user: str) -> Answer:
        """The model's answer to a system message and a question. Tried `TRIES` times where the trouble may pass.

        Raises:
            NoAnswer: it kept failing, or what came is no answer.
            UserError: no request can succeed: no such address or model, or the key is refused.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        trouble = ""
        for attempt in range(TRIES):
            try:
                return self._answer(self._post({"model": self.model, "messages": messages, **self._options}))
            except _Passing as error:
                trouble = str(error)
                pause = min(error.wait or self._first_pause * 2**attempt, LONGEST_PAUSE)
                if attempt + 1 < TRIES and self._closed.wait(pause):
                    raise NoAnswer("interrupted") from None
        raise NoAnswer(f"{trouble} ({TRIES} tries)")

    def close(self) -> None:
        """Let nobody wait for another try."""
        self._closed.set()

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "sae-factory"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        question = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}/chat/completions", data=question, headers=headers, method="POST")
        # "from None" throughout: what is raised below quotes headers and addresses
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                answer = response.read(ANSWER_BYTES)
                if response.length:  # what the headers promised and did not come
                    raise _Passing("the answer broke off")
                return answer
        except urllib.error.HTTPError as error:
            with error:
                refusal = self._refusal(error, body)
            raise refusal from None
        except TimeoutError:
            raise _Passing(f"the server did not answer within {self._timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Passing(f"the server did not answer within {self._timeout:g} s") from None
            if isinstance(error.reason, ConnectionError) and not isinstance(error.reason, ConnectionRefusedError):
                raise _Passing(f"the connection broke ({type(error.reason).__name__})") from None
            raise UserError(f"There is no connection to {self.base} ({self._plain(error.reason)}).") from None
        except (http.client.HTTPException, OSError) as error:
            raise _Passing(f"the connection broke ({type(error).__name__})") from None

    def _refusal(self, error: urllib.error.HTTPError, sent: Mapping[str, Any]) -> Exception:
        """What an HTTP status means: to be raised."""
        try:
            said = self._said(error.read(ANSWER_BYTES))
        except (OSError, http.client.HTTPException):
            said = ""
        status, quoted = error.code, f"HTTP {error.code}{f': {said}' if said else ''}"
        if status in PASSING or status >= 500:
            if "insufficient_quota" in said:
                return UserError(f"The account at {self.base} has no credit left ({quoted}).")
            slow = "the server asks to slow down" if status == 429 else "the server has trouble"
            return _Passing(f"{slow} ({quoted})", _seconds(error.headers.get("Retry-After")))
        if status in (401, 403):
            key = f"does not accept the key in {self.key_name}" if self._key else f"asks for a key: set {KEYS[0]}"
            return UserError(f"{self.base} {key} ({quoted}).")
        if 300 <= status < 400:
            return UserError(f"{self.base} answers from somewhere else ({quoted}): give the address that it names.")
        if status == 400 and (option := next((name for name in OPTIONS if name in said and name in sent), None)):
            self._drop(option)
            return _Passing(quoted, 1e-3)
        if status == 404 or (status == 400 and "model" in said.lower() and self.model in said):
            return UserError(f"There is no model '{self.model}' at {self.base}, or no chat completions ({quoted}).")
        if status == 405:
            return UserError(f"{self.base} takes no chat completions ({quoted}): the address often ends in /v1.")
        return NoAnswer(f"the server refuses the request ({quoted})")

    def _drop(self, option: str) -> None:
        """Do without an option that this model does not take; newer ones call max_tokens otherwise."""
        with self._lock:
            options = dict(self._options)
            value = options.pop(option, None)
            if option == "max_tokens" and value is not None:
                options["max_completion_tokens"] = value
            self._options = options

    def _answer(self, body: bytes) -> Answer:
        try:
            data = json.loads(body)
            choice = data["choices"][0]
            text = choice["message"]["content"]
            usage = data.get("usage") or {}
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise NoAnswer("what the server sent is no chat completion") from None
        text = re.sub(r"(?s)<think>.*?(</think>|$)", "", text).strip() if isinstance(text, str) else ""
        if not text:
            cut = choice.get("finish_reason") == "length"
            raise NoAnswer(f"the model's answer is {'cut before it begins' if cut else 'empty'}")
        return Answer(self._redacted(text), *tokens)

    def _said(self, body: bytes) -> str:
        """The message in an error's body."""
        try:
            data = json.loads(body)
            inner = data.get("error", data)
            said = inner if isinstance(inner, str) else f"{inner.get('message', '')} {inner.get('code') or ''}"
        except (ValueError, AttributeError, RecursionError):
            said = re.sub(r"<[^>]*>", " ", body[:4096].decode(errors="replace"))
        return self._plain(said)

    def _plain(self, text: object) -> str:
        return one_line(self._redacted(str(text)), MESSAGE_CHARACTERS)

    def _redacted(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return re.sub(r"\b(sk|hf)[-_][A-Za-z0-9_-]{10,}|(?i:bearer)\s+\S+", "***", text)


class _Passing(Exception):
    """Trouble that may pass. wait: seconds that the server asks for, if it does."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the key is for the host that was asked."""


def printable(text: str) -> str:
    """`text` without control, format and surrogate characters; line feeds and tabs stay, other line ends become one."""
    kept = (char for char in text if char in "\n\t" or unicodedata.category(char)[0] != "C")
    return "".join("\n" if char in "\u2028\u2029" else char for char in kept)


def one_line(text: str, characters: int) -> str:
    """Printable, on one line, and not longer than so many characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"


def _checked(url: str) -> Any:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:
        good = False
    if not good or " " in url:
        raise UserError("The endpoint is no address: give one such as http://localhost:8000/v1.")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(f"The endpoint must hold no key, query or user name: set {KEYS[0]} in the environment instead.")
    return parts


def _key_for(scheme: str, host: str) -> tuple[str, str]:
    """(the variable that holds the key, the key) to send to a host; two empty strings for none."""
    name = next((name for name in KEYS if name in os.environ), "")
    key = os.environ.get(name, "").strip()
    if not key or (name == KEYS[1] and scheme == "http" and not _is_here(host)):
        return "", ""
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{name} holds characters that no key has: set it anew.")
    return name, key


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for: seconds, or a date."""
    if not retry_after:
        return None
    if re.fullmatch(r"\d+(\.\d*)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
