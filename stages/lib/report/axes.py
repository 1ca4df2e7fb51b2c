"""Axes: where a value lies in a picture, which ticks there are, and what stands beside them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low, high: values at its ends. start, end: places of these, in pixels. ticks: values.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The place of a value, in pixels to one decimal."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def labels(self) -> list[str]:
        """What stands beside each tick, all with as many decimals."""
        between = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        most = max(map(abs, self.ticks), default=0.0)
        return [number(value, between, most) for value in self.ticks]


def axis(
    values: Iterable[float], start: float, end: float, about: int = 5, *, exact: bool = False,
    whole: bool = False, zero: bool = False,
) -> Axis:  # fmt: skip
    """An axis for values, from tick to tick.

    Args:
        about: so many ticks. exact: from the least value to the greatest instead, as along time. whole: no tick
            between whole numbers. zero: begins there.
    """
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if zero:
        low = min(low, 0.0)
    if low == high:
        room = 0.0 if exact or (zero and not low) else abs(low) * 0.1
        low, high = low - room, high + (room or 1.0)
    between = step((high - low) / max(about - 1, 1))
    if whole:
        between = max(1.0, float(math.ceil(between)))
    first, last = (
        (math.ceil(low / between - 1e-9), math.floor(high / between + 1e-9))
        if exact
        else (math.floor(low / between + 1e-9), math.ceil(high / between - 1e-9))
    )
    ticks = tuple(round(n * between, 12) for n in range(first, last + 1))
    return Axis(*((low, high) if exact else (ticks[0], ticks[-1])), start, end, ticks)


def step(rough: float) -> float:
    """The least of 1, 2, 2.5 or 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in STEPS if step * power >= rough * (1 - 1e-9))


def number(value: float, step: float = 0.0, most: float | None = None) -> str:
    """A number with few digits, from ten thousand on as k, M or G.

    Args:
        step: between ticks, which all have as many decimals. most: the largest of the ticks.
    """
    most = abs(value) if most is None else most
    for least, size, sign in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if most >= least and value:
            return f"{value / size:,.{_decimals(step / size) if step else 1}f}{sign}"
    return f"{value:,.{_decimals(step)}f}" if step else f"{value:,.4g}"


def _decimals(step: float) -> int:
    if not step:
        return 0
    decimals = max(0, -math.floor(math.log10(abs(step)) + 1e-9))
    return decimals + (round(step * 10**decimals, 6) % 1 != 0)


def scaled(values: Sequence[float], kind: str) -> tuple[float, str]:
    """What to divide values by, and the unit that they have then.

    Args:
        kind: `bytes`, `seconds`, or `power` for what is best told with a power of ten.
    """
    most = max((abs(value) for value in values), default=0.0)
    if kind == "bytes":
        return (2.0**30, "GiB") if most >= 2**29 else (2.0**20, "MiB")
    if kind == "seconds":
        return next(
            (size, unit) for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "s"))
            if most >= 2 * size or size == 1.0
        )  # fmt: skip
    power = math.floor(math.log10(most)) if most else 0
    return (
        (1.0, "") if -2 <= power <= 3 else (10.0**power, f"×10{str(power).translate(SUPERSCRIPTS)}")
    )
