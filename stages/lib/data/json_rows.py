"""JSON as training data needs it: strict, every fault with its place, memory bounded by one row."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from stages.lib.data.rows import (
    CHUNK_ROWS,
    NESTING_LIMIT,
    ROW_LIMIT,
    TOO_DEEP,
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

BOM = b"\xef\xbb\xbf"
NAMES = {list: "array", str: "string", int: "number", float: "number", type(None): "null"}
# Escapes that may stand for NUL or half a character.
SUSPECT = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
# What may stand between the place of an error and the end, where JSON was cut off there.
CUT = re.compile(r"\s*|u[0-9a-fA-F]{0,4}|\.|[eE][+-]?")
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


class Refused(ValueError):
    """JSON that Python would read, and that is wrong all the same."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = first_twice([name for name, _ in pairs])
        raise Refused(f"the key {twice!a} is there twice")
    return found


def _constant(word: str) -> None:
    raise Refused(f"{word} is no JSON value")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def ends_early(error: json.JSONDecodeError) -> bool:
    """Whether the JSON was right as far as it goes, and only too short."""
    rest = error.doc[error.pos :]
    if error.msg.startswith("Unterminated string") or CUT.fullmatch(rest):
        return True
    return error.msg == "Expecting value" and any(word.startswith(rest) for word in LITERALS)


def reason(error: ValueError | RecursionError, byte: int, start: int = 0) -> str:
    """Why a JSON text could not be read; it begins at `byte` of the file, and at `start` of what was parsed."""
    if isinstance(error, json.JSONDecodeError):
        words = error.msg.removesuffix(" at").replace("Expecting", "expected", 1)
        place = byte + len(error.doc[start : error.pos].encode())
        return f"{words[:1].lower()}{words[1:]} at byte {place}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {byte + error.start}"
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return f"a number of more than {sys.get_int_max_str_digits()} digits"


def parse(text: bytes, line: int, byte: int, is_end: bool = False) -> Row:
    """One row from its JSON text; `is_end` says that the file ends with it, without a line's end."""
    if len(text) > ROW_LIMIT:
        return bad(line, byte, TOO_LONG, text)
    try:
        data = STRICT.decode(text.decode())
    except (ValueError, RecursionError) as error:
        nul = text.find(b"\0")
        if nul >= 0 and not isinstance(error, UnicodeDecodeError):
            return bad(line, byte, f"a NUL byte at byte {byte + nul}", text)
        cut = is_end and _is_cut(error)
        return bad(line, byte, TRUNCATED if cut else reason(error, byte), text)
    if type(data) is not dict:
        kind = NAMES.get(type(data), "boolean")
        return bad(line, byte, f"a JSON {kind}, not an object", text)
    problem = too_many(len(data)) or (_is_deep(text, data) and TOO_DEEP) or None
    if problem or (SUSPECT.search(text) and (problem := problem_of(data))):
        return bad(line, byte, problem, text)
    return Row(line, byte, data)


def _is_deep(text: bytes, data: Any) -> bool:
    """Whether more lies within one another than libraries that recurse would follow."""
    if text.count(b"[") + text.count(b"{") <= NESTING_LIMIT:
        return False
    level = [data]
    for _ in range(NESTING_LIMIT):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
    return bool(level)


def _is_cut(error: ValueError | RecursionError) -> bool:
    if isinstance(error, UnicodeDecodeError):
        return error.reason == "unexpected end of data"
    return isinstance(error, json.JSONDecodeError) and ends_early(error)


class Lines(Chunk):
    """Whole lines, of which each that is not blank is a row; the payload is their bytes."""

    def rows(self) -> Iterator[Row]:
        """Parse each line."""
        text, byte = self.payload, self.byte
        if byte == 0 and text.startswith(BOM):
            text, byte = text[len(BOM) :], len(BOM)
        lines = text.split(b"\n")
        last = len(lines) - 1 + self.line  # empty where the text ends with a line's end
        for number, line in enumerate(lines, self.line):
            if line and not line.isspace():
                yield parse(line, number, byte, number == last)
            byte += len(line) + 1


def cut(blocks: Iterator[bytes]) -> Iterator[Chunk]:
    """Whole lines; one over the limit is passed over, and told of as a bad row."""
    line, byte = 1, 0
    held: list[bytes] = []  # the beginning of a line whose end is not read yet
    block = next(blocks, b"")
    while block:
        end = block.rfind(b"\n") + 1
        rest = b""
        if end:
            for piece, lines in _few(b"".join((*held, memoryview(block)[:end]))):
                yield Lines(piece, line, byte)
                line, byte = line + lines, byte + len(piece)
            held = [block[end:]]
        else:
            held.append(block)
            size = sum(map(len, held))
            if size > ROW_LIMIT:
                skipped, rest = _pass_over(blocks)
                row = bad(line, byte, TOO_LONG, b"".join(held))
                yield Rows([row], line, byte)
                line, byte, held = line + 1, byte + size + skipped + 1, []
        block = rest or next(blocks, b"")
    if any(held):
        yield Lines(b"".join(held), line, byte)


def _few(text: bytes) -> Iterator[tuple[bytes, int]]:
    """Whole lines in pieces of at most `CHUNK_ROWS`, each with their number."""
    start = 0
    while start < len(text):
        end, lines = start, 0
        while lines < CHUNK_ROWS and end < len(text):
            end, lines = text.find(b"\n", end) + 1, lines + 1  # much faster than to count them
        yield text[start:end], lines
        start = end


def _pass_over(blocks: Iterator[bytes]) -> tuple[int, bytes]:
    """Read up to the next line's end: the bytes before it, and what follows it in the last block."""
    size = 0
    for block in blocks:
        end = block.find(b"\n")
        if end >= 0:
            return size + end, block[end + 1 :]
        size += len(block)
    return size, b""
