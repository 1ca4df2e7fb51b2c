"""How much memory the host can give."""

import contextlib
import ctypes
from pathlib import Path

M_MMAP_THRESHOLD = -3
SHARE = 0.8  # of what is free: what is pinned cannot be swapped, and others want memory, too
# Limit, use, and a key of the statistics that says what of it can be had back; cgroups 2 and 1.
GROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
    ),
)  # fmt: skip


def give_back() -> None:
    """Have glibc return what is freed from 1 MiB on: it keeps blocks below 32, and they lie in pieces."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


def room(root: Path = Path("/"), sharing: int = 1) -> int:
    """Bytes that each of so many processes may take, within the machine and its container.

    0 where Linux does not say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = [int(_table(lines)["MemAvailable:"]) * 1024]
    except (OSError, KeyError):
        return 0
    for folder, limit, used, key in GROUPS:
        group = root / folder
        if (group / limit).is_file():
            most = (group / limit).read_text().strip()
            if most != "max":
                back = int(_table((group / "memory.stat").read_text().splitlines()).get(key, 0))
                free.append(int(most) - int((group / used).read_text()) + back)
    return int(SHARE * max(min(free), 0)) // sharing


def _table(lines: list[str]) -> dict[str, str]:
    return {parts[0]: parts[1] for parts in map(str.split, lines) if len(parts) > 1}
