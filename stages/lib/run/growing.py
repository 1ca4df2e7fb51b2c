"""An artifact of one file that grows by lines, and goes on growing where it was stopped.

Until it is whole, `draft.json` beside the file says what it is made from. A line is whole once its end is
there, so a process may be killed at any instant. Where a mount takes nothing more at the end of a file that was
closed or flushed, as with object stores, the file is written anew with what it had.
"""

import contextlib
import errno
import json
import time
from pathlib import Path
from typing import Any

from stages.lib.run import artifact, failpoints, preemption, redaction, volume
from stages.lib.run.artifact import DRAFT, MANIFEST, Artifact, Draft, retire, writing
from stages.lib.run.exits import InUse
from stages.lib.run.holder import ANYONE, Holder

SYNC_SECONDS = 5.0
CHECK_SECONDS = 1.0  # nobody takes a run over that was seen alive within a minute
# What mounts say that only write files anew.
NO_APPEND = {*volume.NO_SYNC, errno.EPERM, errno.EACCES, errno.ESPIPE}


def begun(folder: Path) -> Artifact | None:
    """What an unfinished file in `folder` is made from, or None where there is none."""
    try:
        made_from = json.loads((folder / DRAFT).read_bytes())
        whole = made_from.keys() >= {"inputs", "settings"}
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return None
    return Artifact(folder, made_from) if whole and not (folder / MANIFEST).is_file() else None


class Growing(Draft):
    """An artifact that is one JSONL file.

    As a context it leaves what was not finished, if it holds a line.

    Args:
        target: its folder. name: of the file. made_from: its `inputs` and `settings`.
        goes_on: whether what lies there is kept; else it is retired.

    Attributes:
        entries: of its whole lines. resumed: how many were there already.
    """

    def __init__(
        self,
        target: Path,
        name: str,
        made_from: dict[str, Any],
        goes_on: bool,
        by: Holder = ANYONE,
    ) -> None:
        super().__init__(target, by)
        self.file, self.made_from, self.goes_on = target / name, made_from, goes_on
        self.entries: list[dict[str, Any]] = []
        self.resumed = self._size = 0
        self._handle: Any = None
        self._rewritten, self._synced = False, time.monotonic()
        self._checked = self._synced

    def __enter__(self) -> "Growing":
        with writing(self.path):
            if not self.goes_on:
                self._begin(json.dumps(self.made_from).encode())
            self._open()
        return self

    def __exit__(self, *error: object) -> None:
        with preemption.deferred(), contextlib.suppress(OSError, InUse):
            self._handle.close()
            self.by.check_held()
            if self._whole is None:  # not flushed, or not to its end: nobody may take it for whole
                (self.path / MANIFEST).unlink(missing_ok=True)
            if self._whole is None and not self.entries:
                retire(self.path)

    def _open(self) -> None:
        content = self.file.read_bytes() if self.file.is_file() else b""
        while (end := content.find(b"\n", self._size)) >= 0:
            entry = _entry(content[self._size : end])
            if entry is None:  # what a power failure leaves
                break
            self.entries.append(entry)
            self._size = end + 1
        self.resumed = len(self.entries)
        try:
            self._handle = self.file.open("ab", buffering=0)
            if self._size < len(content):
                self._handle.truncate(self._size)
        except OSError as error:
            if error.errno not in NO_APPEND:
                raise
            self._rewrite()

    def add(self, entry: dict[str, Any]) -> None:
        """Write a line, for readers to see at once.

        Raises:
            CannotWrite: the disk is full; the lines before it stay.
        """
        line = redaction.line(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode())
        line += b"\n"
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self.by.check_held()
            self._checked = time.monotonic()
        with preemption.deferred(), writing(self.file):
            try:
                failpoints.reach("grow.line")
                self._append(line)
            except OSError as error:
                if error.errno not in NO_APPEND or self._rewritten:
                    raise
                self._rewrite()
                self._append(line)
            self._size += len(line)
            self.entries.append(entry)
        self.by.progressed()

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._handle.write(rest) :]
        if not self._rewritten and time.monotonic() - self._synced > SYNC_SECONDS:
            volume.sync(self._handle.fileno())
            self._synced = time.monotonic()

    def _rewrite(self) -> None:
        """Begin the file anew with its whole lines; from now on it is flushed at the end alone."""
        if self._handle:
            with contextlib.suppress(OSError):  # says once more that nothing was added
                self._handle.close()
        content = self.file.read_bytes()[: self._size]
        self._handle, self._rewritten = self.file.open("wb", buffering=0), True
        self._append(content)

    def finish(self, manifest: dict[str, Any]) -> Artifact:
        """Write its manifest: now it is there."""
        self.by.check_held()
        with preemption.deferred():
            with writing(self.file):
                volume.sync(self._handle.fileno())
                self._handle.close()
                volume.set_mode(self.file)
            size = self.file.stat().st_size
            self._entries[self.file.name] = {"bytes": size, "sha256": artifact.sha256(self.file)}
            return super().finish(manifest)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
