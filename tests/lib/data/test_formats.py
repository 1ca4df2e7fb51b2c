"""Every chat format with every kind of tokenizer: what is learned, what ends an answer, what a prompt is."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from stages.lib.data import formats
from stages.lib.data.conversation import Conversation, Turn, ask, loads
from stages.lib.data.formats import Format
from stages.lib.data.shapes import Misfit
from stages.lib.run.exits import BadData, BadSetting, CannotRun, Missing
from tests.lib.conftest import Tokenizers
from tests.lib.data.talk import (
    FORMATS,
    conversations,
    learned_text,
    make,
    quick,
    real_conversations,
    stops,
    trainable,
)

KINDS = ("embedded", "llama", "llama2", "mistral")
# Of these tokenizers the embedded one alone has a chat template.
EACH = [
    (name, kind) for name in FORMATS for kind in KINDS if name != "tokenizer" or kind == KINDS[0]
]


@pytest.fixture(params=EACH, ids="-".join)
def form(request: pytest.FixtureRequest, tokenizers: Tokenizers) -> Format:
    name, kind = request.param
    return make(name, tokenizers(kind))


@quick(20)
@given(conversations())
def test_what_is_learned_is_what_the_assistant_says_and_what_ends_it(
    form: Format, said: Conversation
) -> None:
    tokens = form.tokens
    encoded = tokens.encode([form.segments(said)])
    ids, mask = encoded.row(0)
    assert learned_text(tokens, ids, mask) == trainable(form, said)
    assert mask[-1]
    assert ids[-1] in form.stops.ids
    assert not mask[0]
    # Special tokens are those of the format alone, whatever the texts look like.
    marks = np.isin(ids, list(tokens.specials.values()))
    if tokens.bos is not None:
        assert ids[0] == tokens.bos
        assert (ids == tokens.bos).sum() == 1
        assert marks.sum() == 1 + stops(form, said)
    assert (ids == tokens.eos).sum() == stops(form, said)
    learned = sum(turn.role == "assistant" and turn.learned for turn in said.turns)
    assert (np.isin(ids, form.stops.ids) & mask).sum() == min(learned, stops(form, said))
    for number, turn in enumerate(said.turns):
        if turn.role == "assistant" and turn.learned:
            prompt = form.prompt(said._replace(turns=said.turns[:number]))
            assert prompt == ids[: len(prompt)].tolist()
            assert mask[len(prompt)]


@pytest.mark.parametrize(("name", "kind"), [pair for pair in EACH if pair[1] in KINDS[::2]])
def test_real_conversations_are_learned_to_the_letter(
    tokenizers: Tokenizers, name: str, kind: str
) -> None:
    tokens = tokenizers(kind)
    one, everything = (make(name, tokens, loss_on) for loss_on in ("assistant", "all"))
    talks = real_conversations()
    encoded = tokens.encode([one.segments(said) for said in talks])
    whole = tokens.encode([everything.segments(said) for said in talks])
    for number, said in enumerate(talks):
        ids, mask = encoded.row(number)
        assert learned_text(tokens, ids, mask) == trainable(one, said)
        assert mask[-1]
        assert (ids == tokens.eos).sum() == stops(one, said)
        all_ids, all_mask = whole.row(number)
        assert all_mask[1:].all()
        assert not all_mask[0]
        assert (all_ids == tokens.eos).sum() == stops(one, said)
        assert tokens.backend.decode(all_ids, False) == tokens.backend.decode(ids, False)
        if number % 10 == 0:
            answer = max(n for n, turn in enumerate(said.turns) if turn.role == "assistant")
            prompt = one.prompt(said._replace(turns=said.turns[:answer]))
            assert prompt == ids[: len(prompt)].tolist()


def test_prompts_are_stored_whole(tokenizers: Tokenizers) -> None:
    """Answers that were not learned too: they are tokenised with what stands round them."""
    form = make("guanaco", tokenizers("llama2"))
    turns = [Turn("user", "a", "b"), Turn("assistant", "c", learned=False), Turn("user", "d")]
    said = Conversation((*turns, Turn("assistant", "e")), ({"name": "f"},))
    assert loads(json.loads(json.dumps(said.dumps()))) == said
    assert form.prompt(loads(said._replace(turns=tuple(turns), tools=()).dumps())) == form.prompt(
        said._replace(turns=tuple(turns), tools=())
    )


def test_stops(tokenizers: Tokenizers) -> None:
    embedded, llama = tokenizers("embedded"), tokenizers("llama")
    for loss_on in ("assistant", "all"):
        for tokens in (embedded, llama):
            assert make("guanaco", tokens, loss_on).stops == formats.Stops(("### Human:",), (2,))
            for name in ("alpaca", "llama2", "zephyr.jinja", "text"):
                assert make(name, tokens, loss_on).stops == formats.Stops((), (2,))
        assert make("chatml", embedded, loss_on).stops == formats.Stops((), (2,))
        # Where its marks are no tokens, they are text that ends an answer.
        assert make("chatml", llama, loss_on).stops == formats.Stops(("<|im_end|>",), (2,))
        plain = (
            "{% for m in messages %}{{ m.role }} 4: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant 4:{% endif %}"
        )
        assert make("x.jinja", llama, loss_on, plain).stops.texts == ("user 4:",)


def test_what_a_question_is_about_is_never_lost(tokenizers: Tokenizers) -> None:
    """Alpaca's `input`, in templates that have heard of it and in those that have not."""
    said = Conversation((Turn("user", "Who is it?", "Ada is a cat."), Turn("assistant", "A cat.")))
    for name in FORMATS:
        form = make(name, tokenizers("embedded"))
        text = "".join(segment.text for segment in form.segments(said))
        assert "Ada is a cat." in text, name
        assert ("Who is it?\nAda is a cat." in text) == (name != "alpaca")


