"""What a run needs of its machine: folders that take files and stay, room, memory to share, packages."""

import importlib.metadata
import time
from pathlib import Path

import pytest

from stages.lib.run import checks, preflight
from stages.lib.run.exits import CannotWrite
from tests.test_bad_input import mounted

# As Docker mounts a container's root, a volume, one below it with a blank in its name, and shared memory.
DOCKER = r"""
561 411 0:52 / / rw,relatime master:190 - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/u,workdir=/w
562 561 0:55 / /proc rw,nosuid - proc proc rw
571 561 259:1 /vol /artifacts rw,relatime - ext4 /dev/nvme0n1p1 rw
572 571 0:61 / /artifacts/my\040runs rw,relatime - nfs4 10.0.0.2:/runs rw,vers=4.2
573 561 0:58 / /dev/shm rw,nosuid - tmpfs shm rw,size=65536k
"""


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(DOCKER.strip())
    return path


@pytest.mark.case("A8")
@pytest.mark.parametrize(
    ("folder", "state", "words"),
    [
        ("/opt/lora-stages/runs/x", "warn", "container's own disk (overlay)"),
        ("/artifactsx/run", "warn", "container's own disk"),
        ("/artifacts/run", "ok", "ext4 at /artifacts"),
        ("/artifacts/my runs/x", "ok", "nfs4 at /artifacts/my runs"),
        ("/dev/shm/run", "warn", "in memory (tmpfs at /dev/shm)"),
    ],
)
def test_folder_that_goes_with_the_container(
    docker: Path, folder: str, state: str, words: str
) -> None:
    found = preflight.lasting(Path(folder), docker)
    assert found.state == state
    assert words in found.found
    assert ("RUN_DIR" in found.remedy) == (state == "warn")


def test_mount_of_a_folder_of_this_machine(tmp_path: Path) -> None:
    with mounted(tmp_path / "small disk", "size=1m") as small:
        assert preflight.mount_of(small / "not" / "there") == (str(small), "tmpfs")
    assert preflight.mount_of(Path("/proc/self")) == ("/proc", "proc")
    assert preflight.mount_of(tmp_path, tmp_path / "none") == ("", "")


@pytest.mark.case("A7")
def test_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = preflight.writable("run directory", tmp_path / "file" / "run")
    assert (blocked.state, blocked.code) == ("fail", 73)
    with mounted(tmp_path / "small", "size=1m,ro") as small:
        began = time.monotonic()
        with pytest.raises(CannotWrite, match="Read-only"):
            preflight.start(small / "run", tmp_path)
        with pytest.raises(CannotWrite, match="Read-only"):
            preflight.start(tmp_path, small)
        assert time.monotonic() - began < 5


def test_nothing_is_left_by_looking(tmp_path: Path) -> None:
    assert preflight.writable("scratch", tmp_path / "not" / "yet").state == "ok"
    preflight.start(tmp_path / "run", tmp_path / "scratch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("A5")
def test_room_is_counted_by_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as small:
        needs = [("one", small / "a", 600 << 10), ("two", small / "b", 600 << 10)]
        here = [("three", tmp_path, 1), ("nothing", small, 0)]
        full, fine = preflight.room([*needs, *here])
        assert (full.code, fine.state) == (73, "ok")
        for word in (str(small / "a"), "1.0 MiB free", "1.2 MiB are needed", "one 600.0 KiB"):
            assert word in full.found
        assert "nothing" not in full.found
        (enough,) = preflight.room(needs[:1])
        assert enough.state == "ok"
        with pytest.raises(CannotWrite, match="make room"):
            checks.enforce([enough, full])


@pytest.mark.case("E6")
def test_little_shared_memory(tmp_path: Path) -> None:
    with mounted(tmp_path / "shm", "size=64m") as shm:
        found = preflight.shared_memory(shm)
    assert found.state == "warn"
    assert "has 64 MiB" in found.found
    assert "--shm-size" in found.remedy
    assert preflight.shared_memory(tmp_path / "none").state == "warn"


def test_packages_as_pinned(tmp_path: Path) -> None:
    pins, click = tmp_path / "requirements.txt", importlib.metadata.version("click")

    def state(text: str) -> tuple[str, int]:
        pins.write_text(text)
        found = preflight.packages(pins)
        return found.state, found.code

    assert state(f"# Words\nclick=={click}\n") == ("ok", 0)
    assert state(f"click=={click}\ntorch==0.1\n") == ("warn", 0)
    assert state("no-such-package[extra]==1.0\n") == ("fail", 78)
    assert preflight.packages(tmp_path / "none").state == "skip"
    assert (
        "packages as pinned" in preflight.packages().found or preflight.packages().state == "warn"
    )
