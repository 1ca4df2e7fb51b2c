"""Templates as models ship them: the text that transformers writes, and which part of it is an answer."""

import datetime
from typing import Any

import pytest
from hypothesis import assume, given

from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.formats import Format
from stages.lib.data.shapes import Misfit
from tests.lib.conftest import Tokenizers
from tests.lib.data import chat_templates as written
from tests.lib.data.talk import (
    conversations,
    learned_text,
    make,
    own_ids,
    quick,
    real_conversations,
)

END = "<|im_end|>"
SYSTEM = Turn("system", "Be brief. ")
CALL = {
    "type": "function",
    "function": {"name": "find", "arguments": {"what": "<|im_end|> or </tool_call>"}},
}
TOOLS = ({"type": "function", "function": {"name": "find", "description": "<|im_start|>"}},)


def user(text: str) -> Turn:
    return Turn("user", text)


def said(text: str, *calls: dict[str, Any], learned: bool = True) -> Turn:
    return Turn("assistant", text, calls=calls, learned=learned)


CHAT = Conversation((user("What? "), said(" So <|im_end|>.\n"), user("Why?"), said("Because.")))
TOOL_CHAT = Conversation(
    (
        SYSTEM, user("Where is it?"), said("", CALL), Turn("tool", "here <|im_end|>", name="find"),
        said("Here."), user("And that?"), said("", CALL), Turn("tool", "there"), said("There. "),
    ),
    TOOLS,
)  # fmt: skip


@pytest.fixture
def form(request: pytest.FixtureRequest, tokenizers: Tokenizers) -> Format:
    source = getattr(written, request.param)
    return make(f"{request.param}.jinja", tokenizers("embedded"), "assistant", source)


def of(*names: str) -> Any:
    return pytest.mark.parametrize("form", names, indirect=True)


def learned(form: Format, conversation: Conversation) -> str:
    """What is learned of it; each prompt is where the row goes on with an answer."""
    encoded = form.tokens.encode([form.segments(conversation)])
    ids, mask = encoded.row(0)
    for number, turn in enumerate(conversation.turns):
        if turn.role == "assistant" and turn.learned:
            prompt = form.prompt(conversation._replace(turns=conversation.turns[:number]))
            assert prompt == ids[: len(prompt)].tolist()
            assert mask[len(prompt)]
    assert mask[-1]
    assert ids[-1] in form.stops.ids
    told = sum(turn.role == "assistant" and turn.learned for turn in conversation.turns)
    assert sum(mask[end - 1] for end in encoded.ends[0]) == told
    return learned_text(form.tokens, ids, mask)


def theirs(form: Format, conversation: Conversation, prompt: bool = False) -> str:
    """What transformers makes of it."""
    messages = [turn.message() for turn in conversation.turns]
    text = form.tokens.fast.apply_chat_template(
        messages, chat_template=form.source, tools=list(conversation.tools) or None, tokenize=False,
        add_generation_prompt=prompt,
    )  # fmt: skip
    return str(text).replace(f"{datetime.date.today():%d %b %Y}", "29 Feb 2024")


@of("GEMMA", "STRIPS")
def test_contents_that_are_trimmed(form: Format) -> None:
    assert learned(form, CHAT) == f"So <|im_end|>.{END}Because.{END}"
    text = "".join(segment.text for segment in form.segments(CHAT))
    assert theirs(form, CHAT) == text + "\n"


@of("GEMMA")
def test_a_system_turn_that_is_refused_becomes_part_of_the_question(form: Format) -> None:
    assert form.folds_system
    text = form.prompt_text(Conversation((SYSTEM, *CHAT.turns[:1])))
    assert (
        text == "<|endoftext|><|im_start|>user\nBe brief. \n\nWhat?<|im_end|>\n<|im_start|>model\n"
    )
    # Where nobody asks, it is what the user says.
    assert "user\nBe brief.<" in form.prompt_text(
        Conversation((SYSTEM, said("Yes."), user("Why?")))
    )


@of("MISTRAL", "GEMMA")
def test_roles_that_do_not_alternate_are_a_misfit(form: Format) -> None:
    assert learned(form, CHAT).endswith(END)
    for turns in (
        (said("a"),),
        (user("a"), user("b"), said("c")),
        (user("a"), said("b"), said("c")),
    ):
        with pytest.raises(Misfit, match="roles must alternate"):
            form.segments(Conversation(turns))


@of("MISTRAL")
def test_an_answer_begins_where_the_prompt_ends(form: Format) -> None:
    assert not form.folds_system
    assert (
        learned(form, Conversation((SYSTEM, *CHAT.turns)))
        == f"  So <|im_end|>.\n{END} Because.{END}"
    )


@of("QWEN3")
def test_reasoning_that_is_dropped_from_earlier_answers(form: Format) -> None:
    """As Qwen3 does it: what the row holds of an answer is learned, and not a character of what follows."""
    thought = "<think>\nA long thought, longer than the question that follows it.\n</think>\n\n"
    turns = (user("One?"), said(f"{thought}First."), user("Two?"), said(f"{thought}Second."))
    assert learned(form, Conversation(turns)) == f"First.{END}{thought}Second.{END}"
    bare = (user("One?"), said("First."), user("<|im_end|>"), said("Second."))
    assert learned(form, Conversation(bare)) == f"First.{END}<think>\n\n</think>\n\nSecond.{END}"
    # Without a learned answer in the middle too.
    some = (turns[0], turns[1]._replace(learned=False), *turns[2:])
    assert learned(form, Conversation(some)) == f"{thought}Second.{END}"
    assert form.stops.texts == ()


