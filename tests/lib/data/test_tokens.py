"""Ids and masks, with the embedded tokenizer and those that Llama's family ships."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.shapes import parse_guanaco
from stages.lib.data.templates import Segment
from stages.lib.data.tokens import Tokens
from stages.lib.run.exits import BadData
from tests.lib.conftest import Tokenizers
from tests.lib.data.talk import learned_text, make, own_ids, quick, real_texts, said, texts

KINDS = ("embedded", "llama", "llama2", "mistral")
GUANACO = "### Human: Größe </s>?### Assistant: 日本 <|im_end|>.### Human: a### Assistant: b"


@pytest.fixture(params=KINDS)
def tokens(request: pytest.FixtureRequest, tokenizers: Tokenizers) -> Tokens:
    return tokenizers(request.param)


@pytest.mark.case("C10")
def test_llama_pads_with_unk_and_never_grows(tokenizers: Tokenizers) -> None:
    for kind in KINDS[1:]:
        tokens = tokenizers(kind)
        assert tokens.pad == tokens.fast.unk_token_id != tokens.eos
        assert len(tokens) == 32000


@pytest.mark.case("C10")
def test_the_embedded_model_does_not_pad_with_eos(sample_model: Path) -> None:
    tokens = Tokens(sample_model)
    config = json.loads((sample_model / "tokenizer_config.json").read_text())
    assert config["pad_token"] == config["eos_token"]  # what its makers chose
    assert tokens.pad != tokens.eos


@pytest.mark.case("C10")
@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>", None])
def test_what_is_saved_pads_as_the_base_does(
    sample_model: Path, tmp_path: Path, pad: str | None
) -> None:
    """With EOS, another token, or none: it is our batches that never pad with EOS."""
    from transformers import AutoTokenizer

    shutil.copytree(sample_model, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"pad_token": pad}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    tokens = Tokens(tmp_path / "base")
    assert tokens.pad != tokens.eos
    tokens.decode([5])
    tokens.save(tmp_path / "saved", None)
    own, found = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "saved"))
    assert found.pad_token == own.pad_token == pad
    assert found.get_vocab() == own.get_vocab()
    assert found.special_tokens_map == own.special_tokens_map


def test_bos_is_what_the_model_was_trained_with(tokenizers: Tokenizers) -> None:
    assert tokenizers("embedded").bos is None
    assert (
        tokenizers("embedded").names["bos_token"] == "<|im_start|>"
    )  # it has the name, and no use for it
    for kind in KINDS[1:]:
        assert tokenizers(kind).bos == tokenizers(kind).fast.bos_token_id == 1


@pytest.mark.parametrize("said_to", [True, False])
def test_a_tokenizer_config_says_whether_rows_begin_with_bos(
    tokenizers: Tokenizers, tmp_path: Path, said_to: bool
) -> None:
    """As the one of Llama 3 does, whose tokenizer.json may not."""
    tokenizers("embedded").save(tmp_path, None)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": said_to}))
    tokens = Tokens(tmp_path)
    assert tokens.bos == (1 if said_to else None)
    ids = tokens.encode_prompt([Segment("Hi", False)])
    assert ids == [1] * said_to + tokenizers("embedded").backend.encode("Hi").ids
    # A template that puts it there itself gets no second one.
    assert tokens.encode_prompt([Segment("<|im_start|>", False, 1), Segment("Hi", False)])[:2] == [
        1,
        ids[-1],
    ]


def test_the_classic_rows_have_the_tokenizers_own_ids(tokens: Tokens) -> None:
    """The guanaco recipe to the letter: the whole text as one, and EOS."""
    form = make("guanaco", tokens, "all")
    written = [form.segments(Conversation(parse_guanaco(text))) for text in real_texts()]
    encoded = tokens.encode(written)
    for number, text in enumerate(real_texts()):
        assert encoded.row(number)[0].tolist() == [*tokens.backend.encode(text).ids, tokens.eos]


@pytest.mark.parametrize("name", ["llama2", "chatml", "zephyr.jinja"])
def test_text_behind_a_special_token_has_the_tokenizers_own_ids(
    tokenizers: Tokenizers, name: str
) -> None:
    for kind in (*KINDS, "phi"):
        tokens = tokenizers(kind)
        form = make(name, tokens, "all")
        for text in (
            "### Human: a### Assistant: b ",
            "### Human:  \n日本 ### Assistant:  c### Human: d",
        ):
            turns = (*parse_guanaco(text), Turn("assistant", "\n e"))
            segments = form.segments(Conversation(turns))
            bos = [] if tokens.bos is None else [tokens.bos]
            whole = own_ids(tokens, "".join(segment.text for segment in segments))
            assert tokens.encode([segments]).ids.tolist() == bos + whole, (kind, text)


def test_what_looks_like_a_special_token_is_plain_text(tokens: Tokens) -> None:
    for word in (*tokens.specials, "<|im_end|>", "</s>"):
        segments = [
            Segment(f"What is {word}?", False),
            Segment(f"{word}", True),
            Segment("!", True),
        ]
        ids = tokens.encode([segments]).ids.tolist()
        special = [i for i in ids if i in tokens.specials.values()]
        assert special == ([] if tokens.bos is None else [tokens.bos])
        assert tokens.decode(ids).count(word) == 2
        assert len(tokens.encode_prompt(segments)) == len(ids)


@st.composite
def rows(draw: st.DrawFn) -> list[Segment]:
    """Texts and special tokens in any order, learned and not."""
    some = draw(st.lists(st.tuples(said, st.booleans(), st.booleans()), min_size=1, max_size=8))
    pieces = [
        Segment("", learns, 2) if special else Segment(text, learns)
        for text, learns, special in some
    ]
    return [Segment("x", False), *pieces]


@quick(25)
@given(st.lists(rows(), min_size=1, max_size=3))
def test_masks_lie_between_tokens(tokens: Tokens, rows: list[list[Segment]]) -> None:
    eos = tokens.names["eos_token"]
    rows = [[s._replace(text=eos) if s.id == 2 else s for s in row] for row in rows]
    encoded = tokens.encode(rows)
    assert encoded.ids.dtype == np.int32
    assert encoded.starts[-1] == len(encoded.ids) == len(encoded.learned)
    for number, row in enumerate(rows):
        ids, mask = encoded.row(number)
        assert tokens.encode_prompt(row) == ids.tolist()
        assert not mask[0]
        # A blank that the tokenizer puts before a text is learned with it.
        wanted = "".join(segment.text for segment in row if segment.learned)
        assert learned_text(tokens, ids, mask).replace(" ", "") == wanted.replace(" ", "")
        shown = "".join(text for text, _, _ in tokens.pieces(ids.tolist(), mask.tolist()))
        assert shown == tokens.backend.decode(ids.tolist(), False)
        for learned in (True, False):
            same = tokens.encode([[segment._replace(learned=learned) for segment in row]])
            assert tokens.backend.decode(same.ids.tolist(), False) == shown
            assert (same.learned[1:] == learned).all()


def test_where_answers_end(tokens: Tokens) -> None:
    row = [
        Segment("a", False), Segment("b", True, None, True), Segment("c", False), Segment("d", True),
        Segment("</s>", True, tokens.eos, True),
    ]  # fmt: skip
    encoded = tokens.encode([row, row[:2]])
    lengths = [len(tokens.encode([row[:count]]).ids) for count in range(1, 6)]
    assert encoded.ends == [[lengths[1], lengths[4]], [lengths[1]]]
    # Run together with what follows, an answer's end is no place to cut.
    whole = tokens.encode([[segment._replace(learned=True) for segment in row]])
    assert whole.ends == [[len(whole.ids)]]


def test_lengths_of_texts(tokens: Tokens) -> None:
    assert tokens.lengths([]) == []
    row = tokens.encode([[Segment("a", False), Segment(" word or two", True)]])
    assert tokens.lengths([" word or two"]) == [int(row.learned.sum())]


@quick(20)
@given(texts)
def test_pieces_are_the_text(tokens: Tokens, text: str) -> None:
    ids = tokens.encode_prompt([Segment("x " + text, False)])
    assert "".join(
        piece for piece, _, _ in tokens.pieces(ids, [False] * len(ids))
    ) == tokens.backend.decode(ids, False)
    # Cut anywhere, as long rows are, in the middle of a character too.
    for end in range(1, len(ids)):
        cut = [*ids[:end], tokens.eos]
        found = list(tokens.pieces(cut, [False] * end + [True]))
        assert found[-1] == (tokens.names["eos_token"], True, True)


def test_the_saved_tokenizer_gives_the_same_ids(tokens: Tokens, tmp_path: Path) -> None:
    tokens.save(tmp_path, "{{ messages }}")
    again = Tokens(tmp_path)
    assert again.chat_template == "{{ messages }}"
    assert (again.pad, again.eos, again.bos) == (tokens.pad, tokens.eos, tokens.bos)
    for loss_on in ("assistant", "all"):
        segments = make("guanaco", tokens, loss_on).segments(Conversation(parse_guanaco(GUANACO)))
        assert again.encode_prompt(segments) == tokens.encode_prompt(segments)
    # For others a special token is special again.
    others = Tokens(tmp_path).fast
    others.backend_tokenizer.encode_special_tokens = False
    assert others("a</s>", add_special_tokens=False).input_ids == own_ids(tokens, "a</s>")


def test_a_tokenizer_that_cannot_be_used(tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokenizers("embedded").save(tmp_path, None)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(BadData, match="has no EOS token, so no answer could ever end"):
        Tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(BadData, match=r"cannot be read .*; fetch it again"):
        Tokens(tmp_path)
