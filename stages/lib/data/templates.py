"""Chat templates: a conversation as text, and which parts of that text are its turns.

Every chat format is a Jinja template, a base model's own or one of ours, so there is one way of rendering.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from stages.lib.data import sandbox
from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.shapes import Misfit


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    Attributes:
        text: as it stands there. learned: whether the model is to learn to say it.
        id: of the special token that the template put there, else None: then `text` is encoded as plain text.
        ends: whether an answer ends here.
    """

    text: str
    learned: bool
    id: int | None = None
    ends: bool = False


class Slot(NamedTuple):
    """Where a turn's own text goes."""

    turn: int
    field: str
    learned: bool
    ends: bool


# Stand for a turn's text while a template is examined. Unicode calls them noncharacters: no text holds them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{OPEN}(\\d+)(text|context){CLOSE}")
MOST_LAYOUTS = 4096


class Template:
    """A Jinja chat template over a tokenizer's special tokens.

    Args:
        source: the template. name: of it, for messages. date: what it is told of the day, `YYYY-MM-DD`.
        names: `bos_token`, `eos_token` and the like. specials: text and id of each special token.
        learn_all: whether every segment is learned, rather than what the assistant says.
    """

    def __init__(
        self, source: str, name: str, date: str, names: dict[str, str], specials: dict[str, int],
        learn_all: bool,
    ) -> None:  # fmt: skip
        self.source, self.name, self.names, self.specials = source, name, names, specials
        self.learn_all = learn_all
        self._compiled = sandbox.compiled(source, name, date)
        self._words = tuple(sorted(filter(None, specials), key=len, reverse=True))
        either = "|".join(map(re.escape, self._words))
        self._special = re.compile(f"({either})" if either else "(?!)")
        self._layouts: dict[Any, list[Segment | Slot] | str | None] = {}

    def render(
        self, conversation: Conversation, turns: int | None = None, prompt: bool = False
    ) -> str:
        """The text of the first `turns` turns; with `prompt`, and the mark behind which an answer begins.

        Raises:
            Misfit: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        messages = [turn.message() for turn in conversation.turns[:turns]]
        tools = list(conversation.tools) or None
        try:
            return self._compiled(
                {
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": prompt,
                }
                | self.names
            )
        except (TemplateError, TypeError, AttributeError, LookupError, ValueError) as error:
            words = str(error) or type(error).__name__
            raise Misfit(f"the chat template refuses it: {words}") from error

    def segments(self, conversation: Conversation, prompt: bool = False) -> list[Segment]:
        """A conversation's segments; joined, they are the rendered text, to the end of the last answer.

        The learned ones are what the assistant says and the special token that ends it.

        Raises:
            Misfit: the template refuses it, or leaves part of it out.
        """
        turns = conversation.turns
        if not conversation.tools and all(not turn.calls and not turn.name for turn in turns):
            key = (prompt, *((t.role, not t.text, not t.context, t.learned) for t in turns))
            if key not in self._layouts:
                if len(self._layouts) == MOST_LAYOUTS:
                    self._layouts.clear()
                self._layouts[key] = self._examine(conversation, prompt)
            layout = self._layouts[key]
            if isinstance(layout, str):
                raise Misfit(layout)
            if layout is not None:
                found = [_filled(part, turns) for part in layout]
                if "".join(s.text for s in found) == self._whole(conversation, prompt):
                    return found
        return self._unescaped(conversation, prompt)

    def _whole(self, conversation: Conversation, prompt: bool) -> str:
        text = self.render(conversation, prompt=prompt)
        return text if prompt else self._cut_tail(text)

    def _cut_tail(self, text: str) -> str:
        """A text to the end of its last special token, if only blanks follow."""
        bare = text.rstrip()
        return bare if bare.endswith(self._words) else text

    def _without_tail(self, text: str) -> str:
        """A text to the last thing in it that is neither blank nor a special token."""
        text = text.rstrip()
        while text.endswith(self._words):
            word = next(word for word in self._words if text.endswith(word))
            text = text[: -len(word)].rstrip()
        return text

    def _examine(
        self, conversation: Conversation, prompt: bool
    ) -> list[Segment | Slot] | str | None:
        """Where the turns' texts go in any conversation of the same roles.

        Returns:
            None where the template does more with a text than put it there; the reason, where it refuses.
        """
        marked = []
        for number, turn in enumerate(conversation.turns):
            text, context = (f"{OPEN}{number}{field}{CLOSE}" for field in ("text", "context"))
            marked.append(turn._replace(text=turn.text and text, context=turn.context and context))
        wanted = [
            (n, f) for n, turn in enumerate(marked) for f in ("text", "context") if getattr(turn, f)
        ]
        try:
            segments = self._lay_out(Conversation(tuple(marked)), prompt)
        except Misfit as reason:
            # What is refused with marks for texts may be fine with the texts themselves.
            try:
                self.render(conversation, prompt=prompt)
            except Misfit:
                return str(reason)
            return None
        parts = [part for segment in segments for part in _slots(segment)]
        slots = sorted((part.turn, part.field) for part in parts if isinstance(part, Slot))
        lost = {number for number, _ in set(wanted) - set(slots)}
        if lost:
            role = conversation.turns[min(lost)].role
            return f"the chat template leaves out what a {role} turn says"
        return parts if slots == sorted(wanted) else None

    def _unescaped(self, conversation: Conversation, prompt: bool) -> list[Segment]:
        """The segments of a conversation whose texts the template alters or looks into."""
        words = [word for word in self.specials if _mentions(conversation, word)]
        if _mentions(conversation, OPEN):
            raise Misfit(f"it holds U+{ord(OPEN):04X}, which is no character")
        stand_ins = {word: f"{OPEN}{number}text{CLOSE}" for number, word in enumerate(words)}
        segments = self._lay_out(_replaced(conversation, stand_ins), prompt)
        if not words:
            return segments
        return [
            s._replace(text=MARK.sub(lambda found: words[int(found[1])], s.text)) for s in segments
        ]

    def _lay_out(self, conversation: Conversation, prompt: bool) -> list[Segment]:
        """The segments of a conversation in whose texts nothing looks like a special token."""
        text = self.render(conversation, prompt=prompt)
        answers = []
        for number, turn in enumerate(conversation.turns):
            if turn.role == "assistant":
                answers.append((*self._answer(conversation, number, text, prompt), turn.learned))
        if not prompt:
            text = self._cut_tail(text)
        found: list[Segment] = []
        position = 0
        for start, end, learned in answers:
            end = min(end, len(text))
            found += self._split(text[position:start], self.learn_all)
            said = self._split(text[start:end], self.learn_all or learned)
            if said:
                said[-1] = said[-1]._replace(ends=True)
            found += said
            position = end
        return found + self._split(text[position:], self.learn_all)

    def _answer(
        self, conversation: Conversation, number: int, text: str, prompt: bool
    ) -> tuple[int, int]:
        """Where answer `number` begins and ends in the rendered text of the whole conversation."""
        head = self._head(conversation, number, text, prompt)
        upto = self.render(conversation, number + 1)
        body = self._without_tail(upto)
        if not text.startswith(body) or len(body) < len(head):
            body = text[: self._end(conversation, number, text, prompt)]
        if text.startswith(upto) and not self._special.search(upto[len(body) :]):
            return len(head), len(upto)  # a mark in plain text, which no special token closes
        end = re.compile(r"\s*" + self._special.pattern).match(text, len(body))
        return len(head), end.end() if end else len(body)

    def _head(self, conversation: Conversation, number: int, text: str, prompt: bool) -> str:
        """What precedes an answer: the prompt for it."""
        if number:
            head = self.render(conversation, number, prompt=True)
        else:  # nothing was asked, and templates differ in what they make of nothing
            head, _ = self._around(conversation, number, prompt)
        if not text.startswith(head):
            raise Misfit(
                "the chat template writes what precedes an answer otherwise than the prompt for it"
            )
        return head

    def _end(self, conversation: Conversation, number: int, text: str, prompt: bool) -> int:
        """Where an answer ends that the template writes otherwise once more follows: where that begins."""
        _, rest = self._around(conversation, number, prompt)
        if not text.endswith(rest):
            raise Misfit("the chat template does not let one tell where an answer ends")
        return len(text) - len(rest)

    def _around(self, conversation: Conversation, number: int, prompt: bool) -> tuple[str, str]:
        """What stands before and behind a turn's text."""
        turns = list(conversation.turns)
        turns[number] = turns[number]._replace(text=OPEN + CLOSE, calls=())
        changed = self.render(conversation._replace(turns=tuple(turns)), prompt=prompt)
        before, mark, behind = changed.partition(OPEN + CLOSE)
        if not mark:
            raise Misfit(f"the chat template leaves out what a {turns[number].role} turn says")
        return before, behind

    def _split(self, text: str, learned: bool) -> list[Segment]:
        """Text with its special tokens apart."""
        pieces = self._special.split(text) if text else []
        return [Segment(p, learned, self.specials.get(p)) for p in pieces if p]


