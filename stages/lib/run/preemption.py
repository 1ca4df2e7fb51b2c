"""Stop signals: acted on at once, but where a loop asked to choose the moment itself."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from stages.lib.run.exits import TryAgain

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_SECONDS = 3.0  # a scheduler sends two, to the process and to its group; a person means it
_reasons: list[str] = []
_first = 0.0
_deferred = 0


def listen() -> None:
    """Take SIGTERM, SIGINT and SIGUSR1 as a request to stop; a later second one ends the process."""
    global _deferred
    _reasons.clear()
    _deferred = 0
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _first
    now = time.monotonic()
    if _reasons and now - _first > REPEAT_SECONDS:
        os._exit(128 + number)
    first, reason = not _reasons, f"stopped by {signal.Signals(number).name}"
    if reason not in _reasons:
        request(reason)
    if first:
        _first = now
        if not _deferred:
            check()


def request(reason: str) -> None:
    """Ask the loops of this process to stop."""
    _reasons.append(reason)


def check() -> None:
    """Raise `TryAgain` (exit 75) if a stop was asked for. Call it wherever the state is whole."""
    if _reasons:
        raise TryAgain(f"{_reasons[0]}; the same command goes on")


def by_keyboard() -> bool:
    """Whether a Ctrl-C and nothing else asked for the stop; it is then forgotten, so that work can go on."""
    only = _reasons == [f"stopped by {signal.SIGINT.name}"]
    if only:
        _reasons.clear()
    return only


def conclude() -> None:
    """From here on a signal changes nothing: all that is left is to say how it ended."""
    global _deferred
    _deferred += 1


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let what runs inside call `check` where its state is whole, instead of being cut off anywhere."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
