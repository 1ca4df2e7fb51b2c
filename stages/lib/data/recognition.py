"""Which shape a data set has: told by the columns of its first rows."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from stages.lib.data.rows import COLUMN_LIMIT
from stages.lib.data.shapes import LONGEST_NAME, MARK, MARKS, PAIRS, Shape, listed
from stages.lib.run.exits import BadData

BESIDE = {"system", "system_prompt", "history", "tools"}  # columns that conversations may have too
# Column that decides it, and the shapes that it may mean.
LISTS = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
PLAIN = ("text", "content")
CHATS = {("messages", "sharegpt"), ("sharegpt", "messages")}  # read alike


def _candidates(columns: Sequence[str], texts: Sequence[str]) -> list[Shape]:
    found = [Shape(name, (column,)) for column, name in LISTS.items() if column in columns]
    pairs = [pair for pair in PAIRS if pair[0] in columns and pair[2] in columns]
    if pairs:
        asked, about, answer = max(pairs, key=lambda pair: pair[1] in columns)
        found.append(Shape("alpaca", (asked, answer, about), 2))
    plain = next((column for column in PLAIN if column in columns), None)
    if plain:
        marked = any(text.lstrip().startswith(tuple(MARKS)) for text in texts)
        marked = marked or (bool(texts) and all(MARK.search(text) for text in texts))
        found.append(Shape("guanaco" if marked else "text", (plain,)))
    return found


def recognise(rows: Sequence[dict[str, Any]], name: str, told: str) -> Shape:
    """The shape of a data set, by the columns of its first rows.

    Args:
        name: of the data set, for the message. told: a shape's name, or `auto`.

    Raises:
        BadData: no shape fits, or more than one; the sentence shows the columns and the nearest shape.
    """
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    plain = next((column for column in PLAIN if column in columns), PLAIN[0])
    texts = [row[plain] for row in rows if isinstance(row.get(plain), str) and row[plain].strip()]
    found = _candidates(columns, texts)
    if told in ("guanaco", "text") and plain in columns:
        return Shape(told, (plain,))
    if told != "auto":
        own = [shape for shape in found if shape.name == told]
        like = [shape._replace(name=told) for shape in found if (shape.name, told) in CHATS]
        found = (own or like)[:1]
    if len(found) == 1:
        return found[0]
    if found:
        fits = " and ".join(
            f"{shape.name} ({listed(shape.columns[: shape.needed])})" for shape in found
        )
        raise BadData(
            f"{name} has the columns {listed(columns)}, which fit {fits}; choose with SHAPE={found[0].name}"
        )
    wanted = f" for SHAPE={told}" if told != "auto" else ""
    raise BadData(
        f"{name} has the columns {listed(columns)}, which fit no shape{wanted}; the nearest is "
        f"{_nearest(columns)}: rename what it needs"
    )


def unread(rows: Sequence[dict[str, Any]], shape: Shape) -> list[str]:
    """The columns that a shape makes nothing of."""
    read = {*shape.columns} | (set() if shape.name in ("guanaco", "text") else BESIDE)
    columns = dict.fromkeys(str(key) for row in rows for key in row)
    return [column for column in columns if column not in read]


def _nearest(columns: Sequence[str]) -> str:
    shapes: list[tuple[str, tuple[str, ...]]] = [
        (name, (column,)) for column, name in LISTS.items()
    ]
    shapes += [("alpaca", (asked, answer)) for asked, _, answer in PAIRS]
    shapes += [("guanaco or text", ("text",))]

    short = [column[:LONGEST_NAME] for column in columns[:COLUMN_LIMIT]]

    def likeness(needed: Iterable[str]) -> float:
        ratios = [
            max((difflib.SequenceMatcher(None, need, c.lower()).ratio() for c in short), default=0)
            for need in needed
        ]
        return sum(ratios) / len(ratios)

    name, needed = max(shapes, key=lambda shape: likeness(shape[1]))
    return f"{name} ({listed(needed)})"
