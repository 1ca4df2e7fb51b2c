"""Any user, a read-only root file system, no capabilities, no network; and what files of another user's say."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.forking import Forking, forking
from tests.refusals import refused, write_preset
from tests.storage.conftest import RECIPE
from tests.storage.mounts import skip

UID = 123456
CONFINED = Path(__file__).parent / "confined.sh"


WHO = """
import os, socket, stages, sys
status = [line.split() for line in open("/proc/self/status")]
print(os.getuid(), os.getgid(), [words[1] for words in status if words[0] in ("CapEff:", "CapBnd:")])
try:
    open(sys.argv[1], "w")
except OSError as error:
    print(error.strerror)
print([name for _, name in socket.if_nameindex()])
"""


@dataclass
class Place:
    """A folder outside pytest's own, which only root may enter; `run` and `scratch` may be written in it."""

    folder: Path
    stages: Forking

    @property
    def run(self) -> Path:
        return self.folder / "rw" / "run"

    def __call__(self, stage: str, *args: str, code: int = 0) -> str:
        done = self.stages(
            "--env-file", self.folder / "tiny.env", stage, "--run-dir", self.run, *args
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout


def hidden() -> tuple[str, str]:
    """The folder that another user may not enter on the way to the interpreter, and where that lies."""
    python = Path(sys.base_prefix)
    closed = [path for path in (python, *python.parents) if not path.stat().st_mode & stat.S_IXOTH]
    return (str(closed[-1]), str(python)) if closed else ("", "")


@pytest.fixture(scope="module")
def place(tiny: Path, rows: Path) -> Iterator[Place]:
    if os.getuid():
        skip("only root can become another user")
    folder = Path(tempfile.mkdtemp(prefix="any-user-"))
    folder.chmod(0o755)
    for name in ("run", "scratch", "io", "theirs"):
        (folder / "rw" / name).mkdir(parents=True)
        os.chown(folder / "rw" / name, UID if name in ("run", "scratch") else 0, 0)
    for name in ("stdin", "stdout", "stderr"):
        (folder / "rw" / "io" / name).touch()
        (folder / "rw" / "io" / name).chmod(0o666)
    shutil.copytree(tiny, folder / "tiny")
    for path in (folder / "tiny").iterdir():
        path.chmod(0o644)
    shutil.copyfile(rows, folder / "rows.jsonl")
    (folder / "prompts.txt").write_text("Why?\nWho?\n")
    write_preset(
        folder / "tiny.env", BASE_MODEL=folder / "tiny", DATASET=folder / "rows.jsonl", **RECIPE
    )
    confined = ["unshare", "-n", "-m", "sh", str(CONFINED), str(UID), str(folder), *hidden()]
    probe = [*confined, sys.executable, "-c", WHO, str(folder / "elsewhere")]
    try:
        tried = subprocess.run(
            probe, env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}, cwd=folder / "rw" / "io",
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if tried.returncode:
            skip(f"no namespaces, or {ROOT} is closed to others: {tried.stderr.strip()}")
        assert tried.stdout.splitlines() == [
            f"{UID} 0 ['0000000000000000', '0000000000000000']",
            "Read-only file system",
            "['lo']",
        ]
        shutil.rmtree(folder / "python", ignore_errors=True)
        with forking(
            folder / "rw" / "io", *confined, SCRATCH_DIR=str(folder / "rw" / "scratch")
        ) as stages:
            yield Place(folder, stages)
    finally:
        shutil.rmtree(folder)


@pytest.mark.promise("P8")
@pytest.mark.case("D11")
def test_every_stage_as_any_user(place: Place) -> None:
    for stage in ("prepare-data", "train", "evaluate", "merge"):
        place(stage)
    place("generate", "--prompts-file", str(place.folder / "prompts.txt"))
    assert place("generate", "--prompt", "Why?").strip()
    made = {path.parent.name for path in place.run.glob("*/manifest.json")}
    assert made == {"data", "adapter", "evaluation", "merged", "generations"}
    for path in place.run.rglob("*"):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (UID, 0)
        assert stat.S_IMODE(found.st_mode) == (0o775 if path.is_dir() else 0o664), path
    assert not list((place.folder / "rw" / "scratch").glob("lora-stages-*"))


@pytest.mark.case("A9")
def test_files_of_another_user_say_whose_they_are(place: Place) -> None:
    args = ("--env-file", place.folder / "tiny.env")
    theirs = place.folder / "rw" / "theirs"
    done = place.stages(*args, "prepare-data", "--run-dir", theirs / "run")
    refused(done, 73, f"{theirs} belongs to UID 0, mode 0755; this is UID {UID}")
    place("prepare-data")
    path = place.run / "data" / "train.arrow"
    os.chown(path, 0, 0)
    path.chmod(0o600)
    try:
        said = place("train", "--max-steps", "1", "--verify", code=66)
    finally:
        os.chown(path, UID, 0)
    assert f"{path} belongs to UID 0, mode 0600; this is UID {UID}" in said
