"""An evaluation as people read it: every figure is there, and no text does more than be seen."""

import re
from pathlib import Path
from typing import Any

import pytest

from stages.lib.model.said import Answer
from stages.lib.report import comparison, evaluation_page, gate
from tests.lib.report.test_comparison import QUESTIONS, SAID, compared, rows
from tests.lib.report.test_preview import HOSTILE, Page

ALLOWED = {
    "html", "meta", "title", "style", "h1", "h2", "h3", "p", "section", "strong", "ul", "li", "div", "table",
    "thead", "tbody", "tr", "th", "td", "small", "svg", "line", "circle", "article", "pre", "details",
    "summary",
}  # fmt: skip


JUDGED = {
    "model": "umpire", "url": "http://judge", "pairs": 4, "wins": 2, "ties": 0, "losses": 1, "disagreed": 1,
    "disagreement_rate": 0.25, "unusable": 0, "identical": 0, "win_rate": 2 / 3, "interval": None,
}  # fmt: skip
SCORED = {
    "harness": "lm-eval 0", "limit": 5, "chat": False, "truncated": 0, "scores": [{
        "task": "arc", "group": None, "metric": "acc", "filter": "none", "higher_is_better": True,
        "base": 0.123456789, "tuned": 0.5, "difference": 0.376543211, "difference_stderr": 0.1,
        "documents": 5,
    }],
}  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    found = compared(rows(40, 0.5))
    found["gate"] = gate.judge(found, "better,loss<1")
    return found


def hostile(result: dict[str, Any]) -> dict[str, Any]:
    """With such a text wherever one comes from outside."""
    entry = result["answers"][0]
    entry["question"] = entry["reference"] = entry["base"]["text"] = entry["tuned"]["fault"] = (
        HOSTILE
    )
    entry["tuned"]["well_formed"] = False
    result["by_source"][0]["source"] = HOSTILE
    result["made_of"]["settings"] = {"PROMPT": HOSTILE, HOSTILE: [HOSTILE]}
    result["health"] = {"why": HOSTILE}
    result["judge"] = JUDGED | {"model": HOSTILE, "url": HOSTILE}
    return result


def test_every_figure_is_on_the_page(result: dict[str, Any]) -> None:
    text = " ".join(Page(evaluation_page.page(result)).text.split())
    written = " ".join(evaluation_page.markdown(result).split())
    for row in evaluation_page.rows(result):
        for cell in filter(None, row.values()):
            assert cell in text
            assert cell in written
    for part in evaluation_page.parts(result):
        for row in part["rows"]:
            for name in ("name", "base", "tuned", "change", "conversations", "tokens"):
                assert row[name] in text
    for said in (text, written):
        assert result["sentence"] in said
        assert "The gate" in said
        assert "loss is 2.5" in said
        assert QUESTIONS[3]["question"] in said
        assert "That." in said
    assert "it does not end by itself" in text
    assert "well formed" in text


def test_a_page_asks_for_nothing_and_runs_nothing(result: dict[str, Any]) -> None:
    plain = Page(evaluation_page.page(result | {"health": {"why": "x"}}))
    source = evaluation_page.page(hostile(result))
    found = Page(source)
    assert {tag for tag, _ in found.elements} <= ALLOWED
    names = {name for _, attributes in found.elements for name in attributes}
    assert not [name for name in names if name in ("src", "href", "style") or name.startswith("on")]
    styles = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    assert found.text.count("<script src='http://x'></script>&amp;") == 11
    assert "<script" not in source
    assert {tag for tag, _ in plain.elements} == {tag for tag, _ in found.elements}
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", source
    )


def test_a_page_follows_the_readers_colours_and_width(result: dict[str, Any]) -> None:
    source = evaluation_page.page(result)
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source
    assert 'name="viewport"' in source


def test_intervals_are_drawn_to_one_scale(result: dict[str, Any]) -> None:
    sources, lengths = evaluation_page.parts(result)
    assert [part["title"] for part in (sources, lengths)] == ["source", "length"]
    assert sources["rows"][-1] == lengths["rows"][-1]
    for row in sources["rows"] + lengths["rows"]:
        dot, low, high, zero = row["drawn"]
        assert 0 <= low <= dot <= high < zero <= evaluation_page.WIDTH


def test_few_or_no_conversations_are_shown_as_they_are(tmp_path: Path) -> None:
    for count in (0, 1, 2, 5):
        found = compared(rows(count, 0.5))
        comparison.write(found, tmp_path)
        text = (tmp_path / "evaluation.html").read_text()
        assert found["sentence"].replace("->", "-&gt;") in text
        assert (f"{count} held-out" in " ".join(text.split())) is True
        assert comparison.table_of(found)
        assert "None" not in text + (tmp_path / "evaluation.md").read_text()
    nothing = compared(rows(0, 0), {"base": [], "tuned": []})
    assert "Answers side by side" not in evaluation_page.page(nothing)
    assert "nan" not in evaluation_page.page(nothing)


def test_markdown_keeps_cells_and_quotes_apart(result: dict[str, Any]) -> None:
    result["by_source"][0]["source"] = "a|b\nc"
    result["answers"][0]["base"]["text"] = "# no heading\n| no | table |"
    lines = evaluation_page.markdown(result).split("\n")
    assert any(line.startswith("| a\\|b c | 20 |") for line in lines)
    assert "> # no heading" in lines
    assert [line for line in lines if line.startswith("# ")] == ["# Base against tuned"]


def test_other_figures_are_shown_with_their_own_table_or_leaf_by_leaf() -> None:
    said = {"base": SAID["base"][:1], "tuned": [Answer("", 1, "stop")]}
    found = compared(rows(6, 0.5), said) | {
        "benchmarks": SCORED,
        "judge": JUDGED,
        "health": {"layers": [{"norm": 1.5}, {"norm": None}], "finite": True, "names": ["q", "v"]},
    }
    shown = evaluation_page.others(found)
    assert shown[0]["title"] == "Benchmarks"
    assert shown[0]["rows"] == [["arc", "acc ↑", "0.123457", "0.5", "+0.3765 ± 0.2", "5"]]
    assert "first 5 documents" in shown[0]["note"]
    assert shown[1]["rows"][1] == ["tuned is better", "2"]
    assert shown[2]["rows"] == [
        ["layers.0.norm", "1.5"], ["layers.1.norm", "-"], ["finite", "yes"], ["names", "q, v"],
    ]  # fmt: skip
    assert "it is empty" in evaluation_page.page(found)
    assert "| arc | acc ↑ | 0.123457 |" in evaluation_page.markdown(found)
