"""Work shared among processes: in order, few at a time, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.lib.run import preemption, workers
from stages.lib.run.exits import BadData, TryAgain
from tests.conftest import ROOT

PARENT = """
import os, time
from stages.lib.run import workers

def work(job):
    if job:  # the first process is busy, another waits for work
        time.sleep(30)
    return os.getpid()

made = workers.in_order(work, iter(range(20)), 2)
print(next(made), flush=True)
time.sleep(30)
"""


def alive(pid: int) -> bool:
    """Whether a process runs: it is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


class Others:
    """The processes that were there before; what has come since are workers."""

    def __init__(self) -> None:
        self.known = set(children(os.getpid()))

    def since(self) -> list[int]:
        return [pid for pid in children(os.getpid()) if pid not in self.known]


@pytest.fixture
def others() -> Others:
    return Others()


def wait_until_gone(pids: list[int]) -> None:
    ends = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < ends, f"still running: {pids}"
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_jobs(processes: int) -> None:
    def work(job: int) -> tuple[int, int]:
        time.sleep(0.02 * (job % 3 == 0))
        return job, os.getpid()

    made = list(workers.in_order(work, range(30), processes))
    assert [job for job, _ in made] == list(range(30))
    pids = {pid for _, pid in made}
    assert pids == {os.getpid()} if processes == 1 else os.getpid() not in pids
    wait_until_gone([pid for pid in pids if pid != os.getpid()])
    assert list(workers.in_order(work, [], processes)) == []


def test_work_may_hold_what_cannot_be_sent() -> None:
    lock = open(os.devnull)  # noqa: SIM115 - no process could be sent an open file
    with lock:
        assert list(workers.in_order(lambda job: (job, lock.readable()), [1, 2], 2)) == [
            (1, True),
            (2, True),
        ]


@pytest.mark.parametrize("processes", [1, 2])
def test_few_jobs_are_under_way(processes: int) -> None:
    """However many there are, so that memory is bounded."""
    taken = 0

    def jobs() -> Iterator[int]:
        nonlocal taken
        for job in range(1000):
            taken += 1
            yield job

    made = workers.in_order(lambda job: job, jobs(), processes)
    for received in range(1, 50):
        next(made)
        assert taken <= received + (workers.AHEAD * processes if processes > 1 else 0)
    made.close()
    assert taken < 100


def test_processes_end_when_the_iterator_is_closed(others: Others) -> None:
    made = workers.in_order(lambda job: time.sleep(30 if job else 0) or os.getpid(), range(9), 2)
    next(made)
    started = others.since()
    assert len(started) == 2
    made.close()
    wait_until_gone(started)


def test_processes_end_when_a_job_fails(others: Others) -> None:
    def work(job: int) -> int:
        if job == 3:
            raise BadData("row 3 is bad; mend it")
        time.sleep(30 if job > 3 else 0)
        return job

    made = workers.in_order(work, range(20), 2)
    assert next(made) == 0
    started = others.since()
    with pytest.raises(BadData, match="row 3 is bad; mend it") as caught:
        list(made)
    assert caught.value.exit_code == 65
    wait_until_gone(started)


def test_processes_end_when_the_jobs_themselves_fail(others: Others) -> None:
    def jobs() -> Iterator[int]:
        yield from range(8)
        raise BadData("the file is cut off")

    made = workers.in_order(lambda job: job, jobs(), 2)
    next(made)
    started = others.since()
    with pytest.raises(BadData, match="cut off"):
        list(made)
    wait_until_gone(started)


def test_a_worker_that_is_killed_is_worth_another_try(others: Others) -> None:
    def work(job: int) -> int:
        if job == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    with pytest.raises(
        TryAgain, match=r"a worker process was killed, .* run the same command"
    ) as caught:
        list(workers.in_order(work, range(100), 2))
    assert caught.value.exit_code == 75
    wait_until_gone(others.since())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_request_to_stop_ends_it(
    processes: int, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "_reasons", [])
    made = workers.in_order(lambda job: job, range(100), processes)
    assert next(made) == 0
    preemption.request("stopped by SIGTERM")
    with pytest.raises(TryAgain, match="stopped by SIGTERM; the same command goes on"):
        list(made)
    wait_until_gone(others.since())


@pytest.mark.case("G9")
def test_signals_are_left_to_the_parent() -> None:
    """Ctrl-C reaches the whole group: workers go on until their parent has closed what it writes."""

    def work(job: int) -> int:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), name)
        return job

    assert list(workers.in_order(work, range(4), 2)) == [0, 1, 2, 3]


@pytest.mark.case("G9")
def test_no_process_outlives_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout
        first = int(parent.stdout.readline())
        started = children(parent.pid)
        assert len(started) == 2
        assert first in started
        assert all(map(alive, started))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until_gone(started)


def test_no_more_processes_than_cores() -> None:
    assert 1 <= workers.available() <= min(workers.MOST, os.cpu_count() or 1)
