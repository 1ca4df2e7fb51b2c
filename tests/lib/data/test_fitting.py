"""Long rows: cut, split or dropped, with every token accounted for."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.fitting import Fitted, Fitter
from stages.lib.data.formats import Format
from tests.lib.conftest import Tokenizers
from tests.lib.data import chat_templates
from tests.lib.data.talk import FORMATS, learned_text, make, quick

LIMIT = 128
EACH = [(name, kind) for name in FORMATS for kind in ("embedded", "llama2")]
EACH.remove(("tokenizer", "llama2"))
words = st.sampled_from(["word ", "日本", "### Human:", "<|im_end|>", "</s>", "ü", "\n", "12"])


@st.composite
def long_texts(draw: st.DrawFn) -> str:
    return draw(words) * draw(st.sampled_from([1, 1, 5, 30, 100, 300])) + "end"


@st.composite
def long_conversations(draw: st.DrawFn) -> Conversation:
    turns = [Turn("system", "Be brief.")] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        context = draw(st.just("") | long_texts())
        turns.append(Turn("user", draw(long_texts()), context))
        learned = draw(st.sampled_from([True, True, False]))
        turns.append(Turn("assistant", draw(long_texts()), learned=learned))
    return Conversation(
        (*turns, Turn("user", draw(long_texts())), Turn("assistant", draw(long_texts())))
    )


@pytest.fixture(params=EACH, ids="-".join)
def form(request: pytest.FixtureRequest, tokenizers: Tokenizers) -> Format:
    name, kind = request.param
    return make(name, tokenizers(kind))


def row_of(form: Format, said: Conversation) -> tuple[Sequence[int], Sequence[bool], list[int]]:
    encoded = form.tokens.encode([form.segments(said)])
    return *encoded.row(0), encoded.ends[0]


def fit(form: Format, said: Conversation, policy: str, limit: int = LIMIT) -> Fitted:
    """What becomes of it, after the checks that hold for every policy."""
    ids, mask, ends = row_of(form, said)
    fitted = Fitter(form, limit, policy).fit(said, ids, mask, ends)
    open_ended = 0
    for own, learned in fitted.pieces:
        assert len(own) == len(learned) <= limit
        assert own.dtype == np.int32
        assert not learned[0]
        assert learned.any()
        open_ended += not (own[-1] in form.stops.ids and learned[-1])
        if form.tokens.bos is not None:
            assert own[0] == form.tokens.bos
            assert (own == form.tokens.bos).sum() == 1
    assert 0 <= fitted.lost <= len(ids)
    assert open_ended <= fitted.going_on
    return fitted


def answers(said: Conversation) -> list[int]:
    return [n for n, turn in enumerate(said.turns) if turn.role == "assistant" and turn.learned]


def test_dropped_rows_are_lost_whole(form: Format) -> None:
    said = Conversation((Turn("user", "a"), Turn("assistant", "word " * LIMIT)))
    for policy in ("drop", "error"):
        assert fit(form, said, policy) == Fitted([], len(row_of(form, said)[0]))


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@quick(15)
@given(said=long_conversations())
def test_truncated_rows_keep_whole_turns_where_any_answer_fits(
    form: Format, loss_on: str, said: Conversation
) -> None:
    form = make(form.name, form.tokens, loss_on)
    ids, mask, _ = row_of(form, said)
    if len(ids) <= LIMIT:
        return
    fitted = fit(form, said, "truncate")
    assert fitted.going_on == 0
    assert len(fitted.pieces) == 1
    ((own, learned),) = fitted.pieces
    assert own[-1] in form.stops.ids
    assert learned[-1]
    everything = loss_on == "all"
    told = [
        n for n, t in enumerate(said.turns) if t.role == "assistant" and (t.learned or everything)
    ]
    shorter = [row_of(form, said._replace(turns=said.turns[: number + 1])) for number in told]
    fitting = [row for row in shorter if len(row[0]) <= LIMIT]
    if fitting:
        assert own.tolist() == fitting[-1][0].tolist()
        assert learned.tolist() == fitting[-1][1].tolist()
        assert fitted.lost in (len(ids) - len(own), len(ids) - len(own) + 1)
    else:
        # The first answer is cut; what is left of it stands in the row that it comes from.
        begins = learned_text(form.tokens, ids, mask)
        kept = learned_text(form.tokens, own, learned).removesuffix(form.tokens.names["eos_token"])
        kept = kept.removesuffix("<|im_end|>").rstrip("\ufffd ")
        assert begins.startswith(kept) or everything
        assert learned.sum() >= min(LIMIT // 4, shorter[0][1].sum())


@quick(15)
@given(said=long_conversations())
def test_split_rows_lose_nothing_of_any_answer(form: Format, said: Conversation) -> None:
    ids, mask, _ = row_of(form, said)
    if len(ids) <= LIMIT:
        return
    fitted = fit(form, said, "split")
    assert fitted.pieces
    if not all(room < LIMIT * 3 // 4 for room in prompts(form, said)):
        return  # a question has to be cut
    if all(turn.learned for turn in said.turns):
        assert fitted.lost == 0
    eos = form.tokens.names["eos_token"]
    pieces = "".join(learned_text(form.tokens, *piece) for piece in fitted.pieces).replace(eos, "")
    if "\ufffd" not in pieces:  # a window may end within a character
        assert pieces == learned_text(form.tokens, ids, mask).replace(eos, "")
    if not fitted.going_on:
        texts = [form.tokens.decode(own.tolist()) for own, _ in fitted.pieces]
        assert all("Be brief." in text for text in texts) or said.turns[0].role == "user"


def prompts(form: Format, said: Conversation) -> list[int]:
    """The tokens that stand before each learned answer, of what must stand there."""
    head = said.turns[:1] if said.turns[0].role == "system" else ()
    return [
        len(form.prompt(said._replace(turns=(*head, said.turns[n - 1])))) for n in answers(said)
    ]


@pytest.mark.parametrize("kind", ["embedded", "llama2"])
@pytest.mark.parametrize(
    "count", [*range(LIMIT, LIMIT + 5), 2 * LIMIT - 2, 2 * LIMIT, 3 * LIMIT + 1, 1000]
)
def test_plain_text_is_split_into_windows_that_add_up(
    tokenizers: Tokenizers, kind: str, count: int
) -> None:
    form = make("text", tokenizers(kind))
    said = Conversation((Turn("text", "word " * count),))
    ids, mask, _ = row_of(form, said)
    fitted = fit(form, said, "split")
    assert fitted.lost == 0
    assert fitted.going_on == len(fitted.pieces) - 1
    own = [fitted.pieces[0][0].tolist(), *(piece.tolist()[1:] for piece, _ in fitted.pieces[1:])]
    assert list(itertools.chain(*own)) == ids.tolist()
    # No token is learned less often for being at a window's beginning.
    assert sum(int(learned.sum()) for _, learned in fitted.pieces) == mask.sum()
    assert all(len(piece) == LIMIT for piece, _ in fitted.pieces[:-2])
    # An end that stands alone would teach to say nothing.
    assert all(len(piece) > LIMIT // 8 for piece, _ in fitted.pieces)


def test_whole_turns_are_kept_though_later_ones_have_longer_characters(
    tokenizers: Tokenizers,
) -> None:
    """With LOSS_ON=all guanaco's answers end within a run, so the turns that fit are looked for."""
    form = make("guanaco", tokenizers("embedded"), "all")
    first = (Turn("user", "hello " * 50), Turn("assistant", "hello " * 50))
    said = Conversation(
        (*first, Turn("user", "日本語の文章" * 40), Turn("assistant", "また今度ね" * 40))
    )
    ((own, _),) = fit(form, said, "truncate", 256).pieces
    assert own.tolist() == row_of(form, Conversation(first))[0].tolist()


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_an_answer_that_is_not_learned_is_no_end(form: Format, policy: str) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b", learned=False), Turn("user", "c"))
    said = Conversation((*turns, Turn("assistant", "word " * 2 * LIMIT)))
    fitted = fit(form, said, policy)
    assert learned_text(form.tokens, *fitted.pieces[0]).lstrip().startswith("word word")


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_a_long_question_leaves_room_for_its_answer(form: Format, policy: str) -> None:
    said = Conversation(
        (
            Turn("system", "Be brief."),
            Turn("user", "why " * 300, "cats " * 100),
            Turn("assistant", "word " * 10),
        )
    )
    fitted = fit(form, said, policy)
    assert fitted.lost > 300
    ((own, learned),) = fitted.pieces
    text = form.tokens.decode(own.tolist())
    assert "Be brief." in text
    assert learned_text(form.tokens, own, learned).count("word ") == 10
    longer = Conversation((*said.turns[:2], Turn("assistant", "word " * 300)))
    ((own, learned), *_) = fit(form, longer, policy).pieces
    assert learned.sum() >= LIMIT // 4 - 1
    assert "why" in form.tokens.decode(own.tolist())


