"""A stand-in for the Hugging Face Hub: enough of its HTTP API to create repositories, commit to them and read them.

In: what `huggingface_hub` sends to `endpoint=server.url`. Out: repositories in memory, to look at in a test:
`server.repos["datasets/user/name"].files` maps paths to bytes, `.commits` lists (message, commit id). Standard library
only, so that the tests need no network and no account. Files are asked for as "regular", those whose names end in one
of `server.lfs` through LFS; never through Xet (set HF_HUB_DISABLE_XET).

    with HubServer() as server:
        HfApi(endpoint=server.url, token=server.token).create_repo("user/name")
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = r"(?P<repo>\w+s/[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"


@dataclass
class Pull:
    """A pull request: its title, whether it waits, its files, and its commits."""

    title: str
    files: dict[str, bytes]
    status: str = "open"
    author: str = ""  # empty: the user of the token
    commits: list[str] = field(default_factory=list)


@dataclass
class Repo:
    """One repository: its files at the newest commit, every commit, the files of each commit, its pull requests."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)  # numbered from 1

    def commit(self, message: str) -> str:
        """Records the present files under an id that depends on content and history."""
        content = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(self.files.items())]
        sha = hashlib.sha1(json.dumps([content, message, self.commits]).encode()).hexdigest()
        self.commits.append((message, sha))
        self.snapshots[sha] = dict(self.files)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit id, files) of main (its newest commit), a pull request or a commit id; None if there is none."""
        if revision.startswith("refs/pr/"):
            pull = self.pulls[int(revision.removeprefix("refs/pr/")) - 1]
            return hashlib.sha1(json.dumps(pull.commits).encode()).hexdigest(), pull.files
        if revision == "main":
            revision = self.commits[-1][1]
        return (revision, self.snapshots[revision]) if revision in self.snapshots else None


class HubServer:
    """The server, on a free local port, as a context manager.

    Misbehaviour, by a part of the path such as "/commit/":
        refuse[part]: requests fail with this status (and a message that quotes the token, as a careless server might).
        slow[part]: seconds before an answer.
        meanwhile[part]: is called, once, before an answer.
        cut[part]: so many answers break off in the middle of the data; of an upload, in the middle of what is sent.
    `requests` lists "METHOD path" of everything asked.
    """

    token = "hf_testtokenofnoaccount"
    user = "user"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.refuse: dict[str, int] = {}
        self.slow: dict[str, float] = {}
        self.meanwhile: dict[str, Callable[[], object]] = {}
        self.cut: dict[str, int] = {}
        self.cutting = threading.Lock()
        self.lfs: tuple[str, ...] = ()
        self.objects: dict[str, bytes] = {}  # sha256 -> what LFS holds
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, kind: str, name: str, private: bool = False) -> Repo:
        """A repository with its first, empty commit; `kind` is model or dataset."""
        repo = self.repos[f"{kind}s/{name}"] = Repo(private)
        repo.commit("initial commit")
        return repo

    def takes(self, misbehaviour: dict[str, Any], path: str) -> Any:
        """The misbehaviour set for a path, or None."""
        return next((value for part, value in misbehaviour.items() if part in path), None)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """No lines on stderr: tests look at it."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self._cuts(path):
            self.rfile.read(length // 2)
            return self._hang_up()
        body = self.rfile.read(length)
        for part in [part for part in self.hub.meanwhile if part in path]:
            self.hub.meanwhile.pop(part, lambda: None)()
        if (seconds := self.hub.takes(self.hub.slow, path)) is not None:
            time.sleep(seconds)
        if (status := self.hub.takes(self.hub.refuse, path)) is not None:
            return self._json({"error": f"refused: {self.headers.get('Authorization')}"}, status)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.command == "POST" and not known:
            return self._json({"error": "Invalid credentials"}, 401)
        for pattern, answer in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate_yaml),
            (r"/api/whoami-v2", self._whoami),
            (r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/storage/(?P<oid>[0-9a-f]{64})", self._lfs_object),
            (rf"/api/{REPO}/preupload/{REVISION}", self._preupload),
            (rf"/api/{REPO}/commit/(?P<revision>.+)", self._commit),
            (rf"/api/{REPO}/discussions", self._discussions),
            (rf"/api/{REPO}/discussions/(?P<number>\d+)/merge", self._merge),
            (rf"/api/{REPO}/tree/{REVISION}(?:/.*)?", self._tree),
            (rf"/api/{REPO}(?:/revision/(?P<revision>.+))?", self._info),
            (rf"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/{REVISION}/(?P<file>.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                named = match.groupdict()
                if "repo" in named:
                    name = named["repo"] if named["repo"].count("/") == 2 else f"models/{named['repo']}"
                    if name not in self.hub.repos or (self.hub.repos[name].private and not known):
                        return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                    named["repo"] = name
                return answer(body, **named)
        return self._json({"error": f"no such address: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    # ------------------------------------------------------------------------------------------ writing

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        kind = asked.get("type", "model")
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if f"{kind}s/{name}" in self.hub.repos:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.create(kind, name, private)
        return self._json({"url": url, "name": name})

    def _whoami(self, body: bytes) -> None:
        self._json({"name": self.hub.user, "type": "user"})

    def _validate_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        _, there = self.hub.repos[repo].at(revision) or ("", {})
        files = []
        for path in (asked["path"] for asked in json.loads(body)["files"]):
            lfs = path.endswith(self.hub.lfs or ("\0",))
            oid = _oid(there[path], lfs) if path in there else None
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.objects:
                asked["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{asked['oid']}"}}
        self._json({"objects": objects, "transfer": "basic"})

    def _lfs_object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "the object does not match its name"}, 400)
        self.hub.objects[oid] = body
        return self._json({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        target, message = self.hub.repos[repo], ""
        new_pull = "create_pr" in parse_qs(urlsplit(self.path).query)
        pull = target.pulls[int(revision.removeprefix("refs/pr/")) - 1] if revision.startswith("refs/pr/") else None
        files = dict(target.files if pull is None else pull.files)  # all operations, or none
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, target.commits[-1][1]):
                    return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._json({"error": f"unsupported operation {line['key']}"}, 400)
        answer: dict[str, Any] = {"success": True}
        if new_pull:
            pull = Pull(message, files)
            target.pulls.append(pull)
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo.split('/', 1)[1]}/discussions/{len(target.pulls)}"
        if pull is not None:
            pull.files = files
            sha = hashlib.sha1(f"{message} {len(pull.commits)}".encode()).hexdigest()
            pull.commits.append(sha)
        else:
            target.files = files
            sha = target.commit(message)
        self._json(answer | {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def _merge(self, body: bytes, repo: str, number: str) -> None:
        target = self.hub.repos[repo]
        pull = target.pulls[int(number) - 1]
        if pull.status != "open":
            return self._json({"error": f"This pull request is {pull.status}"}, 409)
        pull.status, target.files = "merged", dict(pull.files)
        target.commit(f"{pull.title} (#{number})")
        return self._json({})

    # ------------------------------------------------------------------------------------------ reading

    def _discussions(self, body: bytes, repo: str) -> None:
        kind, name = repo.split("/", 1)
        listed = [
            {
                "title": pull.title,
                "num": number,
                "author": {"name": pull.author or self.hub.user},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": pull.status,
                "repo": {"name": name, "type": kind.removesuffix("s")},
                "isPullRequest": True,
            }
            for number, pull in enumerate(self.hub.repos[repo].pulls, 1)
        ]
        wanted = parse_qs(urlsplit(self.path).query).get("status", [None])[0]
        listed = [pull for pull in listed if wanted in (None, pull["status"])]
        self._json({"discussions": listed, "count": len(listed), "start": 0})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self.hub.repos[repo].at(revision) or ("", {})
        entries = [{"type": "file", "path": p, "size": len(d), "oid": _oid(d, False)} for p, d in files.items()]
        self._json(entries)

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        target = self.hub.repos[repo]
        found = target.at(revision or "main")
        if found is None:
            return self._no_revision(revision)
        siblings = [{"rfilename": path} for path in found[1]]
        name = repo.split("/", 1)[1]
        return self._json({"id": name, "sha": found[0], "private": target.private, "siblings": siblings, "tags": []})

    def _resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        found = self.hub.repos[repo].at(revision)
        if found is None:
            return self._no_revision(revision)
        sha, files = found
        if file not in files:
            return self._json(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            )
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            return self._send(files[file], 200, headers)
        size = len(files[file])
        headers["Content-Range"] = f"bytes {start[1]}-{size - 1}/{size}"
        return self._send(files[file][int(start[1]) :], 206, headers)

    # ------------------------------------------------------------------------------------------ the answers

    def _no_revision(self, revision: str | None) -> None:
        self._json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self._cuts(unquote(urlsplit(self.path).path)):
            self.wfile.write(data[: len(data) // 2])
            return self._hang_up()
        self.wfile.write(data)
        return None

    def _cuts(self, path: str) -> bool:
        with self.hub.cutting:  # each cut is of one answer
            for part, times in self.hub.cut.items():
                if part in path and times > 0:
                    self.hub.cut[part] -= 1
                    return True
        return False

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True


def _oid(data: bytes, lfs: bool) -> str:
    """What the Hub calls a file's content: its SHA-256 in LFS, else git's name for the blob."""
    return hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
