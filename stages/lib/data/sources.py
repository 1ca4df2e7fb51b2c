"""Where rows come from: hub ids, local files, folders, globs, URLs, or the embedded sample; one or several."""

import glob
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from stages.lib.data import reading, remote
from stages.lib.data.reading import Chunk, Row, Rows
from stages.lib.data.wanted import Wanted, parse, plain
from stages.lib.run import access, fetched
from stages.lib.run.artifact import Artifact, sha256
from stages.lib.run.exits import BadData, Missing
from stages.lib.run.rundir import Run

__all__ = [
    "SAMPLE", "Source", "Wanted", "check_unchanged", "chunks", "copy", "elsewhere", "find", "identity",
    "oddities", "parse", "plain", "reference",
]  # fmt: skip
SAMPLE = "sample"
KINDS = ", ".join(sorted(reading.KINDS)) + ", and with .gz or .zst"
# What `datasets` puts beside its files, and into them when it has computed something.
NO_DATA = re.compile(
    r"(dataset_infos|dataset_info|dataset_dict|state)\.json|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow"
)
# The words by which Hugging Face data sets name the part that is not for training.
HELD_OUT = re.compile(
    r"(?:^|[^a-z])(test|testing|eval|evaluation|validation|valid|val|dev)(?:[^a-z]|$)", re.I
)


