"""Axes: ticks at round numbers that hold all values, and labels that tell them apart."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.report import axes

NUMBERS = st.floats(-1e9, 1e9).filter(lambda v: v == 0 or abs(v) > 1e-6)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.booleans())
def test_every_value_lies_between_the_ends_and_labels_differ(
    values: list[float], zero: bool
) -> None:
    found = axes.axis(values, 300, 10, zero=zero)
    span = found.high - found.low
    assert found.low - span * 1e-9 <= min(values) <= max(values) <= found.high + span * 1e-9
    assert 2 <= len(found.ticks) <= 12
    if span > 1e-5 * max(map(abs, found.ticks)):  # else more digits than anybody reads
        assert len({*found.labels()}) == len(found.ticks)
    if zero and min(values) >= 0:
        assert found.low == 0
    assert found.at(found.low) == 300
    assert found.at(found.high) == 10


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 4.6], ["0", "2", "4", "6"]),
        ([0, 1], ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([0, 19_000], ["0", "5k", "10k", "15k", "20k"]),
        ([1e6, 3e6], ["1.0M", "1.5M", "2.0M", "2.5M", "3.0M"]),
        ([-2, 2], ["-2", "-1", "0", "1", "2"]),
    ],
)
def test_labels_are_what_people_write(values: list[float], labels: list[str]) -> None:
    assert axes.axis(values, 0, 1).labels() == labels


def test_steps_have_no_tick_between_them_and_time_ends_with_the_run() -> None:
    few = axes.axis([1, 3], 0, 100, 8, exact=True, whole=True)
    assert few.ticks == (1, 2, 3)
    one = axes.axis([7], 0, 100, exact=True, whole=True)
    assert one.low == 7
    assert math.isfinite(one.at(7))
    along = axes.axis([0, 33.4], 0, 100, exact=True)
    assert (along.low, along.high, along.ticks) == (0, 33.4, (0, 10, 20, 30))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [([3 * 2**30], "bytes", (2**30, "GiB")), ([2**28], "bytes", (2**20, "MiB")),
     ([7200], "seconds", (3600, "hours")), ([90], "seconds", (1, "s")), ([2e5], "seconds", (86400, "days")),
     ([0.02], "power", (1, "")), ([2e-4], "power", (1e-4, "×10⁻⁴")), ([], "power", (1, ""))],
)  # fmt: skip
def test_units_fit_the_largest_value(
    values: list[float], kind: str, expected: tuple[float, str]
) -> None:
    assert axes.scaled(values, kind) == (pytest.approx(expected[0]), expected[1])
