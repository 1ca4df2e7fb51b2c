"""Every kind of file, whole and broken: each line is a row or a bad row, and nothing else happens."""

import csv
import gzip
import io
import itertools
import json
import pickle
import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.data import csv_rows, expanding, json_arrays, json_rows, reading
from stages.lib.data.reading import ROW_LIMIT, Row
from stages.lib.run.exits import BadData, StageError
from tests.conftest import REAL_ROWS, ROOT

ROWS = [{"text": f'### Human: {n}, "ü\U0001f600"?\n### Assistant: {n}\r\nmore'} for n in range(5)]
GOOD = b'{"text": "good"}\n'


def rows(path: Path, kind: str | None = None) -> list[Row]:
    """All rows of a file, each chunk sent as it would be to another process."""
    kind = kind or reading.kind_of(path) or ""
    sent = (pickle.loads(pickle.dumps(chunk)) for chunk in reading.chunks(path, kind))
    return [row for chunk in sent for row in chunk.rows()]


def data(found: list[Row]) -> list[Any]:
    assert [row.problem for row in found] == [None] * len(found)
    return [row.data for row in found]


def written(path: Path, content: list[dict[str, Any]]) -> Path:
    """A file of the kind that its name says."""
    kind = reading.kind_of(path)
    table = pa.Table.from_pylist(content)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    elif path.name == "file.arrow":
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        packed(path, as_text(kind or "", content).encode())
    return path


def as_text(kind: str, content: list[dict[str, Any]]) -> str:
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, content[0])
        writer.writeheader()
        writer.writerows(content)
        return text.getvalue()
    lines = [json.dumps(row, ensure_ascii=False) for row in content]
    return (
        "\n".join(lines) if kind == "jsonl" else json.dumps(content, ensure_ascii=False, indent=1)
    )


def packed(path: Path, content: bytes) -> Path:
    """A file with this content, compressed as its name says."""
    how = expanding.packing(path)
    if how == "gzip":
        content = gzip.compress(content)
    elif how == "zstd":
        content = zstd(content)
    path.write_bytes(content)
    return path


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


# --- what is accepted ------------------------------------------------------------------------------

NAMES = [
    "rows.jsonl", "rows.ndjson", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "file.arrow",
    "rows.feather", "rows.jsonl.gz", "rows.jsonl.zst", "rows.json.gz", "rows.json.zst", "rows.csv.gz",
    "ROWS.CSV.ZST",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_file(tmp_path: Path, name: str) -> None:
    found = rows(written(tmp_path / name, ROWS))
    assert data(found) == ROWS
    if not name.lower().startswith("rows.csv"):  # there a record has two lines, after the header
        assert [row.line for row in found] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", NAMES)
def test_empty_files_have_no_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert rows(path) == []


def test_files_with_nothing_but_space_or_a_header_have_no_rows(tmp_path: Path) -> None:
    for name, content in (
        ("blank.jsonl", b"\xef\xbb\xbf\r\n \n\t\n"),
        ("blank.json", b"\xef\xbb\xbf\r\n \n\t\n"),
        ("blank.csv", b"\r\n \n\n"),
        ("header.csv", b"\xef\xbb\xbftext,label\r\n"),
        ("array.json", b" [ ] \n"),
        ("blank.jsonl.gz", b"\n\n"),
        ("blank.csv.zst", b"text\n\n"),
    ):
        assert rows(packed(tmp_path / name, content)) == [], name
    for name in ("none.parquet", "none.arrow", "file.arrow"):
        path = written(tmp_path / name, ROWS[:1])
        with pa.ipc.new_stream(path, pa.schema([("text", pa.string())])):
            pass
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
        assert rows(path) == [], name


@pytest.mark.case("B6")
def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf\r\n" + "\r\n \r\n".join(map(json.dumps, ROWS)).encode() + b"\r\n"
    )
    found = rows(path)
    assert data(found) == ROWS
    assert [row.line for row in found] == [2, 4, 6, 8, 10]
    content = path.read_bytes()
    assert all(content[row.byte or 0 :].startswith(b'{"text"') for row in found)

    (tmp_path / "rows.csv").write_bytes(b'\xef\xbb\xbftext,n\r\n\r\n"a\r\nb",1\r\n \r\nc,2\r\n')
    found = rows(tmp_path / "rows.csv")
    assert data(found) == [{"text": "a\r\nb", "n": "1"}, {"text": "c", "n": "2"}]
    assert [(row.line, row.byte) for row in found] == [(3, 13), (6, 26)]

    (tmp_path / "rows.json").write_bytes(
        b'\xef\xbb\xbf\r\n[\r\n{"text": "a"} ,{"text": "b"}\r\n]\r\n'
    )
    found = rows(tmp_path / "rows.json")
    assert data(found) == [{"text": "a"}, {"text": "b"}]
    assert [(row.line, row.byte) for row in found] == [(1, 8), (2, 23)]


