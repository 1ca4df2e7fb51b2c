"""Tokenizers that are read without transformers, and those that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.lib.data import tokenizer
from stages.lib.data.tokens import Tokens

PLAIN = {"mistral", "llama2", "phi", "embedded"}
BOS = "<|im_start|>"


@pytest.fixture
def embedded(sample_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the embedded tokenizer, with changes to its files."""

    def make(config: Any = None, written: Any = None, model: Any = None) -> Path:
        changes = {tokenizer.FILE: written, tokenizer.CONFIG: config, "config.json": model}
        for name, change in changes.items():
            held = json.loads((sample_model / name).read_text()) | (change or {})
            (tmp_path / name).write_text(json.dumps(held))
        return tmp_path

    return make


def check_same(folder: Path) -> None:
    """It is read alone, and is what transformers makes of it."""
    found, other = tokenizer.load(folder), tokenizer.by_transformers(folder)
    assert found.fast is None
    assert found.backend.to_str() == other.backend_tokenizer.to_str()
    assert found.names == other.special_tokens_map
    assert found.template == other.chat_template


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_a_tokenizer_is_what_transformers_makes_of_it(
    tokenizer_folder: Callable[[str], Path], kind: str
) -> None:
    check_same(tokenizer_folder(kind))


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"pad_token": None},
        {"extra_special_tokens": ["<repo_name>"]},
        {"additional_special_tokens": ["<repo_name>", BOS]},
        {"chat_template": "{{ messages }}"},
        {"clean_up_tokenization_spaces": True, "add_prefix_space": True, "padding_side": "left"},
        {"split_special_tokens": True, "tokenizer_class": "LlamaTokenizer", "model_max_length": 9},
    ],
)
def test_what_a_config_says(embedded: Callable[..., Path], config: dict[str, Any]) -> None:
    check_same(embedded(config))


def test_a_template_has_a_file_of_its_own(embedded: Callable[..., Path]) -> None:
    folder = embedded({"chat_template": "old"})
    (folder / tokenizer.TEMPLATE).write_text("new\r\n")
    check_same(folder)


def test_a_config_may_list_the_added_tokens_again(embedded: Callable[..., Path]) -> None:
    """Then older files beside it are not read."""
    folder = embedded()
    added = json.loads((folder / tokenizer.FILE).read_text())["added_tokens"]
    again = {str(token.pop("id")): token for token in added}
    (folder / "special_tokens_map.json").write_text('{"cls_token": "<cls>"}')
    (folder / "added_tokens.json").write_text('{"<more>": 49152}')
    check_same(embedded({"added_tokens_decoder": again}))
    assert tokenizer.load(embedded({"added_tokens_decoder": {"0": again["0"]}})).fast
    again["0"]["lstrip"] = True
    assert tokenizer.load(embedded({"added_tokens_decoder": again})).fast


def test_a_token_that_takes_blanks_may_be_added_anew(
    tokenizer_folder: Callable[[str], Path],
) -> None:
    folder = tokenizer_folder("phi")
    config = json.loads((folder / tokenizer.CONFIG).read_text())
    more = {"extra_special_tokens": ["<repo_name>"]}
    (folder / tokenizer.CONFIG).write_text(json.dumps(config | more))
    assert tokenizer.load(folder).fast


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({"pad_token": "<pad>"}, None), ({"unk_token": "a"}, None), ({"image_token": BOS}, None),
        ({"pad_token": {"content": BOS, "__type": "AddedToken"}}, None),
        ({"extra_special_tokens": ["<more>"]}, None), ({"extra_special_tokens": {"x_token": BOS}}, None),
        ({"chat_template": [{"name": "default", "template": "a"}]}, None), (None, {"post_processor": None}),
        (None, {"padding": {
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }}),
    ],
)  # fmt: skip
def test_what_transformers_would_change_is_read_by_it(
    embedded: Callable[..., Path], config: dict[str, Any] | None, written: dict[str, Any] | None
) -> None:
    assert tokenizer.load(embedded(config, written)).fast


@pytest.mark.parametrize("name", [*tokenizer.OLDER, tokenizer.TEMPLATES])
def test_older_files_are_read_by_transformers(embedded: Callable[..., Path], name: str) -> None:
    folder = embedded()
    (folder / name).mkdir() if "." not in name else (folder / name).write_text("{}")
    assert tokenizer.load(folder).fast


def test_a_large_one_of_mistral_is_read_by_transformers(
    embedded: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "LARGE", 1000)
    check_same(embedded())
    assert tokenizer.load(embedded(model={"model_type": "mistral"})).fast
    assert tokenizer.load(embedded(model={"model_type": None})).fast


def test_it_is_saved_as_it_is_used(embedded: Callable[..., Path], tmp_path: Path) -> None:
    """With the BOS that its own files forget."""
    tokens = Tokens(embedded({"add_bos_token": True}))
    tokens.save(tmp_path / "saved", "{{ messages }}")
    again = Tokens(tmp_path / "saved")
    assert (
        again.backend.encode("a").ids
        == tokens.backend.encode("a").ids
        == [1, *again.backend.encode("a").ids[1:]]
    )
    assert (again.chat_template, again.pad, again.names) == (
        "{{ messages }}",
        tokens.pad,
        tokens.names,
    )
