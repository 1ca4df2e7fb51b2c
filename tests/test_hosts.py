"""Two hosts are one process: two network namespaces with a cable, in each a command as its scheduler starts it.

As root, with iproute2. What Slurm itself sets is in `make slurm-test`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import clean_environment
from tests.forking import Forking
from tests.test_several import RECIPE, check_same, error, metrics

ABLE = os.getuid() == 0 and shutil.which("ip") and shutil.which("unshare")
pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(not ABLE, reason="NOT RUN: two hosts need root, `ip` and `unshare`"),
]
ADDRESSES = ("10.87.0.1", "10.87.0.2")
Process = subprocess.Popen[str]
# What each scheduler sets on the host of this number.
SCHEDULERS = {
    "any": lambda n: {"NNODES": "2", "NODE_RANK": str(n), "MASTER_ADDR": ADDRESSES[0]},
    "Slurm": lambda n: {
        "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": str(n), "SLURM_STEP_NODELIST": "host[0-1]",
        "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": str(n), "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NTASKS_PER_NODE": "1",
    },
    "TrainJob": lambda n: {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(n), "PET_MASTER_ADDR": "host0",
        "PET_MASTER_PORT": "29400", "JOB_COMPLETION_INDEX": str(n),
    },
    "JobSet": lambda n: {"NNODES": "2", "JOB_COMPLETION_INDEX": str(n), "MASTER_ADDR": "host0"},
    "AWS Batch": lambda n: {
        "AWS_BATCH_JOB_NUM_NODES": "2", "AWS_BATCH_JOB_NODE_INDEX": str(n),
        "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
    } | ({"AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": ADDRESSES[0]} if n else {}),
}  # fmt: skip


class Pair:
    """Two hosts, and what is started on them."""

    def __init__(self, cli: Forking, base: Path) -> None:
        self.folder, self.base, self.cli = cli.folder, base, cli
        self.names = [f"stages{os.getpid()}{number}" for number in range(2)]
        self.cable = [f"st{os.getpid() % 10**7}v{number}" for number in range(2)]
        for number, address in enumerate(ADDRESSES):
            # As Debian has it: a host's own name is on the loop.
            lines = ["127.0.0.1 localhost", f"127.0.1.1 host{number}"]
            lines += [f"{other} host{n}" for n, other in enumerate(ADDRESSES) if other != address]
            (cli.folder / f"hosts{number}").write_text("\n".join(lines) + "\n")

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """While they are there."""
        try:
            ip("link", "add", self.cable[0], "type", "veth", "peer", "name", self.cable[1])
            for name, end, address in zip(self.names, self.cable, ADDRESSES, strict=True):
                ip("netns", "add", name)
                ip("link", "set", end, "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
            yield
        finally:
            for name in self.names:
                with contextlib.suppress(subprocess.CalledProcessError):
                    ip("netns", "delete", name)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Without the cable."""
        ip("-n", self.names[0], "link", "set", self.cable[0], "down")
        try:
            yield
        finally:
            ip("-n", self.names[0], "link", "set", self.cable[0], "up")

    def begin(self, name: str) -> Path:
        return shutil.copytree(self.folder / "prepared", self.folder / name)

    def start(self, number: int, run: Path, scheduler: str = "any", **changed: str) -> Process:
        """The command on one host, whose name is its own."""
        ours = clean_environment(self.folder) | RECIPE | SCHEDULERS[scheduler](number)
        ours |= {
            "BASE_MODEL": str(self.base),
            "RUN_DIR": str(run),
            "OMP_NUM_THREADS": "1",
        } | changed
        own = f'mount --bind "{self.folder}/hosts{number}" /etc/hosts; hostname host{number}; exec "$@"'
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], "unshare", "--mount", "--uts", "sh", "-ec", own, "sh",
             sys.executable, "-m", "stages", "train"],
            env=ours, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def train(self, run: Path, scheduler: str = "any") -> list[tuple[int, str]]:
        """The codes of both, and what they say."""
        both = [self.start(n, run, scheduler) for n in range(2)]
        return [ended(process) for process in both]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def ended(process: Process, within: float = 150) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, err


