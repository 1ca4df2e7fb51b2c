"""Stop signals: acted on at once, but where a loop asked to choose the moment itself.

Whatever the work is doing, the process ends GRACE_SECONDS after it was first asked to, and before MAX_RUNTIME.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stages.lib.run.exits import InUse, StageError, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WAKE = signal.SIGUSR2  # from a thread of ours to the main one, which may be where nothing polls
REPEAT_SECONDS = 3.0  # a scheduler sends two, to the process and to its group; a person means it
GRACE_SECONDS = 25.0  # batch services kill 30 seconds after the signal
LAST_WORDS_SECONDS = 1.0  # the volume may be what keeps the work from stopping
TICK_SECONDS = 0.2
SWALLOWED_SECONDS = 1.0  # some libraries catch whatever is raised in them: it is raised again
LastWords = Callable[[StageError], int]
_reasons: list[str] = []
_signals: list[signal.Signals] = []
_asked = 0.0
_signalled = 0.0
_deferred = 0
_grace = GRACE_SECONDS
_lost = False
_patient = False
_watch = threading.Event()


def listen(
    grace: float = GRACE_SECONDS,
    limit: float | None = None,
    last_words: LastWords | None = None,
    patient: bool = False,
) -> None:
    """Take SIGTERM, SIGINT and SIGUSR1 as a request to stop; a later second one ends the process.

    Args:
        grace: seconds from the first request to the end. limit: seconds from now to the end.
        last_words: told of the end that is forced when these are over, and gives its code; without it none is.
        patient: a second signal ends nothing, as torchrun sends one when a process has ended.
    """
    global _deferred, _grace, _lost, _patient, _watch
    _watch.set()
    _reasons.clear()
    _signals.clear()
    _deferred, _grace, _lost, _patient, _watch = 0, grace, False, patient, threading.Event()
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.signal(WAKE, _wake)
    if last_words:
        # Half of a short limit is for the work: to stop takes what GRACE_SECONDS says.
        stop_at = time.monotonic() + limit - min(grace, limit / 2) if limit else None
        told = f"MAX_RUNTIME of {limit:g} seconds is near" if limit else ""
        arguments = (_watch, stop_at, told, last_words)
        threading.Thread(target=_watch_over, args=arguments, daemon=True, name="deadline").start()


def _watch_over(
    over: threading.Event, stop_at: float | None, told: str, last_words: LastWords
) -> None:
    woken = 0.0
    while not over.wait(TICK_SECONDS):
        now = time.monotonic()
        if stop_at and now >= stop_at and not _reasons:
            request(told)
        if left() == 0:
            _end(last_words)
        if _reasons and now - max(_asked, woken) > SWALLOWED_SECONDS:
            woken = now
            _wake_main()


def _end(last_words: LastWords) -> None:
    """End the process as it is: what is verified stands, and the rest has no manifest."""
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    where = f" ({Path(main.f_code.co_filename).name}:{main.f_lineno})" if main else ""
    error = Stopped(
        f"{_reasons[0]}, and after {_grace:g} seconds the work had not stopped by itself{where}; "
        "what was verified stands, and the same command goes on from there"
    )
    leave(lambda: last_words(error), error.exit_code, LAST_WORDS_SECONDS)


def leave(report: Callable[[], int], code: int, seconds: float) -> NoReturn:
    """End the process as it is, with the code that `report` gives, or with `code` where it takes too long.

    What keeps the work from ending may be the very disk that is reported to.
    """
    codes = [code]
    telling = threading.Thread(target=lambda: codes.append(report()), daemon=True)
    telling.start()
    telling.join(seconds)
    os._exit(codes[-1])


def _note(number: int, frame: FrameType | None) -> None:
    global _signalled
    now = time.monotonic()
    if _signals and now - _signalled > REPEAT_SECONDS and not _patient:
        os._exit(128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM))
    first = not _signals
    _signals.append(signal.Signals(number))
    reason = f"stopped by {signal.Signals(number).name}"
    if reason not in _reasons:
        request(reason)
    if first:
        _signalled = now
        _wake(number, frame)


def _wake(number: int, frame: FrameType | None) -> None:
    if not _deferred:
        check()


def request(reason: str, lost: bool = False) -> None:
    """Ask the loops of this process to stop; `lost`: because the run directory is another's now."""
    global _asked, _lost
    if not _reasons:
        _asked = time.monotonic()
    _reasons.append(reason)
    _lost = _lost or lost
    if threading.current_thread() is not threading.main_thread():
        _wake_main()


def _wake_main() -> None:
    main = threading.main_thread()
    if main.ident and signal.getsignal(WAKE) is _wake:
        signal.pthread_kill(main.ident, WAKE)


def check() -> None:
    """Raise `Stopped` (exit 75) if a stop was asked for. Call it wherever the state is whole."""
    if _lost:
        raise InUse(_reasons[-1])
    if _reasons:
        raise Stopped(f"{_reasons[0]}; the same command goes on")


def left() -> float | None:
    """Seconds until the process ends whatever it does, or None where nobody asked it to."""
    return max(_asked + _grace - time.monotonic(), 0.0) if _reasons else None


def signalled() -> signal.Signals | None:
    """The signal that asked first, if one did."""
    return _signals[0] if _signals else None


def by_keyboard() -> bool:
    """Whether a Ctrl-C and nothing else asked for the stop; it is then forgotten, so that work can go on."""
    only = _reasons == [f"stopped by {signal.SIGINT.name}"]
    if only:
        _reasons.clear()
        _signals.clear()
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
