"""Several processes for one training: started through torchrun, watched, and their ends made one exit code.

The process that was called starts the others and trains nothing itself. The first of them, rank 0, holds the
run directory and writes; the others compute. As a program, `python -m stages.lib.run.several`, it is torchrun
without its report of what failed, which the processes give themselves.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from stages.lib.run import environment, exits, gpu, notes, preemption, scratch
from stages.lib.run.exits import CannotRun, Stopped, TryAgain
from stages.lib.run.progress import say
from stages.lib.run.rank import Hosts, Rank
from stages.lib.run.rundir import Run

TICK_SECONDS = 0.2
MARGIN_SECONDS = 5.0  # beyond the grace that the processes keep by themselves
LINGER_SECONDS = 3.0  # for the first process to say why it ends
FAR_SECONDS = 10.0  # for another host to do so
REASON = "error.{}.json"  # of a host that failed by itself, by its number
PREFIX = "lora-stages-ranks-"
FAULT, AGAIN = 70, TryAgain.exit_code


def start(run: Run, near: int) -> bool:
    """Run this command as `near` processes on each host; False where this one is to do the work itself.

    Returns:
        True when all have done their part.

    Raises:
        CannotRun: there are fewer GPUs. TryAgain: a process was lost. SystemExit: with the code that the
            processes ended with, which they have recorded and said.
    """
    if run.ctx.obj.rank:
        _answer(run.ctx.obj.rank)
        return False
    hosts = environment.hosts()
    if hosts.count * near == 1:
        return False
    there = len(gpu.look().gpus)
    if 0 < there < near:
        raise CannotRun(f"NUM_GPUS is {near}, and this machine has {there}; lower it")
    parent = environment.scratch_parent()
    parent.mkdir(parents=True, exist_ok=True)
    _forget(run, hosts)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as name:
        folder = Path(name)
        code = _Ranks(folder, hosts, near, run.ctx.params["grace_seconds"]).run()
        _conclude(run, _ends(folder), near, code, hosts)
    return True


class _Ranks:
    """The processes of this host, by way of torchrun."""

    def __init__(self, folder: Path, hosts: Hosts, near: int, grace: float) -> None:
        self.folder, self.near, self.grace = folder, near, grace
        self.among = f"of {hosts.count * near} " if hosts.count > 1 else ""
        self.asked: signal.Signals | None = None
        self.asked_at, self.again = 0.0, False
        where = ["--standalone"]
        if hosts.count > 1:
            where = [
                f"--nnodes={hosts.count}", f"--node-rank={hosts.number}",
                f"--master-addr={hosts.address}", f"--master-port={hosts.port}",
            ]  # fmt: skip
        own = ["-m", "stages", *sys.argv[1:]]
        self.command = [
            sys.executable, "-m", __name__, *where, f"--nproc-per-node={near}",
            "--max-restarts=0", *own,
        ]  # fmt: skip

    def run(self) -> int:
        """Start them, hand on what this process is told, and wait; torchrun's code."""
        preemption.listen()  # without a deadline: theirs is enough
        for number in preemption.SIGNALS:
            signal.signal(number, self._note)
        say(f"starting {self.near} {self.among}processes, one for each GPU")
        # A session of its own: a service signals whole groups, and torchrun would kill after 30 seconds.
        process = subprocess.Popen(
            self.command, env=environment.for_ranks(self.folder, self.near), start_new_session=True
        )
        told: set[int] = set()
        while process.poll() is None:
            time.sleep(TICK_SECONDS)
            if self.asked:
                self._tell(self.asked, told)
                late = time.monotonic() - self.asked_at > self.grace + MARGIN_SECONDS
                if late or self.again:
                    process.kill()
        self._tell(signal.SIGKILL, set())
        return process.returncode

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.again |= self.asked is not None and now - self.asked_at > preemption.REPEAT_SECONDS
        if not self.asked:
            self.asked, self.asked_at = signal.Signals(number), now

    def _tell(self, number: signal.Signals, told: set[int]) -> None:
        """Signal each process once, as soon as it is there and listens."""
        for path in self.folder.glob("*.pid"):
            pid = int(path.stem)
            if pid not in told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


