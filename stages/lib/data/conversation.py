"""What a conversation is, and how it becomes text: the one rendering that all stages share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

GUANACO = "guanaco"
MARKS = {"user": "### Human:", "assistant": "### Assistant:"}
ROLES = {mark: role for role, mark in MARKS.items()}
MARK = re.compile("(" + "|".join(map(re.escape, ROLES)) + ")")


@dataclass(frozen=True)
class Turn:
    """What one side said. `text` is kept to the letter, with the space behind the mark.

    `role` is `system`, `user` or `assistant`.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text, and whether the model is to learn to say it."""

    text: str
    trained: bool


def parse(text: str) -> list[Turn]:
    """The turns of a guanaco `text`; what stands before the first mark is the system turn."""
    first, *rest = MARK.split(text)
    turns = [Turn("system", first)] if first else []
    return turns + [
        Turn(ROLES[mark], said) for mark, said in zip(rest[::2], rest[1::2], strict=True)
    ]


def render(turns: Sequence[Turn], loss_on: str) -> list[Segment]:
    """The segments of a whole conversation; joined, they are the row's text to the letter.

    Args:
        loss_on: `assistant` trains what the assistant says, `all` everything.
    """
    segments = []
    for turn in turns:
        mark = MARKS.get(turn.role, "")
        if mark:
            segments.append(Segment(mark, loss_on == "all"))
        segments.append(Segment(turn.text, loss_on == "all" or turn.role == "assistant"))
    return segments


def render_prompt(turns: Sequence[Turn]) -> str:
    """The text that the model is to continue: the conversation so far and the assistant's mark."""
    return "".join(segment.text for segment in render(turns, "all")) + MARKS["assistant"]


def ask(prompt: str, system: str = "") -> list[Turn]:
    """The conversation that a single prompt opens."""
    opening = [Turn("system", system)] if system else []
    return [*opening, Turn("user", f" {prompt}")]


# Rendered and tokenised with the data, and compared wherever the adapter is used.
GOLDEN = [
    Turn("system", "Be brief.\n"),
    Turn("user", " What is 2 + 2?"),
    Turn("assistant", " 4"),
    Turn("user", " Why?"),
]


def stops() -> tuple[str, ...]:
    """Texts at which an answer is over, beside EOS: the next turn's mark."""
    return (MARKS["user"],)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded at all; JSON may hold half a surrogate pair, a shell any byte."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
