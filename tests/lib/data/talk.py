"""Conversations of every kind, and what each chat format must make of them, apart from what the code says."""

import json
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.formats import Format, _source
from stages.lib.data.shapes import parse_guanaco
from stages.lib.data.tokens import Tokens
from tests.conftest import REAL_ROWS

DATE = "2024-02-29"
ZEPHYR = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FORMATS = ("guanaco", "alpaca", "chatml", "llama2", "tokenizer", "zephyr.jinja")
# Texts that look like what a format or a tokenizer puts there itself, blanks, and more than one code point.
TRAPS = (
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "<0x0A>", "[INST]", " [/INST] ",
    "<<SYS>>", "### Human:", "### Assistant:", "### Response:\n", "\ufdd0", "\ufdd00text\ufdd1", "{{ x }}",
    "{%",
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "e\u0301", "👩‍👩‍👧", "日本語", "<think>\n", "</think>\n",
    "\\n", '"',
)  # fmt: skip
QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def quick(examples: int) -> settings:
    return settings(max_examples=examples, **QUICK)


# SmolLM2 has no tokens for some control characters and for the bytes of planes that Unicode does not use; a
# SentencePiece model writes a blank as U+2581, so that it cannot tell the two apart.
characters = st.characters(
    exclude_categories=("Cs", "Cn"), exclude_characters="\4\6\x13\x14\x16\x1d▁"
)
pieces = st.sampled_from(TRAPS) | st.text(characters, max_size=12)
texts = st.lists(pieces, max_size=5).map("".join)
said = texts.filter(str.strip)
questions = st.tuples(texts, st.just("") | texts).map(lambda given: Turn("user", *given))
answers = said.map(lambda text: Turn("assistant", text))
unlearned = answers.map(lambda turn: turn._replace(learned=False))


@st.composite
def conversations(draw: st.DrawFn, most: int = 4) -> Conversation:
    """Mostly a question and its answer in turn, sometimes two of the same side; the last answer is learned."""
    turns = [Turn("system", draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, most)) - 1):
        turns += draw(st.sampled_from([1, 1, 1, 2])) * [draw(questions)]
        turns.append(draw(answers | unlearned))
    return Conversation((*turns, draw(questions), draw(answers)))


def make(
    name: str, tokens: Tokens, loss_on: str = "assistant", source: str | None = None
) -> Format:
    """A chat format by its name; a name that ends in `.jinja` has its `source`."""
    if name == "zephyr.jinja":
        source = ZEPHYR
    return Format(name, source or _source(name, tokens), tokens, loss_on, DATE)


def closing(form: Format) -> tuple[str, str, str]:
    """What an answer begins with, what ends it, and what ends the last one besides."""
    eos = form.tokens.names["eos_token"]
    has_marks = "<|im_end|>" in form.tokens.specials
    return {
        "guanaco": (" ", "", eos),
        "alpaca": ("", eos, ""),
        "chatml": ("", "<|im_end|>", "") if has_marks else ("", "<|im_end|>\n", eos),
        "llama2": (" ", " " + eos, ""),
        "tokenizer": ("", "<|im_end|>", ""),
        "zephyr.jinja": ("", eos, ""),
    }[form.name]


def trainable(form: Format, conversation: Conversation) -> str:
    """All that is to be learned of a conversation with LOSS_ON=assistant."""
    before, behind, last = closing(form)
    told = [turn.text for turn in conversation.turns if turn.role == "assistant" and turn.learned]
    return "".join(before + text + behind for text in told) + last


def stops(form: Format, conversation: Conversation) -> int:
    """How many stop tokens a row has: one for each answer, or only one."""
    answers = sum(turn.role == "assistant" for turn in conversation.turns)
    if form.name in ("chatml", "tokenizer") and "<|im_end|>" in form.tokens.specials:
        own = form.name == "tokenizer" and conversation.turns[0].role != "system"
        return len(conversation.turns) + own
    if form.name == "zephyr.jinja":
        return len(conversation.turns)
    return 1 if form.name in ("guanaco", "chatml") else answers


def learned_text(tokens: Tokens, ids: Iterable[int], mask: Iterable[bool]) -> str:
    """The text of what is learned, special tokens included."""
    found = tokens.pieces([int(i) for i in ids], [bool(m) for m in mask])
    return "".join(text for text, learned, _ in found if learned)


def own_ids(tokens: Tokens, text: str) -> list[int]:
    """What the tokenizer itself makes of a text in which special tokens are special."""
    before, tokens.backend.encode_special_tokens = tokens.backend.encode_special_tokens, False
    ids = tokens.backend.encode(text, add_special_tokens=False).ids
    tokens.backend.encode_special_tokens = before
    return list(ids)


def real_texts() -> list[str]:
    """The 853 real conversations as their rows have them."""
    if not REAL_ROWS.is_file():
        pytest.skip(f"{REAL_ROWS} is absent: the real conversations are not tested")
    with REAL_ROWS.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def real_conversations() -> list[Conversation]:
    """The same as conversations, without what nobody answers."""
    found = []
    for text in real_texts():
        turns = parse_guanaco(text)
        while turns and turns[-1].role != "assistant":
            turns = turns[:-1]
        if turns and all(turn.text.strip() for turn in turns if turn.role == "assistant"):
            found.append(Conversation(turns))
    assert len(found) > 800
    return found
