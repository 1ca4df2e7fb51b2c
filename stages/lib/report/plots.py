"""Plots as SVG: text stays text, the page has the colours for light and dark, tooltips need no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from stages.lib.report import axes
from stages.lib.report.page import text

MOST = 700  # points of a drawn line
HITS = 120  # columns of a plot that have a tooltip
COLOURS = 8
LETTER = 6.4  # pixels that a digit is wide
RIGHT, FOOT, HEAD = 14, 36, 38  # pixels beside, below and above the axes
SMALL = (400, 250)
WIDE = (920, 320)

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Values along the x axis.

    Attributes:
        name: for the legend; without one it has no entry. points: by x; one that is not finite is a gap.
        colour: from 1 to `COLOURS`. faint: drawn thin, behind others. dots: each point is marked.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word: a restart, a limit. `strong` is for what has to be seen."""

    at: float
    word: str
    strong: bool = False


@dataclass(frozen=True)
class Plot:
    """What is to be drawn.

    Attributes:
        title: above it. x, y: what the axes are, with their units. alt: the same in words.
        zero: the y axis begins there. whole: x are whole numbers. tips: x and what is told of it.
        rings: points to be seen, such as the best.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    alt: str
    marks: Sequence[Mark] = ()
    tips: Sequence[tuple[float, str]] = ()
    rings: Sequence[Point] = ()
    zero: bool = False
    whole: bool = True
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot as the page has it: `narrow` is for phones, where there are two."""

    title: str
    svg: Markup
    narrow: Markup | None = None
    keys: Sequence[tuple[int, str, str]] = field(default_factory=list)  # colour, form, name
    note: str = ""


def figure(plot: Plot, wide: bool = False) -> Figure:
    """Draw a plot; a wide one twice, as its text would be too small on a phone."""
    keys = [
        (s.colour, "faint" if s.faint else "dots" if s.dots else "line", s.name)
        for s in plot.series
        if s.name
    ]
    narrow = _draw(plot, SMALL) if wide else None
    svg = _draw(plot, WIDE if wide else SMALL)
    return Figure(plot.title, svg, narrow, keys if len(keys) > 1 else [], plot.note)


def _draw(plot: Plot, size: tuple[int, int]) -> Markup:
    canvas = Canvas(size, plot.alt)
    points = [p for s in plot.series for p in s.points if math.isfinite(p[1])]
    across = [p[0] for p in points] + [mark.at for mark in plot.marks]
    canvas.frame(across, [p[1] for p in points], plot.x, plot.y, zero=plot.zero, whole=plot.whole)
    canvas.marks(plot.marks)
    for series in sorted(plot.series, key=lambda s: not s.faint):
        canvas.line(series)
    for x, y in plot.rings:
        canvas.add("Circle", canvas.x.at(x), canvas.y.at(y), 6, class_="ring")
    canvas.tips(plot.tips)
    return canvas.svg()


