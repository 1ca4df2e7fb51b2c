"""Plots: every line is where its values are, no spike is lost, and no text does more than be seen."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from stages.lib.report import plots
from stages.lib.report.plots import Mark, Plot, Series, figure, smoothed, thinned
from tests.lib.report.test_preview import HOSTILE

SVG = "{http://www.w3.org/2000/svg}"


def elements(svg: str, kind: str) -> list[ElementTree.Element]:
    """Of one that is well-formed."""
    root = ElementTree.fromstring(svg)
    return [e for e in root.iter() if kind in (e.get("class") or "").split()]


def plot(points: list[tuple[float, float]], **more: object) -> Plot:
    return Plot("Loss", "step", "nats", [Series("", points)], "A line.", **more)  # type: ignore[arg-type]


def test_points_lie_where_their_values_are() -> None:
    drawn = figure(plot([(0.0, 0.0), (10.0, 5.0), (20.0, 10.0)])).svg
    (path,) = elements(drawn, "line")
    places = [
        tuple(map(float, p.split(","))) for p in re.findall(r"[ML]([\d.,-]+)", path.get("d") or "")
    ]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y2  # up is more
    ticks = {e.text: e for e in ElementTree.fromstring(drawn).iter(f"{SVG}text")}
    assert float(ticks["10.0"].get("y") or 0) == pytest.approx(y2 + 4, abs=0.2)
    assert {"step", "nats"} <= ticks.keys()


def test_what_is_not_finite_is_a_gap() -> None:
    found = figure(plot([(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.0), (6, 1.0)])).svg
    assert len(elements(found, "line")) == 2
    assert "nan" not in found.lower()
    nothing = figure(plot([(1, math.nan)])).svg
    assert not elements(nothing, "line")


def test_a_long_line_keeps_its_spikes_and_is_short() -> None:
    points = [(float(n), 1 + n % 7 / 10) for n in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[54_999] = (54_999.0, -9.0)
    few = thinned(points)
    assert len(few) <= plots.MOST
    assert {(54_321.0, 99.0), (54_999.0, -9.0)} <= {*few}
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert thinned(points[:10]) == points[:10]
    drawn = figure(plot(points, tips=[(x, f"step {x}") for x, _ in points]))
    assert len(elements(drawn.svg, "hit")) == plots.HITS
    assert len(drawn.svg) < 60_000


def test_a_mean_is_of_its_neighbours() -> None:
    points = [(n, v) for n, v in enumerate([1.0, 2.0, 6.0, math.nan, 4.0])]
    assert [y for _, y in smoothed(points, 3)] == [1.5, 3.0, 4.0, 5.0, 4.0]
    assert math.isnan(smoothed([(0, math.nan)], 3)[0][1])


def test_no_text_is_more_than_text() -> None:
    told = HOSTILE + '" onload="x()'
    shown = Plot(
        told, told, told, [Series(told, [(1, 1.0), (2, 2.0)], dots=True)], told, marks=[Mark(1, told)],
        tips=[(1, told), (2, told)],
    )  # fmt: skip
    for drawn in (figure(shown, wide=True).svg, figure(shown, wide=True).narrow):
        assert drawn
        root = ElementTree.fromstring(drawn)
        assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
            "svg", "line", "text", "tspan", "path", "circle", "rect", "title",
        }  # fmt: skip
        assert not [name for e in root.iter() for name in e.attrib if name.startswith("on")]
        assert "\x1b" not in drawn
        assert "<script" not in drawn


def test_words_of_marks_do_not_run_into_each_other() -> None:
    crowd = [Mark(float(n), "restart") for n in range(1, 41)]
    drawn = figure(plot([(1, 1.0), (40, 2.0)], marks=crowd)).svg
    assert len(elements(drawn, "mark")) == 40
    places = sorted(float(e.get("x") or 0) for e in elements(drawn, "unit") if e.text == "restart")
    assert 2 <= len(places) < 10
    assert min(b - a for a, b in pairwise(places)) > 40
