"""A run that makes no progress says where it stands, and ends: it may be a hung driver, disk or network."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from stages.lib.run import preemption
from stages.lib.run.exits import TryAgain
from stages.lib.run.preemption import LastWords

FILE = "stacks.txt"
# Before a loop's first sign, and between two loops: libraries, downloads, loading, compiling, a proof.
PATIENCE = 4
TICK_SECONDS = 5.0
RECORD_SECONDS = 10.0
_signs = 0
_patience = PATIENCE
_last = time.monotonic()


def alive(patience: int | None = None) -> None:
    """Tell that something was done; any thread may.

    Args:
        patience: times STALL_MINUTES that the next sign may take; as before, if not given.
    """
    global _signs, _patience, _last
    _signs += 1
    _patience = patience or _patience
    _last = time.monotonic()


def idle_seconds() -> float:
    """Since something was done, as far as it was told."""
    return time.monotonic() - _last


@contextlib.contextmanager
def watching(minutes: float, folder: Path, report: LastWords) -> Iterator[None]:
    """End the process with exit code 75 when no sign of life comes for so many minutes; 0: never.

    Args:
        folder: gets the stacks of all threads, as standard error does. report: is told, and gives the code.
    """
    alive(PATIENCE)
    done = threading.Event()
    given = (done, minutes * 60, folder, report)
    if minutes:
        threading.Thread(target=_watch, args=given, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(done: threading.Event, limit: float, folder: Path, report: LastWords) -> None:
    """Counts its own ticks: time in which the whole process stood still is nobody's fault."""
    tick = min(TICK_SECONDS, limit / 4)
    seen, idle = _signs, 0.0
    while not done.wait(tick):
        idle = idle + tick if seen == _signs else 0.0
        seen = _signs
        if idle >= limit * _patience:
            _end(idle / 60, folder, report)


def _end(minutes: float, folder: Path, report: LastWords) -> None:
    error = TryAgain(
        f"nothing was finished for {minutes:.3g} minutes (STALL_MINUTES): where each thread stood is in "
        f"{folder / FILE}; the same command goes on"
    )

    def record() -> int:
        faulthandler.dump_traceback(sys.stderr)
        with contextlib.suppress(OSError), (folder / FILE).open("w") as file:
            faulthandler.dump_traceback(file)
        return report(error)

    preemption.leave(record, error.exit_code, RECORD_SECONDS)