def test_what_stands_under_the_name_of_json(tmp_path: Path) -> None:
    for content, unit in (
        ("\n".join(map(json.dumps, ROWS)), "line"),
        ("\n".join(map(json.dumps, ROWS[:1])), "line"),
        (json.dumps(ROWS), "row"),
        (json.dumps(ROWS[0], indent=1), "row"),
    ):
        path = tmp_path / "rows.json"
        path.write_text(content)
        found = data(rows(path))
        assert found in (ROWS, ROWS[:1])
        assert {chunk.unit for chunk in reading.chunks(path, "json")} == {unit}


def test_cells_of_a_csv_file_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "x" * 200_000  # more than `csv` itself allows
    path.write_text(f'a,b\n007,""\n1e3,"say ""hi"", {long}"\n')
    assert data(rows(path)) == [{"a": "007", "b": ""}, {"a": "1e3", "b": f'say "hi", {long}'}]


def test_values_of_a_table_stay_what_they_are(tmp_path: Path) -> None:
    content = [{"n": 1, "f": 0.5, "l": [{"role": "user", "content": "x"}], "b": b"\0", "x": None}]
    assert data(rows(written(tmp_path / "rows.parquet", content))) == content
    assert data(rows(written(tmp_path / "rows.arrow", content))) == content


def test_kinds_by_name() -> None:
    for name, kind in (
        ("a/b.jsonl", "jsonl"), ("b.NDJSON.GZ", "jsonl"), ("b.json.zst", "json"), ("b.csv", "csv"),
        ("b.parquet", "parquet"), ("b.parquet.gz", "parquet"), ("b.arrow", "arrow"),
        ("b.feather", "arrow"), ("b.txt", None), ("b.gz", None), ("jsonl", None), (".gz", None),
        ("b.jsonl.bz2", None), ("", None),
    ):  # fmt: skip
        assert reading.kind_of(name) == kind, name


def test_chunks_are_of_a_size_that_can_be_shared_out(tmp_path: Path) -> None:
    short = [{"text": f"row {n}"} for n in range(2000)]
    long = [{"text": "x" * 300_000} for n in range(12)]
    for name in (
        "rows.jsonl",
        "rows.json",
        "rows.csv",
        "rows.parquet",
        "rows.arrow",
        "rows.feather",
    ):
        for content, most in ((short, 512), (long, 8)):
            path = written(tmp_path / name, content)
            found = [
                list(chunk.rows()) for chunk in reading.chunks(path, reading.kind_of(path) or "")
            ]
            assert data(list(itertools.chain(*found))) == content
            assert max(map(len, found)) <= most
            assert len(found) >= len(content) // most
            chunks = reading.chunks(path, reading.kind_of(path) or "")
            assert [chunk.line for chunk in chunks] == [part[0].line for part in found]


