"""CSV as RFC 4180 has it: a header row, quoted line ends, every cell a text."""

import csv
import io
import itertools
from collections.abc import Iterator

from stages.lib.data.json_rows import BOM, cut
from stages.lib.data.rows import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    REST_LOST,
    ROW_LIMIT,
    TOO_LONG,
    TRUNCATED,
    Chunk,
    Row,
    Rows,
    bad,
    first_twice,
    problem_of,
    too_many,
)
from stages.lib.run.exits import BadData

# Of the process: `csv` alone refuses 128 KiB. More than a row, so that our own limit speaks first.
FIELD_LIMIT = 2 * ROW_LIMIT


class Long(ValueError):
    """A record that is over the limit, and has not ended."""


class Records:
    """The records of a text, one by one, with the lines that each was read from.

    Attributes:
        begin: number of lines before the present record.
        lines: from the present record's first to as far as was read; `first` counts those before.
        starts: the offset of each of `lines`, and of what follows them.
        wrong: lines that are not UTF-8, and where.
    """

    def __init__(self, blocks: Iterator[bytes], line: int = 1, byte: int = 0) -> None:
        self.begin = self.first = 0
        self.lines: list[bytes] = []
        self.starts = [byte]
        self.wrong: dict[int, str] = {}
        self.line = line
        self.cells = csv.reader(itertools.chain.from_iterable(self._texts(blocks)), strict=True)

    def _texts(self, blocks: Iterator[bytes]) -> Iterator[io.StringIO]:
        for chunk in cut(blocks):
            done = self.begin - self.first
            del self.lines[:done], self.starts[:done]
            self.first = self.begin
            self.wrong = {line: why for line, why in self.wrong.items() if line >= self.begin}
            if isinstance(chunk, Rows) or self.starts[-1] - self.starts[0] > ROW_LIMIT:
                raise Long
            lines = io.BytesIO(chunk.payload).readlines()
            if self.starts == [0]:
                lines[0] = lines[0].removeprefix(BOM)
                self.starts = [len(chunk.payload) - sum(map(len, lines))]
            yield io.StringIO(self._decoded(lines), newline="\n")

    def _decoded(self, lines: list[bytes]) -> str:
        self.lines += lines
        self.starts += list(itertools.accumulate(map(len, lines), initial=self.starts[-1]))[1:]
        try:
            return b"".join(lines).decode()
        except UnicodeDecodeError:
            places = itertools.count(len(self.lines) - len(lines))
            return "".join(map(self._replaced, places, lines))

    def _replaced(self, place: int, line: bytes) -> str:
        """A line as text; one that is not UTF-8 is marked, and its record goes on to its end."""
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.wrong[self.first + place] = f"not UTF-8 at byte {self.starts[place] + error.start}"
            return line.decode(errors="replace")

    def next(self) -> list[str] | None:
        """The cells of the next record, which may be none for a blank line; None at the end."""
        self.begin = self.cells.line_num
        return next(self.cells, None)

    @property
    def place(self) -> tuple[int, int]:
        """Line and offset where the present record begins."""
        return self.line + self.begin, self.starts[self.begin - self.first]

    def text(self) -> bytes:
        """The bytes of the present record, as far as it was read."""
        return b"".join(self.lines[self.begin - self.first : self.cells.line_num - self.first])

    def problem(self) -> str | None:
        """What is wrong with the lines of the present record."""
        found = (self.wrong.get(n) for n in range(self.begin, self.cells.line_num))
        return next(filter(None, found), None) if self.wrong else None

    def bad(self, problem: str) -> Row:
        """The present record as a bad row."""
        return bad(*self.place, problem, self.text())


class Cells(Chunk):
    """Whole records; the payload is the columns' names and the records' bytes."""

    def rows(self) -> Iterator[Row]:
        """Parse each record; after wrong quotes where the next one begins is anyone's guess."""
        csv.field_size_limit(FIELD_LIMIT)
        columns, text = self.payload
        records = Records(iter([text]), self.line, self.byte)
        try:
            while (cells := records.next()) is not None:
                if len(cells) > 1 or not records.text().isspace():
                    yield _row(records, cells, columns)
        except csv.Error as error:
            is_cut = "unexpected end" in str(error)
            yield records.bad((TRUNCATED if is_cut else f"wrong quotes: {error}") + REST_LOST)


def _row(records: Records, cells: list[str], columns: list[str]) -> Row:
    data = dict(zip(columns, cells, strict=False))
    problem = records.problem() or problem_of(data)
    if len(cells) != len(columns):
        problem = problem or f"{len(cells)} cells, where the header row has {len(columns)}"
    return records.bad(problem) if problem else Row(*records.place, data)


def cut_records(blocks: Iterator[bytes], name: str) -> Iterator[Chunk]:
    """Whole records of a CSV file.

    Raises:
        BadData: its header names no columns, or one twice.
    """
    csv.field_size_limit(FIELD_LIMIT)
    records = Records(blocks)
    columns = _header(records, name)
    held, size, place, over = list[bytes](), 0, None, None
    try:
        while records.next() is not None:
            place = place or records.place
            held.append(records.text())
            size += len(held[-1])
            if size >= CHUNK_BYTES or len(held) >= CHUNK_ROWS:
                yield Cells((columns, b"".join(held)), *place)
                held, size, place = [], 0, None
    except csv.Error:
        held.append(records.text())  # with its error, which shows again where it is parsed
        place = place or records.place
    except Long:
        over = records.bad(f"{TOO_LONG} (is a quote never closed?){REST_LOST}")
    if place:
        yield Cells((columns, b"".join(held)), *place)
    if over:
        yield Rows([over], *records.place)


def _header(records: Records, name: str) -> list[str]:
    """The names of the columns; none in an empty file."""
    try:
        columns = records.next()
        while columns is not None and not "".join(columns).strip() and len(columns) < 2:
            columns = records.next()
    except (csv.Error, Long) as error:
        why = str(error) or TOO_LONG
        raise BadData(f"{name} has no readable header row ({why}); mend it") from error
    columns = columns or []
    if problem := records.problem():
        raise BadData(f"{name} is {problem}; convert it")
    empty = [number for number, column in enumerate(columns, 1) if not column.strip()]
    if problem := too_many(len(columns)):
        raise BadData(f"{name} has {problem}; leave out those that are not needed")
    if empty:
        raise BadData(f"{name} has no name for column {empty[0]} in its header row; give it one")
    if twice := first_twice(columns):
        raise BadData(f"{name} has two columns {twice!r} in its header row; rename one")
    return columns