class Canvas:
    """A drawing with two axes.

    Args:
        size: width and height, in pixels. alt: what it shows, in words.

    Attributes:
        x, y: the axes, once `frame` was called.
    """

    x: axes.Axis
    y: axes.Axis

    def __init__(self, size: tuple[int, int], alt: str) -> None:
        import drawsvg

        self.width, self.height = size
        self._library = drawsvg
        # The library escapes what is text, and no attribute.
        self._drawing = drawsvg.Drawing(
            *size, class_="plot", role="img", aria_label=str(escape(text(alt)))
        )

    def add(self, kind: str, *args: Any, title: str = "", **kwargs: Any) -> Any:
        """Add an element of the library; with a title, that is its tooltip."""
        element = getattr(self._library, kind)(*args, **kwargs)
        if title:
            element.append_title(text(title))
        self._drawing.append(element)
        return element

    def words(self, said: str, x: float, y: float, anchor: str = "start", kind: str = "") -> None:
        """Write a line."""
        given = {"class_": kind} if kind else {}
        shown = " ".join(text(said).split()) or " "
        self.add("Text", shown, 12, round(x, 1), round(y, 1), text_anchor=anchor, **given)

    def frame(
        self,
        across: Sequence[float],
        up: Sequence[float],
        x: str,
        y: str,
        *,
        zero: bool,
        whole: bool,
    ) -> None:
        """Both axes, with grid, ticks and units."""
        self.y = axes.axis(up, self.height - FOOT, HEAD, 5, zero=zero)
        labels = self.y.labels()
        left = 12 + LETTER * max(map(len, labels))
        for value, label in zip(self.y.ticks, labels, strict=True):
            at = self.y.at(value)
            self.add("Line", left, at, self.width - RIGHT, at, class_="grid")
            self.words(label, left - 6, at + 4, "end")
        self.words(y, 0, 12, kind="unit")
        self.across(across, x, left=left, exact=True, whole=whole)

    def across(
        self,
        values: Sequence[float],
        unit: str,
        *,
        left: float,
        exact: bool = False,
        whole: bool = False,
    ) -> None:
        """The x axis alone."""
        bottom = self.height - FOOT
        about = 5 if self.width < 500 else 8
        self.x = axes.axis(values, left, self.width - RIGHT, about, exact=exact, whole=whole)
        self.add("Line", left, bottom, self.width - RIGHT, bottom, class_="axis")
        for value, label in zip(self.x.ticks, self.x.labels(), strict=True):
            at = self.x.at(value)
            self.add("Line", at, bottom, at, bottom + 4, class_="axis")
            room = LETTER * len(label) / 2
            self.words(label, min(max(at, room), self.width - room), bottom + 17, "middle")
        self.words(unit, self.width - RIGHT, self.height - 4, "end", "unit")

    def marks(self, marks: Sequence[Mark]) -> None:
        """Vertical lines over the whole height; words that would run into each other are left out."""
        free = -math.inf
        for mark in sorted(marks, key=lambda m: m.at):
            at = self.x.at(mark.at)
            kind = "mark strong" if mark.strong else "mark"
            self.add("Line", at, self.y.end - 4, at, self.y.start, class_=kind, title=mark.word)
            half = LETTER * len(mark.word) / 2
            place = min(max(at, self.x.start + half), self.x.end - half)
            if place - half > free:
                self.words(mark.word, place, self.y.end - 7, "middle", "unit")
                free = place + half + 6

    def line(self, series: Series) -> None:
        """A line through points, in pieces where one is not finite."""
        kind = f"line c{series.colour}" + " faint" * series.faint
        pieces: list[list[Point]] = [[]]
        for x, y in thinned(series.points):
            if math.isfinite(y):
                pieces[-1].append((self.x.at(x), self.y.at(y)))
            elif pieces[-1]:
                pieces.append([])
        for piece in filter(None, pieces):
            path = self.add("Path", class_=kind)
            path.M(*piece[0])
            for point in piece[1:]:
                path.L(*point)
            if series.dots or len(piece) == 1:
                for point in piece:
                    self.add("Circle", *point, 3.2, class_=f"dot c{series.colour}")

    def tips(self, tips: Sequence[tuple[float, str]]) -> None:
        """Columns without colour, each with what is told of its place."""
        tips = spread(tips, HITS)
        places = [self.x.at(x) for x, _ in tips]
        for n, (_, told) in enumerate(tips):
            low = (places[n - 1] + places[n]) / 2 if n else self.x.start
            high = (places[n] + places[n + 1]) / 2 if n + 1 < len(tips) else self.x.end
            width = round(max(high - low, 0.5), 1)
            place = (round(low, 1), self.y.end, width, self.y.start - self.y.end)
            self.add("Rectangle", *place, class_="hit", title=told)

    def svg(self) -> Markup:
        """The drawing; what in it came from outside is escaped."""
        drawn = self._drawing.as_svg(header="", skip_js=True, skip_css=True)
        return Markup(
            "\n".join(line for line in drawn.splitlines() if line not in ("<defs>", "</defs>"))
        )


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(n * (len(values) - 1) / (most - 1))] for n in range(most)]


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most about `most` points, of each stretch the lowest and the highest: no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) * 2 // most)
    found: list[Point] = []
    for place in range(0, len(points), size):
        part = points[place : place + size]
        chosen = {part.index(p) for p in (min(part, key=_height), max(part, key=_height))}
        found += [part[n] for n in sorted(chosen)]
    return found


def _height(point: Point) -> float:
    return point[1] if math.isfinite(point[1]) else math.inf


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """The mean of up to `span` points round each; what is not finite is passed over."""
    sums, counts = [0.0], [0]
    for _, y in points:
        known = math.isfinite(y)
        sums.append(sums[-1] + (y if known else 0.0))
        counts.append(counts[-1] + known)
    found = []
    for n, (x, _) in enumerate(points):
        low, high = max(0, n - span // 2), min(len(points), n + span // 2 + 1)
        count = counts[high] - counts[low]
        found.append((x, (sums[high] - sums[low]) / count if count else math.nan))
    return found
