"""From sources to the rows of an artifact: read, prepared by all cores, told apart, counted."""

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.lib.data import preparation, recognition, sources
from stages.lib.data.duplicates import Seen
from stages.lib.data.ledger import Ledger
from stages.lib.data.preparation import Batch, Job, Outcome
from stages.lib.data.prepared import PARTS, Writer
from stages.lib.data.shapes import MOST_NAMES, Shape
from stages.lib.data.shards import Shards
from stages.lib.data.sources import Source
from stages.lib.run import workers
from stages.lib.run.progress import Progress, say

SAMPLED = 100  # rows by which a shape is recognised
SMALL = 4 << 20  # bytes of sources that one process reads as fast as many
SMALL_ROWS = 4096


class Reading(NamedTuple):
    """One source and how its rows are read."""

    number: int
    source: Source
    shape: Shape


def recognise(found: Iterable[Source], told: str) -> list[Reading]:
    """The shape of each source, by its first rows; says what it is, and which columns are not read.

    Raises:
        BadData: no shape fits, or more than one.
    """
    readings = []
    for number, source in enumerate(found):
        rows = (
            row.data
            for _, chunk in sources.chunks(source, source.train)
            for row in chunk.rows()
            if row.data is not None
        )
        # Where there are bad rows alone, any shape will do: each is reported.
        first = list(itertools.islice(rows, SAMPLED))
        shape = (
            recognition.recognise(first, source.name, told) if first else Shape("text", ("text",))
        )
        unread = recognition.unread(first, shape)
        rest = f"; columns not read: {', '.join(unread[:MOST_NAMES])}" if unread else ""
        odd = sources.oddities(source)
        note = f"; {odd}" if odd else ""
        say(f"{source.name} has the shape {shape.name}{rest}{note}")
        readings.append(Reading(number, source, shape))
    return readings


