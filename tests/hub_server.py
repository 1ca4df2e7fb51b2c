"""A small Hugging Face hub on 127.0.0.1, for `HF_ENDPOINT`: real HTTP, folders from disk, the hub's own errors.

It speaks what `huggingface_hub.snapshot_download` asks: a revision's commit, its tree, and HEAD and GET of
files; a weights file is redirected to another host, as the hub does, which must not see the token. And what
`create_repo` and `create_commit` ask, large files by git-lfs.
"""

import base64
import hashlib
import http.server
import json
import re
import shutil
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

INVALID = "Invalid credentials in Authorization header"
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
WRITE = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")
BATCH = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
WEIGHTS = (".safetensors", ".gguf")
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
        private: whether it says so. writers: the tokens that may write to it.
    """

    commits: dict[str, Path] = field(default_factory=dict)
    main: str = ""
    readers: set[str] | None = None
    gated: bool = True
    closed: bool = False
    private: bool = False
    writers: set[str] = field(default_factory=set)


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
        owners: the tokens that may make repositories, by owner. damaged: whether uploads lose a byte.
        received: what was sent to make repositories and commits, in order.
        only_public: whether what is made is public whatever was asked.
        busy: the status and headers of an answer by which it is failing.
        cuts: how many more times a large file is cut off after nine tenths of what was asked; -1 for ever.
        spoilt: how many more times a large file is sent with another last byte. dripping: seconds for a block.
        ranges: where each request for a large file began.
    """

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server_port}"
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.busy: tuple[int, dict[str, str]] = (503, {})
        self.cuts = self.spoilt = 0
        self.dripping = 0.0
        self.ranges: list[int] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: set[str] = set()
        self.requests: list[tuple[str, str, str | None, int]] = []
        self.failing: dict[str, int] = {}
        self.mood = "well"
        self.large: dict[str, Path] = {}
        self.owners: dict[str, set[str]] = {}
        self.damaged = self.only_public = False
        self.received: list[dict[str, Any]] = []
        self.store = tempfile.TemporaryDirectory()

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
        self.store.cleanup()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody who did not wait for the end."""

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

    def answer(self, method: str, path: str, token: str | None, sent: bytes = b"") -> Answer:
        """What the hub says to a request."""
        for pattern, times in self.failing.items():
            if times and re.search(pattern, path):
                self.failing[pattern] = times - 1
                return error(self.busy[0], None, "Service Unavailable", self.busy[1])
        if self.mood == "portal":
            return Answer(
                200, b"<html>Accept the terms of this network</html>", {"Content-Type": "text/html"}
            )
        if method == "PUT" and (found := LARGE.fullmatch(path)):
            kept = Path(self.store.name) / found["sha256"]
            kept.write_bytes(sent[:-1] + b"?" if self.damaged else sent)
            self.large[found["sha256"]] = kept
            return Answer()
        if found := LARGE.fullmatch(path):
            content = self.large[found["sha256"]].read_bytes()
            if self.spoilt and method == "GET":
                self.spoilt -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            return Answer(200, content)
        if token is not None and token not in self.tokens:
            return error(401, None, INVALID)
        if method == "POST":
            return self._write(path, token, sent)
        if found := API.fullmatch(path):
            return self._api(found, token)
        if found := FILE.fullmatch(path):
            return self._file(found, token)
        return error(404, None, f"this hub does not know {method} {path}")

    def _api(self, asked: re.Match[str], token: str | None) -> Answer:
        revision = asked["revision"] or "main"
        found = self._find(asked["kind"], asked["id"], revision, token, listing=True)
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
            "private": self.repositories[asked["kind"], asked["id"]].private,
            "disabled": False,
        }
        return said(about | {"tags": [], "downloads": 0, "likes": 0})

    def _write(self, path: str, token: str | None, sent: bytes) -> Answer:
        """What makes repositories and commits."""
        if path == "/api/validate-yaml":
            return said({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(sent), token)
        found = WRITE.fullmatch(path) or BATCH.fullmatch(path)
        if not found:
            return error(404, None, f"this hub does not know POST {path}")
        repository = self.repositories.get(("models", found["id"]))
        if repository is None:
            return error(404, "RepoNotFound", "Repository not found")
        if token not in repository.writers:
            return error(403, None, "you do not have the right to write here")
        if BATCH.fullmatch(path):
            return said({"objects": [self._wanted(entry) for entry in json.loads(sent)["objects"]]})
        if found["what"] == "preupload":
            return said({"files": [self._mode(file) for file in json.loads(sent)["files"]]})
        lines = [json.loads(line) for line in sent.splitlines()]
        return self._commit(found["id"], repository, lines)

    def _create(self, asked: dict[str, Any], token: str | None) -> Answer:
        self.received.append(asked)
        name = f"{asked['organization']}/{asked['name']}"
        if token is None:
            return error(401, None, "Invalid username or password.")
        if token not in self.owners.get(asked["organization"], ()):
            return error(
                403, None, "You don't have the rights to create a model under this namespace"
            )
        if ("models", name) in self.repositories:
            return error(409, None, "You already created this model repo")
        empty = Path(self.store.name) / f"empty-{len(self.received)}"
        empty.mkdir()
        self.push("models", name, empty)
        repository = self.repositories["models", name]
        repository.private = asked.get("visibility") == "private" and not self.only_public
        repository.gated = not repository.private
        repository.readers = {token} if repository.private else None
        repository.writers = {token}
        return said({"url": f"{self.url}/{name}", "name": name})

    def _wanted(self, entry: dict[str, Any]) -> dict[str, Any]:
        """How a large file is to be sent, unless it is here."""
        if entry["oid"] in self.large:
            return entry
        place = f"http://localhost:{self.server_port}/large/{entry['oid']}"
        return entry | {"actions": {"upload": {"href": place}}}

    @staticmethod
    def _mode(file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(WEIGHTS) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> Answer:
        folder = Path(self.store.name) / f"commit-{len(self.received)}"
        shutil.copytree(repository.commits[repository.main], folder)
        self.received += lines
        for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            target = folder / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if "oid" in value:
                shutil.copy(self.large[value["oid"]], target)
            else:
                target.write_bytes(base64.b64decode(value["content"]))
        commit = self.push("models", name, folder)
        place = f"{self.url}/{name}/commit/{commit}"
        return said({"commitUrl": place, "commitOid": commit, "pullRequestUrl": None})

    def _file(self, asked: re.Match[str], token: str | None) -> Answer:
        kind = "datasets" if asked["kind"] else "models"
        found = self._find(kind, asked["id"], asked["revision"], token, listing=False)
        if isinstance(found, Answer):
            return found
        commit, folder = found
        path = folder / asked["file"]
        if path not in files(folder):
            return error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        is_large = path.suffix in WEIGHTS
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

    def do_POST(self) -> None:
        self._respond()

    def do_PUT(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        header = self.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        if self.server.mood == "hang-up":
            self.server.requests.append((self.command, path, token, 0))
            self.close_connection = True
            return
        answer = self.server.answer(self.command, path, token, self._sent())
        body = answer.body
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span and answer.status == 200:
            answer.status, body = 206, body[int(span[1]) :]
        self.server.requests.append((self.command, path, token, answer.status))
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and LARGE.fullmatch(path):
            self._send_large(body, int(span[1]) if span else 0)
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _send_large(self, body: bytes, start: int) -> None:
        self.server.ranges.append(start)
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) * 9 // 10]
            self.close_connection = True
        while body and self.server.dripping:
            self.wfile.write(body[: 1 << 20])
            body = body[1 << 20 :]
            time.sleep(self.server.dripping)
        self.wfile.write(body)

    def _sent(self) -> bytes:
        """The body of the request, chunked or not."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

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
    if path.suffix in WEIGHTS:
        found["lfs"] = {"oid": oid(path, True), "size": size, "pointerSize": 134}
    return found


def said(content: Any) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error(
    status: int, code: str | None, message: str, headers: dict[str, str] | None = None
) -> Answer:
    told = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), told | (headers or {}))
