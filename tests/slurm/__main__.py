"""The Slurm script on a real cluster: what is requeued, what the container gets, and a training on two nodes.

As root, with Debian's slurm-wlm and munge; minutes. A stand-in for apptainer notes what it is given and ends as
told, or runs the stages.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lib.jobs.orders import ODD, spec
from tests.slurm.cluster import GOING, SWITCH, Cluster

LIMIT_SECONDS = 400.0


@dataclass(frozen=True)
class Case:
    """What the container ends with, attempt by attempt, and what then becomes of the job.

    Attributes:
        plan: see `stand_in`. end: state, code and restarts. told: how often the container got SIGTERM.
        by: what stops the first attempt. name: of its folder.
    """

    name: str
    plan: str
    end: tuple[str, str, str]
    by: str = ""
    told: int = 0


CASES = (
    Case("stopped", "75 0", ("COMPLETED", "0:0", "1")),
    Case("bad-data", "65", ("FAILED", "65:0", "0")),
    Case("killed-codes", "137 143 0", ("COMPLETED", "0:0", "2")),
    Case("killed", "KILL TERM 0", ("COMPLETED", "0:0", "2")),
    Case("signalled", "wait 0", ("COMPLETED", "0:0", "1"), "scancel", told=1),
    Case("time-over", "wait 0", ("COMPLETED", "0:0", "1"), "limit", told=1),
    Case("preempted", "wait 0", ("COMPLETED", "0:0", "1"), "urgent", told=1),
    Case("preempted-deaf", "deaf 0", ("COMPLETED", "0:0", "1"), "urgent", told=2),
    Case("in-vain", " ".join(["75"] * 12), ("FAILED", "75:0", "9")),
)


class Trial:
    """A case on a cluster."""

    def __init__(self, cluster: Cluster, case: Case) -> None:
        self.cluster, self.case = cluster, case
        self.run, self.stopped = cluster.folder / case.name, False
        self.run.mkdir()
        (self.run / "plan").write_text(case.plan)
        runtime = 55 if case.by == "limit" else None  # a minute for Slurm, which is the least
        script = spec(
            "slurm", volume=str(self.run), gpu=None, secret=None, variables=ODD, runtime=runtime
        )
        (self.run / "job.sbatch").write_text(script)
        self.partition = ["--partition=spare"] if case.by == "urgent" else []
        self.job = self.submit("job.sbatch", *self.partition)
        self.found: dict[str, str] = {}

    def submit(self, *arguments: str) -> str:
        command = ["sbatch", "--parsable", *reversed(arguments)]
        return self.cluster.run(*command, folder=self.run, HF_TOKEN="hf_of_this_test")

    def look(self) -> bool:
        """See how far it is, and stop its first attempt as the case wants it; whether it has ended."""
        self.found = self.cluster.said(self.job)
        if not self.stopped and (self.run / "waiting").exists():
            self.stopped = True
            if self.case.by == "scancel":
                self.cluster.run("scancel", "--signal=TERM", self.job)
            if self.case.by == "urgent":
                self.submit(
                    "--wrap=sleep 20", "--exclusive", "--partition=urgent", "--output=/dev/null"
                )
        return self.found["JobState"] not in GOING

    def judge(self) -> bool:
        """Whether it is as expected; says so."""
        case, lines = self.case, (self.run / "calls.jsonl").read_text().splitlines()
        notes = [json.loads(line) for line in lines]
        calls = [note["environment"] for note in notes if "environment" in note]
        told = len(notes) - len(calls)
        prefix = "APPTAINERENV_"
        handed = {name: calls[0].get(prefix + name) for name in [*ODD, "HF_TOKEN"]}
        ended = tuple(self.found[name] for name in ("JobState", "ExitCode", "Restarts"))
        good = (
            ended == case.end
            and len(calls) == int(case.end[2]) + 1
            and told >= case.told
            and bool(told) == bool(case.told)
            and handed == ODD | {"HF_TOKEN": "hf_of_this_test"}
        )
        print(
            f"{'ok ' if good else 'BAD'} {case.name}: the container ends with {case.plan}; job {ended}, "
            f"{len(calls)} attempts, told {told} times",
            flush=True,
        )
        if not good:
            print("".join(log.read_text() for log in self.run.glob("*.log")), handed)
        return good


def tried(cluster: Cluster) -> list[bool]:
    """Which cases are as expected; they run at once."""
    # One node for both that are preempted, so one after the other.
    waiting = [case for case in CASES if case.name != "preempted-deaf"]
    trials = [Trial(cluster, case) for case in waiting]
    going, good, until = list(trials), [], time.monotonic() + LIMIT_SECONDS
    while going:
        for trial in list(going):
            if trial.look() or time.monotonic() > until:
                going.remove(trial)
                good.append(trial.judge())
                if trial.case.name == "preempted":
                    (last,) = set(CASES) - set(waiting)
                    going.append(Trial(cluster, last))
        time.sleep(1)
    return good


def main() -> int:
    """Submit every case, and hold what became of it against what was expected."""
    if os.getuid() or not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd", "munged"))):
        print("slurm-test: NOT RUN: it needs root, and `apt-get install slurm-wlm munge`")
        return 1
    with Cluster() as cluster:
        good = tried(cluster)
        if not all(good):
            shutil.copytree(cluster.folder, kept := Path(f"{cluster.folder}.failed"))
            print(f"what was logged is in {kept}")
    os.environ[SWITCH] = "1"
    return int(pytest.main(["-v", str(Path(__file__).parent)])) or int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
