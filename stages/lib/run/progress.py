"""What a stage says while it runs: a display on a terminal, one JSON object a line elsewhere.

All of it goes to standard error, so that standard output carries results alone.
"""

import json
import sys
import time
from typing import Any

from stages.lib.run import watchdog

EVERY_SECONDS = 5.0
# What a line of 80 columns has room for.
SHOWN = {
    "loss": "loss",
    "held_out_loss": "held-out",
    "tokens_per_second": "tok/s",
    "tokens": "tokens",
}
_stage = "stages"
_silent = False


def start(stage: str, silent: bool = False) -> None:
    """Name the stage that speaks from now on; `silent`: another process does for this one."""
    global _stage, _silent
    _stage, _silent = stage, silent


def on_terminal() -> bool:
    """Whether a person is watching this process."""
    return sys.stderr.isatty() and not _silent


def say(message: str) -> None:
    """One message: a line for a person, a JSON line for a program."""
    if on_terminal():
        print(f"{_stage}: {message}", file=sys.stderr, flush=True)
    else:
        _write({"event": "message", "message": message})


def _write(fields: dict[str, Any]) -> None:
    if _silent:
        return
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": stamp, "stage": _stage} | fields), file=sys.stderr, flush=True)


class Progress:
    """Counts towards `total` of `unit`, which may be unknown; shows speed and the time that is left.

    `update` may be called as often as work is done: elsewhere than on a terminal a line is written every
    few seconds, and the last one always.
    """

    def __init__(self, total: int | None, unit: str, done: int = 0) -> None:
        self.total, self.unit, self.first, self.done, self.written = total, unit, done, done, done
        self.started = self.spoke = time.monotonic()
        self.fields: dict[str, Any] = {}
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        watchdog.alive(watchdog.PATIENCE)
        if on_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn(f"{_stage}:"), BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn(self.unit),
                TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *error: object) -> None:
        watchdog.alive(watchdog.PATIENCE)
        if self.bar:
            self.bar.stop()
        elif self.done > self.written:
            self._line()

    def advance(self, more: int) -> None:
        """`more` than before is finished."""
        self.update(self.done + more)

    def update(self, done: int, **fields: Any) -> None:
        """`done` of the total are finished; `fields` are shown beside."""
        watchdog.alive(1)
        self.done = done
        self.fields.update(fields)
        now = time.monotonic()
        if self.bar:
            shown = {SHOWN[name]: value for name, value in self.fields.items() if name in SHOWN}
            note = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.bar.update(self.task, completed=done, note=note)
        elif now - self.spoke >= EVERY_SECONDS:
            self._line()

    def _line(self) -> None:
        self.spoke, self.written = time.monotonic(), self.done
        rate = (self.done - self.first) / max(self.spoke - self.started, 1e-9)
        eta = round((self.total - self.done) / rate, 1) if rate and self.total else None
        counted = {"unit": self.unit, "done": self.done, "total": self.total, "eta_seconds": eta}
        _write({"event": "progress"} | counted | {k: _rounded(v) for k, v in self.fields.items()})


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