def test_a_format_without_tools_says_them(tokenizers: Tokenizers) -> None:
    call = {
        "type": "function",
        "function": {"name": "add", "arguments": {"a": 1, "b": "<|im_end|>"}},
    }
    said = Conversation(
        (
            Turn("user", "1 + 2?"), Turn("assistant", "", calls=(call,)), Turn("tool", "3", name="add"),
            Turn("assistant", "Three."),
        ),
        ({"name": "add"},),
    )  # fmt: skip
    form = make("guanaco", tokenizers("embedded"))
    ids, mask = form.tokens.encode([form.segments(said)]).row(0)
    called = '{"name": "add", "arguments": {"a": 1, "b": "<|im_end|>"}}'
    assert learned_text(form.tokens, ids, mask) == f" {called} Three.<|im_end|>"
    text = "".join(segment.text for segment in form.segments(said))
    assert text.startswith('Tools: [{"name": "add"}]\n### Human: 1 + 2?### Assistant:')
    assert "### Human: 3### Assistant: Three." in text
    assert (ids == form.tokens.eos).sum() == 1


@pytest.mark.parametrize("name", ["guanaco", "tokenizer", "zephyr.jinja", "text"])
def test_a_saved_format_is_the_same(tokenizers: Tokenizers, tmp_path: Path, name: str) -> None:
    tokens = tokenizers("embedded")
    form = make(name, tokens, "all")
    form.save(tmp_path)
    again = Format.load(tmp_path, tokens)
    assert again.recorded() == form.recorded()
    assert again.stops == form.stops
    said = ask("Größe 日本?", "Be brief.")
    assert again.prompt(said) == form.prompt(said)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("template", "{{ messages[-1].content }}"),
        ("template", "{{ raise_exception('no') }}"),
        ("stop_ids", [3]),
        ("golden", {"text": "### Human: What is 2 + 2?", "ids": [1, 2, 3]}),
    ],
)
def test_a_format_that_writes_otherwise_is_refused(
    tokenizers: Tokenizers, tmp_path: Path, key: str, value: object
) -> None:
    form = make("guanaco", tokenizers("embedded"))
    path = tmp_path / formats.FILE
    path.write_text(json.dumps(form.recorded() | {key: value}))
    with pytest.raises(CannotRun, match="rendered or tokenised otherwise") as caught:
        Format.load(tmp_path, form.tokens)
    assert caught.value.exit_code == 78


def test_a_format_is_refused_with_another_tokenizer(tokenizers: Tokenizers, tmp_path: Path) -> None:
    make("llama2", tokenizers("llama2")).save(tmp_path)
    Format.load(tmp_path, tokenizers("llama2"))
    for other in ("embedded", "llama"):
        with pytest.raises(CannotRun):
            Format.load(tmp_path, tokenizers(other))


