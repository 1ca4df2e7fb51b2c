"""One writer at a time on a run directory: `holder.json`, created exclusively, with a counter that moves.

A dead holder on this host is replaced at once; one on another host when its counter has stood still for a
minute of our own clock, so that no two hosts' clocks are ever compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.lib.run import failpoints, preemption
from stages.lib.run.artifact import writing
from stages.lib.run.exits import InUse
from stages.lib.run.progress import say

HOLDER = "holder.json"
BEAT_SECONDS = 10.0
SETTLE_SECONDS = 0.5
STALE_SECONDS = 60.0
IDENTITY = ("host", "boot", "pid", "started")


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _own() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": started,
        "beat": 0,
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}  # being written, or cut off


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # A container's PID 1 has the same number after a restart; a zombie answers too.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def _dead(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    same_host = holder.get("host") == own["host"]
    if same_host and holder.get("boot") != own["boot"]:
        return True
    return same_host and (holder.get("pid") == own["pid"] or not _alive(int(holder.get("pid", 0))))


def _stands_still(path: Path, holder: dict[str, Any]) -> bool:
    say(
        f"{path} is held by {holder.get('host', 'an unknown host')}; watching its counter for a minute"
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        preemption.check()
        time.sleep(1.0)
        if _read(path) != holder:
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
        holder = _read(path)
        if holder is None:
            continue
        same_host = holder.get("host") == own["host"]
        if not (_dead(holder, own) or (not same_host and _stands_still(path, holder))):
            raise _in_use(path, holder)
        path.unlink(missing_ok=True)
        if _create(path, own):
            time.sleep(SETTLE_SECONDS)  # another may have found the same holder dead
            _check_ours(path, own)
            return


def _in_use(path: Path, holder: dict[str, Any]) -> InUse:
    return InUse(
        f"{path.parent} is in use by process {holder.get('pid')} on {holder.get('host')} "
        f"since {holder.get('started')}; wait for it, or choose another RUN_DIR"
    )


def _check_ours(path: Path, own: dict[str, Any]) -> None:
    holder = _read(path)
    if holder and any(holder.get(key) != own[key] for key in IDENTITY):
        raise _in_use(path, holder)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Hold a run directory; what is given raises `InUse` once another process has taken it over.

    Raises:
        InUse: another live process holds it.
    """
    path, own = run_dir / HOLDER, _own()
    _take(path, own)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                _check_ours(path, own)
            except InUse as lost:  # we were taken for dead; whoever took over is right now
                preemption.request(lost.message)
                return
            own["beat"] += 1
            _rewrite(path, json.dumps(own))

    thread = threading.Thread(target=beat, daemon=True, name="lease")
    thread.start()
    try:
        yield lambda: _check_ours(path, own)
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(InUse, OSError):
            failpoints.reach("lease.release")
            _check_ours(path, own)
            path.unlink(missing_ok=True)


def _rewrite(path: Path, text: str) -> None:
    """Replace the holder file in one go where the mount can; a beat that fails is made up by the next."""
    beside = path.with_suffix(".beat")
    try:
        failpoints.reach("lease.beat")
        beside.write_text(text)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            path.write_text(text)