def test_what_leaves_no_room_at_all_is_dropped(tokenizers: Tokenizers) -> None:
    """Tools that are longer than the limit cannot be cut."""
    form = make("chatml", tokenizers("embedded"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "word " * 99}}}
    said = Conversation(
        (Turn("user", "a"), Turn("assistant", "b")), ({"name": "word " * 2 * LIMIT},)
    )
    for policy in ("truncate", "split"):
        assert fit(form, said, policy).pieces == []
        assert fit(form, said, policy).lost == len(row_of(form, said)[0])
    called = Conversation((Turn("user", "a"), Turn("assistant", "", calls=(call,))))
    assert len(fit(form, called, "truncate", 64).pieces) == 1
    assert len(fit(form, called, "split", 64).pieces) == 2


def test_calls_of_tools_are_not_torn_from_their_results(tokenizers: Tokenizers) -> None:
    """A piece begins with a question: some templates refuse one that begins with what a tool says."""
    form = make("x.jinja", tokenizers("embedded"), "assistant", chat_templates.QWEN3)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    exchange = (
        Turn("user", "a"), Turn("assistant", "", calls=(call,)), Turn("tool", "b"), Turn("assistant", "c " * 9),
    )  # fmt: skip
    said = Conversation(exchange * 4, ({"name": "f"},))
    size = len(row_of(form, said._replace(turns=exchange))[0])
    fitted = fit(form, said, "split", size * 7 // 4)
    assert len(fitted.pieces) == 4
    assert fitted.lost == fitted.going_on == 0
    for own, _ in fitted.pieces:
        text = form.tokens.backend.decode(own.tolist(), False)
        assert text.startswith("<|im_start|>user\na")
        assert text.count("<tool_response>") == 1


def test_what_a_tool_says_at_length_is_lost_where_nothing_in_it_is_learned(
    tokenizers: Tokenizers,
) -> None:
    form = make("x.jinja", tokenizers("llama2"), "assistant", chat_templates.QWEN3)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    said = Conversation(
        (
            Turn("user", "a"), Turn("assistant", "", calls=(call,)), Turn("tool", "word " * 5 * LIMIT),
            Turn("assistant", "c"),
        )
    )  # fmt: skip
    ids, mask, _ = row_of(form, said)
    fitted = fit(form, said, "split")
    assert len(fitted.pieces) == 2
    assert fitted.lost > 3 * LIMIT
    assert sum(len(own) for own, _ in fitted.pieces) - 1 + fitted.lost == len(ids)  # one BOS is new
    assert sum(int(learned.sum()) for _, learned in fitted.pieces) == mask.sum()


def test_a_template_that_refuses_parts_of_what_it_writes_whole(tokenizers: Tokenizers) -> None:
    """Split between tokens then, rather than ending the stage."""
    refuse = "{% if messages[0].content[:4] == 'then' %}{{ raise_exception('no') }}{% endif %}"
    source = (
        refuse
        + "{% for message in messages %}"
        + chat_templates.TURN
        + "{% endfor %}"
        + chat_templates.ASK
    )
    form = make("x.jinja", tokenizers("embedded"), "assistant", source)
    said = Conversation(
        (
            Turn("user", "word " * 40), Turn("assistant", "word " * 40), Turn("user", "then " * 40),
            Turn("assistant", "word " * 40),
        )
    )  # fmt: skip
    _, mask, _ = row_of(form, said)
    fitted = fit(form, said, "split")
    assert sum(int(learned.sum()) for _, learned in fitted.pieces) == mask.sum()
    # Without its history, as which it is refused, the row cannot be cut.
    turns = (said.turns[0]._replace(text="word " * 200), said.turns[1]._replace(learned=False))
    history = said._replace(turns=(*turns, *said.turns[2:]))
    assert fit(form, history, "truncate") == Fitted([], len(row_of(form, history)[0]))
