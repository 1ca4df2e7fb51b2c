"""What `gc` may remove: debris, and checkpoints that no command needs; never a verified artifact.

What a stopped command goes on from is no debris: lines and parts that it has finished, shards of rows, the
newest checkpoints. Nothing is reached through a link, and nothing is removed that no stage made.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.run import artifact, checkpoints, fetched, growing, lease, manifests, scratch
from stages.lib.run.artifact import DRAFT, MANIFEST
from stages.lib.run.attempts import FOLDER as ATTEMPTS
from stages.lib.run.exits import BadData, CannotWrite
from stages.lib.run.rundir import MADE_BY

SHARDS = "data-shards"  # of rows, until data/ is there
CUT_OFF = "was cut off while it was written or removed"


@dataclass(frozen=True)
class Needless:
    """Something that may go.

    Attributes:
        kind: debris, checkpoint or scratch. bytes: that it takes on its disk.
    """

    path: Path
    kind: str
    reason: str
    bytes: int

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"path": str(self.path)} | {
            name: getattr(self, name) for name in ("kind", "reason", "bytes")
        }


def in_run(run_dir: Path, deep: bool = False) -> list[Needless]:
    """What may go of a run that nobody holds.

    Args:
        deep: hash what checkpoints are given up for.

    Raises:
        OSError: it cannot be looked at.
    """
    found = [("debris", path, reason) for path, reason in _debris(run_dir)]
    if not (run_dir / "checkpoints").is_symlink():
        found += [("checkpoint", *each) for each in checkpoints.needless(run_dir, deep)]
    return [Needless(path, kind, reason, size(path)) for kind, path, reason in found]


def in_scratch() -> list[Needless]:
    """What dead processes have left in SCRATCH_DIR."""
    return [Needless(path, "scratch", reason, size(path)) for path, reason in scratch.left()]


def _debris(run: Path) -> Iterator[tuple[Path, str]]:
    for name in (*MADE_BY, fetched.PINS):
        if is_debris(run / name) and not _goes_on(run / name):
            yield run / name, CUT_OFF
        parts = run / f"{name}.parts"
        if _is_whole(run / name) and _is_begun(parts):
            yield parts, f"was not removed when {name}/ was published"
    for path in _folders(run / SHARDS):
        if is_debris(path):
            yield path, CUT_OFF
        elif _is_whole(path) and _is_whole(run / "data"):
            yield path, "was not removed when data/ was published"
    for path in [*_folders(run / fetched.STORE), *_folders(run / "checkpoints")]:
        if is_debris(path):
            yield path, CUT_OFF
    seen = lease.seen(run)
    if seen and seen.alive is False:
        yield run / lease.HOLDER, f"{seen.process}, which held the run, is gone"
    for folder in (run, run / ATTEMPTS):
        for path in sorted(folder.glob(".*.json.new")) if not folder.is_symlink() else ():
            if stat.S_ISREG(path.lstat().st_mode):
                yield path, CUT_OFF


def _folders(folder: Path) -> list[Path]:
    """The folders in one, if it is no link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.is_symlink() and path.is_dir())


def _is_begun(folder: Path) -> bool:
    return not folder.is_symlink() and (folder / DRAFT).is_file()


def _is_whole(folder: Path) -> bool:
    """Whether an artifact is there, by the sizes of its files."""
    with contextlib.suppress(BadData):
        return not folder.is_symlink() and artifact.load(folder) is not None
    return False


def is_debris(folder: Path) -> bool:
    """Whether a stage began a folder, or to remove it, and it is no artifact; not with a strange manifest."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    with contextlib.suppress(BadData):
        whole = manifests.read(folder / MANIFEST) is not None
        return not whole and ((folder / DRAFT).is_file() or not any(folder.iterdir()))
    return False


def _goes_on(folder: Path) -> bool:
    """Whether the same command would go on with what lies in an unfinished folder."""
    return growing.begun(folder) is not None or _is_begun(folder.with_name(f"{folder.name}.parts"))


def remove(item: Needless) -> bool:
    """Remove it, a run's only while its lease is held; False where it is in use by now.

    Raises:
        CannotWrite: it cannot be removed.
    """
    with artifact.writing(item.path):
        if item.kind == "scratch":
            return scratch.remove(item.path)
        if item.kind == "checkpoint":
            checkpoints.drop(item.path)
        elif item.path.is_dir() and not item.path.is_symlink():
            artifact.retire(item.path)
        else:
            item.path.unlink(missing_ok=True)
    return True


def clear(run_dir: Path, listed: list[Needless]) -> tuple[list[Needless], list[str]]:
    """Remove of a run what was listed and may still go; what was removed, and what could not be.

    Raises:
        InUse: somebody works on it. CannotWrite: it cannot be held.
    """
    gone, failed = [], []
    names = {item.path for item in listed}
    with lease.held(run_dir, "gc") as check_held:
        gone += [item for item in listed if item.path == run_dir / lease.HOLDER]  # replaced by ours
        for item in in_run(run_dir, deep=True):
            if item.path in names and item.path != run_dir / lease.HOLDER:
                check_held()
                try:
                    remove(item)
                    gone.append(item)
                except CannotWrite as error:
                    failed.append(error.message)
    return gone, failed


def size(path: Path) -> int:
    """Bytes of the files at or below a path, no link followed; what cannot be looked at is none."""
    total, waiting = 0, [str(path)]
    while waiting:
        name = waiting.pop()
        with contextlib.suppress(OSError):
            status = os.lstat(name)
            if stat.S_ISDIR(status.st_mode):
                waiting += [os.path.join(name, inside) for inside in os.listdir(name)]
            else:
                total += status.st_size
    return total
