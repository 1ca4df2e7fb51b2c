"""What a stage says while it runs: a display on a terminal, one JSON object a line elsewhere.

All of it goes to standard error, so that standard output carries results alone. What is under way is a phase:
loading, compiling, evaluating and the like, one in another; a phase that counts is a `Progress`.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from stages.lib.run import fields, watchdog

EVERY_SECONDS = 5.0
QUIET_SECONDS = 30.0  # without a line, after which one says what is still under way
_stage = "stages"
_silent = False
_phases: list["Phase"] = []
_spoke = time.monotonic()
_ticking: threading.Thread | None = None
_display: Any = None


def _no_gpu() -> int | None:
    return None


_gpu_bytes: Callable[[], int | None] = _no_gpu


def start(stage: str, silent: bool = False) -> None:
    """Name the stage that speaks from now on; `silent`: another process does for this one."""
    global _stage, _silent
    _stage, _silent = stage, silent
    _phases.clear()


def measure(gpu_bytes: Callable[[], int | None]) -> None:
    """What tells from now on the most memory of the GPU that was used so far, or None without one."""
    global _gpu_bytes
    _gpu_bytes = gpu_bytes


def on_terminal() -> bool:
    """Whether a person is watching this process."""
    return sys.stderr.isatty() and not _silent


def say(message: str) -> None:
    """One message: a line for a person, a JSON line for a program."""
    if on_terminal():
        print(f"{_stage}: {message}", file=sys.stderr, flush=True)
    else:
        _write({"event": "message", "message": message})


def _write(told: dict[str, Any]) -> None:
    if _silent:
        return
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": stamp, "stage": _stage} | told), file=sys.stderr, flush=True)


def _line() -> None:
    """Where the work stands, as a line."""
    global _spoke
    _spoke = time.monotonic()
    _write({"event": "progress"} | state())


def state() -> dict[str, Any]:
    """Where the work stands: the phase, what is counted and how far, and the figures."""
    phases = list(_phases)
    counting = next((p for p in reversed(phases) if isinstance(p, Progress)), None)
    found: dict[str, Any] = {
        "phase": phases[-1].name if phases else None,
        "phase_seconds": round(time.monotonic() - phases[-1].began, 1) if phases else None,
    }
    found |= counting.counted() if counting else dict.fromkeys(COUNTED)
    on_gpu = _gpu_bytes()
    found |= {"rss_bytes": fields.resident()} if on_gpu is None else {"gpu_bytes": on_gpu}
    return {name: _rounded(value) for name, value in found.items()}


COUNTED = ("unit", "done", "total", "eta_seconds")


class Phase:
    """Something that is under way, inside of what was before; as a context. Elsewhere than on a terminal it is
    told of once it has taken a while.

    Args:
        name: a word or two, as in `loading`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.began = name, time.monotonic()

    def become(self, name: str) -> None:
        """Go over to another phase."""
        if name != self.name:
            self.name, self.began = name, time.monotonic()

    def __enter__(self) -> Any:
        global _display, _ticking
        watchdog.alive(watchdog.PATIENCE)
        self.began = time.monotonic()
        _phases.append(self)
        if on_terminal():
            if _display is None:
                from stages.lib.run.display import Display

                _display = Display(_stage, state)
                _display.start()
        elif _ticking is None and not _silent:
            _ticking = threading.Thread(target=_tick, name="progress", daemon=True)
            _ticking.start()
        return self

    def __exit__(self, *error: object) -> None:
        global _display
        watchdog.alive(watchdog.PATIENCE)
        if _display:
            _display.end(leave=isinstance(self, Progress), last=len(_phases) <= 1)
            _display = _display if len(_phases) > 1 else None
        if self in _phases:
            _phases.remove(self)


def _tick() -> None:
    """Says where the work stands when nothing else does."""
    while True:
        time.sleep(EVERY_SECONDS)
        with contextlib.suppress(IndexError):  # it may have ended just now
            began = _phases[-1].began
            since = max(_spoke, began)
            fresh = began > _spoke and time.monotonic() - began >= EVERY_SECONDS
            if fresh or time.monotonic() - since >= QUIET_SECONDS:
                _line()


class Progress(Phase):
    """A phase that counts towards `total` of `unit`, which may be unknown; shows speed and the time left.

    `update` may be called as often as work is done: elsewhere than on a terminal a line is written every
    few seconds, and the last one always. The time left follows from the pace behind the first update, so that
    what a loop does once, such as to compile, is not taken for its pace.

    Args:
        done: of it before this. remaining: seconds that are left, where somebody knows better; None if not yet.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        done: int = 0,
        name: str = "working",
        remaining: Callable[[], float | None] | None = None,
    ) -> None:
        super().__init__(name)
        self.total, self.unit, self.done, self.written = total, unit, done, done
        self.remaining = remaining or self._remaining
        self.fields: dict[str, Any] = {}
        self._paced: tuple[float, int, int] | None = (
            None  # time, done and tokens at the first update
        )

    def __exit__(self, *error: object) -> None:
        if not on_terminal() and self.done > self.written:
            self._line()
        super().__exit__(*error)

    def advance(self, more: int) -> None:
        """`more` than before is finished."""
        self.update(self.done + more)

    def skip(self, more: int) -> None:
        """`more` was finished before this attempt: it says nothing of the pace."""
        self.done += more
        if self._paced:
            when, done, tokens = self._paced
            self._paced = when, done + more, tokens

    def update(self, done: int, **found: Any) -> None:
        """`done` of the total are finished; `found` are figures to be shown beside, see `fields`."""
        watchdog.alive(1)
        self.done = done
        self.fields.update(found)
        if not self._paced:
            self._paced = time.monotonic(), done, self._tokens()
        if not on_terminal() and time.monotonic() - _spoke >= EVERY_SECONDS:
            self._line()

    def _line(self) -> None:
        self.written = self.done
        _line()

    def _tokens(self) -> int:
        return self.done if self.unit == "tokens" else int(self.fields.get("tokens") or 0)

    def _rate(self, now: int, place: int) -> float | None:
        """A second, of what was `now` less at the first update."""
        if not self._paced:
            return None
        seconds, more = time.monotonic() - self._paced[0], now - int(self._paced[place])
        return more / seconds if more > 0 and seconds > 0 else None

    def _remaining(self) -> float | None:
        if self.done == self.total:
            return 0.0
        rate = self._rate(self.done, 1)
        return (self.total - self.done) / rate if rate and self.total else None

    def counted(self) -> dict[str, Any]:
        """How far it is, in how many seconds it will be through, and its figures."""
        left = self.remaining()
        found = {
            "unit": self.unit,
            "done": self.done,
            "total": self.total,
            "eta_seconds": None if left is None else round(left, 1),
        }
        speed = self._rate(self._tokens(), 2)
        return found | ({"tokens_per_second": speed} if speed else {}) | self.fields


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What runs inside is this phase."""
    with Phase(name):
        yield


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
