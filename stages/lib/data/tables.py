"""Parquet and Arrow files: batches of rows, sent on as Arrow and made Python objects where they are used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.data import expanding
from stages.lib.data.rows import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Chunk,
    Row,
    bad_data,
    first_twice,
    problem_of,
    too_many,
)
from stages.lib.run.exits import BadData

IPC_FILE = b"ARROW1"  # how an Arrow file begins, and feather; an Arrow stream has no mark


class Table(Chunk):
    """Rows of a table; the payload is an Arrow stream."""

    def rows(self) -> Iterator[Row]:
        """Each row as a dict."""
        import pyarrow as pa

        table = pa.ipc.open_stream(self.payload).read_all()
        for number, data in enumerate(_dicts(table), self.line):
            if isinstance(data, str):
                yield Row(number, None, None, data, "")
            elif problem := problem_of(data):
                yield bad_data(number, problem, data)
            else:
                yield Row(number, None, data)


def _dicts(table: Any) -> Iterator[dict[str, Any] | str]:
    """Each row, or why Python cannot hold it: a date out of its range, say."""
    try:
        yield from table.to_pylist()
    except (ValueError, OverflowError):
        for number in range(len(table)):
            try:
                yield table.slice(number, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield " ".join(str(error).split())


def tables(path: Path, kind: str, name: str) -> Iterator[Chunk]:
    """The rows of a `parquet` or `arrow` file.

    Raises:
        BadData: it is cut off, or something else.
    """
    import pyarrow as pa

    if (room := path.stat().st_size) == 0:
        return
    held: list[Any] = []
    rows = size = done = whole = 0
    try:
        for batch in _parquet(path, name) if kind == "parquet" else _arrow(path):
            _check_names(batch.schema.names, name)
            whole += batch.nbytes + len(batch)
            expanding.check(whole, room, name)
            batch.validate(full=True)  # a wrong offset would read memory that is not ours
            for piece in _pieces(batch):
                if held and (rows + len(piece) > CHUNK_ROWS or size + piece.nbytes > CHUNK_BYTES):
                    yield _chunk(held, done)
                    held, rows, size, done = [], 0, 0, done + rows
                held.append(piece)
                rows, size = rows + len(piece), size + piece.nbytes
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = " ".join(str(error).split())[:200]
        place = f" after row {done + rows}" if done + rows else ""
        raise BadData(
            f"{name} is no whole {kind} file{place}: {what}; copy or write it again"
        ) from error
    if held:
        yield _chunk(held, done)


def _chunk(pieces: list[Any], done: int) -> Chunk:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pieces[0].schema.remove_metadata()) as writer:
        for piece in pieces:
            writer.write_batch(piece.replace_schema_metadata(None))
    return Table(sink.getvalue().to_pybytes(), done + 1, 0, "row")


def _check_names(columns: list[str], name: str) -> None:
    if problem := too_many(len(columns)):
        raise BadData(f"{name} has {problem}; leave out those that are not needed")
    if twice := first_twice(columns):
        raise BadData(f"{name} has two columns {twice!r}; rename one")


def _parquet(path: Path, name: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=CHUNK_BYTES) as file:
        about = file.metadata
        _check_names(file.schema_arrow.names, name)
        # Before a page is read: its own size is what it says here.
        said = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
        expanding.check(said, path.stat().st_size, name)
        # Few rows at a time: a long text that comes again and again takes room in the file only once.
        yield from file.iter_batches(batch_size=16, use_threads=False)


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        if file.read(len(IPC_FILE)) == IPC_FILE:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pa.ipc.open_stream(file)


def _pieces(batch: Any) -> Iterator[Any]:
    """A batch in parts of which each can be a chunk."""
    step = max(1, min(CHUNK_ROWS, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, 1)))
    return (batch.slice(start, step) for start in range(0, batch.num_rows, step))
