"""Prepared rows of an attempt that was stopped: kept in the run directory until the artifact is there.

What is kept is what became of single chunks, each under a digest of all that went in. A later attempt takes
what it would make again, and makes the rest; of rows that have changed since it takes nothing. Work of a few
seconds leaves no shard.
"""

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages import __version__
from stages.lib.data import duplicates
from stages.lib.data.preparation import Batch, Job, Outcome, Preparer
from stages.lib.run import artifact, failpoints, preemption
from stages.lib.run.artifact import Artifact
from stages.lib.run.exits import BadData
from stages.lib.run.progress import say
from stages.lib.run.rundir import Run

FOLDER = "data-shards"
FILE, INDEX = "batches.bin", "index.json"
SECONDS = 5.0  # of work in a shard
SPARING = 30  # and so many times what the last one took to write
DIGEST, MARK = Outcome._fields.index("digest"), Outcome._fields.index("mark")


class Made(NamedTuple):
    """What became of a job, as `pack` has it, under the job's key."""

    key: bytes
    content: bytes


def key(job: Job) -> bytes:
    """A digest of all that a job holds, the same in every process and attempt."""
    hashed = hashlib.blake2b(digest_size=16)
    chunk = job.chunk
    about = (type(chunk).__name__, chunk.unit, chunk.line, chunk.byte, tuple(job.shape), job.ask)
    for part in _parts((about, chunk.payload)):
        hashed.update(part)
    return hashed.digest()


def _parts(value: Any) -> Iterable[bytes]:
    # Not pickle: it depends on which equal strings are one object, and so on the process.
    if isinstance(value, bytes):
        yield b"%d:" % len(value)
        yield value
    elif isinstance(value, (list, tuple)):
        yield b"%d[" % len(value)
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode(errors="surrogatepass") + b";"


def pack(batch: Batch) -> bytes:
    """A batch as bytes; no pickle, since they are read from a disk too."""
    outcomes = json.dumps(batch.outcomes, default=_plain, separators=(",", ":")).encode()
    arrays = (batch.starts, batch.ids, np.packbits(batch.learned, bitorder="little"))
    sizes = np.array([len(batch.starts), len(batch.ids)], dtype=np.int64)
    return b"".join((sizes.tobytes(), *(array.tobytes() for array in arrays), outcomes))


def _plain(value: Any) -> str:
    return (value if isinstance(value, bytes) else duplicates.dumps(value)).hex()


