"""The heartbeat of a stage: a small file whose time says that the process lives, and what it is about.

A probe looks at its time alone, see docs/progress.md. It is written with each beat of the lease, by a thread:
it stands still when the whole process does, or the volume. That the work hangs, `watchdog` finds out.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from stages.lib.run import failpoints, notes, progress, watchdog

FILE = "heartbeat.json"


class Heartbeat:
    """The heartbeat of an attempt; as a context it begins, and is taken away at the end."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.path, self.stage, self.attempt = run_dir / FILE, stage, 0
        self._lock = threading.Lock()

    def begin(self, attempt: int) -> "Heartbeat":
        """From here on `attempt` lives."""
        self.attempt = attempt
        return self

    def beat(self) -> None:
        """Say that it lives; where that cannot be written, work goes on without."""
        with self._lock, contextlib.suppress(OSError):
            if self.attempt:
                self._write(time.time())

    def _write(self, now: float) -> None:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "stage": self.stage,
            "attempt": self.attempt,
            "idle_seconds": round(watchdog.idle_seconds(), 1),
        }
        failpoints.reach("heartbeat.write")
        notes.write(self.path, told | progress.state())
        # By the clock of this host, which the probe reads too; a server's may be minutes off.
        os.utime(self.path, (now, now))

    def __enter__(self) -> "Heartbeat":
        self.beat()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock, contextlib.suppress(OSError):
            mine, self.attempt = self.attempt, 0
            if (notes.read(self.path) or {}).get(
                "attempt", mine
            ) == mine:  # else we were taken for dead
                self.path.unlink(missing_ok=True)
