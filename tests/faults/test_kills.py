"""Killed at times that nobody chose, then given again."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.ground import SCENARIOS, Ground, checkpoints, lost

TIMES = 50


def kill_and_rerun(ground: Ground, name: str, after: float) -> list[str]:
    """What is not as promised where a command is killed `after` so many seconds."""
    scenario = SCENARIOS[name]
    ground.restore(scenario.start)
    pid = ground.start(scenario)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):  # it was through
        os.kill(pid, signal.SIGKILL)
    killed = ground.stages.wait()
    wrong = [] if killed.returncode in (0, -signal.SIGKILL) else [killed.stderr]
    there, made = checkpoints(ground.run_dir), ground.made(scenario)
    result = ground.run(scenario)
    if result.returncode:
        wrong.append(f"exit {result.returncode}: {result.stderr[-2000:]}")
    if ground.made(scenario) != ground.reference(scenario):
        wrong.append("the artifact is not that of an undisturbed run")
    if gone := lost(there, checkpoints(ground.run_dir)):
        wrong.append(f"checkpoints {gone} are gone")
    if name == "train" and made is None and not wrong:
        resumed = ground.metrics(scenario)["resumed_from_step"]
        if resumed != max(there, default=None):
            wrong.append(f"it went on from {resumed}, and {list(there)} were there")
    return [f"{name}, killed after {after:.3f} s: {line}" for line in wrong]


@pytest.mark.sweep
@pytest.mark.promise("P2", "P3", "P4")
@pytest.mark.case("B23")
@pytest.mark.parametrize("name", ["prepare-data", "train", "generate"])
def test_killed_at_any_time_it_goes_on(
    ground: Ground, name: str, record_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    ground.restore(SCENARIOS[name].start)
    ground.run(SCENARIOS[name])
    longest = time.monotonic() - began
    chance = random.Random(name)
    found = [kill_and_rerun(ground, name, chance.uniform(0, longest)) for _ in range(TIMES)]
    record_property("tried", TIMES)
    record_property("held", sum(not wrong for wrong in found))
    told = [line for wrong in found for line in wrong]
    assert not told, "\n".join(told)
