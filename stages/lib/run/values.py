"""What a setting may hold, checked before anything slow is imported."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import click


class Number(click.ParamType[Any]):
    """A finite number within bounds; click's own ranges let NaN through."""

    def __init__(
        self,
        kind: type = float,
        low: float = -math.inf,
        high: float = math.inf,
        above: float | None = None,
    ) -> None:
        self.kind, self.low, self.high, self.above = kind, low, high, above
        self.name = "integer" if kind is int else "number"

    def rule(self) -> str:
        """The bounds in words."""
        words = [f"above {self.above:g}"] if self.above is not None else []
        words += [f"at least {self.low:g}"] if self.low > -math.inf else []
        words += [f"at most {self.high:g}"] if self.high < math.inf else []
        return " and ".join(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value` as a number, or click's usage error."""
        try:
            number = self.kind(value)
        except ValueError:
            self.fail(
                f"{value!r} is not {'an' if self.kind is int else 'a'} {self.name}.", param, ctx
            )
        bad = not math.isfinite(number) or number < self.low or number > self.high
        if bad or (self.above is not None and number <= self.above):
            self.fail(f"{value!r} is not a finite {self.name} {self.rule()}.", param, ctx)
        return number


class Duration(click.ParamType[Any]):
    """A time span in seconds: a number above 0, with s, m or h behind it if another unit is meant."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """`value` in seconds, or click's usage error."""
        if isinstance(value, float):
            return value
        form = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.strip())
        seconds = float(form[1]) * {"m": 60, "h": 3600}.get(form[2], 1) if form else 0.0
        if not 0 < seconds < math.inf:
            self.fail(
                f"{value!r} is no time span above 0: write seconds, or as in 90m or 12h.",
                param,
                ctx,
            )
        return seconds


class Names(click.ParamType[Any]):
    """Names with commas between them, as a tuple without repeats; `among`: the names that there are."""

    name = "names"

    def __init__(self, among: tuple[str, ...] = ()) -> None:
        self.among = among

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """`value` as a tuple, or click's usage error."""
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
        if not all(names):
            self.fail(
                f"{value!r} has an empty name; write names with commas between them.", param, ctx
            )
        for name in names:
            if self.among and name not in self.among:
                self.fail(f"{name!r} is none of {', '.join(self.among)}.", param, ctx)
        return names


class Texts(click.ParamType[Any]):
    """A text to the letter, or a JSON list of texts; a tuple of them. For an option that may be repeated."""

    name = "text"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """The environment holds one value; click would cut it at blanks."""
        return (rv,)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """`value` as a tuple, or click's usage error."""
        if isinstance(value, tuple):
            return value
        texts: Any = [value]
        if value.lstrip()[:1] == "[" and value.lstrip()[1:].lstrip()[:1] in ("", '"', "'", "]"):
            try:
                texts = json.loads(value)
            except ValueError:
                self.fail(
                    f'{value!r} is no JSON list of texts: write ["one", "two\\n"].', param, ctx
                )
        if not texts or not all(isinstance(text, str) and text for text in texts):
            self.fail(f"{value!r} holds an empty text, or what is none.", param, ctx)
        return tuple(texts)


def flat(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[str, ...]:
    """The `Texts` of a repeated option as one tuple without repeats."""
    return tuple(dict.fromkeys(text for texts in value or () for text in texts))


class Prices(click.ParamType[Any]):
    """A price above 0, `2.5`, or several by name, `H100=2.5,L4=0.7`; as it was given, once checked."""

    name = "price"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """`value`, or click's usage error."""
        names = []
        for word in str(value).split(","):
            name, _, said = word.rpartition("=")
            names.append(name.strip())
            Number(above=0).convert(said.strip(), param, ctx)
        if len(names) > 1 and not all(names):
            self.fail(f"{value!r} has a price without a name; write NAME=PRICE each.", param, ctx)
        return str(value)
