"""What is counted of answers."""

import pytest

from stages.lib.data.formats import Format
from stages.lib.model.said import Answer
from stages.lib.report import answers
from tests.lib.conftest import Tokenizers
from tests.lib.data.talk import make


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", 0), ("one two three", 0), ("one two three four", 0), ("a b c d a b c d", 0.2),
        ("so so so so so so so", 0.75), ("a b c d e f g h", 0), ("是的是的是的是的", 0.6),
        ("yes! yes! yes! yes!", 0.6),
    ],
)  # fmt: skip
def test_repetition(text: str, wanted: float) -> None:
    assert answers.repetition(text) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "text", "mark"),
    [
        ("guanaco", "Yes.\n### Human: and?", "### Human:"),
        ("guanaco", "Yes, a human: me. # no", None),
        ("chatml", "Yes.\nuser\nAnd why?", "user"),
        ("chatml", "The user says so.\nuser names vary", None),
        ("chatml", "Yes.<|im_start|>", "<|im_start|>"),
        ("llama2", "Yes. [INST] And why?", "[INST]"),
        ("alpaca", "Yes.\n### Instruction:\nMore", "### Instruction:"),
    ],
)
def test_marks_of_a_format(tokenizers: Tokenizers, name: str, text: str, mark: str | None) -> None:
    form: Format = make(name, tokenizers("embedded"))
    found = answers.fault(Answer(text, 9, "stop"), form.marks())
    assert found == (mark and f"it holds the mark {mark!r}")


def test_marks_are_no_words_of_the_example(tokenizers: Tokenizers) -> None:
    for name in ("guanaco", "alpaca", "chatml", "llama2"):
        marks = make(name, tokenizers("embedded")).marks()
        assert not set(marks) & {"Be brief.", "What is 2 + 2?", "4", "Why?", ""}


def test_a_role_at_the_start_of_a_line() -> None:
    assert answers.fault(Answer("Yes.\nUser: why?", 9, "stop"), ["User:"])
    assert not answers.fault(Answer("Each User: has a name", 9, "stop"), ["User:"])


def test_measures_of_both_sides() -> None:
    def side(*said: Answer) -> list[dict[str, object]]:
        return [answers.described(one, ["###"]) for one in said]

    loop = Answer("so " * 20, 20, "length")
    base = side(loop, loop, Answer("Yes.", 2, "stop"), loop)
    tuned = side(
        Answer("Yes.", 2, "stop"), Answer("No. ### ", 3, "stop"), Answer(" ", 1, "stop"), loop
    )
    found = answers.measured(tuned)
    assert (found["stop_rate"], found["format_rate"], found["loop_rate"]) == (0.75, 0.25, 0.25)
    assert found["stop_rate_interval"] == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert (found["answer_tokens"], found["answer_tokens_median"]) == (6.5, 2.5)
    change = answers.differences(base, tuned)
    assert change["stop_rate"] == {"value": 0.5, "p": 0.5}
    assert change["format_rate"] == {"value": 0, "p": 1}
    assert change["loop_rate"] == {"value": -0.5, "p": 0.5}


def test_nothing_asked_is_nothing_measured() -> None:
    assert set(answers.measured([]).values()) == {None}
    assert answers.differences([], [])["stop_rate"] == {"value": None, "p": None}
