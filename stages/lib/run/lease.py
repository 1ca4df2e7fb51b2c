"""One writer at a time on a run directory: `holder.json`, created exclusively, with a counter that moves.

A dead holder on this host is replaced at once; one on another host when its counter has stood still for a
minute of our own clock, so that no two hosts' clocks are ever compared. Process numbers tell who is dead only
on one boot of one host, and in one container: another one of the same name is another host.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.lib.run import failpoints, notes, preemption
from stages.lib.run.artifact import writing
from stages.lib.run.exits import InUse
from stages.lib.run.progress import say

HOLDER = "holder.json"
BEAT_SECONDS = 10.0
SETTLE_SECONDS = 0.5
STALE_SECONDS = 60.0
IDENTITY = ("host", "boot", "space", "pid", "ticks", "id")
PLACE = ("host", "boot", "space")


def boot() -> str:
    """What Linux calls this boot of the machine; the same in all its containers."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _space() -> str:
    """Of the process numbers: a container has its own."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _stat(pid: int) -> list[str]:
    """State, parent and so on of a process, as proc(5) counts them from the third; none where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _ticks(pid: int) -> int:
    """When a process began, in clock ticks since the boot: its number may be given to another one."""
    found = _stat(pid)
    return int(found[19]) if found else 0


def _own(stage: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": boot(),
        "space": _space(),
        "pid": os.getpid(),
        "ticks": _ticks(os.getpid()),
        "id": uuid.uuid4().hex[:8],
        "stage": stage,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "beat": 0,
    }


def is_running(pid: int) -> bool:
    """Whether this host has a process of that number, whosever it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _alive(holder: dict[str, Any]) -> bool:
    pid = int(holder.get("pid", 0))
    if not is_running(pid):
        return False
    if pid == os.getpid() and not _ticks(
        pid
    ):  # of a container before this one, where nothing says when
        return False
    return _stat(pid)[:1] != ["Z"] and _ticks(pid) in (0, holder.get("ticks"))


def _here(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    return all(holder.get(key) == own[key] for key in PLACE)


def _stands_still(path: Path, holder: dict[str, Any]) -> bool:
    say(
        f"{path} is held by {holder.get('host', 'an unknown host')}; watching its counter for a minute"
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        preemption.check()
        time.sleep(1.0)
        if notes.read(path) != holder:
            return False
    return True


def _create(path: Path, own: dict[str, Any]) -> bool:
    with writing(path):
        failpoints.reach("lease.take")
        try:
            with path.open("x") as file:
                file.write(json.dumps(own))
            return True
        except FileExistsError:
            return False


def _take(path: Path, own: dict[str, Any]) -> None:
    while not _create(path, own):
        holder = notes.read(path)
        if holder is None:
            continue
        if _alive(holder) if _here(holder, own) else not _stands_still(path, holder):
            raise _in_use(path, holder)
        path.unlink(missing_ok=True)
        if _create(path, own):
            time.sleep(SETTLE_SECONDS)  # another may have found the same holder dead
            _check_ours(path, own)
            return


def _in_use(path: Path, holder: dict[str, Any]) -> InUse:
    return InUse(
        f"{path.parent} is in use by {holder.get('stage')}, process {holder.get('pid')} on "
        f"{holder.get('host')} since {holder.get('started')}; wait for it, or choose another RUN_DIR"
    )


def _check_ours(path: Path, own: dict[str, Any]) -> None:
    holder = notes.read(path)
    if holder and any(holder.get(key) != own[key] for key in IDENTITY):
        raise _in_use(path, holder)


def at_work(run_dir: Path, stage: str) -> str:
    """That `stage` is at work on a run directory, for a sentence; nothing where it seems not to be."""
    holder = notes.read(run_dir / HOLDER) or {}
    if holder.get("stage") != stage or (_here(holder, _own("")) and not _alive(holder)):
        return ""
    return f"`{stage}` is at work on it, process {holder.get('pid')} on {holder.get('host')}"


@contextlib.contextmanager
def held(
    run_dir: Path, stage: str = "", beaten: Callable[[], None] | None = None
) -> Iterator[Callable[[], None]]:
    """Hold a run directory; what is given raises `InUse` once another process has taken it over.

    Args:
        stage: what the others are told. beaten: called whenever the counter has moved.

    Raises:
        InUse: another live process holds it.
    """
    path, own = run_dir / HOLDER, _own(stage)
    _take(path, own)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                _check_ours(path, own)
            except InUse as lost:  # we were taken for dead; whoever took over is right now
                preemption.request(lost.message, lost=True)
                return
            except OSError:  # the volume's hiccup; the work will meet it itself
                continue
            own["beat"] += 1
            with contextlib.suppress(OSError):
                failpoints.reach("lease.beat")
                notes.write(path, own)
            if beaten:
                beaten()

    thread = threading.Thread(target=beat, daemon=True, name="lease")
    thread.start()
    try:
        yield lambda: _check_ours(path, own)
    finally:
        stop.set()
        thread.join(BEAT_SECONDS)
        with contextlib.suppress(InUse, OSError):
            failpoints.reach("lease.release")
            _check_ours(path, own)
            path.unlink(missing_ok=True)