# --- what is refused, row by row -------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "a" "b"}', "expected ',' delimiter at byte 30"),
    (b'{"text": "a"', "expected ',' delimiter at byte 29"),
    (b'{"text": "caf\xc3\xa9", "n": }', "expected value at byte 40"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 30"),
    (b'{"text": "\xed\xa0\xbd"}', "not UTF-8 at byte 27"),  # half a character, as CESU has it
    (b"\xff\xfe{\0}\0", "not UTF-8 at byte 17"),  # UTF-16
    (b'{"text": "a"} {"text": "b"}', "extra data at byte 31"),
    (b'["text"]', "a JSON array, not an object"),
    (b'"text"', "a JSON string, not an object"),
    (b"7", "a JSON number, not an object"),
    (b"true", "a JSON boolean, not an object"),
    (b"null", "a JSON null, not an object"),
    (b'{"text": "a", "text": "b"}', "the key 'text' is there twice"),
    (b'{"m": [{"r": {"a": 1, "\\u0061": 1}}]}', "the key 'a' is there twice"),
    (b'{"n": NaN}', "NaN is no JSON value"),
    (b'{"n": [-Infinity]}', "-Infinity is no JSON value"),
    (b'{"text": "\\ud83d"}', "half a character (a lone surrogate) in 'text'"),
    (b'{"m": [{"\\uDE00": 1}]}', "half a character (a lone surrogate) in 'm'"),
    (b'{"text": "a\\u0000"}', "a NUL character in 'text'"),
    (b'{"text": "a\0"}', "a NUL byte at byte 28"),
    (b"\0\0\0\0", "a NUL byte at byte 17"),  # where a crash left a hole
    (b'{"text": "a\x1b[0m"}', "invalid control character at byte 28"),
    (b'{"text": "a\tb"}', "invalid control character at byte 28"),
    (b'{"text": "\\x41"}', "invalid \\escape at byte 27"),
    (b"[" * 100_000 + b"]" * 100_000, "nested more than 100 deep"),
    (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 100 deep"),
    (b'{"n": ' + b"9" * 5000 + b"}", "a number of more than 4300 digits"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES, ids=[why for _, why in BAD_LINES])
def test_a_bad_line_is_told_of_and_the_others_are_read(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    first, found, last = rows(path)
    assert first.data == last.data == {"text": "good"}
    assert found == Row(2, len(GOOD), None, problem, line.decode(errors="replace")[:2000])
    assert last[:2] == (3, len(GOOD) + len(line) + 1)
    assert not found.loses_rest


ELEMENTS = [(line, why) for line, why in BAD_LINES if "extra data" not in why]


@pytest.mark.parametrize(("line", "problem"), ELEMENTS, ids=[why for _, why in ELEMENTS])
def test_a_bad_element_is_told_of(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + GOOD + b"," + line + b"," + GOOD + b"]")
    first, found, *last = rows(path)
    assert first.data == {"text": "good"}
    assert found.problem
    assert data(last) == [{"text": "good"}] * (not found.loses_rest)
    if " at byte" not in problem:
        assert found.problem.removesuffix("; nothing after it can be read") == problem


def test_escapes_that_only_look_bad_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\\\\u0000 \\\\ud83d \\ud83d\\ude00 \\u001b \\uD7FF\\ue000 \x7f"}')
    assert data(rows(path)) == [{"text": "\\u0000 \\ud83d \U0001f600 \x1b \ud7ff\ue000 \x7f"}]


@pytest.mark.case("B1")
def test_a_broken_line_deep_in_a_long_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 180}).encode() + b"\n"
    broken = line.replace(b'", ', b'" ').replace(b'x"', b'x" 1')
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line * 4811 + broken + line * 5188)
    found = rows(path)
    assert [row.line for row in found] == list(range(1, 10_001))
    assert [row.byte for row in found[:4812]] == [n * len(line) for n in range(4812)]
    assert [row.line for row in found if row.problem] == [4812]
    assert (
        found[4811].problem == f"expected ',' delimiter at byte {4811 * len(line) + len(line) - 1}"
    )


