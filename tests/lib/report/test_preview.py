"""The preview: what is learned is seen, and nothing in a data set can do more than be seen."""

import html.parser
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from stages.lib.data.conversation import Conversation, Turn
from stages.lib.report import preview
from tests.lib.conftest import Tokenizers
from tests.lib.data.talk import make, quick, texts

METRICS: dict[str, Any] = {
    "shape": "guanaco", "chat_format": "</td><script>alert(1)</script>.jinja", "rows_read": 12345,
    "rows_kept": 3, "rows_held_out": 0, "rows_dropped": {"duplicate": 2, "<b>": 1}, "rows_truncated": 0,
    "tokens": 9, "trainable_tokens": 5, "tokens_lost": 0, "rows_ending_in_trained_eos": 3,
}  # fmt: skip
HOSTILE = (
    "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\x7f\u202e\u2066<script src='http://x'></script>&amp;\x00"
)


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def row_of(tokenizers: Tokenizers, asked: str, answer: str) -> tuple[Any, preview.Row]:
    form = make("chatml", tokenizers("embedded"))
    said = Conversation((Turn("user", asked), Turn("assistant", answer)))
    ids, mask = form.tokens.encode([form.segments(said)]).row(0)
    return form.tokens, (7, ids.tolist(), mask.tolist())


def page(folder: Path, tokens: Any, *rows: preview.Row) -> str:
    preview.write(folder, rows, tokens, METRICS, Counter(len(ids) for _, ids, _ in rows))
    return (folder / preview.FILE).read_text(encoding="utf-8")


def test_what_is_learned_is_marked(tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokens, row = row_of(tokenizers, "Why?", "So <b>.")
    source = page(tmp_path, tokens, row)
    assert (
        '<span class="learned">So &lt;b&gt;.</span><span class="learned special">&lt;|im_end|&gt;</span></pre>'
        in source
    )
    assert '<span class="special">&lt;|im_start|&gt;</span>user\nWhy?<span' in source
    assert f"<h2>Row 7: {len(row[1])} tokens, {sum(row[2])} learned</h2>" in source
    shown = preview.text([row], tokens)
    assert shown.startswith(
        f"row 7: {len(row[1])} tokens, {sum(row[2])} learned\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert shown.endswith("assistant\n«So <b>.<|im_end|>»\n")


def test_the_account_is_shown(tokenizers: Tokenizers, tmp_path: Path) -> None:
    source = page(tmp_path, tokenizers("embedded"))
    assert "<th>rows read</th><td>12,345</td>" in source
    assert "<td>duplicate: 2, &lt;b&gt;: 1</td>" in source
    empty = METRICS | {"rows_dropped": {}}
    preview.write(tmp_path, [], tokenizers("embedded"), empty, Counter())
    assert "<th>rows dropped</th><td>none</td>" in (tmp_path / preview.FILE).read_text()


def test_a_page_asks_for_nothing_and_runs_nothing(tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokens, row = row_of(tokenizers, HOSTILE, HOSTILE)
    source = page(tmp_path, tokens, row)
    found = Page(source)
    assert {tag for tag, _ in found.elements} <= {
        "html", "meta", "title", "style", "h1", "p", "span", "table", "tr", "th", "td", "figure", "svg", "text",
        "rect", "figcaption", "section", "h2", "pre",
    }  # fmt: skip
    names = {name for _, attributes in found.elements for name in attributes}
    assert not [name for name in names if name in ("src", "href", "style") or name.startswith("on")]
    styles = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    assert "://" not in source.replace("&#x27;http://x&#x27;", "")
    assert found.text.count("<script src='http://x'></script>&amp;") == 2


def test_control_characters_reach_neither_page_nor_terminal(
    tokenizers: Tokenizers, tmp_path: Path
) -> None:
    tokens, row = row_of(tokenizers, HOSTILE, HOSTILE)
    for shown in (preview.text([row], tokens), page(tmp_path, tokens, row)):
        assert not re.search(
            r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", shown
        )
        assert r"\x1b[2J\x1b]0;title\x07\x9b31m\x0d\x08\x7f\x202e\x2066" in shown


@quick(30)
@given(asked=texts, answer=texts.filter(str.strip))
def test_nothing_in_a_row_changes_the_page(
    tokenizers: Tokenizers, tmp_path: Path, asked: str, answer: str
) -> None:
    tokens, row = row_of(tokenizers, asked, answer)
    plain = Page(page(tmp_path, tokens, row_of(tokenizers, "a", "b")[1]))
    found = Page(page(tmp_path, tokens, row))
    # The histogram's bar apart, whose place and title tell the length.
    assert [e for e in found.elements if e[0] != "rect"] == [
        e for e in plain.elements if e[0] != "rect"
    ]
    assert all(c.isprintable() or c in "\n\t" for c in preview.text([row], tokens))


def test_colours_on_a_terminal_alone(
    tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, row = row_of(tokenizers, HOSTILE, "So.")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = preview.text([row], tokens)
    assert (
        f"{preview.LEARNED}So.{preview.END}{preview.LEARNED}{preview.SPECIAL}<|im_end|>{preview.END}"
        in shown
    )
    ours = {preview.LEARNED, preview.SPECIAL, preview.LEARNED + preview.SPECIAL, preview.END}
    assert set(re.findall(r"(?:\x1b\[[0-9;]*m)+", shown)) <= ours | {
        preview.END + one for one in ours
    }
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    "lengths", [{}, {1: 3}, {40: 1, 41: 2}, {7: 5, 3000: 1}, {n: n for n in range(1, 2000)}]
)
def test_the_histogram_counts_every_row(lengths: dict[int, int], tmp_path: Path) -> None:
    drawn = preview._histogram(Counter(lengths))
    bars = re.findall(r"<title>(\d+) to (\d+) tokens: ([\d,]+) rows</title>", drawn)
    assert sum(int(count.replace(",", "")) for _, _, count in bars) == sum(lengths.values())
    assert len(bars) <= preview.BARS
    for length in lengths:
        assert sum(int(low) <= length <= int(high) for low, high, _ in bars) == 1
    assert all(int(place) < 720 for place in re.findall(r'<rect x="(\d+)"', drawn))


def test_a_row_with_half_a_character(tokenizers: Tokenizers, tmp_path: Path) -> None:
    """As a row that was cut within one."""
    tokens, (_, ids, _) = row_of(tokenizers, "a", "𓀀𓀀")
    cut = (1, ids[:-2], [True] * len(ids[:-2]))
    assert "�" in page(tmp_path, tokens, cut)
    assert "�" in preview.text([cut], tokens)