def is_command(pid: int) -> bool:
    """Whether it is the one that was called, which starts the others."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[0] == os.fsencode(sys.executable) and words[1:3] == [b"-m", b"stages"]


@pytest.fixture(scope="module")
def pair(few: Forking, tiny: Path) -> Iterator[Pair]:
    found = Pair(few, tiny)
    whole = found.begin("whole")
    done = few("train", env=RECIPE | {"BASE_MODEL": str(tiny), "RUN_DIR": str(whole)})
    assert done.returncode == 0, done.stderr
    with found.joined():
        yield found


def of_session(pid: int) -> list[int]:
    """The processes that one started, by way of others too; itself the first."""
    found: list[int] = [pid]
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    for one in found:
        found += children.get(one, [])
    return found


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_two_hosts_are_one_process(pair: Pair, scheduler: str) -> None:
    run = pair.begin(scheduler)
    ends = pair.train(run, scheduler)
    assert [code for code, _ in ends] == [0, 0], ends
    assert metrics(run)["gpus"] == 2
    check_same(run, pair.folder / "whole")


def wait_for(path: Path) -> None:
    until = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.2)


def check_goes_on(pair: Pair, run: Path) -> None:
    assert error(run)["exit"] == 75
    ends = pair.train(run)
    assert [code for code, _ in ends] == [0, 0], ends
    assert metrics(run)["resumed_from_step"] == 2
    check_same(run, pair.folder / "whole")


@pytest.mark.parametrize("number", [0, 1])
def test_a_host_that_dies_ends_the_other_and_the_same_command_goes_on(
    pair: Pair, number: int
) -> None:
    """It stands still in its third step, so that the other waits for it, and is gone then."""
    run = pair.begin(f"dies {number}")
    both = [pair.start(n, run, FAILPOINTS=f"train.bin=5:hang@{number}") for n in range(2)]
    wait_for(run / "checkpoints" / "step-00000002" / "manifest.json")
    for pid in of_session(both[number].pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    code, said = ended(both[1 - number])
    assert code == 75, said
    assert time.monotonic() - began < 60
    ended(both[number])
    check_goes_on(pair, run)


def test_a_cut_cable_ends_both_and_the_same_command_goes_on(pair: Pair) -> None:
    run = pair.begin("cable")
    both = [pair.start(n, run, FAILPOINTS="train.bin=5:hang@1") for n in range(2)]
    wait_for(run / "checkpoints" / "step-00000002" / "manifest.json")
    with pair.cut():
        began = time.monotonic()
        ends = [ended(process) for process in both]
        assert [code for code, _ in ends] == [75, 75], ends
        assert time.monotonic() - began < 60
    check_goes_on(pair, run)


def test_a_signal_to_one_host_stops_both_before_the_same_step(pair: Pair) -> None:
    run = pair.begin("asked")
    both = [pair.start(n, run, EPOCHS="500") for n in range(2)]
    wait_for(run / "checkpoints")
    (command,) = [pid for pid in of_session(both[1].pid) if is_command(pid)]
    os.kill(command, signal.SIGTERM)
    ends = [ended(process) for process in both]
    assert [code for code, _ in ends] == [75, 75], ends
    assert error(run)["code"] == "stopped"
    assert not (run / "holder.json").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_what_fails_on_one_host_is_the_code_of_both(pair: Pair, number: int) -> None:
    """Slurm takes the higher of the two, so that 75 on the other would have the job tried again."""
    run = pair.begin(f"fails {number}")
    both = [pair.start(n, run, FAILPOINTS=f"train.bin=5:ENOSPC@{number}") for n in range(2)]
    ends = [ended(process) for process in both]
    assert [code for code, _ in ends] == [73, 73], ends
    assert error(run)["exit"] == 73
    ends = pair.train(run)
    assert [code for code, _ in ends] == [0, 0], ends
    assert not list(run.glob("error*"))
