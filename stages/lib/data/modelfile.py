"""Ollama's Modelfile: a chat format as a Go template, where one of ours renders the same."""

import json
from collections.abc import Sequence
from pathlib import Path

from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.formats import FOLDER, OURS, TEXT, Format
from stages.lib.data.shapes import Misfit

FILE = "Modelfile"
SYSTEM = Turn("system", " Be brief. ")
ASKED, ANSWERED = Turn("user", " What is\n\n2 + 2? "), Turn("assistant", " 4.\n")
THOUGHT = Turn("assistant", "<think>\nHm.\n</think>\n\nThat is so.")
# Blanks at the edges, a thought, turns in and out of order: what templates alter, and a Go template would not.
GOLDEN = tuple(
    Conversation(turns)
    for turns in (
        (ASKED,), (SYSTEM, ASKED), (ASKED, ANSWERED, ASKED), (SYSTEM, ASKED, ANSWERED, ASKED),
        (ASKED, THOUGHT, Turn("user", "Why?"), ANSWERED, ASKED), (SYSTEM, ASKED, ANSWERED),
    )
)  # fmt: skip
CHATML = ("<|im_start|>system\n", "<|im_end|>\n")


def template(chat_format: Format) -> str | None:
    """The Go template that renders the prompts of a chat format, or None where there is none here.

    It leaves out the BOS that llama.cpp puts first by itself.
    """
    if chat_format.source is None:
        return _written(TEXT, chat_format, "")
    for name in OURS:
        ours = _ours(name, chat_format)
        system = _default_system(chat_format, ours) if name == "chatml" else ""
        if ours and system is not None and _alike(chat_format, ours, system):
            return _written(name, chat_format, system)
    return None


def _ours(name: str, like: Format) -> Format | None:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    try:
        return Format(name, source, like.tokens, like.loss_on, like.date)
    except Misfit:  # over these special tokens it can write nothing
        return None


def _alike(one: Format, other: Format, system: str) -> bool:
    """Whether both write all of GOLDEN the same, the other one with a system turn where none is said."""
    for asked in GOLDEN:
        told = asked
        if system and asked.turns[0].role != "system":
            told = Conversation((Turn("system", system), *asked.turns))
        try:
            same = _text(one, asked) == _text(other, told)
        except Misfit:
            return False
        if not same:
            return False
    return True


def _default_system(one: Format, chatml: Format | None) -> str | None:
    """What a format like ChatML says where no system turn is there; None where it is not like it."""
    if chatml is None:
        return None
    whole, rest = _text(one, GOLDEN[0]), _text(chatml, GOLDEN[0])
    begin, end = CHATML
    if whole == rest:
        return ""
    inside = whole.startswith(begin) and whole.endswith(end + rest)
    return whole.removeprefix(begin).removesuffix(end + rest) if inside else None


def _text(chat_format: Format, asked: Conversation) -> str:
    text, tokens = chat_format.prompt_text(asked), chat_format.tokens
    return text if tokens.bos is None else text.removeprefix(tokens.names["bos_token"])


def _written(name: str, chat_format: Format, system: str) -> str:
    source = (FOLDER / f"{name}.gotmpl").read_text(encoding="utf-8").removesuffix("\n")
    given = {"eos": chat_format.tokens.names["eos_token"], "system": system}
    words = {key: json.dumps(value, ensure_ascii=False) for key, value in given.items()}
    return "".join(f"{{{{- ${key} := {word} }}}}" for key, word in words.items()) + source


def write(chat_format: Format, weights: str, folder: Path) -> list[str]:
    """Write a Modelfile, where there is a template for one.

    Args:
        weights: the GGUF file that will lie beside it.

    Returns:
        What else there is to know, one sentence each.
    """
    found, remarks = template(chat_format), []
    if found is None or '"""' in found:
        remarks.append(
            f"there is no Modelfile: no Go template known here writes what the chat format {chat_format.name} "
            "writes; llama.cpp itself uses the chat template that the file holds"
        )
    else:
        text = content(found, stops(chat_format), weights)
        (folder / FILE).write_text(text, encoding="utf-8")
    for stop in chat_format.stops.texts:
        remarks.append(
            f"an answer ends before {stop!r}, which a GGUF file cannot say: the Modelfile does, llama.cpp "
            f"has to be told with --reverse-prompt {stop!r}"
        )
    return remarks


def content(go_template: str, stops: Sequence[str], weights: str) -> str:
    """A Modelfile.

    Args:
        stops: texts that end an answer. weights: the GGUF file beside it.
    """
    lines = [f"FROM ./{weights}", f'TEMPLATE """{go_template}"""']
    lines += [f'PARAMETER stop """{stop}"""' for stop in stops]
    return "\n".join(lines) + "\n"


def stops(chat_format: Format) -> list[str]:
    """What ends an answer, as texts: first what the model says, then the special tokens."""
    tokens = chat_format.tokens
    return [
        *chat_format.stops.texts,
        *(tokens.backend.id_to_token(i) for i in chat_format.stops.ids),
    ]
