"""The image that the tests are about, built by `make docker-build` from a checkout with canaries in it."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.image.__main__ import SWITCH
from tests.image.engine import AUTHORITIES, FOLDER

collect_ignore_glob = [] if SWITCH in os.environ else ["test_*.py"]

IMAGE = "lora-stages-test:cpu"
TORCH = next(
    line
    for line in (ROOT / "env/locks/cpu.in").read_text().splitlines()
    if line.startswith("torch==")
)
UID, OTHER_UID = 12345, 54321  # nobody knows them; of group 0, as make and OpenShift have it
HARD = (
    "--read-only --cap-drop=ALL --security-opt no-new-privileges --network none --tmpfs /tmp:exec"
)
# In the folder that is built from, in pip's settings, and nowhere in the image.
CANARIES = {
    "env/secrets.env": "HF_TOKEN=hf_CanaryOfTheSecretsFile0000000001\n",
    "data/rows.jsonl": '{"text": "### Human: CanaryOfTheData0001?### Assistant: Yes."}\n',
    "runs/old/adapter/adapter_model.safetensors": "CanaryOfTheAdapter0001\n",
    ".env": "AWS_SECRET_ACCESS_KEY=CanaryOfTheShell0001\n",
    ".git/config": "[credential]\n\tpassword = CanaryOfTheRepository0001\n",
    "pip.conf": f"[global]\ncert = {AUTHORITIES}\n# https://me:CanaryOfTheIndex0001@index\n",
}
Result = subprocess.CompletedProcess[str]


def run(*command: object, **options: object) -> Result:
    """A command's end and what it said."""
    words = list(map(str, command))
    return subprocess.run(words, text=True, capture_output=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def docker(*words: object) -> str:
    """What a docker command that succeeds says."""
    done = run("docker", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Checkout:
    """A copy of this repository, and make in it. cache: what is mounted as the container's cache."""

    folder: Path
    cache: Path

    def words(self, *words: str, flags: str = HARD) -> list[str]:
        """A make command on the CPU image."""
        given = {"IMAGE": IMAGE, "TORCH": "cpu", "CACHE_DIR": self.cache, "DOCKER_FLAGS": flags}
        return ["make", "-s", *words, *(f"{name}={value}" for name, value in given.items())]

    def as_user(self, uid: int | None) -> dict[str, object]:
        """What a subprocess needs to be another user, where that is allowed."""
        own = {"cwd": self.folder, "env": dict(os.environ) | {"HOME": str(self.cache)}}
        if uid is None or os.getuid():
            return own
        return own | {"user": uid, "group": 0, "extra_groups": []}

    def make(self, *words: str, uid: int | None = UID, flags: str = HARD) -> Result:
        """Make a target."""
        return run(*self.words(*words, flags=flags), **self.as_user(uid))


def give(folder: Path, uid: int) -> None:
    """Make a folder, and all in it, this user's, of group 0, which may do the same."""
    if not os.getuid():
        run("chown", "-R", f"{uid}:0", folder)
    run("chmod", "-R", "g+rwX", folder)


@pytest.fixture(scope="session")
def checkout(sample_model: Path) -> Iterator[Checkout]:
    """The tracked files and those that git would track, with the canaries, where every user may read them."""
    place = FOLDER / "checkout"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, run(*command, cwd=ROOT).stdout.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    for name, content in CANARIES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)
    cache = place / ".cache"
    shutil.copytree(sample_model, cache / "lora-stages" / sample_model.name)
    for folder in (cache, place / "runs"):
        give(folder, UID)
    yield Checkout(place, cache)
    shutil.rmtree(place)


@pytest.fixture(scope="session")
def index() -> Iterator[str | None]:
    """Where the wheel for the CPU is served from, if this machine's pip finds it; else make knows."""
    wheels = FOLDER / "index" / "torch"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(wheels),
        TORCH,
    ]
    if not any(wheels.glob("*.whl")) and run(*command).returncode:
        yield None
        return
    handler = functools.partial(Quiet, directory=str(wheels.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="session")
def image(checkout: Checkout, index: str | None) -> str:
    """The image for the CPU."""
    words = [f"BASE_IMAGE={os.environ[SWITCH]}"] + ([f"TORCH_INDEX_URL={index}"] if index else [])
    flags = "BUILD_FLAGS=--network host --secret id=pip,src=pip.conf"
    done = checkout.make("docker-build", *words, flags, uid=None)
    assert done.returncode == 0, done.stderr[-5000:]
    return IMAGE
