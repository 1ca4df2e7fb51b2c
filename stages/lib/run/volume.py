"""What shared volumes do with files: flushing, modes, removal, room, and hiccups that pass."""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from stages.lib.run import failpoints, watchdog
from stages.lib.run.exits import HICCUP, CannotWrite, StageError, TryAgain, from_os_error
from stages.lib.run.progress import say

# What mounts say that know no fsync; close is then all that they promise.
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
BLOCK = 4 << 20
RETRY_SECONDS = (0.5, 2.0)
LISTINGS = 3
Found = TypeVar("Found")


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


def patiently(attempt: Callable[[], Found]) -> Found:
    """Do what a hiccup of the volume may cut short, and again after a while; for what begins anew each time.

    Raises:
        OSError, TryAgain: the volume failed every time.
    """
    for seconds in RETRY_SECONDS:
        try:
            return attempt()
        except (OSError, TryAgain) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in HICCUP:
                raise
            say(f"the volume failed at {cause.filename}: {cause.strerror}; trying again")
        time.sleep(seconds)
    return attempt()


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
            watchdog.alive()
            failpoints.reach("publish.block")
        self._hashed.update(block)
        self._size += len(block)

    def entry(self) -> dict[str, Any]:
        """Size and hash as a manifest has them."""
        return {"bytes": self._size, "sha256": self._hashed.hexdigest()}


def _blocks(file: Any, suffix: str, size: int) -> Iterator[bytes]:
    while block := file.read(size):
        yield block


def copy(
    source: Path, target: Path, blocks: Callable[[Any, str, int], Iterator[bytes]] = _blocks
) -> dict[str, Any]:
    """Copy a file in sequence to a new one; its size and hash.

    Args:
        blocks: of an open file with a suffix, of about so many bytes, as they are to be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, stream(target) as write:
        for block in blocks(read, source.suffix, BLOCK):
            write.write(block)
    return write.entry()


@contextlib.contextmanager
def stream(target: Path) -> Iterator[Stream]:
    """A new file, flushed once it is whole."""
    with _new(target) as file:
        yield Stream(target, file)
        with writing(target):
            flush(file)
    set_mode(target)


def write(target: Path, content: bytes, replace: bool = False) -> None:
    """Write a small file; a new one, unless it may `replace` another."""
    if replace:
        target.unlink(missing_ok=True)  # a bucket's mount may show again what was removed
    with _new(target) as file:
        file.write(content)
        flush(file)
    set_mode(target)


@contextlib.contextmanager
def _new(target: Path) -> Iterator[Any]:
    """An open file that was not there, and is not if writing it fails."""
    opened = target.open("xb")
    try:
        with opened:
            yield opened
    except (OSError, StageError):
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        raise


def flush(file: Any) -> None:
    """Have an open file's contents on the disk."""
    file.flush()
    sync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
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


def _mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def remove(folder: Path, last: str) -> None:
    """Remove a folder, and the file `last` in it behind all others.

    Raises:
        OSError: something in it cannot be removed.
    """
    for left in reversed(range(LISTINGS)):
        with contextlib.suppress(
            FileNotFoundError
        ):  # an object store's folder goes with its last file
            for path in folder.iterdir():
                if path.name != last:
                    _drop(path)
            (folder / last).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:  # a listing may be older than what another node has added
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not left:
                raise
        else:
            return


def _drop(path: Path) -> None:
    def gone(_: Any, __: str, info: Any) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=gone)
    else:
        path.unlink(missing_ok=True)


def size(folder: Path) -> int:
    """Bytes in the files below a folder, if there is one."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def amount(count: int) -> str:
    """Bytes for people to read."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} bytes"


def nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what cannot be finished.

    Args:
        folder: is there, or will be in the nearest folder above it that is there.

    Raises:
        CannotWrite: its disk has less than `needed` bytes free.
    """
    disk = shutil.disk_usage(nearest(folder))
    if disk.total and disk.free < needed:  # a mount that cannot tell says 0 of 0
        raise CannotWrite(
            f"{folder} has {amount(disk.free)} free, {amount(needed)} are needed; make room, or choose "
            "another RUN_DIR"
        )


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""

    def attempt() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(attempt)
