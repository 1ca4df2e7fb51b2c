"""Runs as commands leave them, made by what makes them, without a model."""

import json
import subprocess
from pathlib import Path
from typing import Any

from stages.lib.run import artifact, checkpoints, lease
from stages.lib.run.artifact import Artifact
from stages.lib.run.attempts import Attempt

SETTINGS = {"SEED": {"value": 0, "from": "default"}}


def publish(run: Path, name: str, size: int = 1000, **metrics: Any) -> Artifact:
    """An artifact of one file."""
    source = run.parent / f"{run.name}-source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "weights.bin").write_bytes(b"w" * size)
    manifest = {"stage": "train", "inputs": {}, "settings": SETTINGS, "metrics": metrics}
    made = artifact.publish(source, run / name, manifest)
    (source / "weights.bin").unlink()
    source.rmdir()
    return made


def checkpoint(run: Path, step: int, held_out_loss: float | None = None) -> Path:
    """A whole checkpoint."""
    name = f"checkpoints/step-{step:08d}"
    return publish(run, name, step=step, held_out_loss=held_out_loss).path


def finished(run: Path) -> Path:
    """A run that trained, with its checkpoints."""
    publish(run, "data")
    for step in (1, 2):
        checkpoint(run, step, 3.0 - step / 4)
    publish(run, "adapter", steps=2, loss=2.75, held_out_loss=2.5, tokens_per_second=123.4)
    with Attempt(run, "train", SETTINGS):
        pass
    return run


def trained_to(run: Path, *losses: float) -> Path:
    """A run that is not finished, with a checkpoint for each held-out loss, none pruned."""
    publish(run, "data")
    for step, loss in enumerate(losses, 1):
        checkpoint(run, step, loss)
    return run


def held_by(run: Path, **changed: Any) -> Path:
    """The holder file of a process of this machine, or of one that differs in something."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / lease.HOLDER
    path.write_text(json.dumps(lease._own("train") | {"id": "left"} | changed))
    return path


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def steps(run: Path) -> list[int]:
    """Of the checkpoints that are there."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints.folders(run)]
