"""A stand-in for the Hugging Face Hub: enough of its HTTP API to create repositories, commit to them and read them.

In: what `huggingface_hub` sends to `endpoint=server.url`. Out: repositories in memory, to look at in a test:
`server.repos["datasets/user/name"].files` maps paths to bytes, `.commits` lists (message, commit id). Standard library
only, so that the tests need no network and no account. All uploads are asked for as "regular": no LFS, no Xet.

    with HubServer() as server:
        HfApi(endpoint=server.url, token=server.token).create_repo("user/name")
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """One repository: its files at the newest commit, every commit, and the files of each commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, message: str) -> str:
        """Records the present files under an id that depends on content and history."""
        content = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(self.files.items())]
        sha = hashlib.sha1(json.dumps([content, message, self.commits]).encode()).hexdigest()
        self.commits.append((message, sha))
        self.snapshots[sha] = dict(self.files)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """(commit id, files) of a branch name (the newest commit) or a commit id."""
        sha = revision if revision in self.snapshots else self.commits[-1][1]
        return sha, self.snapshots[sha]


class HubServer:
    """The server, on a free local port, as a context manager.

    `refuse[path]` (a part of a path, like "/commit/") makes requests to it fail with that status (and a message that
    quotes the token, as a careless server might). `requests` lists
    "METHOD path" of everything asked.
    """

    token = "hf_testtokenofnoaccount"
    user = "user"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.refuse: dict[str, int] = {}
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


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """No lines on stderr: tests look at it."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, status in self.hub.refuse.items():
            if part in path:
                return self._json({"error": f"refused: {self.headers.get('Authorization')}"}, status)
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json({"error": "Invalid credentials"}, 401)
        for pattern, answer in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate_yaml),
            (r"/api/(?P<repo>\w+s/[^/]+/[^/]+)/preupload/[^/]+", self._preupload),
            (r"/api/(?P<repo>\w+s/[^/]+/[^/]+)/commit/[^/]+", self._commit),
            (r"/api/(?P<repo>\w+s/[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/.*)?", self._tree),
            (r"/api/(?P<repo>\w+s/[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", self._info),
            (r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                named = match.groupdict()
                if "repo" in named:
                    name = named["repo"] if named["repo"].count("/") == 2 else f"models/{named['repo']}"
                    if name not in self.hub.repos:
                        return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                    named["repo"] = name
                return answer(body, **named)
        return self._json({"error": f"no such address: {path}"}, 404)

    do_GET = do_HEAD = do_POST = _handle

    # ------------------------------------------------------------------------------------------ the addresses

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

    def _validate_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str) -> None:
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
        self._json({"files": files})

    def _commit(self, body: bytes, repo: str) -> None:
        target, message = self.hub.repos[repo], ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                target.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del target.files[value["path"]]
            else:
                return self._json({"error": f"unsupported operation {line['key']}"}, 400)
        sha = target.commit(message)
        return self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.repos[repo].at(revision)[1]
        entries = [
            {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files.items()
        ]
        self._json(entries)

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        target = self.hub.repos[repo]
        sha, files = target.at(revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self._json(
            {"id": repo.split("/", 1)[1], "sha": sha, "private": target.private, "siblings": siblings, "tags": []}
        )

    def _resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        sha, files = self.hub.repos[repo].at(revision)
        if file not in files:
            return self._json(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            )
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return self._send(files[file], 200, {"X-Repo-Commit": sha, "ETag": etag})

    # ------------------------------------------------------------------------------------------ the answers

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
