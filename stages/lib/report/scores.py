"""Scores of benchmarks as people read them, and a judge's verdicts beside them."""

from typing import Any

from stages.lib.report import judge
from stages.lib.report.table import table

Z = 1.959964  # 95 %
HEADINGS = ("benchmark", "metric", "base", "tuned", "difference", "documents")


def tables(result: dict[str, Any]) -> list[str]:
    """What an evaluation's `benchmarks` and `judge` came to, for a terminal; of what there is."""
    found = [table_of(result["benchmarks"])] if "benchmarks" in result else []
    return found + ([judge.table_of(result["judge"])] if "judge" in result else [])


def rows(result: dict[str, Any], members: bool) -> list[tuple[Any, ...]]:
    """A line a score: an arrow says which way is better, the difference has its 95 % margin.

    Args:
        result: of `stages.lib.model.benchmarks.run`. members: also the tasks of a group that has its own score.
    """
    found = []
    for score in result["scores"]:
        if score["group"] and not members:
            continue
        better = {True: " ↑", False: " ↓", None: ""}[score["higher_is_better"]]
        chosen = "" if score["filter"] == "none" else f" ({score['filter']})"
        found.append((
            score["task"], f"{score['metric']}{chosen}{better}", score["base"], score["tuned"],
            _difference(score), score["documents"],
        ))  # fmt: skip
    return found


def _difference(score: dict[str, Any]) -> str:
    if score["difference"] is None:
        return "-"
    margin = score["difference_stderr"]
    return f"{score['difference']:+.4g}" + (f" ± {Z * margin:.2g}" if margin is not None else "")


def table_of(result: dict[str, Any]) -> str:
    """The scores for a terminal."""
    return table(HEADINGS, rows(result, members=False))


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """The scores for a page: `note`, `headings` and `rows`."""
    limit = f"the first {result['limit']} documents of each" if result["limit"] else "all documents"
    form = "as conversations in the recorded chat format" if result["chat"] else "as plain text"
    note = f"{result['harness']}, {limit}, {form}."
    if result["truncated"]:
        note += f" {result['truncated']} requests lost their beginning: the context is too short."
    return {"note": note, "headings": list(HEADINGS), "rows": rows(result, members=True)}
