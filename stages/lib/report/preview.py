"""Rows as the model learns them: what is learned in colour, special tokens visible."""

import html
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

FILE = "preview.html"
ROWS = 20
BARS = 40
LEARNED, SPECIAL, END = "\033[1;32m", "\033[7m", "\033[0m"

Row = tuple[int, Sequence[int], Sequence[bool]]


class Tokens(Protocol):
    """What a preview needs of a tokenizer; see `stages.lib.data.tokens.Tokens`."""

    def pieces(
        self, ids: Sequence[int], learned: Sequence[bool]
    ) -> Iterator[tuple[str, bool, bool]]: ...


def text(rows: Iterable[Row], tokens: Tokens) -> str:
    """Rows for a terminal: what is learned in green; elsewhere between guillemets."""
    coloured = sys.stdout.isatty()
    lines = []
    for number, ids, learned in rows:
        lines.append(f"row {number}: {len(ids)} tokens, {sum(learned)} learned")
        said = ""
        for piece, is_learned, is_special in tokens.pieces(ids, learned):
            if coloured:
                style = (LEARNED if is_learned else "") + (SPECIAL if is_special else "")
                said += f"{style}{visible(piece)}{END if style else ''}"
            else:
                said += f"«{visible(piece)}»" if is_learned else visible(piece)
        lines += [said.replace("»«", ""), ""]
    return "\n".join(lines)


def visible(piece: str) -> str:
    """Text from a data set without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in piece)


def write(
    folder: Path,
    rows: Iterable[Row],
    tokens: Tokens,
    metrics: dict[str, Any],
    lengths: Counter[int],
) -> None:
    """`preview.html`: the account, the histogram of lengths and the first rows, in one file."""
    body = [_facts(metrics), _histogram(lengths)]
    for number, ids, learned in rows:
        pieces = "".join(_marked(*piece) for piece in tokens.pieces(ids, learned))
        heading = f"Row {number}: {len(ids)} tokens, {sum(learned)} learned"
        body.append(f"<section><h2>{heading}</h2><pre>{pieces}</pre></section>")
    page = PAGE.replace("BODY", "\n".join(body))
    (folder / FILE).write_text(page, encoding="utf-8", errors="replace")


def _marked(piece: str, learned: bool, special: bool) -> str:
    kinds = [kind for kind, applies in (("learned", learned), ("special", special)) if applies]
    shown = html.escape(visible(piece))
    return f'<span class="{" ".join(kinds)}">{shown}</span>' if kinds else shown


def _facts(metrics: dict[str, Any]) -> str:
    names = (
        "shape", "chat_format", "rows_read", "rows_kept", "rows_held_out", "rows_dropped", "rows_truncated",
        "tokens", "trainable_tokens", "tokens_lost", "rows_ending_in_trained_eos",
    )  # fmt: skip
    cells = "".join(
        f"<tr><th>{name.replace('_', ' ')}</th><td>{html.escape(_value(metrics[name]))}</td></tr>"
        for name in names
    )
    return f"<table>{cells}</table>"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)[1:-1].replace('"', "") or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _histogram(lengths: Counter[int]) -> str:
    """Tokens of the rows as bars, drawn in SVG."""
    longest = max(lengths, default=1)
    width = -(-longest // BARS)
    bars = Counter({(length - 1) // width: 0 for length in lengths})
    for length, count in lengths.items():
        bars[(length - 1) // width] += count
    highest = max(bars.values(), default=1)
    drawn = "".join(
        f'<rect x="{bar * 16 + 40}" y="{130 - 120 * count / highest:.1f}" width="14" '
        f'height="{120 * count / highest:.1f}"><title>{bar * width + 1} to {(bar + 1) * width} tokens: '
        f"{count:,} rows</title></rect>"
        for bar, count in sorted(bars.items())
    )
    labels = "".join(
        f'<text x="{bar * 16 + 40}" y="146">{bar * width:,}</text>'
        for bar in range(0, BARS + 1, 10)
    )
    return (
        '<figure><svg viewBox="0 0 720 152" role="img" aria-label="Histogram of row lengths">'
        f'<text x="0" y="18">{highest:,}</text><text x="0" y="130">0</text>{drawn}{labels}</svg>'
        "<figcaption>Rows by length in tokens</figcaption></figure>"
    )


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prepared data</title>
<style>
:root { color-scheme: light dark; --learned: #12702f; --ground: #dff3e4; --soft: #888; }
@media (prefers-color-scheme: dark) { :root { --learned: #8be0a4; --ground: #17351f; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .1rem 1rem .1rem 0; font-weight: normal; }
th { color: var(--soft); } td { font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8884; border-radius: .4rem;
  padding: .7rem; }
.learned { color: var(--learned); background: var(--ground); }
.special { border: 1px solid currentColor; border-radius: .2rem; padding: 0 .2rem; font-size: .85em; }
svg { width: 100%; max-width: 45rem; fill: var(--learned); } svg text { fill: var(--soft); font-size: 11px; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); }
</style>
<h1>Prepared data</h1>
<p>What is learned is <span class="learned">marked like this</span>, special tokens
<span class="special">like this</span>.</p>
BODY
</html>
"""