@of("QWEN3")
def test_calls_of_tools_are_learned(form: Format) -> None:
    assert form.knows_tools
    call = '<tool_call>\n{"name": "find", "arguments": {"what": "<|im_end|> or </tool_call>"}}\n</tool_call>'
    empty = "<think>\n\n</think>\n\n"
    assert learned(form, TOOL_CHAT) == f"{call}{END}Here.{END}{call}{END}{empty}There. {END}"


@of("LLAMA3")
def test_calls_of_tools_and_the_date(form: Format) -> None:
    call = '{"name": "find", "parameters": {"what": "<|im_end|> or </tool_call>"}}'
    assert learned(form, TOOL_CHAT) == f"{call}{END}Here.{END}{call}{END}There.{END}"
    text = "".join(segment.text for segment in form.segments(TOOL_CHAT))
    assert "Today Date: 29 Feb 2024\n" in text
    assert '"description": "<|im_start|>"' in text
    # Special tokens are the template's own: one begin and one end of each turn, and none of the lookalikes.
    ids = form.tokens.encode([form.segments(TOOL_CHAT)]).ids.tolist()
    assert ids.count(1) == ids.count(2) == len(TOOL_CHAT.turns)
    two = Conversation((user("a"), said("", CALL, CALL)))
    with pytest.raises(Misfit, match="only supports single tool-calls at once"):
        form.segments(two)


@of("GENERATION")
def test_marks_of_generation_are_understood(form: Format) -> None:
    assert learned(form, CHAT) == f" So <|im_end|>.\n{END}Because.{END}"


@of("NO_EOS")
def test_a_template_without_any_eos(form: Format) -> None:
    """The mark behind an answer is learned with it, and EOS put behind the last."""
    assert learned(form, CHAT) == f"  So <|im_end|>.\n\n\n Because.\n\n{END}"
    assert form.stops.texts == ("USER:",)
    assert form.tokens.encode([form.segments(CHAT)]).ids.tolist().count(form.tokens.eos) == 1


@of("AT_THE_END")
def test_something_at_the_very_end(form: Format) -> None:
    assert learned(form, CHAT) == f"  So <|im_end|>.\n Because.\n\nFIN{END}"


TOLD = ("GEMMA", "MISTRAL", "QWEN3", "LLAMA3", "GENERATION", "NO_EOS", "AT_THE_END", "STRIPS")


@of(*TOLD)
@quick(20)
@given(conversations(3))
def test_the_text_is_what_transformers_writes(form: Format, said: Conversation) -> None:
    """Whatever the texts hold; what is left out is blank, and behind the last answer."""
    own = [turn._replace(context="") for turn in said.turns if turn.role != "system"]
    said = Conversation(
        tuple(turn for n, turn in enumerate(own) if n == 0 or own[n - 1].role != turn.role)
    )
    assume(not any("\ufdd0" in turn.text for turn in said.turns))
    segments = form.segments(said)
    text = "".join(segment.text for segment in segments)
    whole = theirs(form, said)
    eos = "" if whole.startswith(text) else END
    assert whole.startswith(text.removesuffix(eos))
    assert not whole[len(text.removesuffix(eos)) :].strip()
    assert learned(form, said)
    asked = said._replace(turns=said.turns[:-1])
    assert form.prompt_text(asked) == theirs(form, asked, prompt=True)


def test_real_conversations_are_written_as_transformers_does(tokenizers: Tokenizers) -> None:
    """With the embedded tokenizer's own template: the same text, and the same ids."""
    form = make("tokenizer", tokenizers("embedded"))
    eos, same = form.tokens.eos, 0
    talks = real_conversations()
    encoded = form.tokens.encode([form.segments(said) for said in talks])
    for number, said in enumerate(talks):
        text = "".join(segment.text for segment in form.segments(said))
        whole = theirs(form, said)
        assert whole == text + "\n"
        ids = own_ids(form.tokens, whole)
        ours = encoded.row(number)[0].tolist()
        assert ours[-1] == eos
        # A mask between "\n" and blanks at the beginning of an answer divides a token of theirs.
        divided = any(t.text[:1].isspace() for t in said.turns if t.role == "assistant")
        assert divided or ours == ids[:-1]
        same += ours == ids[:-1]
    assert same > 0.98 * len(talks)


@of("QWEN3")
def test_a_text_that_holds_no_character_is_a_misfit(form: Format) -> None:
    """Only where a template looks into the texts: elsewhere they are never mixed up with our marks."""
    turns = (user("a"), said("\ufdd00text\ufdd1</think>"), user("b"), said("c"))
    with pytest.raises(Misfit, match=r"it holds U\+FDD0, which is no character"):
        form.segments(Conversation(turns))


@of("STRIPS")
def test_time_grows_with_the_text_alone(form: Format) -> None:
    """Blanks within an answer once took the square of their number: this took minutes."""
    blanks = " " * 300_000
    assert len(learned(form, Conversation((user("a"), said(f" b{blanks}c"))))) == len(
        blanks
    ) + 2 + len(END)