def _filled(part: Segment | Slot, turns: Sequence[Turn]) -> Segment:
    if isinstance(part, Segment):
        return part
    turn = turns[part.turn]
    text = turn.text if part.field == "text" else turn.context
    return Segment(text, part.learned, None, part.ends)


def _slots(segment: Segment) -> list[Segment | Slot]:
    if segment.id is not None or OPEN not in segment.text:
        return [segment]
    found: list[Segment | Slot] = []
    pieces = MARK.split(segment.text)  # text, turn, field, text, ...
    for index in range(0, len(pieces), 3):
        if pieces[index]:
            found.append(Segment(pieces[index], segment.learned))
        if index + 2 < len(pieces):
            found.append(Slot(int(pieces[index + 1]), pieces[index + 2], segment.learned, False))
    if found:
        found[-1] = found[-1]._replace(ends=segment.ends)
    return found


def _mentions(conversation: Conversation, word: str) -> bool:
    return word in json.dumps(conversation.dumps(), ensure_ascii=False).replace('\\"', '"')


def _replaced(conversation: Conversation, words: dict[str, str]) -> Conversation:
    """The conversation with some words replaced wherever they stand, in calls and tools too."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            for word, stand_in in words.items():
                value = value.replace(word, stand_in)
        elif isinstance(value, Turn):
            return Turn(value.role, *map(walk, value[1:]))
        elif isinstance(value, (list, tuple)):
            return type(value)(map(walk, value))
        elif isinstance(value, dict):
            return {walk(key): walk(entry) for key, entry in value.items()}
        return value

    return (
        Conversation(walk(conversation.turns), walk(conversation.tools)) if words else conversation
    )
