"""A tokenizer as llama.cpp has it: the fields of a GGUF file, and whether those that were read say the same."""

import json
from typing import Any

from stages.lib.data.formats import Format
from stages.lib.data.tokens import Tokens
from stages.lib.run.exits import BadData, CannotRun, GateFailed

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
# How a text is split before it is merged, and whether a word that is a token is taken whole, by the name that
# llama.cpp's own code has for it: other splittings give other ids without a word.
SPLITTINGS = {
    "gpt-2": ([("ByteLevel", True)], False),
    "smollm": ([("Digits", True), ("ByteLevel", True)], False),
    "llama-bpe": ([("Split", LLAMA3, "Isolated"), ("ByteLevel", False)], True),
    "qwen2": ([("Split", QWEN2, "Isolated"), ("ByteLevel", False)], False),
}
BLANK = "▁"
REPLACES = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
PREPENDS = {"type": "Prepend", "prepend": BLANK}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def fields(tokens: Tokens, chat_format: Format, rows: int) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, by llama.cpp's keys.

    Args:
        rows: of the embeddings, which may be more than there are tokens.

    Raises:
        CannotRun: llama.cpp would split texts otherwise. BadData: there are more tokens than rows.
    """
    described = json.loads(tokens.backend.to_str())
    if described["model"]["type"] != "BPE":
        raise CannotRun(
            f"a tokenizer of the kind {described['model']['type']} cannot be exported: BPE can, as GPT-2's and "
            "Llama's"
        )
    words = tokens.vocabulary()
    if len(words) > rows:
        raise BadData(
            f"the tokenizer has {len(words)} tokens, the embeddings {rows} rows: no model has both; merge again"
        )
    found = _sentencepiece(described) if described["model"]["byte_fallback"] else _gpt2(described)
    kinds = _kinds(tokens, described["model"])
    words += [""] * (rows - len(words))
    found |= {
        "tokens": [word or f"[PAD{number}]" for number, word in enumerate(words)],
        "token_type": [kinds.get(number, NORMAL if w else UNUSED) for number, w in enumerate(words)],
        "add_bos_token": tokens.bos is not None, "add_eos_token": False,
        **_specials(tokens), **_stops(chat_format, tokens.eos),
    }  # fmt: skip
    if "scores" in found:
        scores = found["scores"]
        found["scores"] = [scores.get(word, 0.0) for word in words]
    named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return named | ({"tokenizer.chat_template": chat_format.source} if chat_format.source else {})


def check(read: dict[str, Any], tokens: Tokens, chat_format: Format) -> None:
    """Hold what was read from a file against the tokenizer and the recorded stops, entry by entry.

    Raises:
        GateFailed: they differ.
    """
    got = {key.removeprefix("tokenizer.ggml."): value for key, value in read.items()}
    listed = got["tokens"]
    for number in range(max(len(tokens.vocabulary()), len(listed))):
        word = tokens.backend.id_to_token(number) or f"[PAD{number}]"
        if number >= len(listed) or listed[number] != word:
            raise _differs(f"token {number}, {word!r},")
    if {got[key] for key in STOPS if key in got} != {*chat_format.stops.ids}:
        raise _differs("the set of the ids that end an answer")
    for key, number in _specials(tokens).items():
        if got.get(key) != number:
            raise _differs(f"{key}, {number},")
    special = {number for number, kind in enumerate(got["token_type"]) if kind == CONTROL}
    if special != set(tokens.specials.values()) - _unknown(tokens):
        raise _differs("the set of the special tokens")
    if got["add_bos_token"] != (tokens.bos is not None):
        raise _differs("whether a text begins with BOS")
    if read.get("tokenizer.chat_template") != (chat_format.source or None):
        raise _differs("the chat template")


def remarks(tokens: Tokens) -> list[str]:
    """Where llama.cpp still makes other ids of some texts, one sentence each."""
    described = json.loads(tokens.backend.to_str())
    found = []
    if (described["normalizer"] or {}).get("type") == "NFC":
        found.append("llama.cpp does not compose letters and accents (NFC) as this tokenizer does")
    spaced = described["model"]["byte_fallback"] and _sentencepiece(described)["add_space_prefix"]
    if spaced and not tokens.begins_anew:
        found.append(
            "llama.cpp puts a blank before text that follows a special token, which this tokenizer does not"
        )
    return found


def _gpt2(described: dict[str, Any]) -> dict[str, Any]:
    model, splitter = described["model"], described["pre_tokenizer"] or {}
    steps = [_step(step) for step in splitter.get("pretokenizers", [splitter])]
    asked = (steps, bool(model["ignore_merges"]))
    name = next((name for name, known in SPLITTINGS.items() if known == asked), None)
    normalizer = (described["normalizer"] or {}).get("type")
    odd = any(model[key] for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"))
    if name is None or odd or normalizer not in ((None, "NFC") if name == "qwen2" else (None,)):
        raise CannotRun(
            f"the tokenizer splits texts in a way that is none of {', '.join(SPLITTINGS)} of llama.cpp, and "
            "would get other ids there; convert the model with llama.cpp's own script"
        )
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": name, "merges": pairs}


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """A step of splitting, as `SPLITTINGS` has it."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return (kind, step["use_regex"]) if not step["add_prefix_space"] else (kind, "blank first")
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and not step["invert"]:
        return kind, step["pattern"].get("Regex"), step["behavior"]
    return kind, "unknown"


