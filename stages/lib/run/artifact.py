"""Artifacts: folders that are whole or absent, with a manifest that says what made them.

Libraries write to local scratch; `publish` copies each file in sequence into the run directory, hashing as it
goes, and writes `manifest.json` last. No rename is needed, so it holds on ext4, NFS, Lustre and object-store
mounts alike. A folder without a valid manifest is debris.
"""

import contextlib
import errno
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from stages.lib.run import failpoints, manifests, preemption, redaction, volume
from stages.lib.run.exits import BadData, CannotWrite, InUse, TryAgain
from stages.lib.run.holder import ANYONE, Holder
from stages.lib.run.progress import say
from stages.lib.run.volume import Stream
from stages.lib.run.volume import check_room as check_room
from stages.lib.run.volume import sha256 as sha256
from stages.lib.run.volume import write as write
from stages.lib.run.volume import writing as writing

MANIFEST = "manifest.json"
DRAFT = "draft.json"  # beside what is unfinished: what it is made from, or nothing


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 over the names, sizes and hashes of the files: the identity of the contents."""
        return _digest(self.manifest["files"])

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured."""
        return dict(self.manifest["metrics"])

    def setting(self, variable: str) -> Any:
        """The value that a setting had when this was made."""
        return self.manifest["settings"][variable]["value"]


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


class Notes(Protocol):
    """What a stopped attempt has finished; see `stages.lib.run.parts.Parts`."""

    known: dict[str, Any]

    def keep(self, name: str, result: Any) -> Any: ...


class Draft:
    """An artifact that grows file by file in its place, and has no manifest until it is whole.

    As a context it retires what was not finished: a full disk is not helped by half an artifact. With notes it
    leaves its finished files to the same command, where that is to go on.

    Args:
        target: its folder; what was there is retired, but for files that the notes say are finished.
        by: who writes.
    """

    def __init__(self, target: Path, by: Holder = ANYONE, notes: Notes | None = None) -> None:
        self.path, self.by, self._notes = target, by, notes
        self._entries: dict[str, dict[str, Any]] = self._finished() if notes else {}
        self._whole: dict[str, Any] | None = None

    def __enter__(self) -> "Draft":
        self.by.check_held()
        with writing(self.path):
            failpoints.reach("publish.begin")
            if self._entries:
                self._drop_unfinished()
            else:
                self._begin(b"")
        return self

    def _finished(self) -> dict[str, dict[str, Any]]:
        """The files of a stopped attempt that are as its notes say."""
        assert self._notes is not None
        if (self.path / MANIFEST).is_file():
            return {}
        return {
            name: entry
            for name, entry in self._notes.known.items()
            if (self.path / name).is_file() and sha256(self.path / name) == entry["sha256"]
        }

    def _drop_unfinished(self) -> None:
        kept = {DRAFT, *self._entries}  # files without that mark would be taken for nobody's
        for path in self.path.rglob("*"):
            if path.is_file() and path.relative_to(self.path).as_posix() not in kept:
                path.unlink()

    def _begin(self, made_from: bytes) -> None:
        check_ours(self.path)
        retire(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            volume.patiently(lambda: volume.write(self.path / DRAFT, made_from, replace=True))
        except OSError:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._whole is None:
            with preemption.deferred(), contextlib.suppress(OSError, InUse):
                self.by.check_held()  # it may be another's by now
                if self._notes is not None and isinstance(error, TryAgain):
                    (self.path / MANIFEST).unlink(missing_ok=True)  # nobody may take it for whole
                else:
                    retire(self.path)

    @property
    def size(self) -> int:
        """Bytes of its files so far."""
        return sum(entry["bytes"] for entry in self._entries.values())

    @property
    def digest(self) -> str:
        """sha256 over the names, sizes and hashes of its files so far."""
        return _digest(self._entries)

    def holds(self, name: str) -> bool:
        """Whether a file is finished already."""
        return name in self._entries

    def take(self, source: Path, name: str | None = None) -> None:
        """Copy a finished file into it, under its own name or another.

        Raises:
            CannotWrite: the disk is full or the folder cannot be written.
        """
        name = name or source.name

        def attempt() -> dict[str, Any]:
            failpoints.reach("publish.file")
            (self.path / name).unlink(missing_ok=True)
            return volume.copy(source, self.path / name, redaction.blocks)

        self.by.check_held()
        with writing(self.path):
            self._entries[name] = volume.patiently(attempt)
        if self._notes is not None:
            self._notes.keep(name, self._entries[name])

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Stream]:
        """A new file of it, for what is too large to lie finished elsewhere; it is in it once it is closed."""
        with volume.stream(self.path / name) as stream:
            yield stream
        self._entries[name] = stream.entry()

    def move(self, source: Path) -> None:
        """As `take`; the source is gone then."""
        self.take(source)
        source.unlink()

    def finish(self, manifest: dict[str, Any]) -> Artifact:
        """Write its manifest, with the sizes and hashes of its files: now it is there."""
        whole = (
            {"schema": manifests.SCHEMA}
            | redaction.plain(manifest)
            | {"files": dict(sorted(self._entries.items()))}
        )
        content = json.dumps(whole, indent=1, allow_nan=False).encode() + b"\n"
        self.by.check_held()
        with preemption.deferred(), writing(self.path):
            volume.patiently(lambda: self._seal(content))
            failpoints.reach("publish.written")
            volume.flush_folder(self.path)
            failpoints.reach("publish.done")
            self._whole = whole
            with contextlib.suppress(OSError):  # beside a manifest it means nothing
                (self.path / DRAFT).unlink(missing_ok=True)
            self.by.progressed()
        return Artifact(self.path, whole)

    def _seal(self, content: bytes) -> None:
        path = self.path / MANIFEST
        failpoints.reach("publish.manifest")
        path.unlink(missing_ok=True)  # what an attempt has left
        volume.write(path, content)
        if path.read_bytes() != content:
            raise OSError(errno.EIO, "it reads otherwise than it was written", str(path))


