"""What a run needs of its machine: folders that can be written and have room, memory to share, packages."""

import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from stages.lib.run import artifact, environment, volume
from stages.lib.run.checks import Check, enforce, failed, refused, warned
from stages.lib.run.exits import CannotRun, CannotWrite

LEAST_PYTHON = (3, 11)
# File systems of a container's own root, whose contents go when it goes.
LAYERED = ("overlay", "aufs", "fuse.fuse-overlayfs")
IN_MEMORY = ("tmpfs", "ramfs")
SMALL_SHM = 1 << 30
PINNED = re.compile(r"([\w.-]+)(?:\[[\w,]*\])?==([\w.]+)")
REQUIREMENTS = Path(__file__).parents[3] / "requirements.txt"


def start(run_dir: Path, scratch: Path) -> None:
    """At the start of a stage, before anything is fetched: both folders take a file, and the run will stay.

    Raises:
        CannotWrite: one of them does not.
    """
    enforce([writable("run directory", run_dir), writable("scratch", scratch), lasting(run_dir)])


def writable(name: str, folder: Path) -> Check:
    """Whether a file can be written, flushed and removed in a folder, or where it would be made."""
    try:
        _try(volume.nearest(folder))
    except CannotWrite as error:
        return refused(name, error)
    return Check(name, f"{folder.absolute()} takes files")


def _try(folder: Path) -> None:
    path = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    with artifact.writing(folder):
        try:
            artifact.write(path, b"can this be written?\n")
        finally:
            path.unlink(missing_ok=True)


def mount_of(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> tuple[str, str]:
    """Where the file system of a folder is mounted, and its kind; both empty where Linux does not say."""
    found = ("", "")
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return found
    wanted = folder.resolve()
    for line in lines:
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4])
        # A later mount lies over an earlier one.
        if wanted.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, right.split()[0])
    return found


def lasting(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> Check:
    """Whether a folder outlives the container and the machine, as far as its mount tells."""
    name, (point, kind) = "volume", mount_of(folder, mounts)
    remedy = "mount a volume and name a folder of it in RUN_DIR"
    if kind in LAYERED and point == "/":
        what = (
            f"{folder.absolute()} is on the container's own disk ({kind}), which goes when it ends"
        )
        return warned(name, what, remedy)
    if kind in IN_MEMORY:
        what = f"{folder.absolute()} is in memory ({kind} at {point}), which goes with the machine"
        return warned(name, what, remedy)
    return Check(name, f"{kind} at {point}" if kind else "unknown")


Need = tuple[str, Path, int]


def room(needs: Iterable[Need]) -> list[Check]:
    """Whether the disks have room for some things together: what, the folder for it, and its bytes."""
    disks: dict[int, list[Need]] = {}
    for what, folder, size in needs:
        if size:
            disks.setdefault(volume.nearest(folder).stat().st_dev, []).append((what, folder, size))
    return [_room(parts) for parts in disks.values()]


def _room(parts: list[Need]) -> Check:
    name, folder, size = "room", parts[0][1].absolute(), sum(size for *_, size in parts)
    usage = shutil.disk_usage(volume.nearest(folder))
    if not usage.total:  # some mounts of object stores
        return Check(name, f"{folder} does not say how much is free", state="skip")
    listed = ", ".join(f"{what} {volume.amount(size)}" for what, _, size in parts)
    said = f"{folder} has {volume.amount(usage.free)} free, and {volume.amount(size)} are needed: {listed}"
    if usage.free < size:
        return failed(
            name, CannotWrite, said, "make room, or choose another RUN_DIR or SCRATCH_DIR"
        )
    return Check(name, said)


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Whether processes can share memory; containers get 64 MiB unless told."""
    name = "shared memory"
    if not folder.is_dir():
        return warned(name, f"there is no {folder}", "mount a tmpfs there")
    total = shutil.disk_usage(folder).total
    said = f"{folder} has {total / 2**20:,.0f} MiB"
    if total < SMALL_SHM:
        return warned(name, said, "nothing fails on one GPU; for several start with --shm-size 8g")
    return Check(name, said)


def packages(requirements: Path = REQUIREMENTS) -> Check:
    """Whether Python and the packages are those that this version was tested with."""
    name, python = "packages", platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        return failed(name, CannotRun, f"Python {python}", "use 3.11 or newer")
    pins = PINNED.findall(requirements.read_text()) if requirements.is_file() else []
    if not pins:
        return Check(name, f"Python {python}; there is no {requirements} to compare", state="skip")
    there = {package: _version(package) for package, _ in pins}
    absent = [package for package, version in there.items() if not version]
    remedy = f"pip install -r {requirements}"
    if absent:
        return failed(name, CannotRun, f"{', '.join(absent)} not installed", remedy)
    other = [f"{p} {there[p]}, not {pin}" for p, pin in pins if there[p].partition("+")[0] != pin]
    if other:
        return warned(name, f"other than tested: {', '.join(other)}", remedy)
    return Check(name, f"Python {python}, {len(pins)} packages as pinned")


def _version(package: str) -> str:
    from importlib import metadata  # a tenth of what `--help` may take

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def token() -> Check:
    """Whether a Hugging Face token was given; never what it is."""
    given = environment.has_token()
    return Check("token", "HF_TOKEN is set" if given else "none; public repositories need none")
