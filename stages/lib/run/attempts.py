"""Attempts: every process that works on a run leaves a record, and three that got nowhere end the loop.

A batch service starts a job again as long as its exit code says so. Whether that leads anywhere only these
records know: `attempts/NUMBER-ID.json`, one small file a process, written anew with every beat of the lease, so
that one that was killed has left when it was last alive. Where they cannot be written, work goes on without.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from stages.lib.run import endings, exits, failpoints, lease, notes, preemption, redaction
from stages.lib.run.exits import InUse, NoProgress, Stopped
from stages.lib.run.holder import ANYONE
from stages.lib.run.progress import say

FOLDER = "attempts"
MOST = 3  # without progress
KEEP = 20
SOON_SECONDS = (
    300.0  # a service that takes its machine back this early has left no time for anything
)
RECORD = re.compile(r"\d{1,9}-\w+\.json")
KINDS: dict[str, tuple[type, ...]] = {
    "stage": (str,), "started": (str,), "seconds": (int, float), "resident_bytes": (int,), "boot": (str,),
    "oom_kills": (int, type(None)), "said": (str,), "end": (int, type(None)),
}  # fmt: skip
KILLED = endings.ending("killed").code


def _oom_kills() -> int | None:
    """Processes that the kernel has killed for want of memory since it booted, in any container."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return None


def _resident() -> int:
    """Bytes of memory that this process has; the most it had where Linux does not say."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _within(record: dict[str, Any]) -> str:
    seconds = record["seconds"]
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _bury(record: dict[str, Any]) -> None:
    """Fill in the end of an attempt that could not do so itself."""
    same = record["boot"] == lease.boot() and record["oom_kills"] is not None
    starved = (_oom_kills() or 0) > record["oom_kills"] if same else None
    told = {
        True: "; the kernel killed a process for want of memory meanwhile",
        None: "; the kernel may have been out of memory",
        False: "",
    }[starved]
    size = record["resident_bytes"] / 2**30
    record["end"] = KILLED
    record["said"] = f"was killed after {_within(record)} at {size:.1f} GiB of memory{told}"
    record["counts"] = bool(starved) or record["seconds"] >= SOON_SECONDS


def read(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The records of a run, oldest first; what cannot be read is none."""
    found = []
    with contextlib.suppress(OSError):
        for path in (run_dir / FOLDER).glob("*.json"):
            record = notes.read(path) or {}
            if record.keys() >= {"number", "stage", "settings", "seconds", "end", "counts"}:
                found.append((path, record))
    return sorted(found, key=lambda each: each[1]["number"])


