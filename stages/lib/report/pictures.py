"""Pictures of data and adapter: lengths of rows, what became of rows and tokens, norms by layer."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from stages.lib.report import axes
from stages.lib.report.plots import (
    COLOURS,
    LETTER,
    SMALL,
    WIDE,
    Canvas,
    Figure,
    Mark,
    Plot,
    Series,
    figure,
)

BARS = 48
LAYER = re.compile(r"\.(\d+)\.")
Interval = tuple[str, float, Sequence[float] | None, int]  # name, value, its ends, colour
EXPERT = re.compile(r"experts\.\d+\.")


def histogram(lengths: dict[str, Counter[int]], limit: int | None) -> Figure | None:
    """Rows by their length in tokens, those for training and those held out.

    Args:
        limit: MAX_LENGTH, at which longer rows were cut.
    """
    whole = sum(lengths.values(), Counter())
    if not whole:
        return None
    longest, count = max(whole), whole.total()
    width = max(1, -(-longest // BARS))
    width = round(axes.step(width)) if width > 2 else width
    bars = {part: _binned(found, width) for part, found in lengths.items()}
    ordered = sorted(whole.elements())
    middle, far = ordered[count // 2], ordered[min(count - 1, int(count * 0.95))]
    alt = (
        f"Histogram of row lengths in tokens: {count:,} rows, the shortest {ordered[0]:,}, the median "
        f"{middle:,}, 95 % up to {far:,}, the longest {longest:,}."
    )
    marks = [Mark(middle, "median"), Mark(far, "95 %")]
    if limit and limit <= longest * 1.2:
        marks.append(Mark(limit, "MAX_LENGTH", strong=True))
    wide, narrow = (_histogram(bars, width, marks, alt, size) for size in (WIDE, SMALL))
    names = {"train": "for training", "held_out": "held out"}
    keys = [(n, "bar", names[part]) for n, part in enumerate(bars, 1) if bars[part]]
    title = f"Rows by length, in bins of {width} tokens" if width > 1 else "Rows by length"
    return Figure(title, wide, narrow, keys)


def _binned(found: Counter[int], width: int) -> Counter[int]:
    bars: Counter[int] = Counter()
    for length, rows in found.items():
        bars[max(length - 1, 0) // width] += rows
    return bars


def _histogram(
    bars: dict[str, Counter[int]], width: int, marks: Sequence[Mark], alt: str, size: tuple[int, int]
) -> Markup:  # fmt: skip
    canvas = Canvas(size, alt)
    total: Counter[int] = sum(bars.values(), Counter())
    ends = [0.0, (max(total) + 1.0) * width, *(mark.at for mark in marks)]
    canvas.frame(ends, [0.0, *total.values()], "tokens of a row", "rows", zero=True, whole=True)
    for place in sorted(total):
        low, high = (canvas.x.at(edge * width) for edge in (place, place + 1))
        below = 0
        for number, found in enumerate(bars.values(), 1):
            rows = found[place]
            if rows:
                foot, top = canvas.y.at(below), canvas.y.at(below + rows)
                room = max(high - low - 1, 0.5)
                canvas.add("Rectangle", low, top, room, foot - top, class_=f"bar c{number}")
                below += rows
    canvas.marks(marks)
    span = [(p, f"{p * width + 1:,} to {(p + 1) * width:,} tokens") for p in sorted(total)]
    for place, words in span:
        low, high = (canvas.x.at(edge * width) for edge in (place, place + 1))
        parts = ", ".join(
            f"{found[place]:,} {part.replace('_', ' ')}" for part, found in bars.items()
        )
        top = canvas.y.end
        canvas.add(
            "Rectangle", low, top, high - low, canvas.y.start - top, class_="hit", title=f"{words}: {parts}"
        )  # fmt: skip
    return canvas.svg()


def rows_account(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The way from rows that were read to rows that were written, as lines with bars."""
    read = metrics["rows_read"]
    lines = [_line("rows read", read, read)]
    left = read
    for reason, count in metrics["rows_dropped"].items():
        if count:
            left -= count
            lines.append(_line(f"dropped: {reason.replace('_', ' ')}", -count, read, left))
    kept, held = metrics["rows_kept"], metrics["rows_held_out"]
    lines.append(_line("rows kept", kept, read))
    lines.append(_line("held out", -held, read, kept - held))
    lines.append(_line("rows to train on", kept - held, read, strong=True))
    return lines


