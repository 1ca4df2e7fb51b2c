"""What an evaluation must reach: `better`, or bounds such as `loss<2,stop_rate>=0.9`."""

import math
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from stages.lib.run.exits import BadSetting, GateFailed
from stages.lib.run.progress import say
from stages.lib.run.settings import did_you_mean

BETTER = "better"
HELD_OUT = ("loss", "perplexity", "accuracy", "loss_difference", "accuracy_difference")
ASKED = (
    "stop_rate", "format_rate", "loop_rate", "repetition", "answer_tokens", "answer_tokens_median",
    "stop_rate_difference", "format_rate_difference", "loop_rate_difference",
)  # fmt: skip
PARTS = ("benchmarks", "judge")  # whose figures have names of their own
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
CONDITION = re.compile(r"([^<>=\s]+)\s*(<=|>=|<|>)\s*([^<>=\s]+)")


class Condition(NamedTuple):
    """One thing that must hold, as it was asked for; `better` has no operator."""

    asked: str
    metric: str
    operator: str = ""
    bound: float = math.nan


def parse(asked: str) -> list[Condition]:
    """The conditions of a gate.

    Raises:
        ValueError: and what is wrong with one.
    """
    return [_condition(part.strip()) for part in asked.split(",")]


def _condition(part: str) -> Condition:
    if part == BETTER:
        return Condition(part, part)
    found = CONDITION.fullmatch(part)
    if not found:
        near = did_you_mean(part, [BETTER])
        raise ValueError(
            f"{part!r} is neither `better` nor a metric, one of {', '.join(OPERATORS)}, and a number, as in "
            f"loss<2.{near}"
        )
    metric, sign, number = found.groups()
    first, _, rest = metric.partition(".")
    if metric not in HELD_OUT + ASKED and not (first in PARTS and rest):
        names = [*HELD_OUT, *ASKED]
        near = did_you_mean(metric, names)
        raise ValueError(
            f"{metric!r} is no metric; there are {', '.join(names)}, benchmarks.TASK.METRIC and "
            f"judge.NAME.{near}"
        )
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise ValueError(f"{number!r}, the bound of {metric}, is not a finite number.")
    return Condition(part, metric, sign, bound)


class Gate(click.ParamType[str]):
    """A gate as it was asked for, checked before anything slow is done."""

    name = "gate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """`value`, or click's usage error."""
        try:
            return ",".join(condition.asked for condition in parse(str(value)))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def check_measured(asked: str | None, held_out: bool, prompts: bool) -> None:
    """Refuse a gate on what this evaluation does not measure.

    Raises:
        BadSetting: nothing is held out, or nothing is asked.
    """
    for condition in parse(asked) if asked else []:
        if condition.metric in (BETTER, *HELD_OUT) and not held_out:
            raise BadSetting(
                f"GATE={condition.asked} needs held-out rows, and there are none; set VALIDATION_FRACTION, or "
                "leave it out"
            )
        if condition.metric in ASKED and not prompts:
            raise BadSetting(
                f"GATE={condition.asked} needs answers, and nothing is asked; set EVALUATION_PROMPTS, or "
                "leave it out"
            )


def judge(result: dict[str, Any], asked: str | None) -> dict[str, Any] | None:
    """Whether an evaluation's result is what was asked of it.

    Returns:
        `asked`; `met`; and `conditions`, each with `asked`, `met`, its `value` (None where it was not
        measured), `bound` and `words`. None where nothing was asked.
    """
    if not asked:
        return None
    conditions = [_judged(condition, result) for condition in parse(asked)]
    return {
        "asked": asked,
        "met": all(condition["met"] for condition in conditions),
        "conditions": conditions,
    }


def _judged(condition: Condition, result: dict[str, Any]) -> dict[str, Any]:
    if condition.metric == BETTER:
        return _better(result)
    value = value_of(result, condition.metric)
    met = value is not None and OPERATORS[condition.operator](value, condition.bound)
    is_ = "was not measured" if value is None else f"is {value:.6g}"
    words = f"{condition.metric} {is_}, asked is {condition.operator}{condition.bound:g}"
    return {
        "asked": condition.asked, "met": met, "value": value, "bound": condition.bound, "words": words,
    }  # fmt: skip


def _better(result: dict[str, Any]) -> dict[str, Any]:
    """The held-out loss fell, and the interval of the difference excludes 0."""
    found = result["difference"]["loss"]
    value, interval, fewest = found["value"], found["interval"], result["method"]["fewest"]
    if interval:
        between = " to ".join(f"{bound:+.4f}" for bound in interval)
        seen = f"changed by {value:+.4f} nats a token (95 %: {between})"
    else:
        seen = f"has no interval, as there are fewer than {fewest} held-out conversations"
    met = interval is not None and interval[1] < 0
    words = f"the held-out loss {seen}, asked is an interval below 0"
    return {"asked": BETTER, "met": met, "value": value, "bound": 0.0, "words": words}


def value_of(result: dict[str, Any], metric: str) -> float | None:
    """The figure that a gate's metric names: the tuned model's, where there are two sides."""
    part, _, rest = metric.partition(".")
    if part == "benchmarks":
        for score in result.get(part, {}).get("scores", []):
            name = f"{score['task']}.{score['metric']}"
            if rest in (name, f"{name},{score['filter']}"):
                return _number(score["tuned"])
        return None
    if part == "judge":
        return _number(result.get(part, {}).get(rest))
    name = metric.removesuffix("_difference")
    return _number(result["tuned"][name] if name == metric else result["difference"][name]["value"])


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def enforce(result: dict[str, Any]) -> None:
    """Say that the gate is met, or end.

    Raises:
        GateFailed: and which values are not what was asked.
    """
    verdict = result["gate"]
    if verdict and verdict["met"]:
        say(f"GATE={verdict['asked']} is met")
    elif verdict:
        unmet = [c["words"] for c in verdict["conditions"] if not c["met"]]
        raise GateFailed(
            f"GATE={verdict['asked']} is not met: {'; '.join(unmet)}; train longer or on more data, or ask for "
            "less"
        )
