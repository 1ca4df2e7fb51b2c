"""An evaluation as people read it: Markdown, and one HTML page that asks for nothing and runs nothing."""

from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.report import judge, scores
from stages.lib.report.answers import SIDES
from stages.lib.report.page import render

MARKDOWN, PAGE = "evaluation.md", "evaluation.html"
TEMPLATE = "evaluation.html.jinja"
OTHERS = {
    "benchmarks": "Benchmarks",
    "judge": "A judge's opinion",
    "health": "The adapter's health",
}
WIDTH = 160  # of a drawn interval


class Measure(NamedTuple):
    """How one of the figures is shown: its words, its form, and that of a change."""

    name: str
    words: str
    form: str
    change: str = ""


MEASURES = (
    Measure("loss", "held-out loss, nats a token", "{:.3f}", "{:+.3f}"),
    Measure("perplexity", "held-out perplexity", "{:.4g}"),
    Measure("accuracy", "tokens that are the first choice", "{:.1%}", "{:+.1%}"),
    Measure("stop_rate", "answers that stop by themselves", "{:.0%}", "{:+.0%}"),
    Measure("format_rate", "answers that are well formed", "{:.0%}", "{:+.0%}"),
    Measure("loop_rate", "answers that go round in circles", "{:.0%}", "{:+.0%}"),
    Measure("repetition", "4-grams an answer had said before", "{:.1%}"),
    Measure("answer_tokens", "tokens an answer, mean", "{:.1f}"),
    Measure("answer_tokens_median", "tokens an answer, median", "{:.0f}"),
)


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The measures as text: `words`; `base`, `tuned` and `change`, each with its interval; and `p`."""
    found = []
    for one in MEASURES:
        change = result["difference"].get(one.name, {})
        cells: dict[str, Any] = {"words": one.words, "p": _p(change.get("p"))}
        for side in SIDES:
            cells[side] = _told(result[side][one.name], one.form)
            cells[f"{side}_interval"] = _between(result[side].get(f"{one.name}_interval"), one.form)
        cells["change"] = _told(change.get("value"), one.change)
        cells["change_interval"] = _between(change.get("interval"), one.change)
        found.append(cells)
    return found


def measures(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The measures for a terminal: words, base, tuned, the change with its interval, and p."""
    return [
        (r["words"], r["base"], r["tuned"], _joined(r["change"], r["change_interval"]) or "", r["p"] or "")
        for r in rows(result)
    ]  # fmt: skip


def _told(value: float | None, form: str) -> str | None:
    return None if value is None or not form else form.format(value)


def _between(interval: Any, form: str) -> str | None:
    if not interval or None in interval:
        return None
    return " to ".join(form.format(bound) for bound in interval)


def _joined(value: str | None, interval: str | None) -> str | None:
    return f"{value} ({interval})" if value and interval else value


