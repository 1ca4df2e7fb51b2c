"""A row as a file holds it, and a chunk: some rows of a file, to be parsed in any process."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from stages.lib.data.conversation import is_unicode

ROW_LIMIT = 16 << 20  # bytes
COLUMN_LIMIT = 4096
NESTING_LIMIT = 100
CHUNK_BYTES = 1 << 20
CHUNK_ROWS = 512
SHOWN = 2000  # characters of a bad row
TOO_LONG = f"the row is longer than the limit of {ROW_LIMIT:,} bytes"
TRUNCATED = "the file ends in the middle of this row"
TOO_DEEP = f"nested more than {NESTING_LIMIT} deep"
REST_LOST = "; nothing after it can be read"


class Row(NamedTuple):
    """One row: its data, or why it is bad.

    Attributes:
        line: line of the file where it begins, or its number from 1 (`Chunk.unit` says which).
        byte: offset of its first byte in the expanded file; None in a parquet or arrow file.
        data: None where the row is bad.
        problem: why it is bad.
        raw: the text of a bad row, shortened.
    """

    line: int
    byte: int | None
    data: dict[str, Any] | None
    problem: str | None = None
    raw: str | None = None

    @property
    def loses_rest(self) -> bool:
        """Whether what follows this bad row in its file was not read."""
        return self.problem is not None and self.problem.endswith(REST_LOST)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file, cheap to send to another process. `line` and `byte` are the first row's."""

    payload: Any
    line: int = 1
    byte: int = 0
    unit: str = "line"  # what `line` counts: `line` or `row`

    def rows(self) -> Iterator[Row]:
        """Parse them: every row that is not blank, good or bad."""
        raise NotImplementedError


class Rows(Chunk):
    """Rows that are parsed already; the payload is their list."""

    def rows(self) -> Iterator[Row]:
        """The rows."""
        yield from self.payload


def bad(line: int, byte: int | None, problem: str, text: bytes) -> Row:
    """A bad row that begins with `text`."""
    shown = text[: 4 * SHOWN].decode(errors="replace")[:SHOWN]
    return Row(line, byte, None, problem, shown)


def bad_data(line: int, problem: str, data: dict[str, Any]) -> Row:
    """A bad row of which there is only the parsed form."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    return Row(line, None, None, problem, short.repr(data)[:SHOWN])


def too_many(columns: int) -> str | None:
    """Why so many columns are too many, or None."""
    over = columns > COLUMN_LIMIT
    return f"{columns:,} columns, where the limit is {COLUMN_LIMIT:,}" if over else None


def first_twice(names: list[str]) -> str | None:
    """The first of some names that was there before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def problem_of(data: dict[str, Any]) -> str | None:
    """Why the texts of a row cannot be used, or None: a NUL, half a character, or too much text."""
    size = 0
    for name, value in data.items():
        for text in (name, value) if isinstance(value, str) else (name, *_texts(value)):
            size += len(text)
            if "\0" in text:
                return f"a NUL character in {name!a}"
            if not text.isascii() and not is_unicode(text):
                return f"half a character (a lone surrogate) in {name!a}"
    return TOO_LONG if size > ROW_LIMIT else None


def _texts(value: Any) -> Iterator[str]:
    """The strings in lists and objects, keys included. A stack, since rows may be deeply nested."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, (list, tuple)):
            waiting += found
