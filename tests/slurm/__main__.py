"""The Slurm script on a cluster of one machine: what is requeued, and what the container gets.

As root, with Debian's slurm-wlm and munge. A stand-in for apptainer notes what it is given and ends as told.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.lib.jobs.orders import ODD, spec

CONF = """\
ClusterName=one
SlurmctldHost={host}
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
KillWait=2
MpiDefault=none
ReturnToService=2
GresTypes=gpu
NodeName={host} CPUs=8 RealMemory=65536 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""
STAND_IN = """\
#!{python}
import json, os, signal, sys, time
volume = next(w for w in sys.argv if ":/runs" in w).partition(":/runs")[0]
plan = open(volume + "/plan").read().split()
open(volume + "/plan", "w").write(" ".join(plan[1:]))
with open(volume + "/calls.jsonl", "a") as file:
    file.write(json.dumps({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}) + "\\n")
if plan[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open(volume + "/waiting", "w").close()
    time.sleep(300)
sys.exit(int(plan[0]))
"""
# What the container ends with, attempt by attempt: the state, code and restarts of the job.
CASES = {
    "75 0": ("COMPLETED", "0:0", "1"),
    "65": ("FAILED", "65:0", "0"),
}


def start(folder: Path, processes: list["subprocess.Popen[bytes]"]) -> dict[str, str]:
    """Start munged, slurmctld and slurmd; the environment in which their clients find them."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\n")
    (folder / "bin" / "apptainer").write_text(STAND_IN.format(python=sys.executable))
    (folder / "bin" / "apptainer").chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    surroundings = dict(os.environ) | {
        "SLURM_CONF": f"{folder}/slurm.conf",
        "PATH": f"{folder}/bin:{os.environ['PATH']}:/usr/sbin",
    }
    files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log"}
    files |= {"pid-file": "munged.pid", "seed-file": "munged.seed"}
    munged = ["munged", "--foreground", "--force"]
    for command in (
        [*munged, *(f"--{option}={folder}/{name}" for option, name in files.items())],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", host],
    ):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, env=surroundings, cwd=folder, **quiet))
        time.sleep(1)
    return surroundings


def said(job: str, surroundings: dict[str, str]) -> dict[str, str]:
    """What Slurm says of a job."""
    command = ["scontrol", "show", "job", "--oneliner", job]
    done = subprocess.run(command, env=surroundings, text=True, capture_output=True, check=True)
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def main() -> int:
    """Submit every case, and hold what became of it against what was expected."""
    if os.getuid() or not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd", "munged"))):
        print("slurm-test: NOT RUN: it needs root, and `apt-get install slurm-wlm munge`")
        return 1
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))
    folder.chmod(0o755)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        surroundings = start(folder, processes)
        jobs = {plan: submit(folder, plan, surroundings) for plan in CASES}
        return max([judge(folder, plan, job, surroundings) for plan, job in jobs.items()])
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)


def submit(folder: Path, plan: str, surroundings: dict[str, str]) -> str:
    """Hand the script of a case to sbatch; the number of the job."""
    run = folder / plan.replace(" ", "-")
    run.mkdir()
    (run / "plan").write_text(plan)
    script = spec("slurm", volume=str(run), gpu=None, secret=None, variables=ODD)
    (run / "job.sbatch").write_text(script)
    command = ["sbatch", "--parsable", "job.sbatch"]
    asked = surroundings | {"HF_TOKEN": "hf_of_this_test"}
    done = subprocess.run(command, env=asked, cwd=run, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def judge(folder: Path, plan: str, job: str, surroundings: dict[str, str]) -> int:
    """Wait for the end of a case: 0 where it is as expected."""
    run, until, told = folder / plan.replace(" ", "-"), time.monotonic() + 400, False
    while (found := said(job, surroundings))["JobState"] in (
        "PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING",
    ) and time.monotonic() < until:  # fmt: skip
        if found["JobState"] == "PENDING" and found["Restarts"] != "0":
            # Slurm lets two minutes pass before a second start.
            now = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(now, env=surroundings, check=False, capture_output=True)
        if not told and (run / "waiting").exists():
            told = True
            subprocess.run(["scancel", "--signal=TERM", job], env=surroundings, check=True)
        time.sleep(0.5)
    ended = (found["JobState"], found["ExitCode"], found["Restarts"])
    calls = [json.loads(line) for line in (run / "calls.jsonl").read_text().splitlines()]
    prefix = "APPTAINERENV_"
    odd = {name: calls[0]["environment"].get(prefix + name) for name in ODD}
    good = ended == CASES[plan] and len(calls) == len(plan.split()) and odd == ODD
    good = good and calls[0]["environment"].get(f"{prefix}HF_TOKEN") == "hf_of_this_test"
    print(
        f"{'ok ' if good else 'BAD'} container ends with {plan}: job {ended}, {len(calls)} attempts"
    )
    if not good:
        print("".join(log.read_text() for log in run.glob("*.log")), odd if odd != ODD else "")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
