"""What becomes of each row of a chunk: kept, cut or refused, and what it cost."""

import random
from typing import Any

import numpy as np
import pytest

from stages.lib.data.conversation import loads
from stages.lib.data.fitting import POLICIES
from stages.lib.data.formats import Format
from stages.lib.data.preparation import Batch, Job, Preparer, copies, counts, place
from stages.lib.data.rows import Row, Rows
from stages.lib.data.shapes import Shape
from tests.lib.conftest import Tokenizers
from tests.lib.data.talk import learned_text, make, real_texts

GUANACO, MESSAGES = Shape("guanaco", ("text",)), Shape("messages", ("messages",))
PLAIN = Shape("text", ("text",))
NEVER = "### Human: and then, what comes after that?"


@pytest.fixture(scope="module")
def form(tokenizers: Tokenizers) -> Format:
    return make("guanaco", tokenizers("embedded"))


def prepare(
    form: Format, texts: list[Any], shape: Shape = GUANACO, limit: int = 256, policy: str = "truncate",
    ask: float = 0.0, near: bool = False,
) -> Batch:  # fmt: skip
    """A chunk of rows that hold these in the shape's column, prepared."""
    rows = [Row(2 * n, 100 * n, {shape.columns[0]: text}) for n, text in enumerate(texts, 1)]
    return Preparer(form, limit, policy, 0, near)(Job(Rows(rows), shape, ask))


def pieces(batch: Batch) -> list[tuple[list[int], list[bool]]]:
    bounds = zip(batch.starts[:-1], batch.starts[1:], strict=True)
    return [(batch.ids[a:b].tolist(), batch.learned[a:b].tolist()) for a, b in bounds]


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("policy", POLICIES[:3])
def test_real_rows_end_in_a_learned_eos_and_lose_what_is_said(
    tokenizers: Tokenizers, policy: str, loss_on: str
) -> None:
    """80 of the 853 are longer than 1,024 tokens, so 256 cuts most of them."""
    form = make("guanaco", tokenizers("llama2"), loss_on)
    batch = prepare(form, real_texts(), policy=policy)
    whole = prepare(form, real_texts(), limit=10**6)
    eos, bos = form.tokens.eos, form.tokens.bos
    open_ended = 0
    for ids, learned in pieces(batch):
        assert len(ids) == len(learned) <= 256
        assert ids[0] == bos
        assert ids.count(bos) == 1
        assert not learned[0]
        ended = ids[-1] == eos
        open_ended += not ended
        assert ids.count(eos) == ended
        assert learned[-1]
        assert any(learned[:-1])
    assert open_ended == sum(outcome.going_on for outcome in batch.outcomes)
    tokens, learned_counts, ended_counts = counts(batch, form.stops.ids)
    assert tokens.sum() == len(batch.ids)
    assert learned_counts.sum() == batch.learned.sum()
    assert ended_counts.sum() == len(tokens) - open_ended
    position = 0
    for outcome, before in zip(batch.outcomes, whole.outcomes, strict=True):
        assert outcome.tokens == before.tokens
        assert outcome.digest == before.digest
        kept = int(tokens[position : position + outcome.pieces].sum())
        position += outcome.pieces
        size = outcome.tokens - outcome.unanswered
        assert outcome.long == (size > 256)
        if not outcome.long:
            assert (outcome.pieces, kept, outcome.cut) == (1, size, 0)
        elif policy == "drop":
            assert (outcome.pieces, outcome.reason) == (0, "too_long")
            assert outcome.detail == f"{outcome.tokens} tokens"
        elif policy == "truncate":
            # At most EOS is put back.
            assert outcome.pieces == 1
            assert size - outcome.cut <= kept <= size - outcome.cut + 1
        else:
            # A BOS or an EOS for each piece, where it is not an exchange whose question was cut.
            assert size - outcome.cut <= kept <= size - outcome.cut + 2 * outcome.pieces
    assert position == len(tokens)


def test_a_chunk_is_prepared_as_its_rows_are_one_by_one(form: Format) -> None:
    texts = [*real_texts()[:40], "", "x", "### Human: a"]
    random.Random(0).shuffle(texts)
    for policy in ("truncate", "split"):
        batch = prepare(form, texts, policy=policy)
        alone = [prepare(form, [text], policy=policy) for text in texts]
        assert [o._replace(line=0, byte=0) for o in batch.outcomes] == [
            one.outcomes[0]._replace(line=0, byte=0) for one in alone
        ]
        assert pieces(batch) == [piece for one in alone for piece in pieces(one)]
    assert prepare(form, []).starts.tolist() == [0]


def test_rows_that_are_not_kept_say_why(form: Format) -> None:
    def said(*turns: tuple[str, str, int]) -> list[dict[str, Any]]:
        return [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]

    texts = [
        5, [{"role": "judge", "content": "a"}], [], said(("user", " \n", 1), ("assistant", "", 1)),
        said(("user", "a", 1)), said(("user", "a", 1), ("assistant", "b", 0)),
        said(("user", "a", 1), ("assistant", " ", 1)),
        said(("user", "a", 1), ("assistant", "", 0), ("user", "b", 1), ("assistant", "c", 1)),
    ]  # fmt: skip
    batch = prepare(form, texts, MESSAGES)
    assert [(outcome.reason, outcome.detail) for outcome in batch.outcomes] == [
        ("bad", "column 'messages' holds a number, not a list of messages"),
        ("bad", "a message has the role 'judge'; known are system, user, assistant, tool"),
        ("empty", ""), ("empty", ""), ("no_answer", "its turns: user"),
        ("no_answer", "its turns: user, assistant"), ("empty_answer", ""), ("", ""),
    ]  # fmt: skip
    assert [(o.line, o.byte) for o in batch.outcomes] == [(2 * n, 100 * n) for n in range(1, 9)]
    assert batch.outcomes[0].raw == "{'messages': 5}"
    assert [outcome.pieces for outcome in batch.outcomes] == [0] * 7 + [1]
    assert all(outcome.tokens == 0 for outcome in batch.outcomes[:7])
    # What the reader could not read is handed on.
    bad = Rows([Row(3, 7, None, "not UTF-8 at byte 9", "\ufffd")])
    (outcome,) = Preparer(form, 256, "drop", 0, False)(Job(bad, GUANACO, 0)).outcomes
    assert outcome[:5] == (3, 7, "bad", "not UTF-8 at byte 9", "\ufffd")


