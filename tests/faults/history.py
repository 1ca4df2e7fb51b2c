"""A run to which anything happens, in any order; the promises hold after each event, and it ends well."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.faults.ground import SCENARIOS, Ground, checkpoints, lost
from tests.faults.judging import FAILURES, fewer, noting
from tests.forking import Result

TRAIN = SCENARIOS["train"]
YEAR = 365 * 86400.0


def machine(ground: Ground, happened: list[str]) -> type[RuleBasedStateMachine]:
    """What can happen to a run in `ground`; what did is appended to `happened`."""
    trace = ground.trace("train")

    def arrivals(points: list[str]) -> st.SearchStrategy[tuple[str, int]]:
        return st.sampled_from(points).flatmap(
            lambda point: st.tuples(st.just(point), st.integers(1, trace.count(point)))
        )

    places = arrivals(sorted(set(trace)))
    saving = arrivals(
        [point for point in sorted(set(trace)) if point.startswith(("checkpoint", "publish"))]
    )

    class Run(RuleBasedStateMachine):
        """Prepared data, and a `train` that is to end."""

        def __init__(self) -> None:
            super().__init__()
            self.begin()

        def begin(self) -> None:
            """A run of which nothing is there yet."""
            ground.restore(TRAIN.start)
            self.verified: dict[int, dict[str, str]] = {}
            self.hiccups = 0  # without an end of another kind

        def note(self, event: str) -> None:
            happened.append(event)

        def judge(self, result: Result, *codes: int) -> None:
            """P1: the exit code and the artifact say the same."""
            error = ground.error() or {}
            if error.get("code") == "no-progress":
                assert self.hiccups >= 3
                assert result.returncode == 70
                self.hiccups = 0
            else:
                assert result.returncode in (0, *codes), result.stderr
            made = ground.made(TRAIN)
            assert made in (None, ground.reference(TRAIN))
            if result.returncode >= 0:
                assert (result.returncode == 0) == (made is not None), result.stderr
            if made is not None:  # to go on would be to look at nothing; once more changes nothing
                assert ground.run(TRAIN).returncode == 0
                assert ground.made(TRAIN) == made
                self.begin()

        @rule()
        def run(self) -> None:
            """Undisturbed, it ends."""
            self.note("run")
            self.judge(ground.run(TRAIN))

        @rule(place=places | saving, failure=st.sampled_from(sorted(FAILURES)))
        def fail(self, place: tuple[str, int], failure: str) -> None:
            """Killed, told to stop, on a bad volume or a full disk."""
            how, code = FAILURES[failure]
            self.note(failure)
            point, arrival = place
            result = ground.run(TRAIN, noting(point, f"{point}={arrival}{how}"))
            there = checkpoints(ground.run_dir, damaged=True)
            assert not list(fewer(self.verified, there, result))
            self.judge(result, code)
            if failure.startswith("EIO"):
                self.hiccups += result.returncode == code
            elif result.returncode in (0, 73):
                self.hiccups = 0

        @rule(name=st.sampled_from(range(9)), how=st.sampled_from(["flip", "cut", "remove"]))
        def damage(self, name: int, how: str) -> None:
            """A file of the newest checkpoint is not what it was."""
            there = checkpoints(ground.run_dir, damaged=True)
            if there:
                newest = max(there)
                folder = ground.run_dir / "checkpoints" / f"step-{newest:08d}"
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                _damage(files[name % len(files)], how)
                del self.verified[newest]
                self.note(how)

        @rule()
        def another_runner(self) -> None:
            """While one holds the run directory, another is refused, and changes nothing."""
            self.note("another runner")
            first = ground.start(TRAIN, "scratch:hang")
            holder = ground.run_dir / "holder.json"
            pid, deadline = f'"pid": {first}', time.monotonic() + 30
            while time.monotonic() < deadline:
                with contextlib.suppress(FileNotFoundError):
                    if pid in holder.read_text():
                        break
                time.sleep(0.01)
            second = ground.beside(TRAIN)
            assert second.returncode == 75, second.stderr
            assert f"process {first}" in second.stderr
            os.kill(first, signal.SIGKILL)
            assert ground.stages.wait().returncode == -signal.SIGKILL

        @rule(years=st.sampled_from([-1, 0, 1]))
        def jump(self, years: int) -> None:
            """All files are of another time, and of the same."""
            self.note("clock")
            then = time.time() + years * YEAR
            for path in ground.run_dir.rglob("*"):
                os.utime(path, (then, then))

        @invariant()
        def no_checkpoint_is_lost(self) -> None:
            """P4."""
            there = checkpoints(ground.run_dir, damaged=True)
            assert not lost(self.verified, there)
            self.verified = there

        def teardown(self) -> None:
            """The same command ends with what an undisturbed run makes."""
            result = ground.run(TRAIN)
            self.judge(result)
            if result.returncode:  # that was the end of a loop; the next attempt is let in
                result = ground.run(TRAIN)
                self.judge(result)
            assert result.returncode == 0

    return Run


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def try_runs(ground: Ground, runs: int, events: int, record: Callable[[str, object], None]) -> None:
    happened: list[str] = []
    profile = settings(
        max_examples=runs, stateful_step_count=events, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), print_blob=False,
        phases=[Phase.generate],  # to find a shorter one takes hours
    )  # fmt: skip
    run_state_machine_as_test(machine(ground, happened), settings=profile)
    record("tried", len(happened))
