"""Shapes of rows: told apart by their columns, read to the letter, and what does not fit with its reason."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data import recognition, shapes
from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.recognition import recognise
from stages.lib.data.shapes import Misfit, Shape
from stages.lib.run.exits import BadData
from tests.lib.data.talk import quick, texts

Row = dict[str, Any]
USER, ANSWER = Turn("user", "Why? "), Turn("assistant", " So.")
ADD = {"name": "add", "arguments": '{"a": 1}'}
ASKED = {"role": "user", "content": "Why? "}
ANSWERED = {"role": "assistant", "content": " So."}
SAYS, REPLIES = {"from": "human", "value": "Why? "}, {"from": "gpt", "value": " So."}
PAIR = {"instruction": "a", "output": "b"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def message(**fields: Any) -> Row:
    return {"messages": [ASKED | fields]}


def turn(**fields: Any) -> Row:
    return {"conversations": [REPLIES | fields]}


def read(row: Row, told: str = "auto") -> Conversation:
    return recognise([row], "rows.jsonl", told).read(row)


@pytest.mark.parametrize(
    ("columns", "name", "used"),
    [
        (["text"], "text", ["text"]),
        (["content", "id"], "text", ["content"]),
        (["instruction", "input", "output"], "alpaca", ["instruction", "output", "input"]),
        (["instruction", "output"], "alpaca", ["instruction", "output", "input"]),
        (["instruction", "input", "response"], "alpaca", ["instruction", "response", "input"]),
        (["instruction", "context", "response", "category"], "alpaca", ["instruction", "response", "context"]),
        (["prompt", "completion"], "alpaca", ["prompt", "completion", ""]),
        (["prompt", "response"], "alpaca", ["prompt", "response", ""]),
        (["question", "answer"], "alpaca", ["question", "answer", "context"]),
        (["conversations", "source"], "sharegpt", ["conversations"]),
        (["conversation"], "sharegpt", ["conversation"]),
        (["messages", "tools"], "messages", ["messages"]),
    ],
)  # fmt: skip
def test_shapes_are_recognised(columns: list[str], name: str, used: list[str]) -> None:
    rows: list[Row] = [dict.fromkeys(columns, "some text"), {}]
    shape = recognise(rows, "rows", "auto")
    assert (shape.name, list(shape.columns)) == (name, used)
    assert recognise(rows, "rows", name) == shape


def test_marks_make_it_guanaco() -> None:
    marked, some = {"text": "### Human: a### Assistant: b"}, {"text": "A story"}
    inside = {"text": "Below is a chat.\n### Human: a"}
    assert recognise([marked, some], "rows", "auto").name == "guanaco"
    assert recognise([inside, inside], "rows", "auto").name == "guanaco"
    assert recognise([inside, some], "rows", "auto").name == "text"
    assert recognise([marked], "rows", "text") == Shape("text", ("text",))
    assert recognise([some], "rows", "guanaco") == Shape("guanaco", ("text",))


def test_the_told_shape_decides_among_several() -> None:
    row = {
        "messages": [ASKED, ANSWERED],
        "conversations": [],
        "conversation": [],
        "text": "a",
        "prompt": "b",
    }
    with pytest.raises(BadData) as caught:
        recognise([row], "some.jsonl", "auto")
    assert str(caught.value) == (
        "some.jsonl has the columns 'messages', 'conversations', 'conversation', 'text', 'prompt', which fit "
        "messages ('messages') and sharegpt ('conversations') and sharegpt ('conversation') and text ('text'); "
        "choose with SHAPE=messages"
    )
    assert recognise([row], "rows", "messages").columns == ("messages",)
    assert recognise([row], "rows", "sharegpt").columns == ("conversations",)
    assert recognise([row], "rows", "text").columns == ("text",)
    # The two kinds of chat stand in each other's columns.
    assert recognise([{"messages": []}], "rows", "sharegpt") == Shape("sharegpt", ("messages",))


@pytest.mark.parametrize(
    ("columns", "told", "words"),
    [
        (["promt", "completion"], "auto", "no shape; the nearest is alpaca ('prompt', 'completion'): rename"),
        (["Message"], "auto", "the nearest is messages ('messages')"),
        (["texts"], "auto", "the nearest is guanaco or text ('text')"),
        (["text"], "alpaca", "'text', which fit no shape for SHAPE=alpaca; the nearest is"),
        ([], "auto", "has the columns none"),
    ],
)  # fmt: skip
def test_columns_that_fit_no_shape(columns: list[str], told: str, words: str) -> None:
    with pytest.raises(BadData) as caught:
        recognise([dict.fromkeys(columns, "a")], "some.csv", told)
    assert words in str(caught.value)
    assert caught.value.exit_code == 65


def test_columns_that_are_not_read_are_named() -> None:
    rows = [{"instruction": "a", "output": "b", "id": 1}, {"score": 2, "system": "c"}]
    assert recognition.unread(rows, recognise(rows, "rows", "auto")) == ["id", "score"]
    assert recognition.unread([{"text": "a", "tools": "b"}], Shape("text", ("text",))) == ["tools"]


blocks = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), texts.filter(lambda text: not shapes.MARK.search(text))),
    min_size=1, max_size=5,
)  # fmt: skip


@quick(100)
@given(
    blocks, st.just("") | texts.filter(lambda text: text.strip() and not shapes.MARK.search(text))
)
def test_guanaco_turns_are_read_to_the_letter(blocks: list[tuple[str, str]], system: str) -> None:
    """Joined as its authors join them, with one blank behind a mark and nothing before it."""
    marks = {role: mark for mark, role in shapes.MARKS.items()}
    text = (system and system + "\n") + "".join(f"{marks[role]} {said}" for role, said in blocks)
    wanted = [Turn("system", system)] * bool(system) + [Turn(*block) for block in blocks]
    # Two texts may make a mark between them.
    if len(shapes.MARK.findall(text)) == len(blocks):
        assert read({"text": text}, "guanaco").turns == tuple(wanted)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"text": "### Human: Why? ### Assistant:  So."}, (USER, ANSWER)),
        ({"text": "### Human:Why? ### Assistant:  So."}, (USER, ANSWER)),
        ({"text": "Hi\n### Human: Why? ### Assistant:  So."}, (Turn("system", "Hi"), USER, ANSWER)),
        ({"text": " Once upon </s>\n"}, (Turn("text", " Once upon </s>\n"),)),
        ({"instruction": "Why? ", "output": " So."}, (USER, ANSWER)),
        ({"instruction": "Why? ", "input": "a", "output": " So."}, (USER._replace(context="a"), ANSWER)),
        ({"instruction": "Why? ", "context": "a", "response": " So."}, (USER._replace(context="a"), ANSWER)),
        ({"instruction": "Why? ", "output": " So.", "system": "Hi"}, (Turn("system", "Hi"), USER, ANSWER)),
        ({"instruction": "Why? ", "input": None, "output": " So."}, (USER, ANSWER)),
        (
            {"instruction": "Why? ", "output": " So.", "history": [["a", "b"]]},
            (Turn("user", "a"), Turn("assistant", "b"), USER, ANSWER),
        ),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, (USER, ANSWER)),
        ({"question": "Why? ", "answer": " So."}, (USER, ANSWER)),
        ({"messages": [ASKED, ANSWERED]}, (USER, ANSWER)),
        ({"messages": json.dumps([ASKED, ANSWERED])}, (USER, ANSWER)),
        ({"messages": [ASKED, ANSWERED], "system": "Hi"}, (Turn("system", "Hi"), USER, ANSWER)),
        ({"messages": []}, (Turn("user", ""),)),
        ({"messages": ""}, (Turn("user", ""),)),
        ({"conversations": [SAYS, REPLIES]}, (USER, ANSWER)),
        ({"conversations": [ASKED, ANSWERED]}, (USER, ANSWER)),
        ({"messages": [SAYS, REPLIES | {"from": "Model"}]}, (USER, ANSWER)),
    ],
)  # fmt: skip
def test_rows_of_every_shape(row: Row, turns: tuple[Turn, ...]) -> None:
    told = "guanaco" if "### Human" in str(row) else "auto"
    assert read(row, told) == Conversation(turns)


def test_messages_of_openai() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": text} for text in ("Be brief", ".")]},
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": ADD}]},
            {"role": "tool", "name": "add", "content": "3"},
            ANSWERED | {"weight": 0},
            ASKED | {"name": "Ann"},
            {"role": "assistant", "function_call": {"name": "add", "arguments": ""}},
            ANSWERED | {"weight": 1, "tool_calls": None},
        ],
        "tools": '[{"name": "add"}]',
    }  # fmt: skip
    nothing = {"type": "function", "function": {"name": "add", "arguments": {}}}
    assert read(row) == Conversation(
        (
            Turn("system", "Be brief."), USER, Turn("assistant", "", calls=(CALL,)),
            Turn("tool", "3", name="add"), ANSWER._replace(learned=False), USER,
            Turn("assistant", "", calls=(nothing,)), ANSWER,
        ),
        ({"name": "add"},),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"), ("user", "user"), ("prompter", "user"), ("gpt", "assistant"), ("GPT", "assistant"),
        ("assistant", "assistant"), ("bot", "assistant"), ("system", "system"), ("observation", "tool"),
        ("function_response", "tool"), ("tool", "tool"),
    ],
)  # fmt: skip
def test_speakers_of_sharegpt(speaker: str, role: str) -> None:
    row = {"conversations": [{"from": speaker, "value": "a", "weight": 0}]}
    assert read(row).turns == (Turn(role, "a", learned=False),)


def test_calls_of_sharegpt() -> None:
    value = json.dumps({"name": "add", "arguments": {"a": 1}})
    row = {"conversations": [{"from": "function_call", "value": value}], "tools": [{"name": "add"}]}
    assert read(row) == Conversation((Turn("assistant", "", calls=(CALL,)),), ({"name": "add"},))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": 5}, "column 'text' holds a number, not text"),
        ({"text": None}, "column 'text' holds null, not text"),
        (PAIR | {"output": None}, "column 'output' holds null, not text"),
        (PAIR | {"input": 5}, "column 'input' holds a number, not text"),
        (PAIR | {"history": [["a"]]}, "column 'history' does not hold pairs"),
        (PAIR | {"history": 5}, "column 'history' does not hold pairs"),
        ({"messages": None}, "column 'messages' holds null, not a list of messages"),
        (
            {"messages": {"role": "user"}},
            "column 'messages' holds an object, not a list of messages",
        ),
        ({"messages": "Hi"}, "column 'messages' holds text, not a list of messages"),
        ({"messages": "[{]"}, "'messages' holds text that is not the JSON it should be: "),
        ({"messages": r'[{"role": "\ud800"}]'}, "'messages' holds what JSON cannot: "),
        ({"messages": ["Hi"]}, "a message is no text, not an object with 'role' and 'content'"),
        (message(role="judge"), "has the role 'judge'; known are system, user, assistant, tool"),
        (message(role=None), "a message has the role None; known are"),
        (message(content=None), "a message's 'content' holds null, not text"),
        (
            message(content=[{"type": "image"}, {"type": "text", "text": "a"}]),
            "kind image; only text can",
        ),
        (message(content=[{"type": "text"}]), "parts of kind broken"),
        (message(content=["a"]), "parts of kind ?;"),
        (message(tool_calls=[{"id": 1}]), "a tool call has no function name"),
        (message(tool_calls="add"), "a tool call has no function name"),
        (
            message(tool_calls=[{"name": "f", "arguments": "{"}]),
            "'arguments' holds text that is not",
        ),
        (
            message(tool_calls=[{"name": "f", "arguments": [1]}]),
            "arguments are a list, not an object",
        ),
        (
            message(tool_calls=[{"name": "f", "arguments": {"a": b"b"}}]),
            "'arguments' holds what JSON",
        ),
        (message() | {"tools": "add"}, "'tools' holds text that is not the JSON it should be"),
        (message() | {"tools": {"name": "add"}}, "column 'tools' does not hold a list of objects"),
        (message() | {"tools": [{"since": b""}]}, "'tools' holds what JSON cannot: "),
        (turn(**{"from": "judge"}), "a turn is from 'judge'; known are human, user"),
        (turn(value=["a"]), "a turn's 'value' holds a list, not text"),
        (turn(**{"from": "function_call"}), "'value' holds text that is not the JSON"),
    ],
)
def test_misfits_say_why(row: Row, words: str) -> None:
    shape = recognise([row], "rows", "auto")
    with pytest.raises(Misfit) as caught:
        shape.read(row)
    assert words in str(caught.value)


def test_a_row_without_marks_is_a_misfit_among_guanaco() -> None:
    with pytest.raises(Misfit, match=r"column 'text' has no mark \(### Human: or ### Assistant:\)"):
        Shape("guanaco", ("text",)).read({"text": "no marks"})


def test_a_column_that_a_later_row_lacks() -> None:
    shape = recognise([{"instruction": "a", "output": "b"}], "rows", "auto")
    with pytest.raises(
        Misfit, match=r"no column 'output' \(it has 'instruction', 'outputs'\); is it 'outputs'"
    ):
        shape.read({"instruction": "a", "outputs": "b"})
    with pytest.raises(Misfit, match=r"no column 'messages' \(it has none\)"):
        Shape("messages", ("messages",)).read({})


def test_the_same_conversation_in_another_shape_has_the_same_digest() -> None:
    rows: list[Row] = [
        {"text": "### Human: Why? ### Assistant:  So."}, {"instruction": "Why? ", "output": " So."},
        {"messages": [ASKED, ANSWERED]}, {"conversations": [SAYS, REPLIES]},
        {"prompt": "Why? ", "completion": " So."},
    ]  # fmt: skip
    assert len({read(row).digest() for row in rows}) == 1
    others: list[Row] = [
        {"messages": [ASKED, ANSWERED | {"weight": 0}]}, {"messages": [ASKED, ANSWERED], "tools": [{}]},
        {"instruction": "Why? ", "input": "a", "output": " So."}, {"messages": [ANSWERED, ASKED]},
        {"messages": [ASKED, ANSWERED | {"tool_calls": [CALL]}]}, {"text": "Why? \0 So."},
    ]  # fmt: skip
    assert len({read(row).digest() for row in [rows[0], *others]}) == 7
