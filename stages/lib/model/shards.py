"""A model's tensors in its safetensors files: read one by one, and written in shards with an index."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stages.lib.run import artifact

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST = 2 * 2**30  # bytes of a shard; so much lies in memory while it is written
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Shards(Mapping[str, torch.Tensor]):
    """The tensors of a model folder by name; each is read when it is asked for, and kept by nobody.

    Args:
        folder: with one safetensors file or several.

    Attributes:
        shapes: of each, in the order of the files. elements: how many numbers each has. types: torch's.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.elements: dict[str, int] = {}
        self.types: dict[str, torch.dtype] = {}
        index = folder / INDEX
        names = {SINGLE}
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
        for path in (folder / name for name in sorted(names)):
            for name, entry in _header(path).items():
                self.files[name] = path
                self.shapes[name] = tuple(entry["shape"])
                self.elements[name] = math.prod(entry["shape"])
                self.types[name] = TYPES[entry["dtype"]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        # Opened for each: what was mapped for others is no longer held.
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.clone()


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Type, shape and place of each tensor of a file, in their order."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]))


def write(
    sizes: Mapping[str, int], tensor: Callable[[str], torch.Tensor], folder: Path,
    done: Callable[[Path], object], there: Callable[[str], bool] = lambda file: False,
) -> None:  # fmt: skip
    """Write tensors into shards of at most `LARGEST` bytes (but for a larger tensor), and their index.

    Args:
        sizes: bytes of each tensor by its name. tensor: makes one. done: is given each file when it is whole,
            and may take it away. there: whether a file of this name is finished already.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > LARGEST:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    where: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        where |= dict.fromkeys(names, file)
        if not there(file):
            _save({name: tensor(name) for name in names}, folder / file)
            done(folder / file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        done(folder / INDEX)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with artifact.writing(path):
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            said = re.search(r"os error (\d+)", str(error))  # its only trace of a full disk
            if not said:
                raise
            number = int(said[1])
            raise OSError(number, os.strerror(number), str(path)) from error
