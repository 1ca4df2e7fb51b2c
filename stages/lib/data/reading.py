"""One file as chunks of rows: cut in one process, parsed in many, memory bounded by a constant.

Strict: what is not a row as its file's kind has it is a bad row with its place and reason, never a guess.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path, PurePath

from stages.lib.data import csv_rows, expanding, json_arrays, json_rows, tables
from stages.lib.data.rows import ROW_LIMIT, Chunk, Row, Rows
from stages.lib.run.exits import BadData

__all__ = ["KINDS", "ROW_LIMIT", "Chunk", "Row", "Rows", "chunks", "kind_of", "oddities"]

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}


def kind_of(name: PurePath | str) -> str | None:
    """What a file holds by its name, with or without the suffix of a compression; None if it is no data."""
    path = PurePath(name)
    if expanding.packing(path):
        path = path.with_suffix("")
    return KINDS.get(path.suffix.lower())


def oddities(path: Path, kind: str, name: str) -> list[str]:
    """What is read without complaint at a text file's beginning, though its writer may not know of it."""
    if kind in ("parquet", "arrow"):
        return []
    start = next(iter(expanding.blocks(path, name)), b"")
    lines = start.removeprefix(codecs.BOM_UTF8).split(b"\n")[:-1]
    found = {
        "a byte order mark": start.startswith(codecs.BOM_UTF8),
        "CRLF line ends": any(line.endswith(b"\r") for line in lines),
        "blank lines": kind == "jsonl" and any(not line.strip() for line in lines),
    }
    return [what for what, holds in found.items() if holds]


def chunks(path: Path, kind: str, name: str | None = None) -> Iterator[Chunk]:
    """The rows of a file in order, about 1 MiB or 512 rows a chunk.

    Args:
        path: the file; a suffix `.gz` or `.zst` says that it is compressed.
        kind: one of the values of `KINDS`.
        name: what an error calls the file, where that is not its path.

    Raises:
        BadData: the file as a whole is not what it should be. Rows are bad one by one, in `Chunk.rows`.
    """
    name = name or str(path)
    if kind in ("parquet", "arrow"):
        if expanding.packing(path):
            raise BadData(
                f"{name} is a compressed {kind} file, which cannot be streamed; expand it"
            )
        return tables.tables(path, kind, name)
    blocks = expanding.blocks(path, name)
    if kind == "csv":
        return csv_rows.cut_records(blocks, name)
    return json_arrays.whole(blocks) if kind == "json" else json_rows.cut(blocks)
