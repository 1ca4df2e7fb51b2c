"""A Slurm cluster of several nodes on one machine: munged, slurmctld, and a slurmd for each node."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.stand_in import PROGRAM

SWITCH = "LORA_STAGES_SLURM"  # the tests are collected where it is set
NODES, GPUS = 3, 8
# A requeued job may start again when its credential of before is over: after 120 s by default.
CREDENTIAL_SECONDS = 5
GRACE_SECONDS = 10  # from preemption to the end
# Three of the nodes are for a job of higher rank to take one away.
CONF = """\
ClusterName=one
SlurmctldHost={host}
SlurmctldPort=26817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential}
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
MpiDefault=none
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES
PartitionName=spare Nodes=n3 PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=n3 PriorityTier=9 PreemptMode=OFF
"""
MUNGE = {
    "socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log", "pid-file": "munged.pid",
    "seed-file": "munged.seed",
}  # fmt: skip
GOING = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SUSPENDED")


class Cluster:
    """Runs while it is entered; `folder` holds its state and the jobs' volumes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))
        self.folder.chmod(0o755)
        self.surroundings = dict(os.environ) | {
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}:/usr/sbin",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._begin()
        except BaseException:
            self.__exit__(AssertionError)
            raise
        return self

    def _begin(self) -> None:
        host, folder = socket.gethostname().split(".")[0], self.folder
        names = [f"n{number}" for number in range(1, NODES + 1)]
        for name in ("state", "bin", "gpus", *(f"spool.{node}" for node in names)):
            (folder / name).mkdir()
        for number in range(GPUS):
            (folder / "gpus" / str(number)).touch()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} Port={26821 + number} CPUs=64 RealMemory=655360 "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for number, node in enumerate(names)
        )
        text = CONF.format(
            host=host,
            folder=folder,
            nodes=nodes,
            credential=CREDENTIAL_SECONDS,
            grace=GRACE_SECONDS,
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpus/[0-{GPUS - 1}]\n")
        (folder / "bin" / "apptainer").write_text(
            PROGRAM.format(python=sys.executable, hosts=f"{folder}/hosts")
        )
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(names)}\n")
        (folder / "bin" / "apptainer").chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o400)
        files = [f"--{option}={folder}/{name}" for option, name in MUNGE.items()]
        self._start("munged", "--foreground", "--force", *files)
        self._start("slurmctld", "-D", "-c")
        for node in names:
            self._start("slurmd", "-D", "-N", node)
        self._wait_for_nodes()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(20)
        if kind is None:
            shutil.rmtree(self.folder)

    def _start(self, *command: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes.append(
            subprocess.Popen(command, env=self.surroundings, cwd=self.folder, **quiet)  # type: ignore[call-overload]
        )
        time.sleep(1)

    def _wait_for_nodes(self) -> None:
        until = time.monotonic() + 60
        asked = ("sinfo", "--Node", "--noheader", "--format=%N %T")
        while set((found := self.run(*asked)).split()[1::2]) != {"idle"}:
            assert time.monotonic() < until, f"nodes are {found}; see {self.folder}"
            time.sleep(0.5)

    def run(self, *command: str, folder: Path | None = None, **variables: str) -> str:
        """What a client of Slurm says."""
        done = subprocess.run(
            command, env=self.surroundings | variables, cwd=folder or self.folder, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def said(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)
