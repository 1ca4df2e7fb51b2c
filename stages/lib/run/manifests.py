"""A manifest as a file that anybody may have written: read with limits, its names and sizes held to be sane."""

import json
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from stages.lib.run.exits import BadData

SCHEMA = 1
# Bytes: the largest of ours, with the verdicts of an evaluation, is a few hundred kilobytes.
LARGEST = 16 << 20
PARTS = ("files", "inputs", "settings", "metrics")
RERUN = "run the stage that makes it again with --force"
REMEDY = f"it is corrupt: {RERUN}"
SHA256 = re.compile(r"[0-9a-f]{64}")


def read(path: Path) -> dict[str, Any] | None:
    """What a manifest says, or None where there is none that is whole.

    Raises:
        BadData: it is no file of its folder, too large, of another schema, or holds what no manifest does.
    """
    if path.is_symlink():
        raise BadData(
            f"{path} is a link, which leaves the artifact; copy the folder with its files"
        )
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > LARGEST:
        raise BadData(f"{path} has {size} bytes, no manifest is over {LARGEST}; {REMEDY}")
    try:
        said = json.loads(path.read_bytes())
        schema, files = said["schema"], said["files"]
    except RecursionError as error:
        raise BadData(f"{path} is nested too deeply for a manifest; {REMEDY}") from error
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # cut off while it was written: debris
    if schema != SCHEMA:
        raise BadData(
            f"{path} has schema {schema}, this version reads {SCHEMA}; run its stage again with --force"
        )
    for name in PARTS:
        if not isinstance(said.get(name, {}), dict):
            raise BadData(f"{path} says under {name!r} what no manifest does; {REMEDY}")
    for name, entry in files.items():
        _check(path, name, entry)
    return dict(said)


def _check(path: Path, name: str, entry: Any) -> None:
    pure = PurePosixPath(name)
    strange = not pure.parts or "\0" in name or str(pure) != name
    if strange or pure.is_absolute() or ".." in pure.parts:
        raise BadData(f"{path} names {name!r}, which leaves the artifact")
    size, digest = (
        (entry.get(key) for key in ("bytes", "sha256")) if isinstance(entry, dict) else (0, 0)
    )
    sane = type(size) is int and size >= 0 and isinstance(digest, str) and SHA256.fullmatch(digest)
    if not sane:
        raise BadData(f"{path} gives {name!r} no size and sha256; {REMEDY}")


def check_file(folder: Path, name: str, size: int) -> None:
    """Hold a file against its entry.

    Raises:
        BadData: it is missing, has another size, is no regular file, or is reached through a link.
    """
    path = folder / name
    for part in [path, *path.parents][: len(PurePosixPath(name).parts)]:
        if part.is_symlink():
            raise BadData(f"{part} is a link, which leaves the artifact; put the file in its place")
    if not path.exists():
        raise BadData(f"{path} is missing from its artifact; {RERUN}")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadData(f"{path} is no regular file; {RERUN}")
    if status.st_size != size:
        raise BadData(
            f"{path} has {status.st_size} bytes, its manifest says {size}: it is corrupt; {RERUN}"
        )