def test_a_row_that_is_nested_too_deeply_is_a_bad_row(tokenizers: Tokenizers) -> None:
    for depth in (100, 990):
        value: Any = "x"
        for _ in range(depth):
            value = [value]
        call = {"function": {"name": "f", "arguments": {"a": value}}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        batch = prepare(make("chatml", tokenizers("embedded")), [[message]], MESSAGES, limit=10**4)
        assert batch.outcomes[0].reason == ("bad" if depth > 900 else "")


def test_with_everything_learned_questions_are_answers_enough(tokenizers: Tokenizers) -> None:
    form = make("guanaco", tokenizers("embedded"), "all")
    batch = prepare(form, ["### Human: nobody answers", "### Human: a### Assistant: b" + NEVER])
    assert [outcome.reason for outcome in batch.outcomes] == ["", ""]
    assert [outcome.turns for outcome in batch.outcomes] == [0, 0]
    texts = [learned_text(form.tokens, *piece) for piece in pieces(batch)]
    assert texts[1] == f" Human: a### Assistant: b{NEVER}<|im_end|>"


def test_turns_that_nobody_answers_are_counted(form: Format) -> None:
    (outcome,) = prepare(form, ["### Human: a### Assistant: b" + NEVER]).outcomes
    (answered,) = prepare(form, ["### Human: a### Assistant: b"]).outcomes
    lost = form.tokens.lengths([NEVER.removeprefix("### Human: ")])[0]
    assert (outcome.turns, outcome.unanswered) == (1, lost)
    assert outcome.tokens == answered.tokens + lost
    assert outcome.digest == answered.digest  # they are the same row


def test_plain_text(tokenizers: Tokenizers) -> None:
    form = make("text", tokenizers("llama2"))
    batch = prepare(form, ["Once upon", " ", "word " * 300], PLAIN, policy="split", ask=1.0)
    assert [outcome.reason for outcome in batch.outcomes] == ["", "empty", ""]
    assert [outcome.pieces for outcome in batch.outcomes] == [1, 0, 2]
    assert batch.outcomes[2].going_on == 1
    assert batch.outcomes[0].prompt is None
    first = pieces(batch)[0]
    assert first[0] == [*form.tokens.backend.encode("Once upon").ids, form.tokens.eos]
    assert first[1] == [False] + [True] * (len(first[0]) - 1)


def test_questions_for_evaluation(form: Format) -> None:
    texts = [
        f"### Human: {n}?### Assistant: {n}!### Human: why \u2028?### Assistant: so {n}."
        for n in range(50)
    ]
    batch = prepare(form, texts, ask=0.2)
    places = [place(outcome.digest, 0) for outcome in batch.outcomes]
    for n, (outcome, where) in enumerate(zip(batch.outcomes, places, strict=True)):
        assert (outcome.prompt is not None) == (where < 0.2)
        if prompt := outcome.prompt:
            assert prompt["question"] == "why \u2028?"
            assert (
                prompt["prompt"]
                == f"### Human: {n}?### Assistant: {n}!### Human: why \u2028?### Assistant:"
            )
            assert prompt["reference"] == f"so {n}."
            ids = form.prompt(loads(prompt))
            assert ids == pieces(batch)[n][0][: len(ids)]
    # The least of all may be held out where none is below.
    few = prepare(form, texts, ask=1e-9)
    asked = [n for n, outcome in enumerate(few.outcomes) if outcome.prompt]
    assert asked == [int(np.argmin(places))]
    assert not any(outcome.prompt for outcome in prepare(form, texts).outcomes)
    # None is asked of a row that was cut, nor of one in which nobody asks.
    cut = ["### Human: a### Assistant: " + "word " * 300, "### Assistant: b"]
    assert not any(outcome.prompt for outcome in prepare(form, cut, ask=1.0).outcomes)


def test_places_and_copies_are_even_and_keep_still() -> None:
    digests = [bytes([n % 256, n // 256]) * 8 for n in range(2000)]
    for seed in (0, 1):
        places = np.array([place(digest, seed) for digest in digests])
        assert (places >= 0).all()
        assert (places < 1).all()
        assert abs(np.histogram(places, bins=10, range=(0, 1))[0] - 200).max() < 60
    assert place(digests[0], 0) != place(digests[0], 1)
    assert place(digests[0], 0) == 0.5398359848752231  # the same in every version
    assert {copies(digest, 0, 2.0) for digest in digests} == {2}
    assert {copies(digest, 0, 1.0) for digest in digests} == {1}
    half = [copies(digest, 0, 0.5) for digest in digests]
    assert set(half) == {0, 1}
    assert 900 < sum(half) < 1100
    assert 2900 < sum(copies(digest, 0, 1.5) for digest in digests) < 3100
    # Which rows are left out has nothing to do with which are held out.
    out = [place(digest, 0) < 0.5 for digest in digests]
    assert 400 < sum(a and b for a, b in zip(half, out, strict=True)) < 600