class Assembly:
    """Gathers prepared rows into the parts of an artifact.

    Args:
        shards: which prepare them, and keep what they made.
        held_out: share of rows put aside where a source has no test split of its own.
        repeats: of duplicates: `drop`, `keep`, or `near` (drop those that are nearly the same too).
        max_rows: of each source that are read for training.
    """

    def __init__(
        self, shards: Shards, writer: Writer, ledger: Ledger, scratch: Path, *, held_out: float,
        repeats: str, max_rows: int | None, seed: int,
    ) -> None:  # fmt: skip
        self.shards, self.writer, self.ledger = shards, writer, ledger
        self.seen = Seen(scratch, repeats == "near")
        self.held_out, self.repeats, self.max_rows, self.seed = held_out, repeats, max_rows, seed
        self.own_rows = 0  # the first rows are those of the sources' own test splits
        self.by_source: list[dict[str, Any]] = []
        self.least: tuple[float, int, dict[str, Any] | None] | None = None

    def run(self, readings: list[Reading]) -> list[dict[str, Any]]:
        """Prepare all sources: held-out files first, so that a row of theirs is not learned too.

        Returns:
            `name`, `shape`, `rows_read`, `rows_kept` and `tokens` of each source.
        """
        counts = {"rows_read": 0, "rows_kept": 0, "tokens": 0}
        self.by_source = [{"name": r.source.name, "shape": r.shape.name} | counts for r in readings]
        files = [path for r in readings for path in (*r.source.train, *r.source.held_out)]
        size = sum(path.stat().st_size for path in files)
        processes = workers.available() if size > SMALL else 1
        with Progress(None, "rows", name="preparing") as self.progress:
            for reading in readings:
                self._take(reading, reading.source.held_out, True, processes)
            self.own_rows = self.ledger.rows_read
            for reading in readings:
                self._take(reading, reading.source.train, False, processes)
        self.writer.close()
        self.seen.close()
        if self.held_out and self.least and not self.ledger.rows_held_out:
            self._hold_one_out(*self.least)
        return self.by_source

    def _hold_one_out(self, place: float, row: int, prompt: dict[str, Any] | None) -> None:
        """Put the row with the least hash aside, where chance put none there."""
        if self.ledger.rows_kept > 1:
            self.writer.hold_out(row, prompt)
            self.ledger.rows_held_out = 1

    def _take(self, reading: Reading, files: Any, own: bool, processes: int) -> None:
        """All rows of some files; `own`: they are the source's own test split."""
        if own and not files:
            return
        ask = 1.0 if own else 0.0 if reading.source.held_out else self.held_out
        most = None if own else self.max_rows
        if most is not None and most <= SMALL_ROWS:
            processes = 1
        names: deque[tuple[str, str]] = deque()

        def jobs() -> Iterator[Job]:
            for name, chunk in sources.chunks(reading.source, files):
                names.append((name, ":" if chunk.unit == "line" else " row "))
                yield Job(chunk, reading.shape, ask)

        taken = 0
        work, known = self.shards, self.shards.known
        with contextlib.closing(workers.in_order(work, jobs(), processes, known)) as finished:
            for made in finished:
                batch = self.shards.add(made)
                rows = batch.outcomes[: None if most is None else most - taken]
                self._add(reading, *names.popleft(), batch, rows, own)
                taken += len(rows)
                self.progress.update(self.ledger.rows_read, tokens=self.ledger.tokens)
                if most is not None and taken >= most:
                    return

    def _add(
        self, reading: Reading, file: str, mark: str, batch: Batch, rows: list[Outcome], own: bool
    ) -> None:
        """Account for the rows of a batch, and write those that are kept."""
        written: dict[str, list[tuple[int, int]]] = {part: [] for part in PARTS}
        position = 0
        for outcome in rows:
            self.ledger.rows_read += 1
            self.ledger.tokens_encoded += outcome.tokens
            first, position = position, position + outcome.pieces
            row, where = self.ledger.rows_read, f"{file}{mark}{outcome.line}"
            if outcome.reason:
                self.ledger.refuse(row, where, file, outcome)
                continue
            part = self._part(reading, outcome, own)
            times = self._times(row, where, reading, outcome, own, part)
            if times:
                self.ledger.keep(row, where, outcome, part)
                if part == "held_out":
                    self.writer.ask(row, outcome.prompt)
                written[part] += [(row, n) for n in range(first, position)] * times
                self.by_source[reading.number]["rows_kept"] += 1
        self.by_source[reading.number]["rows_read"] += len(rows)
        tokens, learned, ended = preparation.counts(batch, self.shards.prepare.format.stops.ids)
        for part, pieces in written.items():
            if pieces:
                numbers, index = np.array(pieces, dtype=np.int64).T
                self.ledger.write(tokens[index], learned[index], ended[index])
                self.by_source[reading.number]["tokens"] += int(tokens[index].sum())
                self.writer.write(part, numbers, reading.number, batch, index)

    def _part(self, reading: Reading, outcome: Outcome, own: bool) -> str:
        """On which side a row is: by a hash of its conversation, so that it stays there when others come."""
        if own:
            return "held_out"
        if reading.source.held_out or not self.held_out:
            return "train"
        return "held_out" if outcome.place < self.held_out else "train"

    def _times(
        self, row: int, where: str, reading: Reading, outcome: Outcome, own: bool, part: str
    ) -> int:
        """How often a row is written; never, where it repeats one, or its source's weight leaves it out."""
        times = 1
        if part == "train":
            times = preparation.copies(outcome.digest, self.seed, reading.source.weight)
        if not times:
            self.ledger.drop(row, where, "weight", outcome.tokens)
            return 0
        known = self._known(row, outcome, own)
        if known:
            leaked = not own and known[0] <= self.own_rows
            reason = "leaked" if leaked else "duplicate" if known[1] else "near_duplicate"
            self.ledger.drop(row, where, reason, outcome.tokens, of=known[0])
            return 0
        if part == "train" and not reading.source.held_out:
            candidate = (outcome.place, row, outcome.prompt)
            self.least = min(self.least or candidate, candidate, key=lambda entry: entry[0])
        return times

    def _known(self, row: int, outcome: Outcome, own: bool) -> tuple[int, bool] | None:
        """The kept row that one repeats. Where repeats are kept, still none of a test split is learned."""
        if self.repeats != "keep":
            return self.seen.meet(row, outcome.digest, outcome.mark)
        if own:
            self.seen.meet(row, outcome.digest, None)
            return None
        first = self.seen.find(outcome.digest) if self.own_rows else None
        return None if first is None else (first, True)