def publish(source: Path, target: Path, manifest: dict[str, Any], by: Holder = ANYONE) -> Artifact:
    """Copy the finished files of `source` to `target`; `manifest` gets their sizes and hashes, and goes last.

    Raises:
        CannotWrite: there is no room, and what was there stays; or `target` cannot be written, and nothing is
            left of it. TryAgain: the volume failed more than once, or gives back other bytes.
    """
    json.dumps(manifest, allow_nan=False)  # fails here, and not when the old one is gone
    check_room(target, volume.size(source) - volume.size(target))
    with preemption.deferred():
        with Draft(target, by) as draft:
            for path in sorted(path for path in source.rglob("*") if path.is_file()):
                draft.take(path, path.relative_to(source).as_posix())
            made = draft.finish(manifest)
        try:
            load(target, deep=True)
        except BadData as error:
            retire(target)
            raise TryAgain(f"the volume lost what was written: {error.message}") from error
    return made


def retire(target: Path) -> None:
    """Remove an artifact: its manifest first, so that what remains half-way is debris, and marked as ours."""
    if target.is_dir():
        for name in foreign(target):
            say(f"removing {target / name}, which no manifest names, with what lies beside it")
        with contextlib.suppress(OSError):  # where the disk is full, removing must do without
            (target / DRAFT).touch()
        (target / MANIFEST).unlink(missing_ok=True)
        failpoints.reach("retire.manifest")
        volume.remove(target, last=DRAFT)


def check_ours(target: Path) -> None:
    """Refuse to replace a folder that no stage made: somebody's data may lie in it.

    Raises:
        CannotWrite: it holds files, and neither a manifest nor the mark of an unfinished artifact.
    """
    if not target.is_dir() or any((target / name).exists() for name in (MANIFEST, DRAFT)):
        return
    names = sorted(path.name for path in target.iterdir())
    if names:
        raise CannotWrite(
            f"{target} holds {names[0]!r} and no manifest: no stage made it, and it would be removed; move it "
            "away, or choose another RUN_DIR"
        )


def foreign(folder: Path) -> list[str]:
    """Files in an artifact that its manifest does not name."""
    try:
        manifest = manifests.read(folder / MANIFEST)
    except BadData:
        manifest = None  # of which nothing is believed
    if manifest is None:
        return []
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return sorted(found - {*manifest["files"], MANIFEST, DRAFT})


def load(folder: Path, deep: bool = False) -> Artifact | None:
    """The artifact in `folder`, or None where there is none; `deep` hashes every file again.

    Raises:
        BadData: a file is missing, has another size or hash, or a name leaves the folder.
    """
    said = volume.patiently(lambda: manifests.read(folder / MANIFEST))
    if said is None:
        return None
    for name, entry in said["files"].items():
        manifests.check_file(folder, name, entry["bytes"])
        if deep and sha256(folder / name) != entry["sha256"]:
            raise BadData(
                f"{folder / name} does not have the sha256 that its manifest says: it is corrupt; "
                f"{manifests.RERUN}"
            )
    return Artifact(folder, said)


def fetch(made: Artifact, folder: Path) -> Path:
    """Copy an artifact to local files, and nothing that lies beside them.

    Raises:
        BadData: what is read is not what its manifest says.
    """
    for name, entry in made.manifest["files"].items():
        source, target = made.path / name, folder / name
        if volume.patiently(functools.partial(volume.copy, source, target)) != entry:
            raise BadData(f"{source} is corrupt: it is not what its manifest says")
    return folder
