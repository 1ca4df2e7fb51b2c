"""Tokenizers of the kinds that base models ship, none of them trained here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.lib.data.tokens import Tokens

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
STARTS_ANEW = {"normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE], "type": "Sequence"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}  # fmt: skip
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}  # fmt: skip
Tokenizers = Callable[[str], Tokens]


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's tokenizer as its authors shipped it: a SentencePiece model and no tokenizer.json."""
    import mistral_common

    folder = tmp_path_factory.mktemp("llama")
    models = Path(next(iter(mistral_common.__path__))) / "data"
    shutil.copy(models / "tokenizer.model.v1", folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000}))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(
    llama_like: Path, sample_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a tokenizer: `embedded` (GPT-2's kind, no BOS), `llama` (a SentencePiece model alone),
    `llama2` (its tokenizer.json puts a blank before every text), `mistral` (before the first one alone),
    `phi` (the embedded one, whose special tokens take the blanks beside them)."""

    def changed(source: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
        folder = tmp_path_factory.mktemp(name)
        Tokens(source).save(folder, None)
        path = folder / "tokenizer.json"
        described = json.loads(path.read_text())
        change(described)
        path.write_text(json.dumps(described))
        return folder

    def take_blanks(described: dict[str, Any]) -> None:
        for token in described["added_tokens"]:
            token |= {"rstrip": token["special"], "lstrip": token["content"] == "<|im_end|>"}

    def find(name: str) -> Path:
        shared = {"post_processor": BOS_FIRST, "decoder": DECODER}
        if name == "llama2":
            return changed(llama_like, name, lambda it: it.update(shared, normalizer=STARTS_ANEW))
        if name == "mistral":
            own = {"normalizer": None, "pre_tokenizer": METASPACE}
            return changed(llama_like, name, lambda it: it.update(shared, **own))
        if name == "phi":
            return changed(sample_model, name, take_blanks)
        return {"embedded": sample_model, "llama": llama_like}[name]

    return find


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folder: Callable[[str], Path]) -> Tokenizers:
    """A tokenizer by the name that `tokenizer_folder` knows it by, loaded once."""
    loaded: dict[str, Tokens] = {}

    def load(name: str) -> Tokens:
        if name not in loaded:
            loaded[name] = Tokens(tokenizer_folder(name))
        return loaded[name]

    return load