def unpack(content: bytes) -> Batch:
    """The batch that `pack` was given."""
    pieces, tokens = np.frombuffer(content, np.int64, 2).tolist()
    at = 16
    starts = np.frombuffer(content, np.int64, pieces, at)
    at += starts.nbytes
    ids = np.frombuffer(content, np.int32, tokens, at)
    at += ids.nbytes
    packed = np.frombuffer(content, np.uint8, (tokens + 7) // 8, at)
    learned = np.unpackbits(packed, count=tokens, bitorder="little").view(bool)
    outcomes = [_outcome(values) for values in json.loads(content[at + packed.nbytes :])]
    return Batch(outcomes, ids, learned, starts)


def _outcome(values: list[Any]) -> Outcome:
    values[DIGEST] = bytes.fromhex(values[DIGEST])
    if values[MARK] is not None:
        values[MARK] = duplicates.loads(bytes.fromhex(values[MARK]))
    return Outcome._make(values)


class Shards:
    """What was prepared of one artifact, in this attempt and in those before it.

    Args:
        base: what the artifact will record of its base. scratch: for the shard that is growing.
        run_dir: whose shards they are. publish: as `Run.publish`.

    Attributes:
        rows_resumed: rows of this attempt that an earlier one had prepared.
    """

    def __init__(
        self, prepare: Preparer, base: dict[str, Any], scratch: Path, run_dir: Path,
        publish: Callable[[str, Path, dict[str, Any], dict[str, Any]], Artifact],
    ) -> None:  # fmt: skip
        self.prepare, self.inputs, self.publish = prepare, _identity(prepare, base), publish
        self.run_dir, self.folder, self.scratch = run_dir, run_dir / FOLDER, scratch / "shard"
        self.rows_resumed = self._number = 0
        self._kept: dict[bytes, tuple[Path, int, int]] = {}
        self._index: list[tuple[str, int]] = []
        self._due = 0.0
        self._cost = 0.0
        self._load()

    def __call__(self, job: Job) -> Made:
        """Prepare a job, in any process."""
        return Made(key(job), pack(self.prepare(job)))

    def known(self, job: Job) -> Made | None:
        """What an earlier attempt made of a job, if it did."""
        if not self._kept or (place := self._kept.get(found := key(job))) is None:
            return None
        path, start, size = place
        with path.open("rb") as file:
            file.seek(start)
            return Made(found, file.read(size))

    def add(self, made: Made) -> Batch:
        """Take what became of a job; it is kept if it is new, and its shard written when that is due."""
        batch = unpack(made.content)
        if made.key in self._kept:
            self.rows_resumed += len(batch.outcomes)
            return batch
        now = time.monotonic()
        if not self._index:
            self._due = now + max(SECONDS, SPARING * self._cost)
            with artifact.writing(self.scratch):
                self.scratch.mkdir()
        with artifact.writing(self.scratch), (self.scratch / FILE).open("ab") as file:
            file.write(made.content)
        self._index.append((made.key.hex(), len(made.content)))
        if now >= self._due:
            self.save()
        return batch

    def save(self) -> None:
        """Publish the shard that is growing."""
        began = time.monotonic()
        with preemption.deferred():
            with artifact.writing(self.scratch):
                (self.scratch / INDEX).write_text(json.dumps(self._index))
                failpoints.reach("shard.save")
            self._number += 1
            name = f"{FOLDER}/shard-{self._number:05d}"
            self.publish(name, self.scratch, self.inputs, {"chunks": len(self._index)})
            with artifact.writing(self.folder):
                failpoints.reach("shard.saved")
            shutil.rmtree(self.scratch)
            self._index = []
        self._cost = time.monotonic() - began
        preemption.check()  # a stop that was asked for meanwhile costs nothing now

    def _load(self) -> None:
        """Find what is there, every byte verified; what cannot be used goes away."""
        for path in sorted(self.folder.glob("shard-*")):
            self._number = max(self._number, int(path.name.removeprefix("shard-")))
            found = self._whole(path)
            if found is None:
                with artifact.writing(path):
                    artifact.retire(path)
            elif changed := self._changed(found):
                say(f"{self.folder} was begun otherwise ({changed}): starting afresh")
                return self.clear()
            else:
                self._note(path)
        if self._kept:
            say(f"going on with {len(self._kept)} chunks that were prepared before")
        return None

    def _whole(self, path: Path) -> Artifact | None:
        try:
            found = artifact.load(path, deep=True)
        except BadData as error:
            say(f"making a shard again: {error.message.partition(';')[0]}")
            return None
        if found is None:
            say(f"making {path} again: it was cut off while it was written")
        return found

    def _changed(self, found: Artifact) -> str:
        was = found.manifest["inputs"]
        words = []
        for name, new in self.inputs.items():
            old = was.get(name)
            if old != new:
                plain = not isinstance(new, dict)
                words.append(f"{name} was {old}, is now {new}" if plain else f"another {name}")
        return "; ".join(words)

    def _note(self, path: Path) -> None:
        start = 0
        for name, size in json.loads((path / INDEX).read_bytes()):
            self._kept[bytes.fromhex(name)] = (path / FILE, start, size)
            start += size

    def clear(self) -> None:
        """Remove them all: the artifact is there, or they are of no use."""
        self._kept = {}
        clear(self.run_dir)


def clear(run_dir: Path) -> None:
    """Remove the shards of a run; of each the manifest first."""
    folder = run_dir / FOLDER
    try:
        with preemption.deferred():
            for path in sorted(folder.glob("shard-*")):
                failpoints.reach("shard.clear")
                artifact.retire(path)
            artifact.retire(folder)
    except OSError as error:  # the artifact is there all the same, and the exit code has to say so
        say(f"{folder} could not be removed ({error.strerror}); the same command tries again")


def sweep(run: Run) -> None:
    """Remove what a kill between publishing the artifact and removing its shards has left."""
    if (run.folder / FOLDER).is_dir():
        with run.work():
            clear(run.folder)


def _identity(prepare: Preparer, base: dict[str, Any]) -> dict[str, Any]:
    """All that shapes what becomes of a job, beside the job."""
    form = prepare.format
    about = form.recorded()
    if "strftime_now" not in (form.source or ""):
        del about["date"]
    words = json.dumps([about, form.tokens.names], sort_keys=True).encode()
    return {
        "MAX_LENGTH": prepare.limit,
        "ON_LONG": prepare.fitter.policy,
        "SEED": prepare.seed,
        "near duplicates": prepare.near,
        "chat format": {"name": form.name, "sha256": hashlib.sha256(words).hexdigest()},
        "base": base,
        "versions": {
            "lora-stages": __version__, "tokenizers": importlib.metadata.version("tokenizers"),
        },
    }  # fmt: skip
