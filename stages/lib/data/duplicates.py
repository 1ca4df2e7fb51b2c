"""Rows that were there before: the same conversation, or nearly the same."""

import sqlite3
from pathlib import Path
from typing import Any

from stages.lib.data.conversation import Conversation

PERMUTATIONS, BANDS = 128, 16
SIMILARITY = 0.8  # of Jaccard, from which rows are nearly the same
SHINGLE = 8  # characters: serves languages that put no blank between words


def signature(said: Conversation) -> Any:
    """The MinHash of what is said, over pieces of SHINGLE characters, case and blanks aside."""
    from rensa import RMinHash

    text = " ".join(" ".join(turn.text for turn in said.turns).lower().split())
    found = RMinHash(PERMUTATIONS, 0)
    found.update([text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))])
    return found


def dumps(mark: Any) -> bytes:
    """A `signature` as bytes, for `loads`."""
    return bytes(mark.__reduce__()[2])


def loads(content: bytes) -> Any:
    """The signature that `dumps` was given."""
    from rensa import RMinHash

    found = RMinHash(PERMUTATIONS, 0)
    found.__setstate__(content)
    return found


class Seen:
    """The rows that were kept: on disk, so that memory does not grow with them.

    Near duplicates are an exception, at about 1 KiB a row.

    Args:
        folder: of scratch. near: whether rows that are nearly the same count too.
    """

    def __init__(self, folder: Path, near: bool) -> None:
        self.path = folder / "seen.sqlite"
        self.database = sqlite3.connect(self.path, isolation_level=None)
        self.database.execute("PRAGMA journal_mode = OFF")
        self.database.execute("PRAGMA synchronous = OFF")
        self.database.execute("PRAGMA cache_size = -65536")  # KiB
        self.database.execute(
            "CREATE TABLE seen (digest BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID"
        )
        self.database.execute("BEGIN")
        self.near: Any = None
        if near:
            from rensa import RMinHashDeduplicator

            self.near = RMinHashDeduplicator(SIMILARITY, PERMUTATIONS, True, BANDS, 0)

    def find(self, digest: bytes) -> int | None:
        """The row that was noted with this digest."""
        found = self.database.execute("SELECT row FROM seen WHERE digest = ?", (digest,)).fetchone()
        return int(found[0]) if found else None

    def meet(self, row: int, digest: bytes, mark: Any) -> tuple[int, bool] | None:
        """The noted row that a row repeats, and whether it is the same to the letter; a new one is noted: None.

        Args:
            digest: of the conversation. mark: its `signature`, or None.
        """
        if self.near is not None and mark is not None:
            same = self.find(digest)
            like = self.near.get_duplicates(mark) if same is None else [same]
            if like:
                return min(map(int, like)), same is not None
            self.near.add(str(row), mark)
        added = self.database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, row))
        return None if added.rowcount else (self.find(digest) or 0, True)

    def close(self) -> None:
        """Remove what was noted."""
        self.database.close()
        self.path.unlink()
