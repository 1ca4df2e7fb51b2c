"""An engine to build and run the image with: the one that runs, else Debian's, started for the tests and ended.

Its images stay in FOLDER, so that the next time takes seconds. A debootstrapped tree stands in for the base
image: no registry is asked.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("/var/tmp/lora-stages-engine")
SOCKET = FOLDER / "docker.sock"
BASE, SUITE = (
    "lora-stages-base:bookworm",
    "bookworm",
)  # with Python 3.11, which the lock for the CPU is for
MIRROR = "http://deb.debian.org/debian"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
# No bridge and no rules: containers get no network, or the host's.
OPTIONS = (
    "--iptables=false", "--ip6tables=false", "--bridge=none", "--host-gateway-ip=127.0.0.1", "--group=root",
)  # fmt: skip
PATIENCE = 60  # seconds for the engine to answer


class NoEngine(Exception):
    """There is none, and none can be started; why, and the remedy."""


def surroundings(host: str | None) -> dict[str, str]:
    """The environment of a docker client; Debian's comes first, which has BuildKit in itself."""
    path = f"/usr/bin:/usr/sbin:{os.environ['PATH']}"
    at = {"DOCKER_HOST": host} if host else {}
    return dict(os.environ) | at | {"PATH": path, "DOCKER_BUILDKIT": "1"}


def answers(found: dict[str, str]) -> bool:
    """Whether an engine is there."""
    if not shutil.which("docker", path=found["PATH"]):
        return False
    command = ["docker", "info", "--format", "{{.ServerVersion}}"]
    done = subprocess.run(command, env=found, capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


@contextlib.contextmanager
def engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` finds an engine; one that was started here ends with it.

    Raises:
        NoEngine: none runs, and none can be started.
    """
    ours = surroundings(f"unix://{SOCKET}")
    for found in (surroundings(None), ours):
        if answers(found):
            yield found
            return
    if os.getuid() or not shutil.which("dockerd", path=ours["PATH"]):
        raise NoEngine(
            "no engine runs; start one, or, as root, apt-get install docker.io debootstrap"
        )
    process = _start(ours)
    try:
        yield ours
    finally:
        process.terminate()
        process.wait(60)


def _start(found: dict[str, str]) -> "subprocess.Popen[bytes]":
    FOLDER.mkdir(parents=True, exist_ok=True)
    places = [f"--data-root={FOLDER}/data", f"--exec-root={FOLDER}/exec", f"--pidfile={FOLDER}/pid"]
    with (FOLDER / "dockerd.log").open("wb") as log:
        process = subprocess.Popen(
            ["dockerd", "--host", found["DOCKER_HOST"], *places, *OPTIONS],
            env=found, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        if answers(found):
            return process
        time.sleep(1)
    process.terminate()
    process.wait(60)
    last = (FOLDER / "dockerd.log").read_text(errors="replace").splitlines()[-3:]
    raise NoEngine("dockerd does not start: " + " | ".join(last))


def base(found: dict[str, str]) -> str:
    """The name of a base image: BASE_IMAGE where it is set, else a debootstrapped one, made once.

    Raises:
        NoEngine: it cannot be made.
    """
    if os.environ.get("BASE_IMAGE"):
        return os.environ["BASE_IMAGE"]
    there = ["docker", "image", "inspect", BASE]
    if subprocess.run(there, env=found, capture_output=True, check=False).returncode == 0:
        return BASE
    if os.getuid() or not shutil.which("debootstrap", path=found["PATH"]):
        raise NoEngine("no base image: set BASE_IMAGE, or, as root, apt-get install debootstrap")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as place:
        tree = Path(place) / "base"
        command = [
            "debootstrap",
            "--variant=minbase",
            "--include=ca-certificates",
            SUITE,
            str(tree),
            MIRROR,
        ]
        subprocess.run(command, env=found, check=True, stdout=subprocess.DEVNULL)
        for left in ("var/cache/apt/archives", "var/lib/apt/lists", "var/log"):
            shutil.rmtree(tree / left)
            (tree / left).mkdir()
        if AUTHORITIES.exists():  # of this network, as a company's own base would have them
            shutil.copyfile(AUTHORITIES, tree / AUTHORITIES.relative_to("/"))
        tar = subprocess.Popen(["tar", "-C", str(tree), "-c", "."], stdout=subprocess.PIPE)
        subprocess.run(
            ["docker", "import", "-", BASE],
            env=found,
            stdin=tar.stdout,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        if tar.wait():
            raise NoEngine("tar could not read the tree of the base image")
    return BASE
