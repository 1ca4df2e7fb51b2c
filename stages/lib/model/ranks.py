"""The processes that train together: what they agree on, and the one sum that they make of each step.

Every process has the whole adapter and computes some of a step's bins. Decisions go by way of the hosts (gloo),
so that none waits in a GPU for another that has stopped; gradients by way of the GPUs (NCCL), if there are any.
"""

import contextlib
import datetime
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import distributed

from stages.lib.run import environment, lease, preemption, watchdog
from stages.lib.run.exits import GateFailed, StageError, Stopped, TryAgain
from stages.lib.run.rank import Rank, own_address

# The first process may fetch a base for hours; that the others are alive is what the pulse is for.
PATIENCE = datetime.timedelta(days=2)
MEETING = datetime.timedelta(minutes=5)  # from the first that is ready to the last
BEAT_SECONDS, LOST_BEATS = 4.0, 10
LEAVE_SECONDS = 5.0
DONE = b"done"
Made = TypeVar("Made")


class Lost(TryAgain):
    """Another process of this run is gone."""


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What the library says of a process that is gone, as `Lost`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise _lost(error) from error


def _lost(error: Exception) -> Lost:
    said = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0].splitlines()[0]
    return Lost(f"another process of this run is gone ({said}); the same command goes on")


class Ranks:
    """All processes of a run, seen from one of them; without a rank it is alone, and nothing is waited for.

    Args:
        rank: as the launcher gave it. last_words: told of the end that a lost process makes; its code.

    Attributes:
        number, count: of this process and all; near: on this host. first: it is the one that writes.
        joined: each pass through the model needs all of them, because each has a part of the base.
    """

    def __init__(
        self, rank: Rank | None = None, last_words: Callable[[StageError], int] | None = None
    ) -> None:
        self.number, self.count = (rank.number, rank.count) if rank else (0, 1)
        self.near = rank.near if rank else 1
        self.alone = rank is None  # else there are collectives, though it may be the only one
        self.first = self.number == 0
        self.joined = self.stopped = False
        self._done = threading.Event()
        if rank:
            with _together():
                self._meet(rank, last_words)

    def _meet(self, rank: Rank, last_words: Callable[[StageError], int] | None) -> None:
        serves = not rank.served and self.first
        store = distributed.TCPStore(rank.address, rank.port, rank.count, serves, MEETING)
        self._pulse = _Pulse(rank, last_words, self._done)
        if rank.count > rank.near:
            environment.use_interface(_other_host(rank, store))
        store.set_timeout(PATIENCE)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(
            backend, store=distributed.PrefixStore("run", store), rank=self.number,
            world_size=self.count, timeout=PATIENCE,
        )  # fmt: skip
        self.hosts = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def mine(self, items: int) -> range:
        """Which of so many things this process does."""
        return range(self.number, items, self.count)

    def check(self) -> None:
        """As `preemption.check`, at which all processes stop before the step is taken.

        Where passes need all of them, they agree before each, and so stop at the same one.
        """
        if self.joined:
            self.agree()
            return
        with self.stopping():
            preemption.check()

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Let the others, who come to their `agree`, know of a stop that is raised in here."""
        try:
            yield
        except Lost:
            raise
        except TryAgain:
            if not self.stopped:
                with contextlib.suppress(TryAgain):
                    self.agree()
            raise

    def agree(self, one: float = 0, two: float = 0) -> tuple[float, float]:
        """The sums of two numbers over all processes.

        Raises:
            Stopped: any of them was asked to stop: so all do, at the same place. Lost: one is gone.
        """
        if self.alone:
            return one, two
        asked = float(preemption.left() is not None)
        sums = torch.tensor([asked, one, two], dtype=torch.float64)
        with _together():
            distributed.all_reduce(sums, group=self.hosts)
        stop, one, two = sums.tolist()
        if stop:
            self.stopped = True
            preemption.check()
            raise Stopped("another process was asked to stop; the same command goes on")
        return one, two

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all processes; a GPU does so in the order of its work."""
        with _together():
            distributed.all_reduce(tensor)

    def each(self, value: float) -> list[float]:
        """A number of every process."""
        if self.count == 1:
            return [value]
        own = torch.tensor([value], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        with _together():
            distributed.all_gather(found, own, group=self.hosts)
        return [float(one) for one in found]

    def rounds(self, items: int) -> int:
        """How many of so many things any process does at most."""
        return -(-items // self.count)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """A pass through the model, which may bring parts of it together: a process that is gone is `Lost`."""
        try:
            yield
        except RuntimeError as error:
            library = isinstance(error, distributed.DistBackendError) or "gloo" in str(error)
            if not (self.joined and library):
                raise
            raise _lost(error) from error

    def of_first(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, in all of them."""
        made: list[Any] = [make() if self.first else None]
        if not self.alone:
            with _together():
                distributed.broadcast_object_list(made, src=0, group=self.hosts)
            watchdog.alive()
        return made[0]

    def after_first(self, work: Callable[[], object]) -> None:
        """Do something in the first process, and then in the others, which find it done."""
        if self.first:
            work()
        self.wait()
        if not self.first:
            work()

    def wait(self) -> None:
        """Until all processes have come so far."""
        if not self.alone:
            with _together():
                distributed.barrier(group=self.hosts)

    def check_same(self, adapter: torch.Tensor) -> None:
        """Hold the adapter of this process against that of the first.

        Raises:
            GateFailed: they differ.
        """
        if self.alone:
            return
        own = hashlib.sha256(adapter.detach().cpu().numpy().tobytes()).hexdigest()
        if self.of_first(lambda: own) != own:
            raise GateFailed(
                f"the adapter in process {self.number} is not what it is in the first; run the stage again, "
                "and if that does not help, a GPU or this program is at fault"
            )

    def close(self) -> None:
        """This process needs the others no longer."""
        self._done.set()
        if not self.alone:
            self._pulse.thread.join()
            distributed.destroy_process_group()


def _other_host(rank: Rank, store: distributed.TCPStore) -> str:
    """The address of another host of this run: of the first, or to the first that of one which reaches it."""
    if rank.number < rank.near:
        return str(store.get("another host").decode())
    store.set("another host", own_address(rank.address, rank.port))
    return rank.address


class _Pulse:
    """A counter of each process in their store: the first watches all of them, the others watch the first.

    A call on a store whose host is cut off does not return: what waits for it is watched by another thread.
    """

    def __init__(
        self,
        rank: Rank,
        last_words: Callable[[StageError], int] | None,
        done: threading.Event,
    ) -> None:
        self.rank, self.last_words, self.done = rank, last_words, done
        others = range(1, rank.count) if rank.number == 0 else [0]
        self.seen = dict.fromkeys(others, (b"", 0))  # what was seen, and how often
        self.beats = 0
        self.thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self.thread.start()
        threading.Thread(target=self._time, name="pulse watch", daemon=True).start()

    def _watch(self) -> None:
        own = f"pulse/{self.rank.number}"
        wait = datetime.timedelta(seconds=BEAT_SECONDS * LOST_BEATS)
        try:
            # A connection of its own: one call on a store waits for another.
            store = distributed.TCPStore(
                self.rank.address, self.rank.port, is_master=False, timeout=wait
            )
            while not self.done.wait(BEAT_SECONDS):
                store.set(own, str(self.beats + 1))
                self._look(store)
                self.beats += 1
                if self.rank.parent and not lease.is_running(self.rank.parent):
                    preemption.request("the process that started this one is gone")
            store.set(own, DONE)
        except RuntimeError as error:
            if not self.done.is_set():
                self._end(f"the processes' store is gone ({str(error).splitlines()[0][:200]})")

    def _time(self) -> None:
        before, times = self.beats, 0
        while not self.done.wait(BEAT_SECONDS):
            times = times + 1 if self.beats == before else 0
            before = self.beats
            if times > LOST_BEATS:  # a beat later than the store's own timeout
                self._end(f"the processes' store has not answered for {times * BEAT_SECONDS:.0f} s")

    def _look(self, store: Any) -> None:
        keys = [f"pulse/{number}" for number in self.seen]
        for number, key in zip(self.seen, keys, strict=True):
            value = store.get(key) if store.check([key]) else b""
            before, times = self.seen[number]
            times = times + 1 if value == before and value != DONE else 0
            self.seen[number] = value, times
            if times >= LOST_BEATS:
                self._end(
                    f"process {number} of {self.rank.count} has not moved for {LOST_BEATS * BEAT_SECONDS:.0f} s"
                )

    def _end(self, what: str) -> None:
        error = Lost(f"{what}; the same command goes on")
        told = self.last_words or (lambda error: error.exit_code)
        preemption.leave(lambda: told(error), error.exit_code, LEAVE_SECONDS)
