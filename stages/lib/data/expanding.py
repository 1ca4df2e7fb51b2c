"""The bytes of a file, expanded where its name says that it is compressed."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

from stages.lib.run.exits import BadData

BLOCK = 1 << 20
SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
# Text seldom shrinks to a tenth, and never to a 200th but where it says nothing.
LARGE = 256 << 20
FOLD = 200


def packing(name: PurePath) -> str | None:
    """How a file of this name is compressed: `gzip`, `zstd` or not at all."""
    return SUFFIXES.get(name.suffix.lower())


def blocks(path: Path, name: str) -> Iterator[bytes]:
    """The contents of a file, at most 1 MiB at a time.

    Args:
        path: where it lies; its suffix says how it is compressed.
        name: what an error calls it.

    Raises:
        BadData: it is not what its suffix says, is cut off, or expands beyond measure.
    """
    with path.open("rb") as file:
        how = packing(path)
        stream = file if how is None else _expanding(file, how)
        size = 0
        while block := _read(stream, how, name):
            size += len(block)
            if how:
                check(size, file.tell(), name)
            yield block


def check(size: int, room: int, name: str) -> None:
    """Refuse a file of which `room` bytes become `size` bytes of data, if that is beyond measure.

    Raises:
        BadData: it is.
    """
    if size > LARGE and size > FOLD * room:
        raise BadData(
            f"{name} expands more than {FOLD}-fold ({size:,} bytes so far; a compression bomb?); "
            "expand it yourself if it is meant so"
        )


def _expanding(file: IO[bytes], how: str) -> Any:
    if how == "gzip":
        return gzip.GzipFile(fileobj=file)
    import pyarrow as pa

    return pa.CompressedInputStream(file, how)


def _read(stream: Any, how: str | None, name: str) -> bytes:
    try:
        return bytes(stream.read(BLOCK))
    except (EOFError, zlib.error, OSError) as error:
        if how is None or (isinstance(error, OSError) and error.errno is not None):
            raise
        what = " ".join(str(error).split())
        raise BadData(f"{name} is not a whole {how} file ({what}); copy it again") from error