@pytest.mark.parametrize("cut", range(1, 36))
def test_a_row_that_an_upload_cut_off(tmp_path: Path, cut: int) -> None:
    line = '{"text": "a\\ud83d\\ude00é", "n": [-1.5e+3, true]}'.encode()
    for name, before in (("rows.jsonl", GOOD), ("rows.json", b"[" + GOOD + b", ")):
        path = tmp_path / name
        path.write_bytes(before + line[:-cut])
        found = rows(path)
        assert found[0].data == {"text": "good"}
        assert len(found) == 2
        assert (found[1].problem or "").startswith("the file ends in the middle of this row")
        assert found[1].byte == len(before)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_rows_at_the_limit_and_over_it(tmp_path: Path, end: bytes) -> None:
    """Over it by a byte, and so much that it is never held in memory whole."""
    fits = b'{"text": "' + b"x" * (ROW_LIMIT - 12) + b'"}'
    fits = fits[: -len(end.strip(b"\n")) - 2] + b'"}' if end == b"\r\n" else fits
    huge = b'{"text": "' + b"y" * (3 * ROW_LIMIT) + b'"}'
    path = tmp_path / "rows.jsonl"
    after = end or b"\n"
    path.write_bytes(GOOD + fits + after + huge + after + GOOD + b" " + fits + end)
    found = rows(path)
    assert [row.line for row in found] == [1, 2, 3, 4, 5]
    assert [row.data is None for row in found] == [False, False, True, False, True]
    assert [row.problem for row in found if row.problem] == [
        "the row is longer than the limit of 16,777,216 bytes"
    ] * 2
    assert found[2].raw == '{"text": "' + "y" * 1990
    assert found[3].byte == len(GOOD + fits + after + huge + after)


def test_what_follows_a_broken_array(tmp_path: Path) -> None:
    for content, problem in (
        (b'[{"a": 1} {"a": 2}]', "expected ',' delimiter at byte 10"),
        (b'[{"a": 1}', "the file ends in the middle of this row"),
        (b'[{"a": 1},', "the file ends in the middle of this row"),
        (b'[{"a": 1},]', "expected value at byte 10"),
        (b'[{"a": 1}] [', "extra data at byte 11"),
        (b'[{"a": 1}]\xff', "not UTF-8 at byte 10"),
        (b'[{"a": 1}, {"\xff": 1}]', "not UTF-8 at byte 13"),
    ):  # fmt: skip
        path = tmp_path / "rows.json"
        path.write_bytes(content)
        good, bad = rows(path)
        assert good.data == {"a": 1}
        assert bad.problem == f"{problem}; nothing after it can be read", content[:40]
        assert bad.loses_rest
        assert (bad.line, good.line) == (2, 1)


def test_a_number_between_two_blocks() -> None:
    (chunk,) = json_arrays.whole(iter([b"[12", b'34, {"a": 1}]']))
    assert [row.raw for row in chunk.rows()] == ["1234", None]


def test_what_is_no_array_and_no_object(tmp_path: Path) -> None:
    for content, problems in (
        (b'"text"', ["a JSON string, not an object"]),
        (b"\xff\xfe[\0]\0", ["not UTF-8 at byte 0"]),
        (b'{"a": 1}\n{"a": 1,}\n{"a": 1}', ["expected property name enclosed in double quotes at byte 17"]),
        (b'{"a": 1,}\n{"a": 1}', ["expected property name enclosed in double quotes at byte 8"]),
        (b'{\n "a": 1\n} {', ["extra data at byte 12; nothing after it can be read"]),
        (b'{\n "a": 1\n', ["the file ends in the middle of this row; nothing after it can be read"]),
    ):  # fmt: skip
        path = tmp_path / "rows.json"
        path.write_bytes(content)
        assert [row.problem for row in rows(path) if row.problem] == problems, content


CSV_FAULTS = [
    ("x", "1 cells, where the header row has 2", False),
    ("x,y,z", "3 cells, where the header row has 2", False),
    ('"x\n\n,y",1,', "3 cells, where the header row has 2", False),
    ("a\0,b", "a NUL character in 'text'", False),
    ('"a" b,c', "wrong quotes: ',' expected after '\"'; nothing after it can be read", True),
    ("\udce9,b", "not UTF-8 at byte 14", False),
    ('x,"a\nb \udce9\nc"', "not UTF-8 at byte 21", False),
    (
        'x,"never closed',
        "the file ends in the middle of this row; nothing after it can be read",
        True,
    ),
    ("x," + "y" * ROW_LIMIT, "the row is longer than the limit of 16,777,216 bytes", False),
]


