"""What a conversation is: the one form that every shape of row becomes, and every chat format renders."""

import hashlib
import json
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")


class Turn(NamedTuple):
    """What one side said.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`; `text` for plain text that is no conversation.
        text: what was said, without marks and without the blank that a format puts behind its mark.
        context: what a question is about, where a row holds it apart (Alpaca's `input`).
        calls: an assistant's tool calls, as chat templates read them. name: of the tool that answers.
        learned: False for an answer that is not to be learned (OpenAI's `weight` 0).
    """

    role: str
    text: str
    context: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    learned: bool = True

    def message(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        found: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.context:
            found["context"] = self.context
        if self.calls:
            found["tool_calls"] = list(self.calls)
        if self.name:
            found["name"] = self.name
        return found


class Conversation(NamedTuple):
    """Turns in order, and the tools that the assistant may call, as JSON schemas."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def digest(self) -> bytes:
        """16 bytes that identify the contents, whatever shape they were read from."""
        parts = [part for turn in self.turns for part in turn[:3]]
        if self.tools or any(turn[3:] != ((), "", True) for turn in self.turns):
            rest = [turn[3:] for turn in self.turns]
            parts.append(json.dumps([rest, self.tools], sort_keys=True))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()

    def dumps(self) -> dict[str, Any]:
        """As JSON holds it; `loads` reads it back."""
        weights = [{} if turn.learned else {"weight": 0} for turn in self.turns]
        messages = [
            turn.message() | weight for turn, weight in zip(self.turns, weights, strict=True)
        ]
        return {"messages": messages, "tools": list(self.tools)}


def loads(stored: dict[str, Any]) -> Conversation:
    """The conversation that `Conversation.dumps` gave; other keys are passed over."""
    turns = [
        Turn(
            entry["role"], entry["content"], entry.get("context", ""),
            tuple(entry.get("tool_calls", ())), entry.get("name", ""), entry.get("weight") != 0,
        )
        for entry in stored["messages"]
    ]  # fmt: skip
    return Conversation(tuple(turns), tuple(stored["tools"]))


def ask(prompt: str, system: str = "") -> Conversation:
    """The conversation that a single prompt opens."""
    opening = (Turn("system", system),) if system else ()
    return Conversation((*opening, Turn("user", prompt)))


def is_plain(conversation: Conversation) -> bool:
    """Whether it is text to continue, rather than a conversation."""
    return conversation.turns[0].role == "text"


def without_tools(conversation: Conversation) -> Conversation:
    """The same for a format that knows no tools: calls are JSON that is said, results what the user says."""
    turns = []
    for turn in conversation.turns:
        said = [turn.text] if turn.text else []
        said += [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.calls]
        role = "user" if turn.role == "tool" else turn.role
        turns.append(Turn(role, "\n".join(said), turn.context, learned=turn.learned))
    if conversation.tools:
        listed = json.dumps(list(conversation.tools), ensure_ascii=False)
        own = turns.pop(0).text + "\n" if turns[0].role == "system" else ""
        turns.insert(0, Turn("system", f"{own}Tools: {listed}"))
    return Conversation(tuple(turns))


def with_folded_system(conversation: Conversation) -> Conversation:
    """The same for a format that refuses a system turn: it stands before what the user says first."""
    first, *rest = conversation.turns
    if first.role != "system":
        return conversation
    if rest and rest[0].role == "user":
        rest[0] = rest[0]._replace(text=f"{first.text}\n\n{rest[0].text}")
    else:
        rest.insert(0, Turn("user", first.text))
    return conversation._replace(turns=tuple(rest))


def with_folded_context(conversation: Conversation) -> Conversation:
    """The same for a format that knows no context: it stands behind what is asked."""
    turns = [
        turn._replace(text=f"{turn.text}\n{turn.context}", context="") if turn.context else turn
        for turn in conversation.turns
    ]
    return conversation._replace(turns=tuple(turns))


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded at all; JSON may hold half a character, a shell any byte."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
