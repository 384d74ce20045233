"""Talking to the Hugging Face Hub: what pushing and loading share, for dictionaries and for data sets.

In: a call to `huggingface_hub`. Out: its result, or one `UserError` that says what went wrong and what to do. The token
comes from HF_TOKEN or the Hub's login and is handed to nobody else: a message never shows it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from dictionary_learning.errors import UserError

REACH_SECONDS = 6.0  # for the first answer; the client by itself would wait for minutes
LOOK_SECONDS = 10.0  # for what a run can do without
ANSWER_SECONDS = 300.0  # for any later one; the Hub takes its time over a large commit
MESSAGE_CHARACTERS = 300

REFUSALS = {  # HTTP status -> what it means here
    401: "the Hub does not accept the token: set HF_TOKEN or run `hf auth login`",
    403: "the token has no right to do this: use one with write access to this repository",
    404: "there is no such repository, revision or file, or the token may not see it",
    409: "the repository is being changed by someone else: try again",
    412: "the repository was changed by someone else meanwhile: try again",
    429: "the Hub asks to slow down: try again in a few minutes",
}


def hub_endpoint() -> str:
    """The address of the Hub: HF_ENDPOINT, else that of huggingface_hub."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def check_push(repo_id: str, flag: str = "--push_to") -> None:
    """Find before the work begins that it could not end in a push: a bad name, or no token at all.

    Raises:
        UserError: names `flag`, the setting that gave the repository.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(f"{flag} {repo_id!r} is not a name of a Hub repository; give user/name.") from None
    if not get_token():
        raise UserError(f"{flag} needs a Hugging Face token: set HF_TOKEN or run `hf auth login`.")


@contextlib.contextmanager
def said_plainly(what: str) -> Iterator[None]:
    """Turn the Hub's refusals and the network's failures inside the block into one sentence: `what`: why.

    Within the block no request waits for ever. Raises UserError.
    """
    from huggingface_hub.errors import HTTPError  # of the HTTP library that the installed version uses

    try:
        with _bounded_waits():
            yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # "from None": the original may quote what was sent, the token among it
        raise UserError(f"{what}: {_why(error)}.") from None


def reach_hub(endpoint: str | None = None) -> None:
    """See that the Hub answers at all, and wait `REACH_SECONDS` for it at most, whatever hangs (DNS has no timeout).

    Raises:
        TimeoutError: there is no answer; it and the errors of the HTTP library are for `said_plainly`.
    """
    from huggingface_hub.utils import get_session

    endpoint = endpoint or hub_endpoint()
    failed: list[Exception] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=REACH_SECONDS, follow_redirects=False)
        except Exception as error:  # handed to the thread that waits
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_SECONDS)
    if asking.is_alive():
        raise TimeoutError(f"no answer within {REACH_SECONDS:.0f} s")
    if failed:
        raise failed[0]


def dataset_commits(paths: Iterable[str]) -> dict[str, str]:
    """Dataset -> its newest commit; of none where one can't be told, such as without a network."""
    from huggingface_hub import HfApi

    try:
        found = {path: HfApi(endpoint=hub_endpoint()).dataset_info(path, timeout=LOOK_SECONDS).sha for path in paths}
    except Exception:  # noqa: BLE001 - no network, offline mode, a sick Hub: the reading that follows says so
        return {}
    return {path: sha for path, sha in found.items() if sha} if all(found.values()) else {}


def open_repository(api: Any, repo_id: str, *, repo_type: str, private: bool) -> Any:
    """Make the repository if it does not exist; its `RepoUrl`, with the full name as `repo_id`.

    Raises:
        UserError: `private` is asked for and it exists and is public.
    """
    url = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
    if private and not api.repo_info(url.repo_id, repo_type=repo_type).private:
        raise UserError(f"{repo_id} exists and is public: nothing was pushed. Choose another name, or leave --private.")
    return url


def redacted(text: str) -> str:
    """`text` without the token, or anything that looks like one."""
    from huggingface_hub import get_token

    return re.sub(r"hf_[A-Za-z0-9]{10,}", "***", text.replace(get_token() or "\0", "***"))


def _why(error: Exception) -> str:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    source: BaseException = error
    while source.__cause__ is not None and not isinstance(source, HTTPError | OfflineModeIsEnabled):
        source = source.__cause__  # "check your connection" may stand for anything
    response = getattr(source, "response", None)
    status = getattr(response, "status_code", None)
    message = str(getattr(source, "server_message", None) or source)
    message = redacted(" ".join(message.split()))[:MESSAGE_CHARACTERS].rstrip(".")
    if isinstance(source, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the network: unset it to reach the Hub"
    if status is not None:
        meaning = REFUSALS.get(status, "the Hub has trouble: try again later" if status >= 500 else "the Hub refused")
        return f"{meaning} (HTTP {status}: {message})"
    detail = f"{type(source).__name__}: {message or 'no details'}"
    if isinstance(source, HTTPError | TimeoutError):
        return f"no connection to {hub_endpoint()} ({detail}): check the network"
    return detail


@contextlib.contextmanager
def _bounded_waits() -> Iterator[None]:
    """Give the Hub's client, which waits without limit, a limit for a while."""
    from huggingface_hub.utils import get_session

    client = get_session()
    before = client.timeout
    client.timeout = type(before)(ANSWER_SECONDS, connect=REACH_SECONDS)
    try:
        yield
    finally:
        client.timeout = before
