"""A tokenizer in a GGUF file is the tokenizer, or is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from stages.lib.data import gguf_vocabulary
from stages.lib.data.formats import Format, Stops, choose
from stages.lib.data.gguf_vocabulary import CONTROL, LLAMA3, QWEN2, UNUSED
from stages.lib.data.tokens import Tokens
from stages.lib.run.exits import BadData, CannotRun, GateFailed

Tokenizers = Callable[[str], Tokens]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = BYTES | {"use_regex": False}


def split(regex: str) -> dict[str, Any]:
    """The splitting of Llama 3 and those after it."""
    by = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [by, PLAIN]}


def formatted(tokens: Tokens, name: str = "chatml") -> Format:
    return choose(name, tokens, ("messages",), "assistant")[0]


def changed(source: Path, folder: Path, **parts: Any) -> Tokens:
    """A tokenizer with some of its description replaced; `model` is added to what it had."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"] |= parts.pop("model", {})
    path.write_text(json.dumps(described | parts))
    return Tokens(folder)


def named(fields: dict[str, Any]) -> dict[str, Any]:
    return {key.rpartition(".")[2]: value for key, value in fields.items()}


@pytest.mark.parametrize("kind", ["embedded", "llama2", "mistral", "llama"])
def test_every_entry_is_there(tokenizers: Tokenizers, kind: str) -> None:
    tokens = tokenizers(kind)
    chat_format = formatted(tokens)
    fields = gguf_vocabulary.fields(tokens, chat_format, len(tokens) + 3)
    gguf_vocabulary.check(fields, tokens, chat_format)
    got = named(fields)
    assert (got["model"], got["pre"]) == (
        ("gpt2", "gpt-2") if kind == "embedded" else ("llama", "default")
    )
    assert got["tokens"][-3:] == [f"[PAD{len(tokens) + n}]" for n in range(3)]
    assert got["token_type"][-3:] == [UNUSED] * 3
    assert got["eos_token_id"] == tokens.eos
    assert got["token_type"][tokens.eos] == CONTROL
    assert got["add_bos_token"] is (kind != "embedded")
    assert fields["tokenizer.chat_template"] == chat_format.source
    behind = "a blank before text that follows" in " ".join(gguf_vocabulary.remarks(tokens))
    assert behind is (kind == "mistral")


def test_scores_are_those_of_sentencepiece(tokenizers: Tokenizers, llama_like: Path) -> None:
    """tokenizer.json has none: the order of its merges says them."""
    tokens = tokenizers("llama2")
    got = named(gguf_vocabulary.fields(tokens, formatted(tokens), 32000))
    model = sentencepiece.SentencePieceProcessor(str(llama_like / "tokenizer.model"))
    assert [model.IdToPiece(n) for n in range(32000)] == got["tokens"]
    joined = [n for n in range(259, 32000) if len(got["tokens"][n].strip("▁")) > 1]
    assert len(joined) > 20_000
    assert [model.GetScore(n) for n in joined] == [got["scores"][n] for n in joined]
    assert got["add_space_prefix"]
    assert got["unknown_token_id"] == 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("smollm", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, BYTES]}}),
        ("llama-bpe", {"pre_tokenizer": split(LLAMA3), "model": {"ignore_merges": True}}),
        ("qwen2", {"pre_tokenizer": split(QWEN2), "normalizer": {"type": "NFC"}}),
        (None, {"pre_tokenizer": split(QWEN2 + "|x")}),
        (None, {"pre_tokenizer": split(LLAMA3)}),
        (None, {"pre_tokenizer": BYTES | {"add_prefix_space": True}}),
        (None, {"normalizer": {"type": "Lowercase"}}),
        (None, {"pre_tokenizer": None}),
    ],
)  # fmt: skip
def test_the_splitting_is_known_or_refused(
    sample_model: Path, tmp_path: Path, name: str | None, parts: dict[str, Any]
) -> None:
    tokens = changed(sample_model, tmp_path / "it", **parts)
    if name:
        fields = gguf_vocabulary.fields(tokens, formatted(tokens), 49152)
        assert fields["tokenizer.ggml.pre"] == name
        remarks = gguf_vocabulary.remarks(tokens)
        assert any("NFC" in remark for remark in remarks) is ("normalizer" in parts)
        return
    with pytest.raises(CannotRun, match=r"none of gpt-2, smollm, llama-bpe, qwen2 of llama\.cpp"):
        gguf_vocabulary.fields(tokens, formatted(tokens), 49152)


def test_what_llama_cpp_has_not_is_refused(
    tokenizers: Tokenizers, llama_like: Path, tmp_path: Path
) -> None:
    phi = tokenizers("phi")
    with pytest.raises(CannotRun, match="takes the blanks beside it"):
        gguf_vocabulary.fields(phi, formatted(phi), 49152)
    tokens = tokenizers("embedded")
    with pytest.raises(BadData, match="has 49152 tokens, the embeddings 49000 rows"):
        gguf_vocabulary.fields(tokens, formatted(tokens), 49000)
    many = formatted(tokens)
    many.stops = Stops((), (2, 5, 6, 7))
    with pytest.raises(CannotRun, match="ends with any of 4 tokens"):
        gguf_vocabulary.fields(tokens, many, 49152)
    several = formatted(tokens)
    several.stops = Stops((), (0, 2))
    got = named(gguf_vocabulary.fields(tokens, several, 49152))
    assert (got["eos_token_id"], got["eot_token_id"]) == (2, 0)
    Tokens(llama_like).save(tmp_path / "spm", None)
    lower = changed(tmp_path / "spm", tmp_path / "lower", normalizer={"type": "Lowercase"})
    with pytest.raises(CannotRun, match="otherwise than Llama's"):
        gguf_vocabulary.fields(lower, formatted(lower), 32000)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("eos_token_id", 5, "ids that end an answer"),
        ("eot_token_id", 5, "ids that end an answer"),
        ("padding_token_id", 5, "padding_token_id"),
        ("add_bos_token", True, "begins with BOS"),
        ("tokens", "swapped", "token 300"),
        ("tokens", "short", "token 49151"),
        ("token_type", "plain", "special tokens"),
        ("tokenizer.chat_template", "other", "chat template"),
    ],
)
def test_a_field_that_is_read_otherwise_is_seen(
    tokenizers: Tokenizers, key: str, value: Any, word: str
) -> None:
    tokens = tokenizers("embedded")
    chat_format = formatted(tokens)
    read = gguf_vocabulary.fields(tokens, chat_format, 49152)
    key = key if "." in key else f"tokenizer.ggml.{key}"
    if value == "swapped":
        listed = list(read[key])
        listed[300], listed[301] = listed[301], listed[300]
        value = listed
    elif value == "short":
        value = read[key][:-1]
    elif value == "plain":
        value = [1] * len(read[key])
    with pytest.raises(GateFailed, match=word):
        gguf_vocabulary.check(read | {key: value}, tokens, chat_format)
