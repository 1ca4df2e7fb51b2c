"""Work shared among processes of this machine: results in order, few of them waiting."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from stages.lib.run import environment, preemption
from stages.lib.run.exits import TryAgain

Given = TypeVar("Given")
Made = TypeVar("Made")
MOST = 16
AHEAD = 3  # jobs that wait for each process
YOUNG = 100_000  # objects between two collections; a job makes many, and hardly a cycle
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_work: Callable[[Any], Any]


def available() -> int:
    """Processes worth starting: as many as cores, at most MOST; one where forking is not safe."""
    return min(MOST, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1


def _nothing(job: Any) -> None:
    """Of no job is it known what becomes of it."""


def in_order(
    work: Callable[[Given], Made],
    jobs: Iterable[Given],
    processes: int,
    known: Callable[[Given], Made | None] = _nothing,
) -> Generator[Made, None, None]:
    """`work` done for each job, in their order, with a bounded number of jobs under way.

    The processes are forked, so `work` may hold what cannot be sent to another process. Close the iterator to
    end them. What is `known` of a job is not worked out again.

    Raises:
        TryAgain: a process was killed.
    """
    if processes < 2:
        for job in jobs:
            preemption.check()
            found = known(job)
            yield work(job) if found is None else found
        return
    gc.freeze()  # a collection would touch, and so copy, every page that the processes share
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(work, os.getpid()),
    )
    waiting: deque[Future[Made]] = deque()
    try:
        for job in jobs:
            found = known(job)
            waiting.append(pool.submit(_do, job) if found is None else _done(found))
            if len(waiting) > AHEAD * processes:
                preemption.check()
                yield waiting.popleft().result()
        while waiting:
            preemption.check()
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TryAgain(
            "a worker process was killed, for want of memory perhaps; run the same command again"
        ) from error
    finally:
        _end(pool)


def _done(found: Made) -> Future[Made]:
    done: Future[Made] = Future()
    done.set_result(found)
    return done


def _end(pool: ProcessPoolExecutor) -> None:
    started = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in started:
        process.kill()


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """What a new process does first: leave signals to its parent, and go when it goes."""
    global _work
    _work = work
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it went before it could be asked
        os._exit(1)
    environment.use_one_thread()
    gc.set_threshold(YOUNG)


def _do(job: Any) -> Any:
    return _work(job)
