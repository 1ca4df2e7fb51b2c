"""Local scratch: folders of unfinished work, and which of them a dead process has left.

Each is locked by its process as long as it lives, and its name begins with what Linux calls this boot: on the
same boot a free lock says that nobody is left, in whatever container he was. Elsewhere, as on a shared disk or
after a restart, a folder in which nothing has changed for a day is taken for left.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from stages.lib.run import environment, failpoints, lease
from stages.lib.run.artifact import writing

PREFIX = "lora-stages-"
HOME = "home-"  # a home of `environment.have_home`, which is kept from one process to the next
IDLE_SECONDS = 24 * 3600.0


def _mark() -> str:
    return f"{PREFIX}{lease.boot()[:8]}-"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A scratch folder of this process, which goes away at the end.

    Raises:
        CannotWrite: there is no place for it.
    """
    parent = environment.scratch_parent()
    with writing(parent):
        failpoints.reach("scratch")
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=_mark(), dir=parent, ignore_cleanup_errors=True)
    with made as name:
        handle = os.open(name, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some mounts know no locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)
        finally:
            os.close(handle)


def left() -> list[tuple[Path, str]]:
    """The folders in SCRATCH_DIR whose process is gone, each with the reason to think so."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(environment.scratch_parent().glob(f"{PREFIX}*")):
            with contextlib.suppress(OSError), _locked(path) as reason:
                if reason:
                    found.append((path, reason))
    return found


def remove(path: Path) -> bool:
    """Remove such a folder, unless it is in use by now; whether it was removed.

    Raises:
        OSError: something in it cannot be removed.
    """
    with _locked(path) as reason:
        if reason:
            shutil.rmtree(path)  # follows no link
    return bool(reason)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[str]:
    """Why a folder is nobody's, while it is locked so that it stays so; nothing where it may be somebody's."""
    if path.name.startswith(PREFIX + HOME):
        yield ""
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _reason(path, handle)
    finally:
        os.close(handle)


def _reason(path: Path, handle: int) -> str:
    status = os.fstat(handle)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return ""
    locks = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError:  # as some mounts say that know no locks
        locks = False
    if locks and lease.boot() and path.name.startswith(_mark()):
        return "the process that made it is gone"
    idle = time.time() - _newest(path)
    return f"nothing in it has changed for {idle / 3600:.0f} hours" if idle > IDLE_SECONDS else ""


def _newest(folder: Path) -> float:
    """When something in a folder changed last."""
    times = [folder.lstat().st_mtime]
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                times.append(os.lstat(os.path.join(parent, name)).st_mtime)
    return max(times)