def _p(value: float | None) -> str | None:
    if value is None:
        return None
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def parts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The losses by source and by length as text, with where their intervals are drawn.

    Returns:
        `title` and `rows`, each with `name`, `conversations`, `tokens`, `base`, `tuned`, `change`, `interval`
        and `drawn`: places of dot, ends and zero between 0 and `WIDTH`.
    """
    whole = result["difference"]["loss"] | {"conversations": result["held_out_conversations"]}
    whole |= {side: result[side]["loss"] for side in SIDES} | {"tokens": result["held_out_tokens"]}
    whole["difference"] = whole["value"]
    sources = [(one["source"], one) for one in result["by_source"]]
    lengths = [(f"{one['from']} to {one['to']} tokens", one) for one in result["by_length"]]
    every = [one for _, one in sources + lengths] + [whole]
    ends = [0.0] + [end for one in every for end in one["interval"] or [one["difference"] or 0.0]]
    low, high = min(ends), max(ends)
    scale = (WIDTH - 12) / ((high - low) or 1.0)

    def at(value: float) -> float:
        return round(6 + (value - low) * scale, 1)

    def row(name: str, one: dict[str, Any]) -> dict[str, Any]:
        change = one["difference"]
        drawn = None
        if change is not None:
            drawn = [at(change), *map(at, one["interval"] or [change, change]), at(0.0)]
        return {
            "name": name, "conversations": f"{one['conversations']:,}", "tokens": f"{one['tokens']:,}",
            "base": _told(one["base"], "{:.3f}"), "tuned": _told(one["tuned"], "{:.3f}"),
            "change": _told(change, "{:+.3f}"), "interval": _between(one["interval"], "{:+.3f}"),
            "drawn": drawn,
        }  # fmt: skip

    return [
        {"title": title, "rows": [row(*one) for one in [*some, ("all", whole)]]}
        for title, some in (("source", sources), ("length", lengths))
        if some
    ]


def facts(found: Any, path: str = "") -> list[tuple[str, str]]:
    """All that is in a nested value: dotted path and text of each leaf."""
    if isinstance(found, dict):
        return [
            leaf
            for name, inner in found.items()
            for leaf in facts(inner, f"{path}.{name}" if path else str(name))
        ]
    if isinstance(found, list) and any(isinstance(one, (dict, list)) for one in found):
        return [
            leaf for place, inner in enumerate(found) for leaf in facts(inner, f"{path}.{place}")
        ]
    if isinstance(found, list):
        found = ", ".join(map(plain, found))
    return [(path, plain(found))]


def plain(value: Any) -> str:
    """A leaf as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def others(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What else was measured: `title`, `note`, `headings` and `rows`."""
    shown = {"benchmarks": scores.shown, "judge": judge.shown, "health": _health}
    found = []
    for name, title in OTHERS.items():
        if result.get(name):
            own = shown[name](result[name])
            cells = [[plain(cell) for cell in row] for row in own["rows"]]
            found.append(own | {"title": title, "rows": cells})
    return found


def _health(result: dict[str, Any]) -> dict[str, Any]:
    note = (
        "Checked of the file, of the model that it was loaded into, and of what training recorded."
    )
    return {"note": note, "headings": ["", ""], "rows": facts(result)}


def write(result: dict[str, Any], folder: Path) -> None:
    """`evaluation.md` and `evaluation.html`."""
    for name, text in ((MARKDOWN, markdown(result)), (PAGE, page(result))):
        (folder / name).write_text(text, encoding="utf-8", errors="replace")


def page(result: dict[str, Any]) -> str:
    """The page; whatever is in a text, it is shown and does nothing."""
    return render(
        TEMPLATE, result=result, rows=rows(result), parts=parts(result), others=others(result), sides=SIDES,
        made_of=facts(result["made_of"]) + facts(result["method"], "method"), width=WIDTH,
    )  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The same figures and answers."""
    lines = ["# Base against tuned", "", result["sentence"], ""]
    if result["gate"]:
        met = "met" if result["gate"]["met"] else "not met"
        lines += [f"The gate `{result['gate']['asked']}` is {met}:", ""]
        lines += [f"- {c['words']}" for c in result["gate"]["conditions"]] + [""]
    lines += _table(["", "base", "tuned", "change", "p"], [
        [r["words"], *(_joined(r[side], r[f"{side}_interval"]) for side in (*SIDES, "change")), r["p"]]
        for r in rows(result)
    ])  # fmt: skip
    lines += [
        f"In brackets 95 % intervals; {result['held_out_conversations']:,} held-out conversations, "
        f"{result['held_out_tokens']:,} learned tokens, {len(result['answers'])} questions.",
        "",
    ]
    names = ("name", "conversations", "tokens", "base", "tuned")
    for part in parts(result):
        cells = [
            [*(r[n] for n in names), _joined(r["change"], r["interval"])] for r in part["rows"]
        ]
        lines += [f"## Held-out loss by {part['title']}", ""]
        lines += _table([part["title"], *names[1:], "change"], cells)
    for other in others(result):
        lines += [f"## {other['title']}", "", other["note"], ""]
        lines += _table(other["headings"], other["rows"])
    for number, entry in enumerate(result["answers"], 1):
        lines += [f"## Question {number}", "", _quoted(entry["question"]), ""]
        if entry["reference"]:
            lines += ["Reference:", "", _quoted(entry["reference"]), ""]
        for side in SIDES:
            said = entry[side]
            ended = "stopped by itself" if said["finish"] == "stop" else "cut off at the limit"
            lines += [f"{side.capitalize()} ({said['tokens']} tokens, {ended}):", ""]
            lines += [_quoted(said["text"]), ""]
    return "\n".join(lines)


def _table(headings: list[str], cells: list[list[Any]]) -> list[str]:
    def line(row: list[Any]) -> str:
        texts = ["-" if cell is None else str(cell) for cell in row]
        return "| " + " | ".join(" ".join(t.replace("|", "\\|").split()) for t in texts) + " |"

    return [line(headings), "|" + " --- |" * len(headings), *map(line, cells), ""]


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text.splitlines() or [""]))
