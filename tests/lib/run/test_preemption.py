"""Asked to stop, a process stops: where it is, where it polls, or when its time is over."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from stages.lib.run import preemption
from stages.lib.run.exits import Stopped, TryAgain

# Deaf to everything but its deadline: work that polls nowhere, and last words that never end.
DEAF = """
import sys, time
from stages.lib.run import preemption
def last_words(error):
    print(error.message, flush=True)
    if sys.argv[1] == "hung":
        time.sleep(60)
    return 75
preemption.LAST_WORDS_SECONDS = 0.5
preemption.listen(0.5, float(sys.argv[2]) if len(sys.argv) > 2 else None, last_words)
with preemption.deferred():
    print("at work", flush=True)
    time.sleep(60)
"""

# As libraries do round what they take for a failure of the network.
DULL = """
try:
    print("at work", flush=True)
    time.sleep(60)
except Exception:
    print("swallowed", flush=True)
try:
    time.sleep(60)
except Exception:
    sys.exit(75)
"""


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    preemption.listen()
    yield
    preemption.listen()


@pytest.mark.case("G8")
@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_stops_what_does_not_poll(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=f"stopped by {number.name}; the same command goes on") as end:
        signal.raise_signal(number)
    assert end.value.exit_code == 75
    assert preemption.signalled() == number


def test_a_loop_that_polls_is_asked() -> None:
    with preemption.deferred():
        assert preemption.left() is None
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(TryAgain, match="stopped by SIGTERM"):
            preemption.check()


def test_the_time_that_is_left_runs_down() -> None:
    preemption.listen(grace=0.3)
    assert preemption.left() is None
    preemption.request("enough")
    first = preemption.left()
    time.sleep(0.1)
    second = preemption.left()
    assert first is not None
    assert second is not None
    assert 0 < second <= first - 0.1 < 0.3
    time.sleep(0.3)
    assert preemption.left() == 0


def test_a_thread_stops_the_work_where_nothing_polls() -> None:
    began = time.monotonic()
    threading.Timer(0.2, lambda: preemption.request("enough")).start()
    with pytest.raises(Stopped, match="enough"):
        time.sleep(20)
    assert time.monotonic() - began < 5
    assert preemption.signalled() is None


def test_behind_the_work_a_signal_changes_nothing() -> None:
    preemption.conclude()
    signal.raise_signal(signal.SIGTERM)
    preemption.listen()
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)


def deaf(*args: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, *args], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.case("G7")
@pytest.mark.parametrize("how", ["", "hung"])
def test_the_end_does_not_wait_for_the_work(how: str) -> None:
    process = deaf(how)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 75
    assert 0.4 < time.monotonic() - began < 5
    assert said.startswith("stopped by SIGTERM, and after 0.5 seconds the work had not stopped")
    assert "(<string>:" in said


def test_the_end_comes_before_the_limit() -> None:
    began = time.monotonic()
    process = deaf("", "1.2")
    said, _ = process.communicate()
    assert process.returncode == 75
    assert time.monotonic() - began < 5
    assert said.startswith("MAX_RUNTIME of 1.2 seconds is near, and after 0.5 seconds")


@pytest.mark.case("G7")
def test_a_signal_behind_the_limit_is_the_first_one() -> None:
    """A service's own signal comes while the state is saved, and must not cut that short."""
    with preemption.deferred():
        preemption.request("MAX_RUNTIME of 5 seconds is near")
        time.sleep(0.1)
        preemption._asked -= 2 * preemption.REPEAT_SECONDS
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="MAX_RUNTIME"):
            preemption.check()


@pytest.mark.case("G2", "G3")
def test_a_stop_that_is_swallowed_is_raised_again() -> None:
    code = DEAF.replace("listen(0.5", "listen(20").partition("with preemption.deferred")[0] + DULL
    process = subprocess.Popen([sys.executable, "-c", code, ""], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert (process.returncode, said) == (75, "swallowed\n")
    assert time.monotonic() - began < 10


@pytest.mark.case("G7")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_the_second_one_ends_it_at_once(number: signal.Signals, code: int) -> None:
    late = DEAF.replace("listen(0.5", "REPEAT_SECONDS = 0.2; preemption.listen(20")
    with subprocess.Popen([sys.executable, "-c", late, ""], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        for _ in range(3):
            os.kill(process.pid, number)
            time.sleep(0.15)
    assert process.returncode == code
