"""Small JSON records beside the artifacts, each replaced in one go where the mount can."""

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST = 1 << 20  # bytes: a thousand times ours


def read(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, and an empty one while it is written or after it was cut off."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        return {}


def peek(path: Path) -> dict[str, Any] | None:
    """As `read`, where anybody may have put anything: no link, pipe or huge file is opened."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
        return {}
    try:
        return read(path)
    except RecursionError:
        return {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace a record.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(record, indent=1) + "\n"
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        path.write_text(text)


def tell(path: Path, record: dict[str, Any], limit: int) -> None:
    """Write a record of at most `limit` bytes, its message cut, to a file that somebody else put there."""
    while len(text := json.dumps(record)) > limit and record["message"]:
        record = record | {"message": record["message"][: len(record["message"]) * 3 // 4]}
    with contextlib.suppress(OSError):
        if path.is_file():
            path.write_text(text + "\n")
