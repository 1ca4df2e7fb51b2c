"""The account of every row, and what is refused because of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.lib.run.exits import BadData
from tests.lib.data.making import CHECKS, Maker, rows

LONG = "### Human: long### Assistant: " + "word " * 400
NO_ANSWER, EMPTY_ANSWER = "### Human: nobody answers", "### Human: a### Assistant: "
MIXED = ["", "   ", NO_ANSWER, "x" * 5, LONG, "{broken", rows(1)[0]]
LEFT = "what comes after that?"
ALLOWED = {"max_bad_rows": 1, "allowed": ("nothing-to-learn", "empty-answers")}


@pytest.mark.promise("P6")
@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
def test_the_account_adds_up(maker: Maker, policy: str) -> None:
    unanswered = f"### Human: a### Assistant: b### Human: {LEFT}"
    name = maker.file("mixed.jsonl", [*rows(40), *MIXED, unanswered])
    made = maker.prepare(name, policy=policy)
    ledger = made.ledger
    assert (ledger.rows_read, ledger.turns_dropped) == (48, 1)
    dropped = {"empty": 2, "no_answer": 1, "bad": 2, "duplicate": 1}
    dropped |= {"too_long": 1} if policy == "drop" else {}
    assert dict(ledger.rows_dropped) == dropped
    assert ledger.rows_truncated == (policy == "truncate")
    assert ledger.rows_split == (policy == "split")
    by_reason = {entry["reason"]: entry for entry in made.lost()}
    again = by_reason["duplicate"]
    assert (again["row"], again["where"], again["of"]) == (47, f"{name}:47", 1)
    assert again["tokens_lost"] == maker.tokens.lengths(rows(1))[0] + 1
    left = by_reason["unanswered"]
    assert (left["row"], left["turns"]) == (48, 1)
    assert left["tokens_lost"] == maker.tokens.lengths([LEFT])[0]
    assert by_reason["no_answer"]["detail"] == "its turns: user"
    if policy == "truncate":
        assert made.metrics["tokens_added"] == 1
        size = maker.tokens.lengths([LONG])[0] + 1
        assert by_reason["truncated"]["tokens_lost"] == size - 127
    kept = 48 - sum(dropped.values())
    assert made.sources == [
        {
            "name": name,
            "shape": "guanaco",
            "rows_read": 48,
            "rows_kept": kept,
            "tokens": ledger.tokens,
        }
    ]
    assert ledger.rows_ending_in_trained_eos == ledger.rows_written - ledger.rows_going_on
    quantiles = made.metrics["length_quantiles"]
    assert list(quantiles.values()) == sorted(quantiles.values())
    assert (quantiles["0"], quantiles["1"]) == (min(ledger.lengths), max(ledger.lengths))


KINDS = {
    "good": lambda n: rows(1, n)[0],
    "same": lambda n: rows(1)[0],
    "long": lambda n: f"### Human: {n}### Assistant: " + f"word {n} " * 200,
    "empty": lambda n: " " * (n % 3),
    "bad": lambda n: "{broken",
    "unmarked": lambda n: f"no marks {n}",
    "unanswered": lambda n: f"### Human: nobody answers {n}",
    "hollow": lambda n: f"### Human: {n}### Assistant: ",
    "left": lambda n: f"### Human: {n}### Assistant: b### Human: {LEFT}",
}


@pytest.mark.promise("P6")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=30),
    policy=st.sampled_from(["truncate", "split", "drop"]),
    repeats=st.sampled_from(["drop", "keep"]),
    held_out=st.sampled_from([0.0, 0.3]),
)
def test_no_row_goes_without_a_word(
    maker: Maker, kinds: list[str], policy: str, repeats: str, held_out: float
) -> None:
    """Whatever is mixed: each row is in the artifact or in the ledger, for the reason that it should be."""
    path = maker.file("mixed.jsonl", [*rows(1, 500), *(KINDS[k](n) for n, k in enumerate(kinds))])
    made = maker.prepare(path, policy=policy, repeats=repeats, held_out=held_out)
    ledger, dropped = made.ledger, made.ledger.rows_dropped
    assert ledger.rows_read == len(kinds) + 1
    assert ledger.rows_read == ledger.rows_kept + dropped.total()
    assert dropped["bad"] == kinds.count("bad") + kinds.count("unmarked")
    assert dropped["empty"] == kinds.count("empty")
    assert dropped["no_answer"] == kinds.count("unanswered")
    assert dropped["empty_answer"] == kinds.count("hollow")
    assert ledger.turns_dropped == kinds.count("left")
    shortened = {"truncate": ledger.rows_truncated, "split": ledger.rows_split}
    assert shortened.get(policy, dropped["too_long"]) == kinds.count("long")
    again = max(0, kinds.count("same") - (kinds[:1] != ["good"]))
    assert dropped["duplicate"] == (again if repeats == "drop" else 0)


def test_bad_rows_are_listed_without_their_text(maker: Maker) -> None:
    path = maker.file("mixed.jsonl", rows(3) + MIXED)
    for keep_text in (False, True):
        made = maker.prepare(path, keep_text=keep_text)
        lines = (made.folder / "rejects.jsonl").read_text().splitlines()
        one, two = map(json.loads, lines)
        assert [(e["row"], e["file"], e["line"]) for e in (one, two)] == [
            (7, path, 7),
            (9, path, 9),
        ]
        assert one["reason"] == "column 'text' has no mark (### Human: or ### Assistant:)"
        assert two["byte"] == Path(path).read_bytes().index(b"{broken")
        assert one.get("text") == ("{'text': 'xxxxx'}" if keep_text else None)
        assert two.get("text") == ("{broken" if keep_text else None)
    assert "xxxxx" not in (made.folder / "ledger.jsonl").read_text()


@pytest.mark.parametrize(
    ("texts", "changed", "words"),
    [
        ([], {}, "data has no rows; it is empty"),
        (["{bad", "{worse", *rows(3)], {}, "data has 2 bad of 5 rows, MAX_BAD_ROWS is 0:\n  FILE:1: "),
        (["{bad"] * 30 + rows(3), {"max_bad_rows": 3}, "\n  and 10 more\nmend them, or raise MAX_BAD_ROWS"),
        (
            [NO_ANSWER, *rows(3)], {},
            "data has 1 of 4 rows without a trainable token, first FILE:1 (its turns: user); mend",
        ),
        ([EMPTY_ANSWER, *rows(9)], {}, "data has 1 of 10 rows with an empty answer, over 1 %; mend them"),
        (
            [LONG], {"on_long": "error"},
            "data has 1 of 1 rows over MAX_LENGTH 128, first FILE:1 (409 tokens); raise it",
        ),
        (
            [LONG, LONG + "a" * 100], {"on_long": "drop"},
            "leaves no row to train on: 2 read, 2 too_long; of those over MAX_LENGTH 128 the longest has 4",
        ),
        ([EMPTY_ANSWER], {"allowed": ("empty-answers",)}, "no row to train on: 1 read, 1 empty_answer; add"),
    ],
)  # fmt: skip
def test_what_is_refused(
    maker: Maker, texts: list[str], changed: dict[str, Any], words: str
) -> None:
    path = maker.file("data.jsonl", texts)
    checks = CHECKS | changed
    made = maker.prepare(path, policy=checks["on_long"])
    with pytest.raises(BadData) as caught:
        made.ledger.check("data", **checks)
    assert words.replace("FILE", path) in str(caught.value)
    assert "  " not in str(caught.value).replace("\n  ", "")
    assert caught.value.exit_code == 65


def test_what_is_allowed(maker: Maker) -> None:
    made = maker.prepare(maker.file("data.jsonl", ["{bad", NO_ANSWER, EMPTY_ANSWER, *rows(3)]))
    made.ledger.check("data", **CHECKS | ALLOWED)
    # 1 % of empty answers is no reason to stop, nor is one row in a hundred that does not end.
    few = maker.prepare(maker.file("few.jsonl", [EMPTY_ANSWER, *rows(99)]))
    few.ledger.check("few", **CHECKS)
    few.ledger.rows_ending_in_trained_eos = 98
    few.ledger.rows_going_on = 1
    few.ledger.check("few", **CHECKS)


def test_rows_that_do_not_end_are_refused(maker: Maker) -> None:
    made = maker.prepare(maker.file("data.jsonl", rows(3)))
    made.ledger.rows_ending_in_trained_eos = 1
    with pytest.raises(
        BadData, match="data: only 1 of 3 rows end in a trained EOS, so answers would"
    ):
        made.ledger.check("data", **CHECKS)
    made.ledger.check("data", **CHECKS | {"allowed": ("unended",)})
