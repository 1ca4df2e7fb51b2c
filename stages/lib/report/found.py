"""What there is of a run: its artifacts, how far it is, and what became of its attempts. It is only read."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.report import comparison
from stages.lib.run import artifact, attempts, checkpoints, lease, notes
from stages.lib.run.artifact import Artifact
from stages.lib.run.exits import ERROR, BadData
from stages.lib.run.rundir import MADE_BY

MERGE_REPORT, HEARTBEAT = "merge_report.json", "heartbeat.json"
PARTS = {"train": "train.arrow", "held_out": "held_out.arrow"}
# What an artifact was made from, by the name that its manifest has for it.
MADE_FROM = {
    "adapter": ("data", "data"), "evaluation": ("adapter", "adapter"), "merged": ("adapter", "adapter"),
    "generations": ("adapter", "adapter"), "gguf": ("merged", "merged"),
}  # fmt: skip
Facts = dict[str, Any]


@dataclass(frozen=True)
class Readers:
    """How the rooms read their own files; see `prepared.account` and `history.so_far`."""

    account: Callable[[Path], tuple[Any, int]]
    so_far: Callable[[Path], Facts]


@dataclass(frozen=True)
class Found:
    """A run directory as it is now.

    Attributes:
        artifacts: those that are whole, by name. broken: why others are not. stale: what was made from others.
        training: `history`, `step`, `steps` and `done`; None where nothing was trained yet.
        evaluation, merge: what these wrote of their results, None where they have not.
        lengths: tokens of a row -> rows, of each part of the data. learned: tokens to learn of each part.
        attempts: their records, oldest first. error: how the last command failed. holder: who is at work,
            and whether `here`. beat: how far that is, as its heartbeat says.
    """

    folder: Path
    artifacts: dict[str, Artifact]
    broken: dict[str, str]
    stale: dict[str, str]
    training: Facts | None
    evaluation: Facts | None
    merge: Facts | None
    lengths: dict[str, Counter[int]]
    learned: dict[str, int]
    attempts: list[Facts]
    error: Facts | None
    holder: lease.Seen | None
    beat: Facts

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def empty(self) -> bool:
        """Whether nothing was ever made or tried here."""
        return not (self.artifacts or self.broken or self.training or self.attempts or self.error)

    def metrics(self, name: str) -> Facts:
        """Of an artifact; none where it is not there."""
        return self.artifacts[name].metrics if name in self.artifacts else {}


def look(folder: Path, readers: Readers) -> Found:
    """All that there is of a run."""
    found: dict[str, Artifact] = {}
    broken: dict[str, str] = {}
    for name in MADE_BY:
        try:
            if made := artifact.load(folder / name):
                found[name] = made
        except BadData as error:
            broken[name] = error.message
    parts = {
        part: readers.account(found["data"].path / file)
        for part, file in PARTS.items()
        if "data" in found
    }
    failed = notes.read(folder / ERROR) or {}
    return Found(
        folder, found, broken, dict(_stale(found)), _training(folder, found.get("adapter"), readers),
        comparison.read(found["evaluation"].path) if "evaluation" in found else None,
        _json(found["merged"].path / MERGE_REPORT) if "merged" in found else None,
        {part: Counter(lengths.tolist()) for part, (lengths, _) in parts.items()},
        {part: learned for part, (_, learned) in parts.items()},
        [record for _, record in attempts.read(folder)],
        # Of a command that makes something: a question that was not answered is no failed run.
        failed if failed.get("stage") in MADE_BY.values() else None,
        _holder(folder),
        notes.read(folder / HEARTBEAT) or {},
    )  # fmt: skip


def _holder(folder: Path) -> lease.Seen | None:
    """Who seems to work on a run; nobody that is known to be dead."""
    seen = lease.seen(folder)
    return None if seen and seen.alive is False else seen


def _json(path: Path) -> Facts:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _stale(found: dict[str, Artifact]) -> Iterator[tuple[str, str]]:
    """What is beside another input than it was made from."""
    for name, (source, key) in MADE_FROM.items():
        # A merge of several adapters is of others, and says so.
        if name in found and source in found and "adapters" not in found[name].manifest["inputs"]:
            was = found[name].manifest["inputs"].get(key)
            if isinstance(was, str) and was != found[source].digest:
                yield name, f"it was made from another {source} than the one that lies here now"


def _training(folder: Path, adapter: Artifact | None, readers: Readers) -> Facts | None:
    """The steps of a finished run, else those up to the newest checkpoint."""
    if adapter:
        metrics = adapter.metrics
        steps = metrics.get("steps")
        return {"history": metrics.get("history", []), "step": steps, "steps": steps, "done": True}
    for checkpoint in reversed(checkpoints.verified(folder, deep=False)):
        return readers.so_far(checkpoint.path) | {"done": False}
    return None