@pytest.mark.parametrize(("record", "problem", "loses"), CSV_FAULTS, ids=[f[1] for f in CSV_FAULTS])
def test_a_bad_record_of_a_csv_file(tmp_path: Path, record: str, problem: str, loses: bool) -> None:
    path = tmp_path / "rows.csv"
    text = f"text,n\ngood,1\n{record}\ngood,2\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    found = rows(path)
    assert found[0].data == {"text": "good", "n": "1"}
    assert found[1].problem == problem
    assert (found[1].line, found[1].byte) == (3, 14)
    assert found[1].raw
    assert found[1].loses_rest == loses
    after = [Row(4 + record.count("\n"), found[-1].byte, {"text": "good", "n": "2"})]
    assert found[2:] == ([] if loses else after)


def test_a_quote_that_is_never_closed_in_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text\na\n"b\n' + b"some text\n" * (ROW_LIMIT // 5))
    found = rows(path)
    assert [row.data for row in found] == [{"text": "a"}, None]
    assert "is a quote never closed?" in (found[1].problem or "")
    assert found[1].loses_rest


def test_headers_of_csv_files_that_name_no_columns(tmp_path: Path) -> None:
    for content, words in (
        (b"text,text\na,b\n", "two columns 'text'"),
        (b",text\n0,a\n", "no name for column 1"),
        (b'"text" x,n\na,b\n', "no readable header row"),
        (b'"text', "no readable header row"),
        (b"caf\xe9,n\na,b\n", "not UTF-8 at byte 3"),
        (b"x" * (ROW_LIMIT + 1), "no readable header row"),
    ):
        path = tmp_path / "rows.csv"
        path.write_bytes(content)
        with pytest.raises(BadData, match=words) as error:
            rows(path)
        assert str(path) in str(error.value)


def test_texts_of_a_table_that_cannot_be_used(tmp_path: Path) -> None:
    content = [{"text": "a"}, {"text": "b\0"}, {"text": "c"}, {"text": "d" * (ROW_LIMIT + 1)}]
    for name in ("rows.parquet", "rows.arrow"):
        found = rows(written(tmp_path / name, content))
        assert [row.problem for row in found] == [
            None, "a NUL character in 'text'", None, "the row is longer than the limit of 16,777,216 bytes"
        ]  # fmt: skip
        assert [(row.line, row.byte) for row in found] == [(n, None) for n in (1, 2, 3, 4)]
        assert found[1].raw == "{'text': 'b\\x00'}"
        assert len(found[3].raw or "") <= 2000


def test_a_date_that_python_does_not_know(tmp_path: Path) -> None:
    table = pa.table({"day": pa.array([0, 10**9, 1], pa.int32()).cast(pa.date32())})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = rows(tmp_path / "rows.parquet")
    assert [row.problem is None for row in found] == [True, False, True]


# --- what is refused as a whole --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "file.arrow", "rows.feather"])
def test_tables_that_are_none(tmp_path: Path, name: str) -> None:
    whole = written(tmp_path / name, ROWS * 100).read_bytes()
    for content in (
        whole[: len(whole) // 2],
        whole[:-1] if name == "rows.parquet" else whole[:300],
        GOOD,
        b"PAR1",
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadData, match=re.escape(str(tmp_path / name))):
            rows(tmp_path / name)


def test_a_table_with_a_column_twice_or_that_is_not_utf8(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    wrong = pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())})
    for table, words in ((twice, "two columns 'text'"), (wrong, "UTF8")):
        with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
            stream.write_table(table)
        with pytest.raises(BadData, match=words):
            rows(tmp_path / "rows.arrow")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.zst"])
