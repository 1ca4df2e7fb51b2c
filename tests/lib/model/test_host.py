"""What the host can spare, by what Linux says."""

from pathlib import Path

import pytest

from stages.lib.model import host

GIB = 2**30


def machine(root: Path, free: int) -> None:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        f"MemTotal: {free // 512} kB\nMemAvailable: {free // 1024} kB\n\nHugePages_Total: 0\n"
    )


@pytest.mark.parametrize("group", host.GROUPS)
@pytest.mark.parametrize(("limit", "room"), [(10 * GIB, 9 * GIB), (100 * GIB, 64 * GIB), (GIB, 0)])
def test_a_container_may_have_less_than_the_machine(
    group: tuple[str, str, str, str], limit: int, room: int, tmp_path: Path
) -> None:
    machine(tmp_path, 64 * GIB)
    folder, most, used, key = group
    at = tmp_path / folder
    at.mkdir(parents=True)
    (at / most).write_text(f"{limit}\n")
    (at / used).write_text(f"{3 * GIB}\n")
    (at / "memory.stat").write_text(f"anon {GIB}\n{key} {2 * GIB}\n")
    assert host.room(tmp_path) == int(host.SHARE * room)
    assert host.room(tmp_path, sharing=2) == int(host.SHARE * room) // 2


def test_without_a_limit_it_is_the_machine_that_counts(tmp_path: Path) -> None:
    assert host.room(tmp_path) == 0
    machine(tmp_path, 64 * GIB)
    assert host.room(tmp_path) == int(host.SHARE * 64 * GIB)
    at = tmp_path / "sys/fs/cgroup"
    at.mkdir(parents=True)
    (at / "memory.max").write_text("max\n")
    assert host.room(tmp_path) == int(host.SHARE * 64 * GIB)
