"""What is asked, from a prompt or the lines of a file, and how a bad line is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib.data import prompts
from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.formats import Format
from stages.lib.data.talk import Talk
from stages.lib.data.tokens import Tokens
from stages.lib.run.exits import BadData, BadSetting, Missing

USER, SYSTEM = Turn("user", "Why?"), Turn("system", "Be brief.")


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "asked.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text), encoding="utf-8-sig")
    return path


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize(
    ("line", "turns"),
    [
        ({"prompt": "Why?"}, [SYSTEM, USER]),
        ({"prompt": "Why?", "system": None}, [SYSTEM, USER]),
        ({"prompt": "Why?", "system": "Be long."}, [Turn("system", "Be long."), USER]),
        ({"prompt": "Why?", "system": ""}, [USER]),
        ({"messages": messages(("user", "Why?"))}, [SYSTEM, USER]),
        ({"prompt": messages(("user", "Why?"))}, [SYSTEM, USER]),
        ({"messages": messages(("user", "Why?")), "system": ""}, [USER]),
        ({"messages": messages(("system", "Own."), ("user", "Why?"))}, [Turn("system", "Own."), USER]),
    ],
)  # fmt: skip
def test_what_stands_before_a_prompt(tmp_path: Path, line: Any, turns: list[Turn]) -> None:
    (one,) = prompts.read(None, written(tmp_path, line), "Be brief.")
    assert one.said == Conversation(tuple(turns))


@pytest.mark.case("H3")
@pytest.mark.parametrize("name", ["asked.txt", "asked.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, name: str) -> None:
    line = "Why?" if name.endswith("txt") else '{"prompt": "Why?"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    (one,) = prompts.read(None, tmp_path / name, None)
    assert one.said == Conversation((USER,))


@pytest.mark.case("H1")
@pytest.mark.parametrize("asked", ["", " ", "\n\t"])
def test_an_empty_prompt_is_none(asked: str) -> None:
    with pytest.raises(BadSetting, match="nothing is asked"):
        prompts.read(asked, None, None)


def test_a_line_keeps_its_place_and_id(tmp_path: Path) -> None:
    asked = prompts.read(
        None, written(tmp_path, {"prompt": "a", "id": [1], "more": 2}, "", {"prompt": "b"}), None
    )
    assert [one.where.rpartition(":")[2] for one in asked] == ["1", "3"]
    assert [one.shown for one in asked] == [
        {"number": 0, "id": [1], "prompt": "a"}, {"number": 1, "prompt": "b"},
    ]  # fmt: skip
    again = prompts.read(None, written(tmp_path, {"prompt": "a", "id": [2]}, {"prompt": "b"}), None)
    assert prompts.digest(again) != prompts.digest(asked)


def test_a_tool_may_be_the_last_to_speak(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    turns = [*messages(("user", "Why?")), call, *messages(("tool", "42"))]
    (one,) = prompts.read(
        None, written(tmp_path, {"messages": turns, "tools": [{"name": "f"}]}), None
    )
    assert [turn.role for turn in one.said.turns] == ["user", "assistant", "tool"]
    assert one.said.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("[1]", "a JSON array, not an object"), ('{"prompt": "a"', "middle of this row"),
        ('{"prompt": "a", "prompt": "b"}', "twice"), ('{"prompt": "\\ud800"}', "surrogate"),
        ({"prompt": "a", "messages": []}, "has both"), ({"text": "a"}, "has neither"),
        ({"prompt": 7}, "no text"), ({"prompt": "a", "system": 7}, "`system`"),
        ({"messages": "a"}, "holds text, not a list"), ({"messages": []}, "empty turn"),
        ({"messages": messages(("user", "a"), ("assistant", "b"))}, "turn of the assistant"),
        ({"messages": messages(("user", " "))}, "empty turn"),
        ({"messages": messages(("pope", "a"))}, "the role 'pope'"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: Any, word: str) -> None:
    path = written(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(BadData, match=rf"asked\.jsonl:2\b.*{word}"):
        prompts.read(None, path, None)


def test_no_file_and_no_unicode(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no prompts file"):
        prompts.read(None, tmp_path / "none", None)
    with pytest.raises(BadSetting, match="SYSTEM is not UTF-8"):
        prompts.read("a", None, "\udcff")


def test_a_format_that_cannot_write_it_names_the_line(tmp_path: Path, tiny: Path) -> None:
    said = "{{ raise_exception('no cats') if 'cat' in m.content else m.content }}"
    source = f"{{% for m in messages %}}{said}{{% endfor %}}"
    picky = Format("picky", source, Tokens(tiny), "all", "2026-01-01")
    fine, bad = prompts.read(None, written(tmp_path, {"prompt": "dog"}, {"prompt": "cat"}), None)
    assert fine.ids(picky)
    with pytest.raises(BadData, match=r"asked\.jsonl:2 cannot be written as picky.*no cats"):
        bad.ids(picky)


def test_a_talk_keeps_pairs_as_far_as_they_fit(tiny: Path) -> None:
    source = (Path(prompts.__file__).parent / "chat_formats" / "guanaco.jinja").read_text()
    chat_format = Format("guanaco", source, Tokens(tiny), "all", "2026-01-01")
    talk = Talk(chat_format, None, "Be brief.")
    for number in range(3):
        ids = talk.ask(f"Question {number}")
        talk.answered(f"Question {number}", f"Answer {number}")
    talk.answered("Unheard", " ")
    assert [turn.text for turn in talk.turns[:2]] == ["Question 0", "Answer 0"]
    assert len(talk.turns) == 6
    talk.room = len(ids)
    again = talk.ask("Question 3")
    assert talk.dropped == 1
    assert talk.turns[0].text == "Question 1"
    assert len(again) == len(ids)
    talk.room = 3
    with pytest.raises(BadData, match="3 are left beside MAX_NEW_TOKENS"):
        talk.ask("Question 4")
    assert len(talk.turns) == 4  # nothing is forgotten for a question that is not asked
    talk.reset()
    assert not talk.turns