def test_compressed_files_that_are_broken(tmp_path: Path, name: str) -> None:
    noise = [{"text": random.Random(n).randbytes(200).hex()} for n in range(2000)]
    whole = written(tmp_path / name, noise).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    broken = [whole[:-1], whole[: len(whole) // 2], GOOD, whole[:2]]
    if name.endswith(".gz"):  # pyarrow writes zstd without a checksum
        broken += [bytes(flipped), whole[:50] + b"\xff" * 50 + whole[100:]]
    for content in broken:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadData, match=re.escape(f"{tmp_path / name} is not a whole ")):
            rows(tmp_path / name)


def test_compressed_files_in_several_parts(tmp_path: Path) -> None:
    for name, squeeze in (("rows.jsonl.gz", gzip.compress), ("rows.jsonl.zst", zstd)):
        (tmp_path / name).write_bytes(squeeze(GOOD) + squeeze(GOOD))
        assert data(rows(tmp_path / name)) == [{"text": "good"}] * 2


@pytest.mark.case("B17")
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.zst"])
def test_a_compression_bomb(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    part = packed(path, (b" " * 99_999 + b"\n") * 160).read_bytes()
    with path.open("wb") as file:
        file.writelines([part] * 250)  # 4 GB
    with pytest.raises(BadData, match=r"expands more than 200-fold .* bomb"):
        rows(path)


def test_text_that_shrinks_well_is_no_bomb(tmp_path: Path) -> None:
    path = packed(tmp_path / "rows.jsonl.gz", GOOD * 200_000)
    assert path.stat().st_size * expanding.FOLD < 200_000 * len(GOOD)
    assert len(rows(path)) == 200_000


def test_compressed_tables_are_refused(tmp_path: Path) -> None:
    for name in ("rows.parquet.gz", "rows.arrow.zst"):
        with pytest.raises(BadData, match=f"{name} is a compressed .* expand it"):
            rows(packed(tmp_path / name, b"x"))


def test_an_error_calls_the_file_what_people_call_it(tmp_path: Path) -> None:
    path = tmp_path / "copy.jsonl.gz"
    path.write_bytes(GOOD)
    with pytest.raises(BadData, match=r"^s3://bucket/rows\.jsonl\.gz is not"):
        list(reading.chunks(path, "jsonl", "s3://bucket/rows.jsonl.gz"))


# --- limits ----------------------------------------------------------------------------------------


def test_columns_beyond_the_limit(tmp_path: Path) -> None:
    """In seconds: no list of names is searched for each of them."""
    many = {f"k{n}": "1" for n in range(50_000)}
    start = time.process_time()
    (row,) = rows(packed(tmp_path / "a.jsonl", json.dumps(many).encode()))
    assert row.problem == "50,000 columns, where the limit is 4,096"
    twice = json.dumps(many)[:-1].encode() + b', "k49999": 2}'
    assert rows(packed(tmp_path / "b.jsonl", twice))[0].problem == "the key 'k49999' is there twice"
    few = dict(list(many.items())[:4097])
    for name in ("a.csv", "a.parquet", "a.arrow"):
        with pytest.raises(
            BadData, match=r"has 4,097 columns, where the limit is 4,096; leave out"
        ):
            rows(written(tmp_path / name, [few]))
    assert data(rows(written(tmp_path / "b.csv", [dict(list(few.items())[:4096])])))
    assert time.process_time() - start < 10


@pytest.mark.parametrize("depth", [98, 99])
def test_values_within_values(tmp_path: Path, depth: int) -> None:
    (row,) = rows(packed(tmp_path / "a.jsonl", b'{"a": ' + b"[" * depth + b"]" * depth + b"}"))
    assert row.problem is None


@pytest.mark.case("B17")
@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_a_table_that_expands_beyond_measure(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expanding, "LARGE", 1 << 20)
    table = pa.table({"text": ["a" * (2 << 20)] * 3})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name, compression="zstd", use_dictionary=False)
    else:
        pyarrow.feather.write_feather(table, tmp_path / name, compression="zstd")
    with pytest.raises(BadData, match=r"expands more than 200-fold"):
        rows(tmp_path / name)


# --- memory ----------------------------------------------------------------------------------------

MEASURED = """
    import csv, gzip, sys, pyarrow.parquet
    from pathlib import Path
    from stages.lib.data import reading
    def peak():  # KiB; what getrusage says begins with the parent's
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])
    path, before = Path(sys.argv[1]), peak()
    count = bad = 0
    for chunk in reading.chunks(path, reading.kind_of(path)):
        for row in chunk.rows():
            count, bad = count + 1, bad + (row.problem is not None)
    print(count, bad, peak() - before)
"""


def hole(path: Path, start: bytes, size: int, end: bytes = b"") -> Path:
    """A file with a hole in it, which takes no room: NULs, and no line's end."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
        file.seek(size)
        file.write(end)
    return path


def repeated(path: Path, start: bytes, part: bytes, times: int) -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.writelines([part] * times)
    return path


X = b"x" * (1 << 20)


@pytest.mark.case("B16")
@pytest.mark.parametrize(
    ("make", "count", "bad"),
    [
        (lambda folder: hole(folder / "a.jsonl", GOOD + b'{"', 1 << 30, b"\n" + GOOD), 3, 1),
        (lambda folder: repeated(folder / "a.json", b'[{"a": 1}, {"text": "', X, 100), 2, 1),
        (lambda folder: repeated(folder / "a.json", b'{"text": "', X, 100), 1, 1),
        (lambda folder: repeated(folder / "a.csv", b'text\na\n"', X[:99] + b"\n", 1 << 20), 2, 1),
        (lambda folder: repeated(folder / "a.csv", b"text\n", b'"%s"\n' % X, 150), 150, 0),
        (lambda folder: repeated(folder / "a.jsonl", b"", b'{"text": "%s"}\n' % X, 150), 150, 0),
        (lambda folder: repeated(folder / "a.jsonl.gz", b"", gzip.compress(b"%s\n" % X * 50), 5), 250, 250),
        (lambda folder: written(folder / "a.parquet", [{"text": "y" * 2**20}] * 150), 150, 0),
    ],
    ids=["line", "element", "object", "quote", "records", "rows", "gzip", "parquet"],
)  # fmt: skip
def test_memory_is_bounded(tmp_path: Path, make: Any, count: int, bad: int) -> None:
    path = make(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), path],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = list(map(int, done.stdout.split()))
    assert found[:2] == [count, bad]
    # KiB; `csv` takes four bytes for a character.
    assert found[2] < (160_000 if path.suffix == ".csv" else 100_000)


def test_a_long_element_is_not_scanned_for_every_block() -> None:
    text = b'[{"text": "' + b"x" * (15 << 20) + b'"}]'
    blocks = (text[start : start + (1 << 15)] for start in range(0, len(text), 1 << 15))
    start = time.process_time()
    assert [row.problem for chunk in json_arrays.whole(blocks) for row in chunk.rows()] == [None]
    assert time.process_time() - start < 2  # seconds; 20 where each block began anew


# --- whatever the bytes are ------------------------------------------------------------------------


def some_lines() -> list[bytes]:
    if not REAL_ROWS.is_file():
        return [json.dumps(row).encode() for row in ROWS]
    real = REAL_ROWS.read_bytes().split(b"\n")[:-1]
    return sorted(real, key=len)[:30]


SEEDS = [
    *some_lines(),
    b'{"m": [{"r": "\\ud83d\\ude00", "n": -1.5e3}, null, true], "t": "\\u0041"}',
    b"",
    b" ",
]
PARTS = [
    b"\n", b"\r", b'"', b",", b"{", b"}", b"[", b"]", b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff", b"NaN",
    b'"a":1,"a":1', b"\xef\xbb\xbf", b"\xc3", b"9" * 5000, b"[" * 3000,
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A text to which a few things have happened."""
    text = draw(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(text)))
        gone = draw(st.sampled_from([0, 0, 1, 2, 30, len(text)]))
        more = draw(st.one_of(st.sampled_from([b"", *PARTS]), st.binary(max_size=3)))
        text = text[:at] + more + text[at + gone :]
    return text


