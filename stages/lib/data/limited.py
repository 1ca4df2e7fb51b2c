"""Jinja's sandbox with a budget: a stranger's template can neither run for ever nor fill the memory."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# A character of any text that is made on the way costs one, so this is about the memory too. The largest row
# that is read, copied ten times, costs less.
BUDGET = 1 << 28
PASS, CALL = 256, 64
LARGEST_COUNT = 1 << 20  # such as a width
LARGEST_POWER = 4096  # bits
WIDTH = re.compile(r"\d{6}")


class Runaway(RuntimeError):
    """A template spent its budget. No error of Jinja's, which a template could be forgiven."""


class Limited(ImmutableSandboxedEnvironment):
    """The sandbox, in which loops, calls and texts are counted; `spent` is set to 0 before each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.spent = 0
        self.globals.pop("lipsum")
        self.filters = {name: self._counting(one) for name, one in self.filters.items()}

    def spend(self, units: int) -> None:
        """Count.

        Raises:
            Runaway: it is too much.
        """
        self.spent += units
        if self.spent > BUDGET:
            raise Runaway

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return Counting(self).visit(tree)

    def passes(self, values: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes over."""
        for value in values:
            self.spent += PASS
            if self.spent > BUDGET:
                raise Runaway
            yield value

    def joined(self, *parts: Any) -> str:
        """`a ~ b`."""
        return self.concat(map(str, parts))

    def concat(self, pieces: Iterable[str]) -> str:
        """What a macro, a block or a whole template comes to."""
        found = []
        for piece in pieces:
            self.spent += len(piece)
            if self.spent > BUDGET:
                raise Runaway
            found.append(piece)
        return "".join(found)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result may be much larger than its operands."""
        if operator == "+":  # by far the most frequent, and no larger than both
            return self._paid(left + right)
        self.spend(_cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
        """A method, macro or function."""
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
        owner = getattr(method, "__self__", None)
        if (args or named) and isinstance(owner, (str, list, tuple)):
            self._check(method.__name__, (owner, *args, *named.values()))
        self.spent += CALL
        return self._paid(super().call(context, function, *args, **named))

    def _counting(self, one: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(one)
        def counted(*args: Any, **named: Any) -> Any:
            if len(args) > 1 or named:
                self._check(one.__name__, (*args, *named.values()))
            self.spent += CALL
            return self._paid(one(*args, **named))

        return counted

    def _paid(self, found: Any) -> Any:
        if type(found) is str:
            self.spent += len(found)
        elif isinstance(found, (str, list, tuple)):
            self.spent += _size(found)
        if self.spent > BUDGET:
            raise Runaway
        return found

    def _check(self, name: str, values: tuple[Any, ...]) -> None:
        """Refuse before it is made what would be too large."""
        sizes = [len(value) for value in values if isinstance(value, (str, list, tuple))]
        counts = [abs(value) for value in values if isinstance(value, int)]
        if any(count > LARGEST_COUNT for count in counts):
            raise Runaway
        if name in ("replace", "do_replace", "join", "do_join", "indent", "do_indent") and sizes:
            times = max([*sizes[1:], *counts, 1])
            if sizes[0] * times > BUDGET:
                raise Runaway
        if "format" in name and any(isinstance(v, str) and WIDTH.search(v) for v in values):
            raise Runaway


class Counting(NodeTransformer):
    """Has loops and `~` of a template go through the environment."""

    def __init__(self, environment: Limited) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's own naming
        self.generic_visit(node)
        node.iter = self._through("passes", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._through("joined", node.nodes, node.lineno)

    def _through(self, name: str, values: list[Any], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), values, [], None, None)
        call.set_lineno(line)
        call.set_environment(self.environment)
        return call


def _size(value: Any) -> int:
    """What a value costs: its characters, or its elements, each the eight bytes that it takes."""
    if isinstance(value, str):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple)) else 0


def _cost(operator: str, left: Any, right: Any) -> int:
    """The size of what an operation will make."""
    if isinstance(left, int) and isinstance(right, int):
        powered = operator == "**" and left.bit_length() * abs(right) > LARGEST_POWER
        if powered or (operator == "*" and left.bit_length() + right.bit_length() > LARGEST_POWER):
            raise Runaway
        return 1
    sizes = [_size(left), _size(right)]
    if operator == "*":
        count = right if isinstance(right, int) else left if isinstance(left, int) else 0
        return max(sizes) * max(count, 0)
    if operator == "%" and isinstance(left, str):
        widths = [
            value
            for value in (right if isinstance(right, tuple) else (right,))
            if isinstance(value, int)
        ]
        if WIDTH.search(left) or ("*" in left and any(width > LARGEST_COUNT for width in widths)):
            raise Runaway
    return sum(sizes)