def newest(run_dir: Path) -> dict[str, Any] | None:
    """The record of the last process, without the others being read; its end is filled in if it was killed.

    Raises:
        OSError: they cannot be read.
    """
    folder = run_dir / FOLDER
    try:
        names = [name for name in os.listdir(folder) if RECORD.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return None
    for name in sorted(names, key=lambda each: (int(each.partition("-")[0]), each), reverse=True):
        record = notes.peek(folder / name) or {}
        if all(isinstance(record.get(key), kind) for key, kind in KINDS.items()):
            if record.get("end") is None:
                _bury(record)
            return record
    return None


def in_vain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the attempts at one command, oldest first, the last ones that ended retryably without progress."""
    found: list[dict[str, Any]] = []
    for record in reversed(records):
        if record["progress"] or record["end"] not in (KILLED, exits.TryAgain.exit_code):
            break
        if record["counts"]:
            found.insert(0, record)
    return found


def _no_progress(records: list[dict[str, Any]]) -> NoProgress:
    said = "; ".join(
        f"attempt {r['number']} {' '.join(r['said'].split())[:300]}" for r in records[-MOST:]
    )
    return NoProgress(
        f"{MOST} attempts in a row made no progress: {said}; mend that, then run the same command again"
    )


class Attempt:
    """The record of this process; as a context it ends with what is raised.

    Args:
        settings: of the command: with others it is another command. force: go on whatever was before.

    Attributes:
        check_held: raises `InUse` where the run directory is another's by now.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        settings: dict[str, Any],
        force: bool = False,
    ) -> None:
        self.run_dir, self.force = run_dir, force
        self.check_held: Callable[[], None] = ANYONE.check_held
        self.number = 0
        self.began = time.monotonic()
        self.earlier: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        told = json.dumps({name: entry["value"] for name, entry in settings.items()})
        self.record: dict[str, Any] = {
            "stage": stage,
            "settings": hashlib.sha256(told.encode()).hexdigest()[:12],
            "id": uuid.uuid4().hex[:8],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot": lease.boot(),
            "oom_kills": _oom_kills(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": 0.0,
            "resident_bytes": 0,
            "progress": 0,
            "end": None,
            "said": "",
            "counts": True,
        }

    def _begin(self) -> None:
        """Look at the attempts before this one, and begin its record.

        Raises:
            NoProgress: they got nowhere.
        """
        known = read(self.run_dir)
        for path, record in known:
            if record["end"] is None:  # whoever wrote it no longer holds the run directory
                _bury(record)
                say(f"the attempt before this one, {record['number']}, {record['said']}")
                with contextlib.suppress(OSError):
                    notes.write(path, record)
        for path, _ in known[: -KEEP + 1]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        alike = ("stage", "settings")
        self.earlier = [r for _, r in known if all(r.get(k) == self.record[k] for k in alike)]
        self.number = max((r["number"] for _, r in known), default=0) + 1
        self.record["number"] = self.number
        self.beat()
        vain = in_vain(self.earlier)
        if len(vain) >= MOST and not self.force:
            raise _no_progress(vain)

    def beat(self) -> None:
        """Note that this process is alive, and how large it is; nothing before it has begun."""
        if not self.number:
            return
        self.record |= {
            "seconds": round(time.monotonic() - self.began, 1),
            "resident_bytes": _resident(),
        }
        name = f"{self.number:04d}-{self.record['id']}.json"
        with self._lock, contextlib.suppress(OSError):
            (self.run_dir / FOLDER).mkdir(exist_ok=True)
            failpoints.reach("attempt.record")
            notes.write(self.run_dir / FOLDER / name, self.record)

    def progressed(self) -> None:
        """Note that something more is verified."""
        self.record["progress"] += 1
        if self.record["progress"] == 1:
            self.beat()

    def ended(self, error: BaseException | None) -> click.ClickException | None:
        """Record the end, and return what it amounts to: after the third in vain it is not worth another."""
        known = exits.classify(error) if error else None
        code = known.exit_code if known else exits.NoProgress.exit_code if error else 0
        said = redaction.said(known.format_message() if known else repr(error) if error else "")
        self.record |= {
            "end": code,
            "said": f"ended with {code}: {said}",
            "counts": self._counts(known),
        }
        vain = in_vain([*self.earlier, self.record])
        if len(vain) >= MOST and self.record["counts"] and vain[-1] is self.record:
            known = _no_progress(vain)
            self.record["end"] = known.exit_code
        self.beat()
        return known

    def _counts(self, known: click.ClickException | None) -> bool:
        """Whether an end that may be retried says anything about the work."""
        if isinstance(known, InUse):
            return False
        number = preemption.signalled() if isinstance(known, Stopped) else None
        soon = time.monotonic() - self.began < SOON_SECONDS
        return number is None or (number != signal.SIGINT and not soon)

    def __enter__(self) -> "Attempt":
        try:
            self._begin()
        except NoProgress as error:
            self.ended(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        known = self.ended(self._lost(error) or error)
        if isinstance(known, (NoProgress, InUse)) and known is not error:
            raise known from error

    def _lost(self, error: BaseException | None) -> InUse | None:
        """What made anything fail, where another has taken the run directory over."""
        try:
            if error is not None:
                self.check_held()
        except InUse as lost:
            return lost
        except OSError:
            pass
        return None
