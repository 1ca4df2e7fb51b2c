"""Rows that fit, and an account that adds up."""

import json
from pathlib import Path

import numpy as np
import pytest

from stages.lib.data import prepared, sources
from stages.lib.data.conversation import parse, render
from stages.lib.data.preparation import Example, Ledger, examples, split
from stages.lib.data.tokens import Tokens
from tests.conftest import REAL_ROWS

SETTINGS = {
    "max_rows": None, "max_length": 256, "on_long": "truncate", "loss_on": "assistant",
    "validation_fraction": 0.1, "seed": 0,
}  # fmt: skip


def prepare(path: Path, tokens: Tokens, out: Path, **changed: object) -> Ledger:
    """Run a file through preparation into `out`."""
    ledger = Ledger()
    found = examples(sources.find(str(path), None), tokens, ledger, **(SETTINGS | changed))  # type: ignore[arg-type]
    out.mkdir(exist_ok=True)
    with prepared.Writer(out, tokens) as writer:
        for part, example in found:
            writer.write(part, example)
    return ledger


@pytest.fixture(scope="module")
def tokens(sample_model: Path) -> Tokens:
    return Tokens(sample_model)


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("on_long", ["truncate", "drop"])
def test_eos_is_learned_at_the_end_of_every_kept_row(
    tokens: Tokens, rows: Path, tmp_path: Path, loss_on: str, on_long: str
) -> None:
    """On the real conversations where they are; 80 of 853 are longer than 1,024 tokens, so 256 cuts most."""
    path = REAL_ROWS if REAL_ROWS.is_file() else rows
    ledger = prepare(path, tokens, tmp_path / "out", loss_on=loss_on, on_long=on_long)
    kept = 0
    for name in prepared.PARTS:
        part = prepared.Part(tmp_path / "out" / f"{name}.arrow")
        for number in range(len(part)):
            ids, trained = part[number]
            assert ids[-1] == tokens.eos
            assert trained[-1]
            assert (ids == tokens.eos).sum() == 1
            assert trained[:-1].any()
            assert len(ids) <= 256
            kept += 1
    assert kept == ledger.rows_kept == ledger.rows_ending_in_trained_eos > 0


def test_the_account_adds_up(tokens: Tokens, tmp_path: Path, rows: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    extra = [
        "",
        "   ",
        "### Human: nobody answers",
        "x" * 5,
        "### Human: long### Assistant: " + "word " * 400,
    ]
    path.write_text(rows.read_text() + "".join(json.dumps({"text": t}) + "\n" for t in extra))
    ledger = prepare(path, tokens, tmp_path / "out", max_length=128)
    assert ledger.rows_read == 45
    assert ledger.rows_dropped == {"empty": 2, "no_answer": 2}
    assert ledger.rows_read == ledger.rows_kept + sum(ledger.rows_dropped.values())
    assert ledger.rows_truncated == 1
    parts = [prepared.Part(tmp_path / "out" / f"{name}.arrow") for name in prepared.PARTS]
    assert sum(len(part) for part in parts) == ledger.rows_kept
    assert len(parts[1]) == ledger.rows_held_out
    assert sum(int(part.lengths.sum()) for part in parts) == ledger.tokens
    assert sum(int(part.trained.sum()) for part in parts) == ledger.trainable_tokens
    whole = sum(len(ids) for ids, _ in tokens.encode([render(parse(extra[4]), "all")], False))
    assert ledger.tokens_lost == whole - 128


def test_rows_stay_on_their_side_when_others_are_added() -> None:
    def sides(count: int) -> dict[str, str]:
        rows = [Example(n, "", f"row {n}", []) for n in range(count)]
        return {example.text: part for part, example in split(iter(rows), 0.2, 0)}

    few, many = sides(300), sides(1000)
    assert {text: many[text] for text in few} == few
    assert 130 < sum(part == "held_out" for part in many.values()) < 270


@pytest.mark.parametrize("count", [2, 3, 10])
def test_something_is_always_held_out(count: int) -> None:
    rows = [Example(n, "", f"row {n}", []) for n in range(count)]
    parts = [part for part, _ in split(iter(rows), 0.001, 0)]
    assert parts.count("held_out") == 1
    assert len(parts) == count
    assert [part for part, _ in split(iter(rows), 0, 0)] == ["train"] * count


def test_questions_are_kept_for_evaluation(tokens: Tokens, rows: Path, tmp_path: Path) -> None:
    prepare(rows, tokens, tmp_path / "out", validation_fraction=0.5)
    questions = prepared.prompts(tmp_path / "out")
    assert questions
    for entry in questions:
        assert entry["prompt"].endswith("### Assistant:")
        assert entry["reference"].endswith(".")


def test_others_can_read_it(tokens: Tokens, rows: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    prepare(rows, tokens, tmp_path / "out")
    data = Dataset.from_file(str(tmp_path / "out" / "train.arrow"))
    assert data.column_names == ["row", "input_ids", "trained"]
    part = prepared.Part(tmp_path / "out" / "train.arrow")
    assert np.array_equal(part[0][0], data[0]["input_ids"])


def test_turns_that_nobody_answers_are_counted(tokens: Tokens, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    question = "### Human: and then, what comes after that?"
    texts = ["### Human: a### Assistant: b" + question, "### Human: c### Assistant: d"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ledger = prepare(path, tokens, tmp_path / "out")
    assert ledger.turns_dropped == 1
    assert ledger.tokens_lost == len(tokens.encode_prompt(question))
    assert prepare(path, tokens, tmp_path / "all", loss_on="all").tokens_lost == 0


def test_a_question_may_hold_any_line_separator(tokens: Tokens, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [f"### Human: {n} a\u2028b\x85c\u2029d### Assistant: e" for n in range(4)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(path, tokens, tmp_path / "out", validation_fraction=0.5)
    assert prepared.prompts(tmp_path / "out")[0]["question"].endswith("a\u2028b\x85c\u2029d")
