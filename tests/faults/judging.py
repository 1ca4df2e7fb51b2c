"""A fault, injected, and what is held against the promises then."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.faults.ground import SCENARIOS, STEPS, Ground, Scenario, checkpoints, lost
from tests.forking import Result

# How FAILPOINTS writes each, and the exit code of a command that it ends.
FAILURES = {
    "killed": (":kill", -9),
    "SIGTERM": (":term", 75),
    "EIO": (":EIO", 75),
    "EIO from then on": ("+:EIO", 75),
    "ENOSPC": (":ENOSPC", 73),
}
ARRIVALS = (1, 3)  # and the last


@dataclass(frozen=True)
class Fault:
    """A failure at the n-th arrival at a point, in a scenario."""

    scenario: str
    point: str
    arrival: int
    failure: str

    @property
    def armed(self) -> str:
        return f"{self.point}={self.arrival}{FAILURES[self.failure][0]}"

    def __str__(self) -> str:
        command = SCENARIOS[self.scenario]
        return f"{self.scenario}: FAILPOINTS={self.armed} {' '.join(command.args)}"


def faults(ground: Ground, name: str, failure: str) -> Iterator[Fault]:
    """One kind of failure at the first, the third and the last arrival at each point of a scenario."""
    trace = ground.trace(name)
    for point in SCENARIOS[name].only or dict.fromkeys(trace):
        there = trace.count(point)
        for arrival in sorted({n for n in (*ARRIVALS, there) if 1 <= n <= there}):
            yield Fault(name, point, arrival, failure)


def _late(trace: list[str], fault: Fault) -> bool:
    """Whether the artifact is being published by then, so that a stop may come too late."""
    places = [n for n, point in enumerate(trace) if point == fault.point]
    begins = "publish.begin" if "publish.begin" in trace else "grow.line"
    return places[fault.arrival - 1] >= len(trace) - 1 - trace[::-1].index(begins)


def _right_ends(ground: Ground, fault: Fault) -> set[int]:
    """A failure is ridden out or ends the command with its code; a stop is heard, unless all is done."""
    _, code = FAILURES[fault.failure]
    if fault.failure == "killed":
        return {code}
    if fault.failure == "SIGTERM" and not _late(ground.trace(fault.scenario), fault):
        return {code}
    return {0, code}


def _whole_iff_0(ground: Ground, scenario: Scenario, result: Result) -> Iterator[str]:
    """P1, and that what is there is what an undisturbed run makes."""
    made = ground.made(scenario)
    if made is not None and made != ground.reference(scenario):
        yield f"{scenario.artifact} is not that of the undisturbed run"
    if result.returncode == 0 and made is None:
        yield f"exit 0 without {scenario.artifact}"
    if result.returncode > 0 and made is not None and not scenario.forced:
        yield f"exit {result.returncode} although {scenario.artifact} is whole"


def _recorded(ground: Ground, scenario: Scenario, result: Result) -> Iterator[str]:
    """error.json says what the exit code says."""
    error = ground.error()
    said = (error["exit"], error["stage"]) if error else None
    if said != ((result.returncode, scenario.stage) if result.returncode > 0 else None):
        yield f"exit {result.returncode}, and error.json says {error}"
    if "Traceback" in result.stderr:
        yield f"a traceback: {result.stderr[-2000:]}"


def _left_behind(ground: Ground, fault: Fault, result: Result) -> Iterator[str]:
    if result.returncode >= 0:
        # Not taken, it is held by whoever was killed before; not given back, by a process that is gone.
        held = (ground.run_dir / "holder.json").exists()
        if held and fault.point not in ("lease.take", "lease.release"):
            yield "the run directory is still held"
        if list((ground.folder / "scratch").iterdir()):
            yield "scratch is not empty"


def noting(point: str, armed: str) -> str:
    """A failure at a point, and a note of every checkpoint that is saved, for `fewer`."""
    return armed if point == "checkpoint.saved" else f"{armed},checkpoint.saved=1+:note"


def fewer(before: dict[int, Any], there: dict[int, Any], result: Result) -> Iterator[str]:
    """Whether a command that saved checkpoints beyond those before has not left the last of them."""
    saved = result.stderr.count("failpoint checkpoint.saved\n")
    if max(there, default=0) < max(before, default=0) + saved:
        yield f"{saved} checkpoints were saved, and {list(there)} are there"


def try_fault(ground: Ground, fault: Fault) -> list[str]:
    """Have a command fail, look at what it left, and give it again; what is not as promised."""
    scenario = SCENARIOS[fault.scenario]
    ground.trace(fault.scenario)
    ground.restore(scenario.start)
    before = checkpoints(ground.run_dir)
    result = ground.run(scenario, noting(fault.point, fault.armed))
    try:
        wrong = list(_after(ground, fault, before, result))
        wrong += _again(ground, scenario)
    except AssertionError as half:
        wrong = [str(half).splitlines()[0]]
    return [f"{fault}: {line}" for line in wrong]


def _after(
    ground: Ground, fault: Fault, before: dict[int, dict[str, str]], result: Result
) -> Iterator[str]:
    scenario = SCENARIOS[fault.scenario]
    right = _right_ends(ground, fault)
    if result.returncode not in right:
        yield f"exit {result.returncode}, not {right}: {result.stderr[-2000:]}"
    yield from _whole_iff_0(ground, scenario, result)
    yield from _recorded(ground, scenario, result)
    yield from _left_behind(ground, fault, result)
    if scenario.forced:
        return
    there = checkpoints(ground.run_dir)
    if gone := lost(before, there):
        yield f"checkpoints {gone} are gone"
    yield from fewer(before, there, result)


def _again(ground: Ground, scenario: Scenario) -> Iterator[str]:
    """The same command, undisturbed: it goes on and ends as if nothing had been."""
    was_whole = ground.made(scenario) is not None
    there, answered = checkpoints(ground.run_dir), ground.answered()
    result = ground.run(scenario)
    if result.returncode:
        yield f"again: exit {result.returncode}: {result.stderr[-2000:]}"
        return
    yield from (f"again: {line}" for line in _whole_iff_0(ground, scenario, result))
    yield from (f"again: {line}" for line in _recorded(ground, scenario, result))
    if (ground.run_dir / "holder.json").exists() and not was_whole:
        yield "again: the run directory is still held"
    if scenario.forced or was_whole:
        return
    if gone := lost(there, checkpoints(ground.run_dir)):
        yield f"again: checkpoints {gone} are gone"
    metrics = ground.metrics(scenario)
    if scenario.stage == "train":
        newest = max(there, default=None)
        if metrics["resumed_from_step"] != newest or metrics["steps"] != STEPS:
            yield f"again: went on from {metrics['resumed_from_step']}, not from {newest}"
    if scenario.stage == "generate" and metrics["resumed"] != answered:
        yield f"again: went on after {metrics['resumed']} answers, not after {answered}"


def hold(ground: Ground, tried: Iterable[Fault], record: Callable[[str, object], None]) -> None:
    """Try some faults, and record how many were tried and held.

    Raises:
        AssertionError: some did not hold; with all that was wrong.
    """
    found = {fault: try_fault(ground, fault) for fault in tried}
    assert found, "nothing was tried"
    record("tried", len(found))
    record("held", sum(not wrong for wrong in found.values()))
    told = [line for wrong in found.values() for line in wrong]
    assert not told, "\n".join(told)