@pytest.mark.parametrize(
    ("kind", "shapes", "name"),
    [
        ("embedded", ["text"], "text"),
        ("embedded", ["guanaco", "alpaca"], "guanaco"),
        ("embedded", ["messages"], "tokenizer"),
        ("embedded", ["text", "alpaca"], "tokenizer"),
        ("llama", ["alpaca", "sharegpt"], "alpaca"),
        ("llama", ["messages"], "guanaco"),
    ],
)
def test_auto_chooses(tokenizers: Tokenizers, kind: str, shapes: list[str], name: str) -> None:
    form, why = formats.choose("auto", tokenizers(kind), shapes, "assistant")
    assert form.name == name
    assert why


def test_auto_takes_chatml_where_its_marks_are_tokens(tokenizers: Tokenizers) -> None:
    tokens = tokenizers("phi")
    assert tokens.chat_template is None
    assert formats.choose("auto", tokens, ["messages"], "assistant")[0].name == "chatml"


def test_what_cannot_be_chosen(tokenizers: Tokenizers, tmp_path: Path) -> None:
    llama = tokenizers("llama")
    with pytest.raises(BadSetting, match=r"CHAT_FORMAT 'vicuna' is none of auto, .*choose one"):
        formats.choose("vicuna", llama, ["messages"], "all")
    with pytest.raises(Missing, match="there is no chat template"):
        formats.choose(str(tmp_path / "no.jinja"), llama, ["messages"], "all")
    with pytest.raises(BadData, match="has no chat template; choose CHAT_FORMAT among guanaco"):
        formats.choose("tokenizer", llama, ["messages"], "all")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"{% for %}", "not valid at line 1"),
        (b"\xff{{ messages }}", "not UTF-8 at byte 0"),
        (b"{{ nothing() }}", "cannot write a plain question and answer: .*'nothing' is undefined"),
        (b"{{ raise_exception('no chats') }}", "no chats; mend it, or choose another"),
        (b"{{ messages[0].role }}", "cannot write a plain question and answer"),
    ],
)
def test_a_template_that_is_broken(
    tokenizers: Tokenizers, tmp_path: Path, source: bytes, words: str
) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(source)
    with pytest.raises(BadSetting, match=words):
        formats.choose(str(path), tokenizers("embedded"), ["messages"], "assistant")


def test_plain_text_is_learned_whole(tokenizers: Tokenizers) -> None:
    form = make("text", tokenizers("mistral"))
    said = Conversation((Turn("text", "Once </s> upon a time\n"),))
    ids, mask = form.tokens.encode([form.segments(said)]).row(0)
    # What puts a blank before a text does so here too.
    assert learned_text(form.tokens, ids, mask) == " Once </s> upon a time\n</s>"
    assert ids.tolist() == [*form.tokens.backend.encode(said.turns[0].text).ids, form.tokens.eos]
    assert form.prompt(said) == ids[:-1].tolist()


def test_a_template_without_system_turns_has_them_in_the_question(tokenizers: Tokenizers) -> None:
    """Whether it refuses them or leaves them out. Another turn that it leaves out is refused."""
    passed_over = (
        "{% for m in messages if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}{# tool_calls #}"
    )
    refused = (
        "{% for m in messages if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endfor %}"
    )
    turns = (Turn("system", "Be brief."), Turn("user", "Why?", "Cats."), Turn("assistant", "So."))
    for source in (passed_over, refused + passed_over):
        form = make("x.jinja", tokenizers("embedded"), "assistant", source)
        assert form.folds_system
        text = "".join(segment.text for segment in form.segments(Conversation(turns)))
        assert text == "<|im_start|>Be brief.\n\nWhy?\nCats.<|im_end|><|im_start|>So.<|im_end|>"
        with pytest.raises(Misfit, match="leaves out what a tool turn says"):
            form.segments(Conversation((Turn("tool", "c"), *turns[1:])))


@pytest.mark.parametrize("name", ["tokenizer", *formats.OURS])
def test_a_conversation_may_begin_with_the_assistant(tokenizers: Tokenizers, name: str) -> None:
    """As much of ShareGPT does; the embedded template puts its own system turn before it."""
    form = make(name, tokenizers("embedded"))
    turns = (Turn("assistant", "Hello!"), Turn("user", "Hi."), Turn("assistant", "What now?"))
    segments = form.segments(Conversation(turns))
    told = " ".join(s.text for s in segments if s.learned and s.id is None)
    assert told.split() == ["Hello!", "What", "now?"]
