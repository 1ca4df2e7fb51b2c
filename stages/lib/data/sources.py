"""Where rows come from: a hub id, a local file, a folder, a glob, or the embedded sample."""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.lib.run import hub
from stages.lib.run.artifact import Artifact, sha256
from stages.lib.run.exits import BadData, Missing
from stages.lib.run.rundir import Run

SAMPLE = "sample"
LINES = {".jsonl", ".ndjson"}
SUFFIXES = LINES | {".json", ".csv", ".parquet"}
NO_DATA = {"dataset_infos.json", "dataset_dict.json", "state.json"}  # what `datasets` puts beside
# The words by which Hugging Face data sets name the part that is not for training.
HELD_OUT = re.compile(
    r"(?:^|[^a-z])(test|testing|eval|evaluation|validation|valid|val|dev)(?:[^a-z]|$)", re.I
)


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` names it to a person: file and line, or file and row."""

    where: str
    data: Any


@dataclass(frozen=True)
class Source:
    """A data set that was found. `held_out` is its own test split, where it has one."""

    name: str
    revision: str | None = None
    train: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    root: Path | None = None  # of a hub data set in the cache; its files are named from there

    def inputs(self, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """What identifies the contents; hashes in `known` are kept where size and time did not change."""
        if self.name == SAMPLE:
            return {"name": SAMPLE, "python": _python()}
        old = {entry["path"]: entry for entry in (known or {}).get("files", [])}
        files = [self._identify(path, old) for path in [*self.train, *self.held_out]]
        return {"name": self.name, "revision": self.revision, "files": files}

    def _identify(self, path: Path, known: dict[str, Any]) -> dict[str, Any]:
        stat = path.stat()
        if self.root:
            name = str(path.relative_to(self.root))
            return {"path": name, "bytes": stat.st_size, "sha256": sha256(path)}
        entry = {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        old = known.get(str(path), {})
        if all(old.get(key) == value for key, value in entry.items()):
            return old
        found = entry | {"sha256": sha256(path)}
        return old if old.get("sha256") == found["sha256"] else found  # only touched


def _python() -> str:
    import platform

    return platform.python_version()


def reference(dataset: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """What identifies a data set without asking the hub; see `Source.inputs` for `known`."""
    local = Path(dataset).exists() or glob.has_magic(dataset) or dataset == SAMPLE
    return find(dataset, None).inputs(known) if local else {"name": dataset}


def check_unchanged(run: Run, data: Artifact) -> None:
    """Refuse prepared data whose source files have changed since; where they are no more, it stands alone.

    Raises:
        CannotRun: the data is stale.
    """
    known = data.manifest["inputs"]["dataset"]
    files = [] if known.get("revision") else known.get("files", [])  # a commit does not change
    if files and all(Path(entry["path"]).is_file() for entry in files):
        run.check_made_from(data, "dataset", reference(known["name"], known))


def find(dataset: str, revision: str | None) -> Source:
    """Resolve a data set's name to files.

    Args:
        dataset: `sample`, a path to a file or folder, a glob, or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        Missing: there is no such file, folder or repository.
    """
    if dataset == SAMPLE:
        return Source(SAMPLE)
    path = Path(dataset)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise BadData(f"{path} is none of {', '.join(sorted(SUFFIXES))}; convert it first")
        return Source(dataset, train=[path])
    if path.is_dir():
        return _split(dataset, path.rglob("*"), path)
    if glob.has_magic(dataset):
        return _split(dataset, map(Path, glob.glob(dataset, recursive=True)))
    looks_local = path.suffix in SUFFIXES or path.is_absolute() or dataset.startswith(".")
    if looks_local or len(path.parts) != 2:
        raise Missing(
            f"there is no data at {path.absolute()}; a local file must be mounted at the same path"
        )
    folder, commit = hub.snapshot(dataset, revision, "dataset")
    return replace(_split(dataset, folder.rglob("*"), folder), revision=commit, root=folder)


def _split(name: str, paths: Iterable[Path], root: Path | None = None) -> Source:
    files = sorted(
        path
        for path in paths
        if path.suffix in SUFFIXES and path.name not in NO_DATA and not path.is_dir()
    )
    lost = [path for path in files if not path.exists()]
    if lost:
        raise Missing(f"{lost[0]} is a link to nothing; mend it, or remove it")
    held_out = [path for path in files if HELD_OUT.search(_below(path, root))]
    train = [path for path in files if path not in held_out]
    if not train:
        kinds = ", ".join(sorted(SUFFIXES))
        raise Missing(f"{name} holds no training file ({kinds}); name the files with a glob")
    return Source(name, None, train, held_out)


def _below(path: Path, root: Path | None) -> str:
    """The part of a path that tells its split: all below the data set's own folder."""
    return str(path.with_suffix("").relative_to(root)) if root else path.stem


def rows(source: Source, files: list[Path]) -> Iterator[Row]:
    """The rows of some of a source's files, in order, none of them held in memory.

    Raises:
        BadData: a file is not what its name says; the sentence names file and line.
    """
    if source.name == SAMPLE and not files:
        from stages.lib.data import sample

        for number, data in enumerate(sample.rows(), 1):
            yield Row(f"sample row {number}", data)
    for path in files:
        if path.suffix in LINES:
            yield from _json_lines(path)
        elif path.suffix == ".json":
            yield from _json(path)
        else:
            yield from _table(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield Row(f"{path}:{number}", json.loads(line))
            except UnicodeDecodeError as error:
                raise BadData(
                    f"{path}:{number} is not UTF-8 at byte {error.start}; convert the file"
                ) from error
            except json.JSONDecodeError as error:
                raise BadData(
                    f"{path}:{number} is not valid JSON: {error.msg} at character {error.colno}; mend the line"
                ) from error


def _json(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 at byte {error.start}; convert the file") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line under the other name
            yield from _json_lines(path)
            return
        place = f"{path}:{error.lineno}"
        raise BadData(
            f"{place} is not valid JSON: {error.msg} at character {error.colno}; mend the file"
        ) from error
    if not isinstance(content, list):
        content = [content]
    for number, data in enumerate(content, 1):
        yield Row(f"{path} row {number}", data)


def _table(path: Path) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    kind = path.suffix.removeprefix(".")
    if path.stat().st_size == 0:
        return
    try:
        stream = load_dataset(kind, data_files=str(path), split="train", streaming=True)
        for number, data in enumerate(stream, 1):
            yield Row(f"{path} row {number}", dict(data))
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 at byte {error.start}; convert the file") from error
    except (ArrowInvalid, DatasetGenerationError, ValueError) as error:
        raise BadData(f"{path} is not a valid {kind} file: {str(error).splitlines()[0]}") from error