@dataclass(frozen=True)
class Source:
    """A data set that was found.

    Attributes:
        name: as it may be shown and recorded.
        held_out: its own test split, where it has one.
        root: of a hub data set in the cache; its files are named from there.
        urls: of files that were copied from a store.
    """

    name: str
    weight: float = 1.0
    revision: str | None = None
    train: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    root: Path | None = None
    urls: dict[Path, str] = field(default_factory=dict)

    def inputs(self, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """What identifies the contents; hashes in `known` are kept where size and time did not change."""
        about = {"name": self.name, "weight": self.weight}
        if self.name == SAMPLE:
            return about | {"python": _python()}
        old = _files(known or {})
        files = [self._identify(path, old) for path in [*self.train, *self.held_out]]
        return about | {"revision": self.revision, "files": files}

    def _identify(self, path: Path, known: dict[str, Any]) -> dict[str, Any]:
        stat = path.stat()
        if self.root or self.urls:
            name = self.urls[path] if self.urls else str(path.relative_to(self.root or path))
            return {"path": name, "bytes": stat.st_size, "sha256": sha256(path)}
        entry = {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        old = known.get(str(path), {})
        if all(old.get(key) == value for key, value in entry.items()):
            return old
        found = entry | {"sha256": sha256(path)}
        return old if old.get("sha256") == found["sha256"] else found  # only touched

    def shown(self, path: Path) -> str:
        """What a person calls one of the files."""
        if self.root:
            return f"{self.name}/{path.relative_to(self.root)}"
        return self.urls.get(path, str(path))


def _python() -> str:
    import platform

    return platform.python_version()


def find(dataset: str, revision: str | None, scratch: Path) -> list[Source]:
    """Resolve DATASET to files.

    Args:
        revision: branch, tag or commit of a hub id.
        scratch: where files behind URLs are copied to, in `sources/`.

    Raises:
        Missing: there is no such file, folder, repository or address.
    """
    wanted = parse(dataset, revision)
    return [_find(item, scratch / "sources" / str(n)) for n, item in enumerate(wanted)]


def _find(wanted: Wanted, folder: Path) -> Source:
    if wanted.is_url:
        found = _behind_url(wanted.name, folder)
    else:
        found = _local(wanted.name) or _on_hub(wanted.name, wanted.revision)
    return replace(found, weight=wanted.weight)


def _local(name: str) -> Source | None:
    """A source that is on this machine, or None."""
    if name == SAMPLE:
        return Source(SAMPLE)
    path = Path(name)
    if path.is_file():
        _check_kind(name)
        return Source(name, train=[path])
    if path.is_dir():
        return _split(name, _below(path))
    if glob.has_magic(name):
        found = map(Path, glob.glob(name, recursive=True))
        return _split(name, {path: path.stem for path in found})
    return None


def _below(folder: Path) -> dict[Path, str]:
    """All files of a folder, each with the part of its path that tells its split."""
    return {
        path: str(path.relative_to(folder).with_suffix(""))
        for path in folder.rglob("*")
        if path != folder
    }


def elsewhere(dataset: str, revision: str | None) -> list[Wanted]:
    """The items of DATASET that are not on this machine: on the hub, or behind URLs.

    Raises:
        Missing: an item is neither, nor there.
    """
    found = [item for item in parse(dataset, revision) if item.is_url or not _local(item.name)]
    for item in found:
        if not item.is_url:
            _check_hub_id(item.name)
    return found


def copy(url: str, folder: Path) -> dict[Path, str]:
    """Copy the data behind a URL into a folder: the plain URL of each copy.

    Raises:
        Missing: there is none. BadData: it is of no kind that is read.
    """
    if remote.scheme(url) in remote.WEB:
        _check_kind(remote.plain(url))
    return {copy: shown for shown, copy in remote.fetch(url, folder, _is_data)}


def _behind_url(url: str, folder: Path) -> Source:
    base = remote.plain(url)
    urls = fetched.copies(base) or copy(url, folder)
    is_glob = glob.has_magic(base) and base not in urls.values()
    places = {
        copy: PurePath(shown).stem if is_glob else shown.removeprefix(base)
        for copy, shown in urls.items()
    }
    return replace(_split(base, places), urls=urls)


def _on_hub(name: str, revision: str | None) -> Source:
    _check_hub_id(name)
    folder, commit = access.snapshot(name, revision, "dataset")
    return replace(_split(name, _below(folder)), revision=commit, root=folder)


def _check_hub_id(name: str) -> None:
    path = Path(name)
    looks_local = reading.kind_of(path) or path.is_absolute() or name.startswith(".")
    if looks_local or len(path.parts) != 2:
        raise Missing(
            f"there is no data at {path.absolute()}; a local file must be mounted at the same path"
        )


def _check_kind(name: str) -> None:
    if not reading.kind_of(name):
        raise BadData(f"{name} is none of {KINDS}; convert it first")


def _is_data(name: str) -> bool:
    path = PurePath(name)
    return bool(reading.kind_of(path)) and not NO_DATA.fullmatch(path.name)


def _split(name: str, places: dict[Path, str]) -> Source:
    """The data files among some, parted by the words in their `places`."""
    files = sorted(path for path in places if _is_data(str(path)) and not path.is_dir())
    lost = [path for path in files if not path.exists()]
    if lost:
        raise Missing(f"{lost[0]} is a link to nothing; mend it, or remove it")
    held_out = [path for path in files if HELD_OUT.search(places[path])]
    train = sorted(set(files) - set(held_out))
    if not train:
        raise Missing(f"{name} holds no training file ({KINDS}); name the files with a glob")
    return Source(name, train=train, held_out=held_out)


def identity(
    dataset: str, found: list[Source], known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a manifest says of DATASET and its contents; see `Source.inputs` for `known`."""
    old = itertools.chain((known or {}).get("sources", []), itertools.repeat(None))
    return {
        "name": plain(dataset),
        "sources": [one.inputs(was) for one, was in zip(found, old, strict=False)],
    }


def reference(dataset: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """What identifies DATASET now, without asking the hub or a store: of those it repeats what is `known`."""
    before = itertools.chain((known or {}).get("sources", []), itertools.repeat({}))
    now = [_now(item, was) for item, was in zip(parse(dataset), before, strict=False)]
    return {"name": plain(dataset), "sources": now}


def _now(wanted: Wanted, known: dict[str, Any]) -> dict[str, Any]:
    local = None if wanted.is_url else _local(wanted.name)
    if local:
        return replace(local, weight=wanted.weight).inputs(known)
    asked = {"name": remote.plain(wanted.name), "weight": wanted.weight}
    is_same = all(known.get(key) == value for key, value in asked.items())
    return known if is_same else asked


def check_unchanged(run: Run, data: Artifact) -> None:
    """Refuse prepared data whose source files have changed since; where they are no more, it stands alone.

    Raises:
        CannotRun: the data is stale.
    """
    for known in data.manifest["inputs"]["dataset"].get("sources", []):
        was, now = _files(known), _files(_again(known))
        for path in sorted(was.keys() | now.keys()):
            # One file at a time, so that the refusal names it.
            one = replace(data, manifest={"inputs": {"dataset": was.get(path)}})
            run.check_made_from(one, "dataset", now.get(path))


def _files(source: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["path"]: entry for entry in source.get("files", [])}


def _again(known: dict[str, Any]) -> dict[str, Any]:
    """A source as it is now, if its files are on this machine: what comes from elsewhere does not change."""
    files = known.get("files", [])
    there = all("mtime_ns" in entry and Path(entry["path"]).is_file() for entry in files)
    local = _local(known["name"]) if files and there else None
    return replace(local, weight=known["weight"]).inputs(known) if local else known


def oddities(source: Source) -> str:
    """What is accepted at the beginning of a source's files, in words; empty where there is nothing."""
    files = [*source.train, *source.held_out]
    lists = [reading.oddities(p, str(reading.kind_of(p)), source.shown(p)) for p in files]
    found = dict.fromkeys(what for one in lists for what in one)
    return f"accepted: {', '.join(found)}" if found else ""


def chunks(source: Source, files: list[Path]) -> Iterator[tuple[str, Chunk]]:
    """The rows of some of a source's files, in order: what people call the file, and a chunk of it.

    Raises:
        BadData: a file is not what its name says. Missing: it is gone.
    """
    if source.name == SAMPLE and not files:
        yield from ((SAMPLE, chunk) for chunk in _sample())
    for path in files:
        name = source.shown(path)
        try:
            for chunk in reading.chunks(path, str(reading.kind_of(path)), name):
                yield name, chunk
        except FileNotFoundError as error:
            raise Missing(f"{name} is gone; bring it back, then run the same command") from error


def _sample() -> Iterator[Chunk]:
    from stages.lib.data import sample

    found = enumerate(sample.rows(), 1)
    while rows := [Row(number, None, data) for number, data in itertools.islice(found, 512)]:
        yield Rows(rows, rows[0].line, 0, "row")
