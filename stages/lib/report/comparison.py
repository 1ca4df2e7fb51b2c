"""Base against tuned, as people and programs read it."""

import json
from pathlib import Path
from typing import Any

from stages.lib.report.table import table

MEASURES = {
    "loss": "held-out loss, nats a token",
    "perplexity": "held-out perplexity",
    "stop_rate": "share of answers that stop by themselves",
    "answer_tokens": "tokens an answer",
}


def _rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    found = []
    for name, words in MEASURES.items():
        values = [result[side][name] for side in ("base", "tuned")]
        found.append((words, *(None if value is None else float(value) for value in values)))
    return found


def table_of(result: dict[str, Any]) -> str:
    """The measures of both sides."""
    return table(("evaluation", "base", "tuned"), _rows(result))


def write(result: dict[str, Any], folder: Path) -> None:
    """`evaluation.json`, and the same as `evaluation.md`."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(_markdown(result), encoding="utf-8")


def _markdown(result: dict[str, Any]) -> str:
    lines = ["# Base against tuned", "", "| | base | tuned |", "| --- | --- | --- |"]
    for words, *values in _rows(result):
        cells = " | ".join("-" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"| {words} | {cells} |")
    lines += [
        "",
        f"{result['held_out_rows']} held-out rows, {result['held_out_tokens']} learned tokens.",
        "",
    ]
    for number, entry in enumerate(result["answers"], 1):
        lines += [f"## Question {number}", "", _quoted(entry["question"]), ""]
        if entry["reference"]:
            lines += ["Reference:", "", _quoted(entry["reference"]), ""]
        for side in ("base", "tuned"):
            said = entry[side]
            ended = "stopped by itself" if said["finish"] == "stop" else "cut off at the limit"
            lines += [
                f"{side.capitalize()} ({said['tokens']} tokens, {ended}):",
                "",
                _quoted(said["text"]),
                "",
            ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text.splitlines() or [""]))
