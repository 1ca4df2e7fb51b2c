"""Several stages one after the other, each a process of its own, so that each has the memory to itself."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from stages.lib.run.endings import ending
from stages.lib.run.preemption import SIGNALS


class Chain:
    """Runs stages until one fails or a signal comes; it passes signals on to the one that runs."""

    def __init__(self, env_file: Path | None, limit: float | None) -> None:
        self._preset = ["--env-file", str(env_file)] if env_file else []
        self._ends = time.monotonic() + limit if limit else None
        self._child: subprocess.Popen[bytes] | None = None
        self._signal = 0

    def run(self, stages: tuple[str, ...]) -> int:
        """The exit code of the first that failed, or 0."""
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        for stage in stages:
            if self._signal or self._left() == 0:
                return ending("stopped").code
            if code := self._one(stage):
                return code
        return 0

    def _one(self, stage: str) -> int:
        left = self._left()
        limit = [] if left is None else ["--max-runtime", f"{left:.0f}"]
        command = [sys.executable, "-m", "stages", *self._preset, stage, *limit]
        self._child = subprocess.Popen(command)
        if self._signal:  # it came before there was anybody to pass it on to
            self._child.send_signal(self._signal)
        code = self._child.wait()
        return 128 - code if code < 0 else code

    def _left(self) -> float | None:
        """Seconds, whole; None without a limit."""
        return None if self._ends is None else max(0, int(self._ends - time.monotonic()))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._child and self._child.poll() is None:
            self._child.send_signal(number)