def _sentencepiece(described: dict[str, Any]) -> dict[str, Any]:
    normalizer, splitter = described["normalizer"] or {}, described["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    scheme = None
    if not splitter and steps in ([PREPENDS, REPLACES], [REPLACES]):
        scheme = "always" if PREPENDS in steps else "never"
    elif not steps and splitter.get("type") == "Metaspace" and not splitter["split"]:
        scheme = splitter["prepend_scheme"] if splitter["replacement"] == BLANK else None
    if scheme is None or described["model"]["ignore_merges"]:
        raise CannotRun(
            "the tokenizer changes texts otherwise than Llama's, and they would get other ids in llama.cpp; "
            "convert the model with llama.cpp's own script"
        )
    # llama.cpp joins the pair whose whole has the highest score; here the earliest pair is joined.
    pairs = (
        pair.split(" ") if isinstance(pair, str) else pair for pair in described["model"]["merges"]
    )
    scores: dict[str, float] = {}
    for pair in pairs:
        scores.setdefault("".join(pair), -float(len(scores)))
    single = (word for word in described["model"]["vocab"] if len(word) == 1)
    for word in single:
        scores.setdefault(word, -float(len(scores)))
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "add_space_prefix": scheme != "never",
    }


def _kinds(tokens: Tokens, model: dict[str, Any]) -> dict[int, int]:
    """What each token is that is not a piece of text."""
    found = {}
    if model["byte_fallback"]:
        vocabulary = model["vocab"]
        found = {vocabulary[f"<0x{byte:02X}>"]: BYTE for byte in range(256)}
    for number, token in tokens.backend.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word:
            raise CannotRun(
                f"the token {token.content!r} takes the blanks beside it, which llama.cpp does not; the model "
                "cannot be exported"
            )
        found[number] = CONTROL if token.special else USER
    return found | dict.fromkeys(_unknown(tokens), UNKNOWN)


def _unknown(tokens: Tokens) -> set[int]:
    """The id of SentencePiece's token for what no other can say."""
    model = tokens.backend.model
    named = model.byte_fallback and model.unk_token is not None
    return {tokens.backend.token_to_id(model.unk_token)} if named else set()


def _specials(tokens: Tokens) -> dict[str, int]:
    named = {"bos_token_id": "bos_token", "unknown_token_id": "unk_token"}
    ids = {
        key: tokens.backend.token_to_id(tokens.names.get(name, "")) for key, name in named.items()
    }
    found = {key: number for key, number in ids.items() if number is not None}
    return found | {"padding_token_id": tokens.pad}


def _stops(chat_format: Format, eos: int) -> dict[str, int]:
    ids = [eos, *(number for number in chat_format.stops.ids if number != eos)]
    if len(ids) > len(STOPS):
        raise CannotRun(
            f"an answer ends with any of {len(ids)} tokens, and a GGUF file has room for {len(STOPS)}; choose "
            "another CHAT_FORMAT"
        )
    return dict(zip(STOPS, ids, strict=False))


def _differs(what: str) -> GateFailed:
    return GateFailed(
        f"{what} was read back otherwise than the tokenizer has it, so nothing was published; look at the disk "
        "and at the version of gguf"
    )
