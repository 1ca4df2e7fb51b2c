"""What is in the layers of an image, whether or not a later layer hides it."""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layer:
    """One that holds files: bytes of them in all, and the instruction that made it."""

    made_by: str
    size: int
    files: dict[str, int]


def saved(image: str, folder: Path) -> Path:
    """The image as `docker save` writes it."""
    path = folder / "image.tar"
    subprocess.run(["docker", "save", "--output", str(path), image], check=True)
    return path


def _tars(archive: tarfile.TarFile) -> Iterator[tuple[dict[str, str], tarfile.TarFile]]:
    """Its layers with what the history says of them, from the lowest."""
    (about,) = json.load(_member(archive, "manifest.json"))
    history = json.load(_member(archive, about["Config"]))["history"]
    filled = [entry for entry in history if not entry.get("empty_layer")]
    for entry, name in zip(filled, about["Layers"], strict=True):
        with tarfile.open(fileobj=_member(archive, name)) as layer:
            yield entry, layer


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = archive.extractfile(name)
    assert isinstance(file, io.BufferedReader)
    return file


def layers(path: Path) -> list[Layer]:
    """The layers of a saved image, from the lowest."""
    with tarfile.open(path) as archive:
        found = []
        for entry, layer in _tars(archive):
            files = {member.name: member.size for member in layer if member.isfile()}
            found.append(Layer(entry.get("created_by", ""), sum(files.values()), files))
        return found


def holding(path: Path, wanted: set[bytes]) -> list[str]:
    """Where one of these occurs in a saved image: `layer:file`, or `config` for what is said about it."""
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            said = _member(archive, member.name).read() if member.name.endswith(".json") else b""
            if any(word in said for word in wanted):
                found.append("config")
        for number, (_, layer) in enumerate(_tars(archive)):
            for member in layer:
                file = layer.extractfile(member) if member.isfile() else None
                content = member.name.encode() + b"\n" + (file.read() if file else b"")
                if any(word in content for word in wanted):
                    found.append(f"{number}:{member.name}")
    return found