LINES = st.lists(st.sampled_from(SEEDS), max_size=6).map(b"\n".join)
ARRAYS = LINES.map(lambda text: b"[" + text.replace(b"\n", b",\n") + b"]")
RECORDS = st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), max_size=8).map(
    lambda found: as_text(
        "csv", [{"a": "é,", "b": '"\n'}, *({"a": a, "b": b} for a, b in found)]
    ).encode(errors="replace")
)
CUTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def pieces(text: bytes, sizes: list[int]) -> Iterator[bytes]:
    """A text as a stream may bring it."""
    at = 0
    for size in itertools.cycle(sizes):
        if at >= len(text):
            return
        yield text[at : at + size]
        at += size


def parsed(chunks: Iterator[reading.Chunk]) -> list[Row] | str:
    try:
        return [row for chunk in chunks for row in chunk.rows()]
    except StageError as error:
        return str(error)


def is_right(line: bytes) -> bool:
    """Whether a line is a row, as plainly as it can be said."""
    strict = json.JSONDecoder(object_pairs_hook=no_key_twice, parse_constant=int)
    try:
        found = strict.decode(line.decode())
        again = json.dumps(found, ensure_ascii=False)
        again.encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "\\u0000" not in again.replace("\\\\", "")


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError
    return dict(pairs)


