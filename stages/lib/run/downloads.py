"""The hub's large files, into its own cache: a part stays, goes on where it was cut, and is hashed in passing.

`huggingface_hub` goes on after a cut within a process, but drops the part when the process ends, and counts the
bytes without looking at them. What is not large is left to it.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from errno import EWOULDBLOCK
from pathlib import Path

from stages.lib.run import failpoints, patience, preemption
from stages.lib.run.exits import BadData
from stages.lib.run.progress import Progress, say

AT_ONCE = 4  # files
BLOCK = 1 << 20
CUTS = 5  # in a row, without a byte between them
SMALL = 64 << 20  # bytes that are hashed in no time


@dataclass(frozen=True)
class Large:
    """A file of the hub: its address, its place in the cache, its size and sha256."""

    url: str
    blob: Path
    size: int
    sha256: str

    @property
    def part(self) -> Path:
        """Where it grows. Older versions of `huggingface_hub` go on with a file of this name, too."""
        return self.blob.with_name(f"{self.sha256}.incomplete")


def storage(repository: str, kind: str) -> Path:
    """The folder of a repository in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type=kind)
    return Path(constants.HF_HUB_CACHE).expanduser() / folder


def bring(repository: str, kind: str, revision: str | None, patterns: list[str]) -> None:
    """Bring the large files of a repository that match some patterns, and are not there, into the cache.

    Args:
        kind: `model` or `dataset`.

    Raises:
        BadData: what arrives is twice not what the hub says it is. And the hub's and network's own errors.
    """
    missing = [
        large for large in _listed(repository, kind, revision, patterns) if not _there(large)
    ]
    if not missing:
        return
    for large in missing:
        large.blob.parent.mkdir(parents=True, exist_ok=True)
    megabytes = sum(large.size for large in missing) >> 20
    given_up, done = threading.Event(), dict.fromkeys(missing, 0)
    with (
        Progress(megabytes, "MB", name="downloading") as progress,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        futures = [pool.submit(_bring, large, given_up, done) for large in missing]
        try:
            _follow(futures, done, progress)
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _follow(futures: list["Future[None]"], done: dict[Large, int], progress: Progress) -> None:
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=0.5, return_when="FIRST_EXCEPTION")
        preemption.check()
        for future in ended:
            future.result()
        progress.update(sum(done.values()) >> 20)


def _listed(repository: str, kind: str, revision: str | None, patterns: list[str]) -> list[Large]:
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.utils import filter_repo_objects

    api, folder = HfApi(), storage(repository, kind)
    branch = revision or constants.DEFAULT_REVISION
    commit = api.repo_info(repository, repo_type=kind, revision=branch).sha
    tree = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind)
    entries = [entry for entry in tree if getattr(entry, "lfs", None)]
    wanted = filter_repo_objects(entries, allow_patterns=patterns, key=lambda entry: entry.path)
    limit = getattr(
        constants, "MAX_HTTP_DOWNLOAD_SIZE", 50 * 1000**3
    )  # larger ones go by Xet alone
    return [
        Large(
            hf_hub_url(repository, entry.path, repo_type=kind, revision=commit),
            folder / "blobs" / entry.lfs.sha256, entry.lfs.size, entry.lfs.sha256,
        )
        for entry in wanted if entry.lfs.size <= limit
    ]  # fmt: skip


def _there(large: Large) -> bool:
    with contextlib.suppress(FileNotFoundError):
        size = large.blob.stat().st_size
        if size == large.size:
            return True
        say(f"{large.blob} has {size} bytes instead of {large.size}: fetching it again")
        large.blob.unlink()
    return False


def _bring(large: Large, given_up: threading.Event, done: dict[Large, int]) -> None:
    """Download a file, once more from its beginning if it is not what it should be."""
    with _alone(large.part):
        for _ in range(2):
            if large.blob.exists():  # another process has brought it
                return
            with _Part(large, given_up, done) as part:
                _receive(large, part)
            if part.hashed.hexdigest() == large.sha256:
                failpoints.reach("download.whole")
                large.part.replace(large.blob)
                return
            large.part.unlink()
            say(f"{large.url} arrived damaged: fetching it again")
    raise BadData(
        f"{large.url} arrived twice with another sha256 than the hub says; look at what stands between, such "
        "as HTTPS_PROXY or HF_ENDPOINT"
    )


class _Part:
    """A file that grows, with what it has already. A context that closes it, and leaves it."""

    def __init__(self, large: Large, given_up: threading.Event, done: dict[Large, int]) -> None:
        self.large, self.given_up, self.done = large, given_up, done
        self.hashed, self.size = hashlib.sha256(), 0

    def __enter__(self) -> "_Part":
        self.file = self.large.part.open("a+b", buffering=0)
        if self.file.seek(0, os.SEEK_END) > self.large.size:
            self.file.truncate(0)
        self.file.seek(0)
        while block := self.file.read(BLOCK):
            self._count(block)
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self._count(block)
        failpoints.reach("download.block")

    def restart(self) -> None:
        self.file.truncate(0)
        self.hashed, self.size = hashlib.sha256(), 0

    def _count(self, block: bytes) -> None:
        preemption.check()
        if self.given_up.is_set():  # another file failed
            raise InterruptedError
        self.hashed.update(block)
        self.size += len(block)
        self.done[self.large] = self.size


def _receive(large: Large, part: _Part) -> None:
    """Ask for what a part lacks, until it has it all."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    cuts = 0
    while part.size < large.size:
        before = part.size
        headers = build_hf_headers() | ({"Range": f"bytes={before}-"} if before else {})
        try:
            with http_stream_backoff(
                "GET", large.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True, retry_on_exceptions=(),
            ) as response:  # fmt: skip
                hf_raise_for_status(response)
                if (
                    before and response.status_code == 200
                ):  # it was not asked by somebody in between
                    part.restart()
                for block in response.iter_bytes():
                    part.write(block)
        except patience.network_errors():
            cuts = 0 if part.size > before else cuts + 1
            if cuts == CUTS:
                raise
            patience.pause(1.0)


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Keep other processes from writing to a part, where the file system knows locks."""
    with part.with_suffix(".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != EWOULDBLOCK:
                    break
                patience.pause(0.5)
            else:
                break
        yield


def damaged(folder: Path, deep: bool) -> list[Path]:
    """The files of a snapshot whose contents are not what their names in the cache say.

    Args:
        deep: hash the large ones too, which takes a second or two for a gigabyte.
    """
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        blob = path.resolve()
        if not blob.is_file():
            continue
        looked_at = deep or blob.stat().st_size <= SMALL
        if looked_at and hash_of(blob, blob.name) not in (blob.name, None):
            found.append(path)
    return found


def hash_of(path: Path, like: str) -> str | None:
    """The hash of a file in the kind of another one: a sha256, or git's own; None where that is neither."""
    if len(like) not in (40, 64):
        return None
    size = path.stat().st_size
    hashed = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            preemption.check()
            hashed.update(block)
    return hashed.hexdigest()


def discard(path: Path) -> None:
    """Remove a file of a snapshot from the cache, so that it is fetched anew."""
    while True:
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target
