"""Tables for a terminal or a log: plain text, at most 100 columns unless told."""

import io
from collections.abc import Sequence
from typing import Any

WIDTH = 100


def table(
    headings: Sequence[str], rows: Sequence[Sequence[Any]], width: int = WIDTH, right: bool = False
) -> str:
    """A table as text; long cells are wrapped.

    Args:
        width: columns of text. right: all but the first column end at the right, as numbers do.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*headings, box=SIMPLE_HEAD)
    for column in drawn.columns[1:] if right else ():
        column.justify = "right"
    for row in rows:
        drawn.add_row(*(Text(cell if isinstance(cell, str) else _number(cell)) for cell in row))
    out = Console(file=io.StringIO(), width=width)
    out.print(drawn)
    lines = out.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def account(metrics: dict[str, Any]) -> str:
    """What became of the rows and tokens of a data set."""
    rows: list[tuple[str, Any]] = [("rows read", metrics["rows_read"])]
    rows += [(f"  dropped: {reason}", count) for reason, count in metrics["rows_dropped"].items()]
    rows += [
        ("rows kept", metrics["rows_kept"]),
        ("  held out", metrics["rows_held_out"]),
        ("  truncated", metrics["rows_truncated"]),
        ("  split", metrics["rows_split"]),
        ("unanswered turns left out", metrics["turns_dropped"]),
        ("rows written", metrics["rows_written"]),
        ("  ending in a trained EOS", metrics["rows_ending_in_trained_eos"]),
        ("tokens encoded", metrics["tokens_encoded"]),
        ("  lost", metrics["tokens_lost"]),
        ("  added by cuts, splits and weights", metrics["tokens_added"]),
        ("tokens", metrics["tokens"]),
        ("  trained", metrics["trainable_tokens"]),
        ("longest row, tokens", metrics["length_quantiles"]["1"]),
        ("median row, tokens", metrics["length_quantiles"]["0.5"]),
    ]
    return table(("data", "count"), rows)
