"""A small Hugging Face hub on 127.0.0.1, for `HF_ENDPOINT`: real HTTP, folders from disk, the hub's own errors.

It speaks what `huggingface_hub.snapshot_download` asks: a revision's commit, its tree, and HEAD and GET of
files; a weights file is redirected to another host, as the hub does, which must not see the token.
"""

import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

INVALID = "Invalid credentials in Authorization header"
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/]+)"
)
FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)
LARGE = re.compile(r"/large/(?P<sha256>[0-9a-f]{64})")


@dataclass
class Repository:
    """What the hub holds under one id.

    Attributes:
        commits: folders by commit. main: the newest commit.
        readers: the tokens that may read it; None where everybody may.
        gated: whether others see that it is there, and may ask for access; else it is private.
        closed: whether a gate also stands before the list of its files.
    """

    commits: dict[str, Path] = field(default_factory=dict)
    main: str = ""
    readers: set[str] | None = None
    gated: bool = True
    closed: bool = False


@dataclass
class Answer:
    """A response; an error has a code that the client tells it by."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Hub(http.server.ThreadingHTTPServer):
    """`with Hub() as hub:` serves until the end; `hub.url` is for `HF_ENDPOINT`.

    Attributes:
        tokens: those that belong to an account. requests: (method, path, token, status) of each one so far.
        failing: by request paths (a regular expression), how many more times each answers 503; -1 for ever.
        mood: `well`, `hang-up` (closes connections without an answer) or `portal` (a page for every address).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: set[str] = set()
        self.requests: list[tuple[str, str, str | None, int]] = []
        self.failing: dict[str, int] = {}
        self.mood = "well"
        self.large: dict[str, Path] = {}

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Serve no more; the port is closed. May be called twice."""
        self.shutdown()
        self.server_close()

    def push(self, kind: str, name: str, folder: Path) -> str:
        """Make a folder the newest commit of a repository; the commit.

        Args:
            kind: `models` or `datasets`. name: `owner/name`. folder: stays where it is, and must not change.
        """
        hashed = hashlib.sha1()
        for path in files(folder):
            hashed.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.main = hashed.hexdigest()
        repository.commits[repository.main] = folder
        return repository.main

    def answer(self, method: str, path: str, token: str | None) -> Answer:
        """What the hub says to a request."""
        for pattern, times in self.failing.items():
            if times and re.search(pattern, path):
                self.failing[pattern] = times - 1
                return error(503, None, "Service Unavailable")
        if self.mood == "portal":
            return Answer(
                200, b"<html>Accept the terms of this network</html>", {"Content-Type": "text/html"}
            )
        if found := LARGE.fullmatch(path):
            return Answer(200, self.large[found["sha256"]].read_bytes())
        if token is not None and token not in self.tokens:
            return error(401, None, INVALID)
        if found := API.fullmatch(path):
            return self._api(found, token)
        if found := FILE.fullmatch(path):
            return self._file(found, token)
        return error(404, None, f"this hub does not know {method} {path}")

    def _api(self, asked: re.Match[str], token: str | None) -> Answer:
        found = self._find(asked["kind"], asked["id"], asked["revision"], token, listing=True)
        if isinstance(found, Answer):
            return found
        commit, folder = found
        entries = [entry(folder, path) for path in files(folder)]
        if asked["what"] == "tree":
            return said(entries)
        siblings = [{"rfilename": e["path"]} for e in entries]
        about = {
            "id": asked["id"],
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "disabled": False,
        }
        return said(about | {"tags": [], "downloads": 0, "likes": 0})

    def _file(self, asked: re.Match[str], token: str | None) -> Answer:
        kind = "datasets" if asked["kind"] else "models"
        found = self._find(kind, asked["id"], asked["revision"], token, listing=False)
        if isinstance(found, Answer):
            return found
        commit, folder = found
        path = folder / asked["file"]
        if path not in files(folder):
            return error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        is_large = path.suffix == ".safetensors"
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid(path, is_large)}"'}
        if not is_large:
            return Answer(200, path.read_bytes(), headers)
        self.large[oid(path, True)] = path
        linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": headers["ETag"]}
        place = f"http://localhost:{self.server_port}/large/{oid(path, True)}"
        return Answer(302, b"", headers | linked | {"Location": place})

    def _find(
        self, kind: str, name: str, revision: str, token: str | None, listing: bool
    ) -> tuple[str, Path] | Answer:
        repository = self.repositories.get((kind, name))
        may_read = repository and (repository.readers is None or token in repository.readers)
        if repository is None or not (may_read or repository.gated):
            # To whom it does not know, the hub does not say whether a private repository exists.
            return error(404 if token else 401, "RepoNotFound", "Repository not found")
        if not may_read and (repository.closed or not listing):
            return error(
                403 if token else 401, "GatedRepo", f"Access to model {name} is restricted."
            )
        commit = repository.main if revision == "main" else revision
        if commit not in repository.commits:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]


class Requests(http.server.BaseHTTPRequestHandler):
    """One connection to the hub."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        header = self.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        if self.server.mood == "hang-up":
            self.server.requests.append((self.command, path, token, 0))
            self.close_connection = True
            return
        answer = self.server.answer(self.command, path, token)
        body = answer.body
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span and answer.status == 200:
            answer.status, body = 206, body[int(span[1]) :]
        self.server.requests.append((self.command, path, token, answer.status))
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `hub.requests` instead."""


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def oid(path: Path, is_large: bool) -> str:
    """The name that git gives a file's contents, or for a large one its sha256."""
    content = path.read_bytes()
    if is_large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def entry(folder: Path, path: Path) -> dict[str, Any]:
    """A file as the tree lists it."""
    size = path.stat().st_size
    found = {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": size,
        "oid": oid(path, False),
    }
    if path.suffix == ".safetensors":
        found["lfs"] = {"oid": oid(path, True), "size": size, "pointerSize": 134}
    return found


def said(content: Any) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error(
    status: int, code: str | None, message: str, headers: dict[str, str] | None = None
) -> Answer:
    told = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), told | (headers or {}))
