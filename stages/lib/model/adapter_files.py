"""An adapter as files: its names, and where one lies. No torch here."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stages.lib.run import artifact
from stages.lib.run.artifact import Artifact
from stages.lib.run.exits import BadData, BadSetting, Missing

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLE = "adapter_model.bin"


class Part(NamedTuple):
    """An adapter among those that make a model, and how much of it."""

    made: Artifact
    weight: float = 1.0


def find(path: Path, setting: str = "INIT_ADAPTER") -> Path:
    """The folder of an adapter, given itself or its run directory.

    Raises:
        Missing: it is in neither; `setting` named it. BadData: its weights are a pickle.
    """
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    for folder in (path, path / "adapter"):
        if (folder / PICKLE).is_file():
            raise BadData(
                f"{setting}: {folder} has its weights in {PICKLE}, a pickle, which can hold a program and is "
                f"never read; where you trust it, have peft save it again, as {WEIGHTS}"
            )
    raise Missing(
        f"{setting}: there is no adapter in {path.absolute()}: {CONFIG} and {WEIGHTS} are looked for"
    )


def listed(words: Sequence[str]) -> list[Part]:
    """The adapters that MERGE_ADAPTERS names, each with its weight: `PATH` or `PATH=WEIGHT`.

    Raises:
        BadSetting: a weight is no number, or zero. Missing: an adapter is not there. BadData: it is corrupt, or
        was not made by `train`.
    """
    found = []
    for word in words:
        path, weight = _weighted(word)
        folder = find(path, "MERGE_ADAPTERS")
        made = artifact.load(folder, deep=True)
        if made is None or "base" not in made.manifest["inputs"]:
            raise BadData(
                f"MERGE_ADAPTERS: {folder} has no manifest of `train`, so nothing says which base it was made "
                "for; name the run directory that it was made in"
            )
        found.append(Part(made, weight))
    return found


def _weighted(word: str) -> tuple[Path, float]:
    if "=" not in word or Path(word).exists():
        return Path(word), 1.0
    path, _, said = word.rpartition("=")
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight) or not weight:
        raise BadSetting(
            f"MERGE_ADAPTERS: the weight of {word!r} is no finite number but zero; write PATH=0.5"
        )
    return Path(path), weight