@settings(max_examples=400, deadline=None)
@given(mutated(LINES), CUTS)
def test_whatever_happens_to_lines(text: bytes, sizes: list[int]) -> None:
    found = parsed(json_rows.cut(iter([text] if text else [])))
    assert isinstance(found, list)
    start = 0
    left = iter(found)
    for number, line in enumerate(text.split(b"\n"), 1):
        at, start = start, start + len(line) + 1
        if at == 0 and line.startswith(b"\xef\xbb\xbf"):
            at, line = 3, line[3:]
        if line.strip():
            row = next(left)
            assert row[:2] == (number, at)
            assert (row.data is not None) == is_right(line), (line, row.problem)
            assert row.data is None or row.data == json.loads(line)
            assert (row.data is None) == bool(row.problem and row.raw)
    assert next(left, None) is None
    assert parsed(json_rows.cut(pieces(text, sizes))) == found


@settings(max_examples=300, deadline=None)
@given(mutated(ARRAYS), CUTS)
def test_whatever_happens_to_an_array(text: bytes, sizes: list[int]) -> None:
    found = parsed(json_arrays.whole(iter([text] if text else [])))
    assert isinstance(found, list)
    assert not any(row.loses_rest for row in found[:-1])
    for row in found:
        assert row.data is None or is_right(json.dumps(row.data).encode())
        assert (row.data is None) == bool(row.problem)
    try:
        whole = json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        assert (
            not text.strip()
            or any(row.problem for row in found)
            or not text.lstrip().startswith(b"[")
        )
    else:
        whole = whole if isinstance(whole, list) else [whole]
        assert len(found) == len(whole)
        assert all(row.data in (None, one) for row, one in zip(found, whole, strict=True))
    assert parsed(json_arrays.whole(pieces(text, sizes))) == found


@settings(max_examples=300, deadline=None)
@given(mutated(RECORDS), CUTS)
def test_whatever_happens_to_records(text: bytes, sizes: list[int]) -> None:
    found = parsed(csv_rows.cut_records(iter([text] if text else []), "rows.csv"))
    if isinstance(found, list):
        assert not any(row.loses_rest for row in found[:-1])
        if not any(row.problem for row in found):
            lines = io.StringIO(text.decode("utf-8-sig"), newline="\n")
            every = [cells for cells in csv.reader(lines, strict=True) if len(cells) > 1]
            wide = [dict(zip(every[0], cells, strict=True)) for cells in every[1:]]
            assert [row.data for row in found if len(row.data or ()) > 1] == wide
    assert parsed(csv_rows.cut_records(pieces(text, sizes), "rows.csv")) == found


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    folder = tmp_path_factory.mktemp("tables")
    names = ("rows.parquet", "rows.arrow", "file.arrow", "rows.feather")
    found = [written(folder / name, ROWS * 20) for name in names]
    return {path: path.read_bytes() for path in found}


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
    st.floats(0.5, 1),
)
def test_whatever_happens_to_a_table(
    tables: dict[Path, bytes], which: int, flips: list[tuple[float, int]], rest: float
) -> None:
    path, whole = list(tables.items())[which]
    content = bytearray(whole)
    for place, byte in flips:
        content[int(place * len(content))] = byte
    path.write_bytes(content[: int(rest * len(content))])
    found = parsed(reading.chunks(path, reading.kind_of(path) or ""))
    if isinstance(found, list):
        assert all((row.data is None) == bool(row.problem) for row in found)
    else:
        assert str(path) in found
