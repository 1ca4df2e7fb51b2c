"""Checkpoints of a run: written once, verified, kept by step number and never by file time."""

import shutil
import time
from pathlib import Path
from typing import Any

from stages.lib.run import artifact, failpoints
from stages.lib.run.artifact import Artifact
from stages.lib.run.exits import BadData, TryAgain
from stages.lib.run.progress import say
from stages.lib.run.rundir import Run

KEEP = 2
SETTLE_SECONDS = 1.0
_slowest = 0.0


def _steps(folder: Path) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix("step-"), path) for path in folder.glob("step-*")]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def folders(run_dir: Path) -> list[Path]:
    """What there is of checkpoints, whole or not, oldest first."""
    return [path for _, path in _steps(run_dir / "checkpoints")]


def verified(run_dir: Path, deep: bool = True) -> list[Artifact]:
    """The whole checkpoints of a run, oldest first; what is not whole is named and passed over."""
    found = []
    for _, path in _steps(run_dir / "checkpoints"):
        try:
            checkpoint = _load(path, deep)
        except BadData as error:
            say(f"passing over a corrupt checkpoint: {error.message}")
            continue
        if checkpoint is None:
            say(f"passing over {path}: it was cut off while it was written")
        else:
            for name in artifact.foreign(path) if deep else ():
                say(f"ignoring {path / name}, which its manifest does not name")
            found.append(checkpoint)
    return found


def _load(path: Path, deep: bool) -> Artifact | None:
    try:
        return artifact.load(path, deep=deep)
    except BadData:  # a node may see for a while what was there before another one wrote
        time.sleep(SETTLE_SECONDS)
        return artifact.load(path, deep=deep)


def step(checkpoint: Artifact) -> int:
    """The optimizer steps behind a checkpoint."""
    return int(checkpoint.metrics["step"])


def _best(whole: list[Artifact]) -> Artifact:
    """The one with the least held-out loss, the earliest among equals; the last where none was measured."""
    measured = [c for c in whole if c.metrics["held_out_loss"] is not None]
    return min(measured, key=lambda c: (c.metrics["held_out_loss"], step(c)), default=whole[-1])


def prune(run_dir: Path, keep: Artifact) -> None:
    """Remove all but the newest two and the best; `keep`, the newest, is verified as it was published."""
    whole = verified(run_dir, deep=False)
    kept = {c.path for c in [*whole[-KEEP:], _best(whole)]}
    for _, path in _steps(run_dir / "checkpoints"):
        if path not in kept and path != keep.path:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove what nobody needs; where that fails, its place on the volume is all that is lost."""
    try:
        drop(path)
    except OSError as error:
        say(f"{path} is not needed and could not be removed: {error.strerror}; going on")


def drop(path: Path) -> None:
    """Remove a checkpoint.

    Raises:
        OSError: something of it cannot be removed.
    """
    failpoints.reach("checkpoint.prune")
    artifact.retire(path)


def needless(run_dir: Path, deep: bool = False) -> list[tuple[Path, str]]:
    """The whole checkpoints that no command needs any more, each with the reason; for `gc`.

    Of a finished run that is all of them, of another all but the newest two and the best. What is not sane is
    not judged, and all stay where the adapter is corrupt.

    Args:
        deep: hash what the others are given up for.
    """
    there = [path for path in folders(run_dir) if not path.is_symlink()]
    try:
        finished = artifact.load(run_dir / "adapter", deep=deep) if there else None
    except BadData:
        return []
    whole = [found for path in there if (found := _sound(path, deep and not finished))]
    if finished:
        return [(c.path, "the run is finished: adapter/ has the best and the last") for c in whole]
    kept = {c.path for c in [*whole[-KEEP:], _best(whole)]} if whole else set()
    return [(c.path, "neither of the newest two nor the best") for c in whole if c.path not in kept]


def _sound(path: Path, deep: bool) -> Artifact | None:
    """A checkpoint that a run could go on from."""
    try:
        found = artifact.load(path, deep=deep)
    except BadData:
        return None
    metrics = found.manifest.get("metrics", {}) if found else {}
    loss = metrics.get("held_out_loss", "")
    sane = isinstance(loss, (float, type(None))) and isinstance(metrics.get("step"), int)
    return found if sane else None


def newest(run: Run, inputs: dict[str, Any]) -> Artifact | None:
    """The checkpoint to go on from, or None where the run begins.

    With --force, a finished run or one of other settings is removed first; one that was itself begun with
    --force and stopped goes on.

    Raises:
        CannotRun: the checkpoints belong to other settings or inputs.
    """
    whole = verified(run.folder)
    if not whole and (there := len(_steps(run.folder / "checkpoints"))):
        say(
            f"WARNING: no checkpoint in {run.folder} is whole, of {there}: beginning again at step 0"
        )
    changed = run.differences(whole[-1], inputs) if whole else []
    if run.force and (changed or (run.folder / "adapter").exists()):
        artifact.retire(run.folder / "adapter")
        whole = []
    elif changed:
        raise run.belongs_to_others(whole[-1].path, changed)
    kept = {checkpoint.path for checkpoint in whole}
    for _, path in _steps(run.folder / "checkpoints"):
        if path not in kept:  # of the run that is replaced, or not whole: its name is needed again
            _remove(path)
    if not whole:
        return None
    say(f"going on from step {step(whole[-1])}")
    return whole[-1]


def finished(run_dir: Path, steps: int) -> tuple[Artifact, Artifact]:
    """The best and the last checkpoint of a run of `steps`, every byte verified.

    Raises:
        TryAgain: the last step's is not whole.
    """
    whole = verified(run_dir)
    if not whole or step(whole[-1]) != steps:
        raise TryAgain(
            f"the checkpoint after step {steps} in {run_dir} is not whole; the same command makes it again"
        )
    return _best(whole), whole[-1]


def bring(checkpoint: Artifact, scratch: Path) -> Path:
    """A checkpoint as local files."""
    return artifact.fetch(checkpoint, scratch / f"resumed-{step(checkpoint)}")


def expected_seconds() -> float:
    """What the slowest checkpoint that this process published took; 0 before the first."""
    return _slowest


def save(
    run: Run,
    source: Path,
    number: int,
    held_out_loss: float | None,
    inputs: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Publish what lies in `source` as the checkpoint after `number` steps, then drop what it makes needless.

    `facts` are what the rest of the run must keep: the size of its bins, and whether it recomputes.
    """
    global _slowest
    name, began = f"checkpoints/step-{number:08d}", time.monotonic()
    if artifact.load(run.folder / name) is None:  # write-once
        failpoints.reach("checkpoint.save")
        made = run.publish(
            name, source, inputs, {"step": number, "held_out_loss": held_out_loss} | facts
        )
        _slowest = max(_slowest, time.monotonic() - began)
        failpoints.reach("checkpoint.saved")
        prune(run.folder, made)
    shutil.rmtree(source)