def _ends(folder: Path) -> dict[int, dict[str, Any]]:
    """What each process of this host recorded of its end, by rank."""
    found = {int(path.stem): notes.read(path) for path in folder.glob("*.json")}
    return {rank: record for rank, record in found.items() if record}


def _forget(run: Run, hosts: Hosts) -> None:
    """Remove what this host, and any that is no more among them, left of the attempt before for the others."""
    with contextlib.suppress(OSError):
        for path in run.folder.glob(REASON.format("*")):
            number = path.name.split(".")[1]
            if number == str(hosts.number) or int(number) >= hosts.count:
                path.unlink(missing_ok=True)


def _other_hosts(run: Run, own: dict[str, Any] | None, hosts: Hosts) -> list[dict[str, Any]]:
    """Leave why this host failed, if it did so by itself, for the others; else what they left.

    A service may take the highest code of several, so that 75 here would have a job tried again for nothing.
    """
    if own:
        with contextlib.suppress(OSError):
            notes.write(run.folder / REASON.format(hosts.number), own)
        return []
    until = time.monotonic() + FAR_SECONDS
    while time.monotonic() < until:
        records = [notes.read(path) for path in run.folder.glob(REASON.format("*"))]
        if found := [record for record in records if record]:
            return found
        time.sleep(TICK_SECONDS)
    return []


def _conclude(
    run: Run, ends: dict[int, dict[str, Any]], near: int, code: int, hosts: Hosts | None = None
) -> None:
    """End as the processes did: for the reason of the one that failed, not of those that lost it."""
    if code == 0:
        return
    reasons = sorted(ends.values(), key=lambda end: end["at"])
    own = [end for end in reasons if end["exit"] not in (AGAIN, FAULT)]
    if hosts and hosts.count > 1 and not any(end["code"] == Stopped.slug for end in reasons):
        own += _other_hosts(run, next(iter(own), None), hosts)
    lost = len(ends) < near
    faults = [] if lost else [end for end in reasons if end["exit"] == FAULT]
    chosen = next(iter(own or faults or reasons), None)
    if chosen is None or (lost and not own):
        raise TryAgain(
            f"{near - len(ends)} of {near} processes were killed or lost, and the others ended; the same "
            "command goes on"
        )
    if 0 not in ends or ends[0]["exit"] != chosen["exit"]:
        with contextlib.suppress(OSError):
            notes.write(run.folder / exits.ERROR, chosen)
    sys.exit(int(chosen["exit"]))


def leave(rank: Rank | None, record: dict[str, Any]) -> bool:
    """Leave a process' end where the one that started it looks; whether it goes beside the run, too."""
    if rank is None:
        return True
    preemption.conclude()  # torchrun signals what is left when the first has ended
    if rank.folder:
        with contextlib.suppress(OSError):
            notes.write(rank.folder / f"{rank.number}.json", record | {"at": time.time()})
        until = time.monotonic() + LINGER_SECONDS
        first = rank.folder / "0.json"
        while rank.number and rank.number < rank.near and time.monotonic() < until:
            if first.exists():
                break
            time.sleep(TICK_SECONDS)
    return rank.number == 0


@contextlib.contextmanager
def ending(outcome: exits.Reported) -> Iterator[None]:
    """End a process that failed among several at once: its GPU may wait for another that is gone."""
    try:
        yield
    except SystemExit as end:
        if outcome.rank and end.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code))
        raise


def _answer(rank: Rank) -> None:
    """Let the process that started this one signal it from now on."""
    if rank.folder:
        with contextlib.suppress(OSError):
            (rank.folder / f"{os.getpid()}.pid").touch()


@contextlib.contextmanager
def work(run: Run) -> Iterator[Path]:
    """As `Run.work` in the first process; in the others a scratch folder alone."""
    rank: Rank | None = run.ctx.obj.rank
    if not rank or rank.number == 0:
        with run.work() as folder:
            yield folder
        return
    with scratch.folder() as folder:
        yield folder


def main() -> None:
    """torchrun, with its arguments, ending with 1 where a process failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    try:
        run.main(sys.argv[1:])
    except (ChildFailedError, SignalException):
        sys.exit(1)


if __name__ == "__main__":
    main()
