"""Stop signals: noted when they come, acted on where the state is whole."""

import os
import signal
from types import FrameType

from stages.lib.run.exits import TryAgain

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_received: list[int] = []


def listen() -> None:
    """Take SIGTERM, SIGINT and SIGUSR1 as a request to stop; a second one ends the process at once."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    if _received:
        os._exit(128 + number)
    _received.append(number)


def requested() -> bool:
    """Whether a stop was asked for."""
    return bool(_received)


def check() -> None:
    """Raise `TryAgain` (exit 75) if a stop was asked for. Call it wherever the state is whole."""
    if _received:
        name = signal.Signals(_received[0]).name
        raise TryAgain(f"stopped by {name}; the same command goes on")
