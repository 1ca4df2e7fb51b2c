"""Ids and masks, with the embedded tokenizer and a SentencePiece one like Llama's."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.lib.data.conversation import MARKS, Turn, ask, parse, render, render_prompt
from stages.lib.data.tokens import Tokens


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's tokenizer as its authors shipped it: a SentencePiece model and no tokenizer.json."""
    import mistral_common

    folder = tmp_path_factory.mktemp("llama")
    models = Path(next(iter(mistral_common.__path__))) / "data"
    shutil.copy(models / "tokenizer.model.v1", folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000}))
    return folder


@pytest.fixture(scope="module", params=["embedded", "sentencepiece"])
def tokens(request: pytest.FixtureRequest, sample_model: Path, llama_like: Path) -> Tokens:
    return Tokens(sample_model if request.param == "embedded" else llama_like)


def test_llama_pads_with_unk_and_never_grows(llama_like: Path) -> None:
    tokens = Tokens(llama_like)
    assert tokens.pad == tokens.fast.unk_token_id != tokens.eos
    assert len(tokens) == 32000


def test_the_embedded_model_does_not_pad_with_eos(sample_model: Path) -> None:
    tokens = Tokens(sample_model)
    config = json.loads((sample_model / "tokenizer_config.json").read_text())
    assert config["pad_token"] == config["eos_token"]  # what its makers chose
    assert tokens.pad != tokens.eos


def test_bos_once_where_the_model_wants_it(llama_like: Path, sample_model: Path) -> None:
    llama, embedded = Tokens(llama_like), Tokens(sample_model)
    row = render(parse("### Human: Hi### Assistant: Yes"), "all")
    ((ids, _),) = llama.encode([row], False)
    assert ids.count(llama.fast.bos_token_id) == 1 == ids.index(llama.fast.bos_token_id) + 1
    ((ids, _),) = embedded.encode([row], False)
    assert embedded.fast.bos_token_id not in ids


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(
    lambda text: not any(mark.strip("#: ") in text for mark in MARKS.values()) and "#" not in text
)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
    lambda pairs: [
        Turn(role, f" {text}")
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns)
def test_what_is_learned_is_what_the_assistant_says(tokens: Tokens, turns: list[Turn]) -> None:
    segments = render(turns, "assistant")
    ((ids, trained),) = tokens.encode([segments], True)
    assert len(ids) == len(trained)
    assert ids[-1] == tokens.eos
    assert trained[-1]
    assert ids.count(tokens.eos) == 1
    # The same ids as the whole text, and as with everything learned.
    ((whole, all_trained),) = tokens.encode([render(turns, "all")], False)
    assert ids == whole
    assert not all_trained[0]
    assert all(all_trained[1:])
    # No token is learned outside an answer, and none inside is missed, but one that straddles the edge.
    learned = sum(trained)
    alone = sum(len(tokens.backend.encode(t.text).ids) for t in turns if t.role == "assistant")
    assert abs(learned - 1 - alone) <= 2 * len(turns)


@pytest.mark.parametrize("said", ["</s>", "<|im_end|>", "<s>", "<|endoftext|>"])
def test_special_tokens_in_a_row_are_plain_text(tokens: Tokens, said: str) -> None:
    row = render(parse(f"### Human: What is {said}?### Assistant: {said} is a mark."), "assistant")
    ((ids, _),) = tokens.encode([row], True)
    assert ids.count(tokens.eos) == 1
    assert tokens.decode(ids).count(said) == 2


def test_a_prompt_has_the_ids_that_training_had(tokens: Tokens) -> None:
    text = "### Human: Why is the sky blue?### Assistant: It scatters."
    ((ids, trained),) = tokens.encode([render(parse(text), "assistant")], True)
    prompt = tokens.encode_prompt(render_prompt(ask("Why is the sky blue?")))
    assert ids[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


def test_the_saved_tokenizer_gives_the_same_ids(tokens: Tokens, tmp_path: Path) -> None:
    tokens.save(tmp_path)
    text = "### Human: Größe 日本### Assistant:"
    assert Tokens(tmp_path).encode_prompt(text) == tokens.encode_prompt(text)
    assert Tokens(tmp_path).pad == tokens.pad
