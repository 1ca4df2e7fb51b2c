"""Copies that are verified: an artifact by its manifest, which goes last; other files by size and sha256."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from stages.lib.jobs.places import Place, errors, told_apart
from stages.lib.run import heartbeat, preemption
from stages.lib.run.exits import BadData, TryAgain
from stages.lib.run.lease import HOLDER
from stages.lib.run.progress import Progress

MANIFEST = "manifest.json"


@dataclass
class Outcome:
    """What a copy came to: files and bytes copied, files that were equal already."""

    copied: list[str] = field(default_factory=list)
    bytes: int = 0
    equal: list[str] = field(default_factory=list)
    by_manifest: int = 0


def copy(source: Place, target: Place) -> Outcome:
    """Bring a file, or all files of a folder, to another place; what is equal there already is passed over.

    Raises:
        BadData: a file is not what its manifest says. TryAgain: the target gives back other bytes.
    """
    try:
        return _copy(source, target)
    except errors() as error:
        told = told_apart(error, f"{source.shown} or {target.shown}")
        if told is error:
            raise
        raise told from error


def _copy(source: Place, target: Place) -> Outcome:
    sizes = {name: size for name, size in source.sizes().items() if not _is_holder(name)}
    if set(sizes) == {""} and target.is_folder():
        target = target.inside(source.path.rpartition("/")[2])
    known = _manifests(source, sizes)
    done = Outcome()
    megabytes = -(-sum(sizes.values()) // 10**6)
    with Progress(megabytes, "MB", name="copying") as progress:
        seen = 0
        for name in sorted(sizes, key=_last):
            preemption.check()
            _take(source, target, name, sizes, known.get(name), done)
            seen += sizes[name]
            progress.update(-(-seen // 10**6))
    return done


def _take(
    source: Place, target: Place, name: str, sizes: dict[str, int], wanted: dict[str, Any] | None,
    done: Outcome,
) -> None:  # fmt: skip
    """Copy a file unless it is equal; `wanted`: what its manifest says of it."""
    if wanted and wanted["bytes"] != sizes[name]:
        raise _unlike(source, name)
    digest = wanted["sha256"] if wanted else None
    if _is_equal(source, target, name, sizes[name], digest):
        done.equal.append(name)
    else:
        _retire(target, name, sizes)
        _one(source, target, name, digest)
        done.copied.append(name)
        done.bytes += sizes[name]
    done.by_manifest += bool(wanted)


def _last(name: str) -> tuple[bool, int, str]:
    """Manifests behind all else, the outermost last: where one is, what it names is there too."""
    path = PurePosixPath(name)
    return path.name == MANIFEST, -len(path.parts) if path.name == MANIFEST else 0, name


def _manifests(source: Place, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What the manifests among the files say of others."""
    known: dict[str, dict[str, Any]] = {}
    for name in sizes:
        path = PurePosixPath(name)
        if path.name != MANIFEST:
            continue
        try:
            files = json.loads(b"".join(source.blocks(name)))["files"]
            said = {str(path.parent / inner): dict(about) for inner, about in files.items()}
            sane = all(type(e["bytes"]) is int and len(e["sha256"]) == 64 for e in said.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # of something else, or cut off: its files are compared like any others
        if sane:
            _check_whole(source, name, said, sizes)
            known |= said
    return known


def _check_whole(source: Place, manifest: str, said: dict[str, Any], sizes: dict[str, int]) -> None:
    for name in said:
        if name not in sizes:
            raise BadData(
                f"{source.shown} has no {name}, which its {manifest} names; run the stage that makes it again"
            )


def _unlike(source: Place, name: str) -> BadData:
    return BadData(
        f"{name} in {source.shown} is not what its manifest says: it is corrupt; "
        "run the stage that makes it again"
    )


def _is_equal(source: Place, target: Place, name: str, size: int, digest: str | None) -> bool:
    return target.size(name) == size and target.sha256(name) == (digest or source.sha256(name))


def _is_holder(name: str) -> bool:
    """Whether it says who works on a run: nobody does on a copy."""
    return PurePosixPath(name).name in (HOLDER, heartbeat.FILE)


def _retire(target: Place, name: str, sizes: dict[str, int]) -> None:
    """Before a file of an artifact changes, its manifest goes: half of each is nobody's artifact."""
    for folder in PurePosixPath(name).parents:
        manifest = str(folder / MANIFEST)
        if manifest in sizes:  # which is copied later on
            target.drop(manifest)


def _one(source: Place, target: Place, name: str, digest: str | None) -> None:
    def stoppable() -> Iterator[bytes]:
        for block in source.blocks(name):
            preemption.check()
            yield block

    read = target.write(name, stoppable())
    if digest and read != digest:
        target.drop(name)
        raise _unlike(source, name)
    if target.sha256(name) != read:
        target.drop(name)
        raise TryAgain(
            f"{target.shown} gave back other bytes of {name or 'it'} than were written; run the same command"
        )
