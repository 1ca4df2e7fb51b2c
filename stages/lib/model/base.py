"""The base model as files: where it lies, what it is, and whether this product can use it. No torch here."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.lib.model import known, sample
from stages.lib.run import access, fetched, hub
from stages.lib.run.exits import BadData, BadSetting, CannotRun, Missing
from stages.lib.run.progress import phase, say

BLOCKS, BLOCK = 64, 4096
OTHER_SENSES = ("vision_config", "audio_config", "speech_config")


class Base:
    """A base model by name.

    Args:
        name: `sample`, a folder, or a hub id. revision: commit, tag or branch of a hub id.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision
        self.commit: str | None = None
        self.path = Path(name)
        self.is_sample = name == sample.NAME
        self.is_local = not self.is_sample and self.path.is_dir()
        looks_local = self.path.is_absolute() or name.startswith(".") or len(self.path.parts) != 2
        if looks_local and not (self.is_sample or self.is_local):
            raise Missing(
                f"there is no base model at {self.path.absolute()}; name a folder or a hub id"
            )

    @property
    def on_hub(self) -> bool:
        """Whether it comes from there, or from what `fetch` brought."""
        return not (self.is_sample or self.is_local)

    @classmethod
    def recorded(cls, identity: dict[str, Any]) -> "Base":
        """The base that an artifact was made with."""
        return cls(identity["name"], identity["revision"])

    def reference(self) -> dict[str, Any]:
        """What identifies it without asking the hub or converting anything."""
        if self.is_sample:
            return {"name": self.name, "revision": sample.REVISION}
        if self.is_local:
            return {"name": self.name, "fingerprint": fingerprint(self.path)}
        return {"name": self.name}

    @phase("fetching")
    def fetch(self, weights: bool = True, verify: bool = False) -> Path:
        """Bring it to local disk, and hash again what was there if told; the folder that holds it."""
        if self.is_sample:
            self.folder, self.commit = sample.folder(), sample.REVISION
        elif self.is_local:
            self.folder = self.path.resolve()
        else:
            what = "model" if weights else "tokenizer"
            say(f"fetching the {what} of {self.name}")
            self.folder, self.commit = access.snapshot(self.name, self.revision, what, verify)
        self._check(weights)
        return self.folder

    def consult(self) -> str:
        """Read its config alone, wherever it is nearest; where that was, in words.

        Of a folder nothing but `config.json` need be there. A hub id is looked up among those that are known
        here, then in the hub's cache, and last on the hub.
        """
        found = known.config(sample.HUB_ID if self.is_sample else self.name)
        if self.is_local:
            self.folder, where = self.path.resolve(), str(self.path / "config.json")
        elif found:
            self.folder, self.config = self.path, found
            where = "the list of common bases that comes with this program"
        elif there := self._cached():
            self.folder, where = there, "the hub's cache"
        else:
            self.folder, self.commit = access.snapshot(self.name, self.revision, "config")
            where = f"the hub, at {self.commit[:12]}"
        self._check(weights=False)
        return where

    def _cached(self) -> Path | None:
        """The folder of what the hub's cache has of it, where its config is among that."""
        from huggingface_hub import try_to_load_from_cache

        if fetched.find(self.name, self.revision, "config"):
            return None  # what the run is pinned to
        with hub.explained(self.name, self.revision):
            path = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        return Path(path).parent if isinstance(path, str) else None

    def identity(self) -> dict[str, Any]:
        """What an artifact records of its base: name, commit, and for local files a fingerprint."""
        local = self.is_sample or self.is_local
        mark = {"fingerprint": fingerprint(self.folder)} if local else {}
        return {"name": self.name, "revision": self.commit} | mark

    def about(self) -> dict[str, Any]:
        """For a model card: `name`, `revision`, `hub` (its id there, or None), and `licence`: what its own card
        says under `license`, `license_name` and `license_link`."""
        hub_id = sample.HUB_ID if self.is_sample else None if self.is_local else self.name
        licence = {"license": sample.LICENCE} if self.is_sample else self._licence()
        return {"name": self.name, "revision": self.commit, "hub": hub_id, "licence": licence}

    def _licence(self) -> dict[str, Any]:
        import yaml
        from huggingface_hub import metadata_load

        path = self.folder / "README.md"
        try:
            known = metadata_load(path) if path.is_file() else None
        except (ValueError, yaml.YAMLError):
            known = None  # a card that cannot be read says nothing
        names = ("license", "license_name", "license_link")
        found = {name: known[name] for name in names if known and known.get(name)}
        return found if "license" in found else {}

    def licence_files(self) -> list[Path]:
        """The texts that have to go with whatever is made from it."""
        found = (path for pattern in hub.LICENCES for path in self.folder.glob(pattern))
        return sorted(path for path in found if path.is_file())

    def adapter_name(self) -> tuple[str, str | None]:
        """Base and revision as an adapter's config names them: the hub id, or the resolved folder."""
        if self.is_sample or self.is_local:
            return str(self.folder), None
        return self.name, self.commit

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise Missing(
                f"{self.name} has no config.json, so it is no transformers model; name another"
            )
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise BadData(f"{path} is not valid JSON; fetch the model again") from error

    def _tokenizer_config(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "tokenizer_config.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}  # whoever reads the tokenizer says what is wrong with it

    def _check(self, weights: bool) -> None:
        if "auto_map" in self.config or "auto_map" in self._tokenizer_config():
            raise CannotRun(
                f"{self.name} needs code of its own, which is never run here; choose another base"
            )
        if self.config.get("is_encoder_decoder"):
            raise CannotRun(
                f"{self.name} is an encoder-decoder; only causal language models can be tuned"
            )
        method = self.config.get("quantization_config")
        if method is not None:
            named = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
            raise CannotRun(
                f"{self.name} is quantised already ({named}); name the model that it was made from, and choose "
                "BASE_PRECISION"
            )
        if any(part in self.config for part in OTHER_SENSES):
            raise CannotRun(
                f"{self.name} sees or hears beside reading; only models of text alone can be tuned"
            )
        if weights and not any(self.folder.glob("*.safetensors")):
            raise BadData(
                f"{self.folder} has no safetensors weights; convert them with save_pretrained"
            )

    def weights(self) -> int:
        """Bytes of its weights."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def check_length(self, max_length: int) -> None:
        """Refuse rows longer than the model's context."""
        context = self.config.get("max_position_embeddings")
        if context and max_length > context:
            raise BadSetting(
                f"MAX_LENGTH {max_length} is over the context of {self.name}, {context} tokens; lower it"
            )

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer, where the model has a limit."""
        return self.config.get("max_position_embeddings") or None

    def check_room(self, prompt_tokens: int, new_tokens: int, what: str = "a prompt") -> None:
        """Refuse a prompt that leaves no room for its answer; `what` names it."""
        context = self.context
        if context and prompt_tokens + new_tokens > context:
            raise BadSetting(
                f"{what} of {prompt_tokens} tokens and MAX_NEW_TOKENS {new_tokens} are over the context of "
                f"{self.name}, {context} tokens; shorten one of them"
            )

    def check_vocabulary(self, tokens: Sequence[str]) -> None:
        """Refuse a tokenizer that has ids beyond the model's embeddings; `tokens`: by id."""
        rows = self.config.get("vocab_size", len(tokens))
        if len(tokens) > rows:
            raise BadData(
                f"the tokenizer of {self.name} has {len(tokens)} tokens, its embeddings {rows} rows; the first "
                f"without one is {tokens[rows]!r}: remove it, or resize the model"
            )


def fingerprint(folder: Path) -> str:
    """sha256 over names, sizes, small files whole and evenly spaced blocks of the large ones.

    Cheap for 13 GB, and another fine-tune of the same shape has another.
    """
    hashed = hashlib.sha256()
    kept = (".json", ".safetensors", ".model")
    for path in sorted(p for p in folder.iterdir() if p.suffix in kept and p.is_file()):
        size = path.stat().st_size
        hashed.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for number in range(BLOCKS if size > BLOCKS * BLOCK else 1):
                file.seek(number * (size - BLOCK) // (BLOCKS - 1) if size > BLOCKS * BLOCK else 0)
                hashed.update(file.read(BLOCK if size > BLOCKS * BLOCK else -1))
    return hashed.hexdigest()
