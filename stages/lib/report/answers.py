"""What is counted of answers: whether they end, their length, repetition, and whether they are well formed."""

import re
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, Protocol

from stages.lib.report.statistics import mcnemar, wilson

SIDES = ("base", "tuned")
GRAM = 4
LOOPS = 0.5  # share of 4-grams that were said before, over which an answer goes round in circles
RATES = {"stop_rate": "stopped", "format_rate": "well_formed", "loop_rate": "loops"}
# A word, a mark, or a character of a script that puts no blanks between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")


class Answer(Protocol):
    """See `stages.lib.model.said.Answer`."""

    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def finish(self) -> str: ...


def repetition(text: str) -> float:
    """The share of a text's 4-grams of words that it had said before (Welleck et al. 2020, seq-rep-4)."""
    words = WORD.findall(text)
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def fault(answer: Answer, marks: Sequence[str]) -> str | None:
    """Why an answer is not well formed, in words; None where it is.

    Args:
        marks: of the chat format, roles and special tokens. One that begins with a letter counts where a line
            begins with it, one that is a bare word where it has a line to itself: there it is what is left of a
            mark whose special token was not shown.
    """
    if answer.finish != "stop":
        return "it does not end by itself"
    if not answer.text.strip():
        return "it is empty"
    lines = {line.strip() for line in answer.text.splitlines()}
    for mark in marks:
        if mark.isalnum():
            held = mark in lines
        elif mark[0].isalnum():
            held = any(line.startswith(mark) for line in lines)
        else:
            held = mark in answer.text
        if held:
            return f"it holds the mark {mark!r}"
    return None


def described(answer: Answer, marks: Sequence[str]) -> dict[str, Any]:
    """An answer as `evaluation.json` has it."""
    repeated, why = repetition(answer.text), fault(answer, marks)
    return {
        "text": answer.text, "tokens": answer.tokens, "finish": answer.finish,
        "stopped": answer.finish == "stop", "repetition": repeated, "loops": repeated > LOOPS,
        "well_formed": why is None, "fault": why,
    }  # fmt: skip


def measured(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of one side's answers, each as `described`; None where there are none."""
    count = len(found)
    lengths = [one["tokens"] for one in found]
    result: dict[str, Any] = {}
    for name, key in RATES.items():
        times = sum(one[key] for one in found)
        result[name] = times / count if count else None
        result[f"{name}_interval"] = wilson(times, count)
    return result | {
        "answer_tokens": fmean(lengths) if lengths else None,
        "answer_tokens_median": float(median(lengths)) if lengths else None,
        "repetition": fmean(one["repetition"] for one in found) if found else None,
    }


def differences(base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each rate how much it rose, and McNemar's exact p; None where nothing was asked."""
    found = {}
    for name, key in RATES.items():
        gained = sum(t[key] and not b[key] for b, t in zip(base, tuned, strict=True))
        lost = sum(b[key] and not t[key] for b, t in zip(base, tuned, strict=True))
        value = (gained - lost) / len(base) if base else None
        found[name] = {"value": value, "p": mcnemar(gained, lost) if base else None}
    return found
