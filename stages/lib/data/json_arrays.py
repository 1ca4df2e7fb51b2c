"""A JSON file as a whole: an array of rows, one row, or after all one row a line."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator

from stages.lib.data.json_rows import BOM, STRICT, cut, ends_early, parse, reason
from stages.lib.data.rows import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    REST_LOST,
    ROW_LIMIT,
    SHOWN,
    TOO_LONG,
    TRUNCATED,
    Chunk,
    Row,
    Rows,
    bad,
)

SPACE = re.compile(r"[ \t\n\r]*")
LOOSE = json.JSONDecoder()  # finds where a value ends; how good it is, is seen where it is parsed


class Values(Chunk):
    """Elements of an array; the payload is their offsets and texts."""

    def rows(self) -> Iterator[Row]:
        """Parse each element."""
        for number, (byte, text) in enumerate(self.payload, self.line):
            yield parse(text, number, byte)


class Broken(ValueError):
    """The text is wrong, so that nothing after it can be read."""

    def __init__(self, problem: str, byte: int, text: str) -> None:
        super().__init__(problem)
        self.byte, self.text = byte, text.encode()


class Window:
    """The part of a text that is held in memory; `at` is what comes next, `byte` its offset in the file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks = blocks
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at, self.byte = "", 0, 0
        self.bytes_read, self.is_whole = 0, False
        self.end: str | None = None  # why there is no more, where that is known

    def grow(self) -> None:
        """Read about as much again as is held, so that a long value is not scanned too often."""
        held = self.text[self.at :]
        parts, size = [held], 0
        while size <= len(held) and not self.is_whole:
            parts.append(self._next())
            size += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def _next(self) -> str:
        block = next(self.blocks, b"")
        self.is_whole = not block
        self.bytes_read += len(block)
        try:
            return self.decode(block, self.is_whole)
        except UnicodeDecodeError as error:
            right = error.object[: error.start]
            first = self.bytes_read - len(error.object)
            self.end = reason(error, first) if block else TRUNCATED
            self.is_whole = True
            return right.decode()

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            at = space.end() if space else self.at
            self.byte, self.at = self.byte + at - self.at, at
            if at < len(self.text):
                return self.text[at]
            if self.is_whole:
                return ""
            self.grow()

    def skip(self, sign: str) -> None:
        """Pass over a sign that `peek` has shown."""
        self.at, self.byte = self.at + len(sign), self.byte + len(sign.encode())

    def value(self) -> tuple[int, bytes]:
        """The offset and text of the value that comes next."""
        while True:
            try:
                end = LOOSE.raw_decode(self.text, self.at)[1]
                if end < len(self.text) or self.is_whole:  # else a number may go on
                    return self._take(end)
            except json.JSONDecodeError as error:
                is_cut = ends_early(error)
                if self.is_whole or not is_cut:
                    why = (self.end or TRUNCATED) if is_cut else reason(error, self.byte, self.at)
                    raise self.broken(why) from error
            except (RecursionError, ValueError) as error:
                raise self.broken(reason(error, self.byte)) from error
            if len(self.text) - self.at > ROW_LIMIT:
                raise self.broken(TOO_LONG)
            self.grow()

    def _take(self, end: int) -> tuple[int, bytes]:
        byte, text = self.byte, self.text[self.at : end].encode()
        self.at, self.byte = end, byte + len(text)
        return byte, text

    def broken(self, problem: str) -> Broken:
        """The end of reading, here."""
        while len(self.text) - self.at < SHOWN and not self.is_whole:
            self.grow()
        return Broken(problem, self.byte, self.text[self.at : self.at + SHOWN])

    def unexpected(self, problem: str) -> Broken:
        """The end of reading: what is here should not be, or there should be more."""
        return self.broken(
            f"{problem} at byte {self.byte}" if self.peek() else self.end or TRUNCATED
        )


def whole(blocks: Iterator[bytes]) -> Iterator[Chunk]:
    """The rows of a `.json` file."""
    head = b""
    for block in blocks:
        head += block
        start = head.removeprefix(BOM).lstrip()
        if start[:1] == b"[" or b"\n" in start or len(head) > ROW_LIMIT:
            break
    start = head.removeprefix(BOM).lstrip()
    blocks = itertools.chain([head], blocks)
    if start[:1] != b"[" and _is_row(start.partition(b"\n")[0]):
        yield from cut(blocks)
    else:
        yield from _values(Window(blocks))


def _is_row(line: bytes) -> bool:
    """Whether a file's first line looks like a row of its own, if a broken one, and not like a beginning."""
    try:
        STRICT.decode(line.decode())
    except json.JSONDecodeError as error:
        return not ends_early(error)
    except (ValueError, RecursionError):
        return True
    return True


def _values(window: Window) -> Iterator[Chunk]:
    """Chunks of the elements, and one of a bad row where reading ends too soon."""
    number, held, size = 1, list[tuple[int, bytes]](), 0
    end = None
    try:
        for byte, text in _elements(window):
            held.append((byte, text))
            size += len(text)
            if size >= CHUNK_BYTES or len(held) >= CHUNK_ROWS:
                yield Values(held, number, held[0][0], "row")
                number, held, size = number + len(held), [], 0
    except Broken as error:
        end = error
    if held:
        yield Values(held, number, held[0][0], "row")
    if end:
        row = bad(number + len(held), end.byte, f"{end}{REST_LOST}", end.text)
        yield Rows([row], row.line, end.byte, "row")


def _elements(window: Window) -> Iterator[tuple[int, bytes]]:
    if window.peek() == "\ufeff":
        window.skip("\ufeff")
    if window.peek() == "[":
        window.skip("[")
        if window.peek() != "]":
            yield window.value()
        while window.peek() == ",":
            window.skip(",")
            window.peek()
            yield window.value()
        if window.peek() != "]":
            raise window.unexpected("expected ',' delimiter")
        window.skip("]")
    elif window.peek():
        yield window.value()
    if window.peek() or window.end:
        raise window.unexpected("extra data")
