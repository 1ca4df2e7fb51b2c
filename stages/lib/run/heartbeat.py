"""The heartbeat of a stage: a small file whose time says that the process lives, and what it is about.

A probe looks at its time alone, see docs/progress.md. It is written with each beat of the lease, by a thread:
it stands still when the whole process does, or the volume. That the work hangs, `watchdog` finds out.
"""

import contextlib
import os
import threading
import time

from stages.lib.run import failpoints, notes, progress, watchdog
from stages.lib.run.attempts import Attempt

FILE = "heartbeat.json"


def probe(minutes: int, run_dir: str = "$RUN_DIR") -> str:
    """A command for a shell that fails where nobody has written the heartbeat for so many minutes."""
    return f'find "{run_dir}/{FILE}" -mmin -{minutes} | grep -q .'


class Heartbeat:
    """The heartbeat of an attempt, and its record's; as a context it begins, and is taken away at the end."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.path = attempt, attempt.run_dir / FILE
        self._lock, self._begun = threading.Lock(), False

    def beat(self) -> None:
        """Say that it lives; where that cannot be written, work goes on without."""
        self.attempt.beat()
        with self._lock, contextlib.suppress(OSError):
            if self._begun:
                self._write(time.time())

    def _write(self, now: float) -> None:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "stage": self.attempt.record["stage"],
            "attempt": self.attempt.number,
            "idle_seconds": round(watchdog.idle_seconds(), 1),
        }
        failpoints.reach("heartbeat.write")
        notes.write(self.path, told | progress.state())
        # By the clock of this host, which the probe reads too; a server's may be minutes off.
        os.utime(self.path, (now, now))

    def __enter__(self) -> "Heartbeat":
        self._begun = True
        self.beat()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._begun = False
            own = self.attempt.number
            if (notes.read(self.path) or {}).get(
                "attempt", own
            ) == own:  # else we were taken for dead
                self.path.unlink(missing_ok=True)
