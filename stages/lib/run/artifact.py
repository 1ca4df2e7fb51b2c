"""Artifacts: folders that are whole or absent, with a manifest that says what made them.

Libraries write to local scratch; `publish` copies each file in sequence into the run directory, hashing as it
goes, and writes `manifest.json` last. No rename is needed, so it holds on ext4, NFS, Lustre and object-store
mounts alike. A folder without a valid manifest is debris.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages.lib.run import failpoints, preemption
from stages.lib.run.exits import BadData, CannotWrite, from_os_error

MANIFEST = "manifest.json"
SCHEMA = 1
BLOCK = 4 << 20
# What mounts say that know no fsync; close is then all that they promise.
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 over the names, sizes and hashes of the files: the identity of the contents."""
        return hashlib.sha256(
            json.dumps(self.manifest["files"], sort_keys=True).encode()
        ).hexdigest()

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured."""
        return dict(self.manifest["metrics"])

    def setting(self, variable: str) -> Any:
        """The value that a setting had when this was made."""
        return self.manifest["settings"][variable]["value"]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into the sentence and exit code that it deserves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        known = from_os_error(error, writing=True)
        if known is None:
            raise
        raise known from error


class Draft:
    """An artifact that grows file by file in its place, and has no manifest until it is whole.

    As a context it retires what was not finished: a full disk is not helped by half an artifact.

    Args:
        target: its folder; what was there is retired.
    """

    def __init__(self, target: Path) -> None:
        self.path = target
        self._entries: dict[str, dict[str, Any]] = {}
        self._whole: dict[str, Any] | None = None

    def __enter__(self) -> "Draft":
        with writing(self.path):
            failpoints.reach("publish.begin")
            retire(self.path)
            self.path.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._whole is None:
            with contextlib.suppress(OSError):
                retire(self.path)

    def take(self, source: Path, name: str | None = None) -> None:
        """Copy a finished file into it, under its own name or another.

        Raises:
            CannotWrite: the disk is full or the folder cannot be written.
        """
        name = name or source.name
        with writing(self.path):
            failpoints.reach("publish.file")
            self._entries[name] = _copy(source, self.path / name)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator["Stream"]:
        """A new file of it, for what is too large to lie finished elsewhere; it is in it once it is closed."""
        with _stream(self.path / name) as stream:
            yield stream
        self._entries[name] = stream.entry()

    def move(self, source: Path) -> None:
        """As `take`; the source is gone then."""
        self.take(source)
        source.unlink()

    def finish(self, manifest: dict[str, Any]) -> Artifact:
        """Write its manifest, with the sizes and hashes of its files: now it is there."""
        whole = {"schema": SCHEMA} | manifest | {"files": dict(sorted(self._entries.items()))}
        content = json.dumps(whole, indent=1, allow_nan=False).encode() + b"\n"
        with preemption.deferred(), writing(self.path):
            failpoints.reach("publish.manifest")
            write(self.path / MANIFEST, content)
            failpoints.reach("publish.written")
            _flush_folder(self.path)
            failpoints.reach("publish.done")
            self._whole = whole
        return Artifact(self.path, whole)


class Stream:
    """A file that is written in sequence, and hashed in passing."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._hashed, self._size = hashlib.sha256(), 0

    def write(self, block: bytes | memoryview) -> None:
        """Append some bytes.

        Raises:
            CannotWrite: the disk is full.
        """
        with writing(self._path):
            self._file.write(block)
            failpoints.reach("publish.block")
        self._hashed.update(block)
        self._size += len(block)

    def entry(self) -> dict[str, Any]:
        """Size and hash as a manifest has them."""
        return {"bytes": self._size, "sha256": self._hashed.hexdigest()}


def publish(source: Path, target: Path, manifest: dict[str, Any]) -> Artifact:
    """Copy the finished files of `source` to `target`; `manifest` gets their sizes and hashes, and goes last.

    Raises:
        CannotWrite: the disk is full or `target` cannot be written; nothing is left of it.
    """
    json.dumps(manifest, allow_nan=False)  # fails here, and not when the old one is gone
    with preemption.deferred(), Draft(target) as draft:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            draft.take(path, path.relative_to(source).as_posix())
        return draft.finish(manifest)


def check_room(folder: Path, size: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        CannotWrite: the disk of a folder has less than `size` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CannotWrite(
            f"{folder} has {free / 2**30:.1f} GiB free, {size / 2**30:.1f} are needed; free some, or choose "
            "another RUN_DIR"
        )


def retire(target: Path) -> None:
    """Remove an artifact: its manifest first, so that what remains half-way is debris."""
    if target.is_dir():
        (target / MANIFEST).unlink(missing_ok=True)
        failpoints.reach("retire.manifest")
        shutil.rmtree(target)


def _mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _copy(source: Path, target: Path) -> dict[str, Any]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, _stream(target) as write:
        while block := read.read(BLOCK):
            write.write(block)
    return write.entry()


@contextlib.contextmanager
def _stream(target: Path) -> Iterator[Stream]:
    with target.open("xb") as file:
        yield Stream(target, file)
        with writing(target):
            _flush(file)
    set_mode(target)


def write(target: Path, content: bytes) -> None:
    """Write a new small file."""
    with target.open("xb") as write:
        write.write(content)
        _flush(write)
    set_mode(target)


def _flush(file: Any) -> None:
    file.flush()
    sync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def sync(handle: int) -> None:
    """Have what was written to an open file on the disk, where the mount can say so."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:  # a failed write shows here, and only once
            raise


def set_mode(path: Path) -> None:
    """Give a file the mode that the umask says."""
    # safetensors creates 0600; the next stage may run under another UID.
    with contextlib.suppress(PermissionError, NotImplementedError):
        path.chmod(_mode())


def load(folder: Path, deep: bool = False) -> Artifact | None:
    """The artifact in `folder`, or None where there is none; `deep` hashes every file again.

    Raises:
        BadData: a file is missing, has another size or hash, or a name leaves the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        files = dict(manifest["files"])
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError):
        return None  # cut off while it was written: debris
    if schema != SCHEMA:
        raise BadData(
            f"{path} has schema {schema}, this version reads {SCHEMA}; run its stage again with --force"
        )
    for name, entry in files.items():
        _check(folder, name, entry, deep)
    return Artifact(folder, manifest)


def _check(folder: Path, name: str, entry: dict[str, Any], deep: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or (folder / name).is_symlink():
        raise BadData(f"{folder / MANIFEST} names {name!r}, which leaves the artifact")
    path = folder / name
    remedy = "run the stage that makes it again with --force"
    if not path.is_file():
        raise BadData(f"{path} is missing from its artifact; {remedy}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise BadData(
            f"{path} has {size} bytes, its manifest says {entry['bytes']}: it is corrupt; {remedy}"
        )
    if deep and sha256(path) != entry["sha256"]:
        raise BadData(
            f"{path} does not have the sha256 that its manifest says: it is corrupt; {remedy}"
        )


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
