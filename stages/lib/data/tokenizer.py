"""A tokenizer's files: read by `tokenizers` alone where transformers would take them as they are.

To import transformers takes one second, or six where files are slow to open, as long as all else that a small
data set needs.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.run.exits import BadData, CannotRun

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
# What transformers reads too where the config does not list the added tokens.
OLDER = ("special_tokens_map.json", "added_tokens.json")
ODD = ("single_word", "lstrip", "rstrip", "normalized")
LARGE = 100_000  # tokens, above which transformers looks at MODELS, whose pattern was wrong once
MODELS = ("mistral", "mistral3", "voxtral", "ministral", "pixtral", None)


class Loaded(NamedTuple):
    """A tokenizer.

    Attributes:
        backend: of the library `tokenizers`. names: `bos_token`, `eos_token` and the like.
        template: its chat template; several by name, or None. fast: as transformers has it, where it was asked.
    """

    backend: Any
    names: dict[str, str]
    template: Any
    fast: Any = None


def load(folder: Path) -> Loaded:
    """The tokenizer in a folder.

    Raises:
        BadData: it cannot be read. CannotRun: it is none that `tokenizers` knows.
    """
    return _alone(folder) or _described(by_transformers(folder))


def _described(fast: Any) -> Loaded:
    named = fast.special_tokens_map.items()
    names = {key: str(text) for key, text in named if not isinstance(text, list)}
    return Loaded(fast.backend_tokenizer, names, fast.chat_template, fast)


def by_transformers(folder: Path) -> Any:
    """The tokenizer as transformers loads it.

    Raises:
        BadData: it cannot be read. CannotRun: it is none that `tokenizers` knows.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        if (folder / FILE).is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # A SentencePiece model alone is converted, which needs torch.
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise BadData(
            f"the tokenizer in {folder} cannot be read ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    if not found.is_fast:
        raise CannotRun(f"{folder} has no fast tokenizer (tokenizer.json); choose another base")
    return found


def _alone(folder: Path) -> Loaded | None:
    """The tokenizer by its own files; None where transformers would change them, or cannot be foretold."""
    if (folder / TEMPLATES).exists():
        return None
    try:
        written = json.loads((folder / FILE).read_text(encoding="utf-8"))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        path = folder / "config.json"  # an adapter has none
        model = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        listed = "added_tokens_decoder" in config
        older = not listed and any((folder / name).exists() for name in OLDER)
        plain = not older and _is_plain(written, config, model.get("model_type"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # transformers says what is wrong with it, or knows what to do
    if not plain:
        return None
    from tokenizers import Tokenizer

    template = folder / TEMPLATE
    return Loaded(
        Tokenizer.from_file(str(folder / FILE)),
        {f"{name}_token": config[f"{name}_token"] for name in NAMED if config.get(f"{name}_token")},
        template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template"),
    )


def _is_plain(written: dict[str, Any], config: dict[str, Any], model: str | None) -> bool:
    """Whether all that the config says of tokens is so in tokenizer.json already."""
    added = {token["id"]: token for token in written["added_tokens"]}
    again = {
        int(n): token | {"id": int(n)}
        for n, token in config.get("added_tokens_decoder", {}).items()
    }
    special = {token["content"] for token in added.values() if token["special"]}
    odd = {token["content"] for token in added.values() if any(token[key] for key in ODD)}
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    names = {f"{name}_token" for name in NAMED}
    flags = {"add_bos_token", "add_eos_token"}  # which transformers passes over
    told = {named[key] for key in named.keys() & names if named[key] is not None}
    more = {*config.get("extra_special_tokens", ()), *config.get("additional_special_tokens", ())}
    return (
        written["padding"] is None
        and written["post_processor"] is not None
        and isinstance(config.get("chat_template"), str | None)
        and (not again or again == added)
        and named.keys() <= names | flags
        and told <= special
        and more <= special - odd
        and (len(added) + len(written["model"]["vocab"]) <= LARGE or model not in MODELS)
    )
