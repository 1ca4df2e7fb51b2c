"""Rows of several sources: which repeat another, which are held out, and how often each is learned."""

import json
import random

import pytest

from stages.lib.data import prepared
from stages.lib.run.exits import BadData
from tests.lib.data.making import CHECKS, Maker, rows


def test_duplicates(maker: Maker) -> None:
    """The same conversation in any shape; the first is kept."""
    messages = [
        {"role": "user", "content": "What is 1 and 1?"}, {"role": "assistant", "content": "2."},
    ]  # fmt: skip
    longer = [{"role": "system", "content": "Add."}, *messages]
    one = maker.file("one.jsonl", [*rows(3), *rows(2)])
    two = maker.file("two.jsonl", [json.dumps({"messages": said}) for said in (messages, longer)])
    made = maker.prepare(f"{one},{two}")
    assert [(entry["row"], entry["of"]) for entry in made.lost()] == [(4, 1), (5, 2), (6, 2)]
    assert [row for row, _ in made.rows("train")] == [1, 2, 3, 7]
    assert [source["rows_kept"] for source in made.sources] == [3, 1]
    kept = maker.prepare(f"{one},{two}", repeats="keep")
    assert [row for row, _ in kept.rows("train")] == [1, 2, 3, 4, 5, 6, 7]


def test_near_duplicates(maker: Maker) -> None:
    words = "The quick brown fox jumps over the lazy dog near the bank of the river at noon. "
    text = "### Human: Tell me more of it, please?### Assistant: " + words * 2
    other = "### Human: And of this?### Assistant: " + "Nothing is like the rest of the file. " * 4
    near = [text + "Yes.", text.replace("lazy", "Lazy") + " Yes.", text + "No.", other, other]
    path = maker.file("near.jsonl", near)
    lost = [(e["row"], e["reason"], e["of"]) for e in maker.prepare(path, repeats="near").lost()]
    assert lost == [(2, "near_duplicate", 1), (3, "near_duplicate", 1), (5, "duplicate", 4)]
    assert maker.prepare(path).ledger.rows_kept == 4
    # One that is like a row of the test split is not learned either.
    maker.file("split/train.jsonl", [near[1], other])
    maker.file("split/test.jsonl", [near[0]])
    leaked = maker.prepare(str(maker.folder / "split"), repeats="near").lost()
    assert [(entry["row"], entry["reason"], entry["of"]) for entry in leaked] == [(2, "leaked", 1)]


@pytest.mark.parametrize("repeats", ["drop", "keep", "near"])
def test_what_a_test_split_holds_is_not_learned(maker: Maker, repeats: str) -> None:
    maker.file("split/train.jsonl", rows(10) + rows(1, 9))
    maker.file("split/validation.jsonl", rows(4, 8) + rows(1, 11))
    made = maker.prepare(str(maker.folder / "split"), held_out=0.5, repeats=repeats)
    keeps = repeats == "keep"
    assert made.ledger.rows_dropped["leaked"] == 3
    assert made.ledger.rows_dropped["duplicate"] == (0 if keeps else 1)
    assert [row for row, _ in made.rows("held_out")] == [1, 2, 3, 4] + [5] * keeps
    assert [row for row, _ in made.rows("train")] == list(range(6, 14))
    questions = [entry["row"] for entry in prepared.prompts(made.folder)]
    assert questions == [1, 2, 3, 4] + [5] * keeps
    made.ledger.check("split", **CHECKS)
    with pytest.raises(BadData, match="has 3 rows for training that its test split holds too"):
        made.ledger.check("split", **CHECKS | {"fail_on_leakage": True})


def test_rows_stay_on_their_side_when_others_are_added(maker: Maker) -> None:
    def sides(texts: list[str]) -> dict[str, str]:
        made = maker.prepare(maker.file("some.jsonl", texts), held_out=0.2)
        found = [(part, ids) for part in prepared.PARTS for _, ids in made.rows(part)]
        return {maker.tokens.decode(ids): part for part, ids in found}

    few, many = rows(200), rows(700)
    random.Random(0).shuffle(many)
    before, after = sides(few), sides(many)
    assert len(before) == 200
    assert {text: after[text] for text in before} == before
    assert 100 < sum(part == "held_out" for part in after.values()) < 180


def test_duplicates_that_are_kept_are_on_one_side(maker: Maker) -> None:
    made = maker.prepare(maker.file("some.jsonl", rows(60) * 2), held_out=0.3, repeats="keep")
    train, held_out = ({tuple(ids) for _, ids in made.rows(part)} for part in prepared.PARTS)
    assert not train & held_out
    assert len(train) + len(held_out) == 60
    assert len(made.rows("held_out")) == 2 * len(held_out) > 0


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_something_is_always_held_out(maker: Maker, count: int) -> None:
    path = maker.file("few.jsonl", rows(count))
    made = maker.prepare(path, held_out=1e-6)
    assert len(made.rows("held_out")) == made.ledger.rows_held_out == (count > 1)
    assert len(made.rows("train")) == count - (count > 1)
    questions = prepared.prompts(made.folder)
    assert [entry["row"] for entry in questions] == [row for row, _ in made.rows("held_out")]
    made.ledger.check("few", **CHECKS)
    if count == 10:  # it is among those that a greater share holds out
        held_out = maker.prepare(path, held_out=0.3).rows("held_out")
        assert made.rows("held_out")[0] in held_out
    assert maker.prepare(path).rows("held_out") == []


def test_weights(maker: Maker) -> None:
    half, twice = maker.file("half.jsonl", rows(200)), maker.file("twice.jsonl", rows(50, 200))
    made = maker.prepare(f"{half}=0.5,{twice}=2", held_out=0.2)
    train, held_out = ([row for row, _ in made.rows(part)] for part in prepared.PARTS)
    assert len(held_out) == len(set(held_out)) > 30  # of each source, once each
    assert all(train.count(row) == (1 if row <= 200 else 2) for row in train)
    left_out = made.ledger.rows_dropped["weight"]
    assert left_out + len(set(train)) + len(held_out) == 250
    assert 50 < left_out < 110
    # The same half, whatever stands beside it.
    alone = maker.prepare(f"{half}=0.5", held_out=0.2)
    assert alone.rows("train") == [entry for entry in made.rows("train") if entry[0] <= 200]
    # What a weight left out is no duplicate for the next source.
    again = maker.prepare(f"{half}=0.5,{half}", held_out=0.2)
    assert {tuple(ids) for part in prepared.PARTS for _, ids in again.rows(part)} == {
        tuple(ids)
        for part in prepared.PARTS
        for _, ids in maker.prepare(half, held_out=0.2).rows(part)
    }


def test_only_the_first_rows_of_each_source(maker: Maker) -> None:
    one, two = maker.file("one.jsonl", rows(700)), maker.file("two.jsonl", rows(700, 700))
    made = maker.prepare(f"{one},{two}", max_rows=600)
    assert [source["rows_read"] for source in made.sources] == [600, 600]
    texts = [maker.tokens.decode(ids) for _, ids in made.rows("train")]
    assert texts == rows(600) + rows(600, 700)