def tokens_account(
    metrics: dict[str, Any], learned: dict[str, int], trained: dict[str, Any]
) -> list[dict[str, Any]]:
    """The way from tokens that were encoded to tokens that were learned, as lines with bars.

    Args:
        metrics: of the data. learned: tokens to learn of each part. trained: metrics of the adapter, if any.
    """
    encoded, lost, added = (metrics[f"tokens{name}"] for name in ("_encoded", "_lost", "_added"))
    whole = max(encoded, metrics["tokens"], trained.get("trained_tokens") or 0)
    to_learn, held = sum(learned.values()), learned.get("held_out", 0)
    lines = [
        _line("tokens encoded", encoded, whole),
        _line("lost: cut, dropped, repeated", -lost, whole, encoded - lost),
        _line("added by cuts, splits and weights", added, whole, encoded - lost),
        _line("tokens of all rows", metrics["tokens"], whole),
        _line("only read, not learned", to_learn - metrics["tokens"], whole, to_learn),
        _line("held out", -held, whole, to_learn - held),
        _line("tokens to learn, one epoch", to_learn - held, whole, strong=not trained),
    ]
    if trained:
        epochs = f"{trained['epochs']:.3g} epoch{'s' * (trained['epochs'] != 1)}"
        words = f"tokens learned in {trained['steps']:,} steps, {epochs}"
        lines.append(_line(words, trained["trained_tokens"], whole, strong=True))
    return [line for line in lines if line["count"] != "0"]


def _line(
    words: str, count: int, whole: int, start: int = 0, strong: bool = False
) -> dict[str, Any]:
    """A line of an account: its bar begins at `start`, in percent of `whole`; what goes away is negative."""
    share = 100 / max(whole, 1)
    sign = f"{count:+,}".replace("-", "−") if start or count < 0 else f"{count:,}"
    return {
        "words": words, "count": sign if count else "0", "gone": count < 0, "strong": strong,
        "start": round(start * share, 2), "width": round(max(abs(count) * share, 0.2), 2),
    }  # fmt: skip


def intervals(title: str, unit: str, rows: Sequence[Interval]) -> Figure:
    """Values with their 95 % intervals, one below the other."""
    alt = f"{title}, {unit}: " + "; ".join(
        f"{name} {value:.4g}" + (f" (95 %: {ends[0]:.4g} to {ends[1]:.4g})" if ends else "")
        for name, value, ends, _ in rows
    )
    wide, narrow = (_intervals(unit, rows, alt, width) for width in (WIDE[0], SMALL[0]))
    return Figure(title, wide, narrow)


def _intervals(unit: str, rows: Sequence[Interval], alt: str, width: int) -> Markup:
    canvas = Canvas((width, 44 + 28 * len(rows)), alt)
    longest = max(len(name) for name, *_ in rows)
    letters = min(longest, 40 if width > SMALL[0] else 18)
    across = [v for _, value, ends, _ in rows for v in (value, *(ends or ()))]
    canvas.across(across, unit, left=16 + LETTER * letters)
    for place, (name, value, ends, colour) in enumerate(rows):
        at, middle = canvas.x.at(value), 18 + 28 * place
        canvas.words(cut_to(name, letters), canvas.x.start - 12, middle + 4, "end")
        told = f"{name}: {value:.4g}" + (f", 95 % {ends[0]:.4g} to {ends[1]:.4g}" if ends else "")
        if ends:
            low, high = map(canvas.x.at, ends)
            canvas.add("Line", low, middle, high, middle, class_=f"whisker c{colour}")
            for end in (low, high):
                canvas.add("Line", end, middle - 5, end, middle + 5, class_=f"whisker c{colour}")
        canvas.add("Circle", at, middle, 5, class_=f"dot c{colour}")
        span = width - canvas.x.start
        canvas.add("Rectangle", canvas.x.start, middle - 14, span, 28, class_="hit", title=told)
    return canvas.svg()


def cut_to(name: str, letters: int) -> str:
    """A name of at most so many letters."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def norms(health: dict[str, Any]) -> Figure | None:
    """The norm of each B matrix by layer, a line for each kind of module."""
    kinds: dict[str, dict[int, list[float]]] = {}
    for name, norm in health.get("b_norms", {}).items():
        layer = LAYER.search(name)
        kind = EXPERT.sub("", name).rpartition(".")[2]
        kinds.setdefault(kind, {}).setdefault(int(layer[1]) if layer else 0, []).append(norm)
    if not kinds:
        return None
    means = {
        kind: [(float(layer), sum(all_) / len(all_)) for layer, all_ in sorted(found.items())]
        for kind, found in kinds.items()
    }
    shown = list(means.items())[:COLOURS]
    series = [Series(kind, points, n, dots=True) for n, (kind, points) in enumerate(shown, 1)]
    layers = sorted({layer for _, points in shown for layer, _ in points})
    tips = [
        (layer, "\n".join([f"layer {layer:.0f}", *(
            f"{kind} {dict(points)[layer]:.4g}" for kind, points in shown if layer in dict(points)
        )]))
        for layer in layers
    ]  # fmt: skip
    ends = "; ".join(f"{k} between {min(p)[1]:.3g} and {max(p)[1]:.3g}" for k, p in (
        (kind, sorted(points, key=lambda p: p[1])[:: max(len(points) - 1, 1)]) for kind, points in shown
    ))  # fmt: skip
    note = (
        ""
        if len(means) <= COLOURS
        else f"{len(means) - COLOURS} further kinds of modules are not drawn."
    )
    plot = Plot(
        "Norm of B by layer", "layer", "Frobenius norm of B", series, f"Norms of the adapter by layer: {ends}.",
        tips=tips, zero=True, note=note,
    )  # fmt: skip
    return figure(plot, wide=True)
