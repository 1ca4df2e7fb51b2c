"""How runs stand, read from what they leave: manifests, attempts, `error.json` and the holder file.

Nothing is hashed and nothing is written. What cannot be read of a run is told in its line.
"""

import calendar
import contextlib
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.lib.run import attempts, checkpoints, debris, exits, lease, manifests, notes
from stages.lib.run.artifact import DRAFT, MANIFEST
from stages.lib.run.exits import BadData
from stages.lib.run.rundir import MADE_BY

DEEPEST = 3  # folders between the one that is looked through and a run
AT_ONCE = 16  # what a slow volume takes its time for is waited for side by side
HEARTBEAT = "heartbeat.json"  # of the command at work: how far it is
NUMBERS = ("loss", "held_out_loss", "tokens_per_second")
STOPS = ("stopped", "try-again", "in-use", "interrupted", "killed", "terminated")


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        state: done, going on, perhaps (held where this machine cannot see it), stopped (the same command goes
            on), failed, empty or unreadable.
        stage: that the state is about. why: in a sentence. changed: when, in seconds of the epoch.
        step: of the adapter, else of the newest checkpoint. losses: in nats a token.
    """

    folder: str
    state: str
    stage: str | None = None
    why: str = ""
    artifacts: tuple[str, ...] = ()
    step: int | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    tokens_per_second: float | None = None
    changed: float | None = None
    bytes: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def runs_in(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """The run directories at or below a folder, no link followed; those that cannot be looked into too."""
    try:
        with os.scandir(folder) as entries:
            names = {e.name for e in entries if e.is_dir(follow_symlinks=False) or e.is_file()}
    except OSError:
        yield folder
        return
    if _is_run(folder, names):
        yield folder
    elif depth:
        for name in sorted(names):
            path = folder / name
            if not name.startswith(".") and path.is_dir() and not path.is_symlink():
                yield from runs_in(path, depth - 1)


def _is_run(folder: Path, names: set[str]) -> bool:
    if names & {lease.HOLDER, attempts.FOLDER}:
        return True
    made = [name for name in MADE_BY if name in names]
    marked = any((folder / name / mark).is_file() for name in made for mark in (MANIFEST, DRAFT))
    refused = exits.ERROR in names and "retryable" in (notes.peek(folder / exits.ERROR) or {})
    return marked or refused


def standings(folder: Path) -> list[Standing]:
    """How all runs in a folder stand, the last active first.

    Raises:
        OSError: the folder itself cannot be read.
    """
    os.scandir(folder).close()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(standing, runs_in(folder)))
    return sorted(found, key=lambda each: -(each.changed or 0.0))


def standing(run: Path) -> Standing:
    """How a run stands."""
    try:
        return _standing(run)
    except OSError as error:
        return Standing(plain(run), "unreadable", why=plain(error.strerror or error))


def _standing(run: Path) -> Standing:
    made = {name: manifest for name in MADE_BY if (manifest := _manifest(run / name))}
    attempt = attempts.newest(run)
    state, stage, why = _state(run, list(made), attempt)
    step, numbers = _numbers(run, made)
    changed = _ended(attempt) or run.lstat().st_mtime
    if seen := lease.seen(run):
        changed = max(changed, time.time() - seen.idle)
    return Standing(
        plain(run), state, plain(stage) if stage else None, plain(why), tuple(made), step, **numbers,
        changed=changed, bytes=debris.size(run),
    )  # fmt: skip


def _state(
    run: Path, made: list[str], attempt: dict[str, Any] | None
) -> tuple[str, str | None, str]:
    """State, the stage that it is about, and why."""
    seen = lease.seen(run)
    if seen and seen.sure:
        return "going on", seen.stage, seen.process + _how_far(run)
    if seen and seen.alive is not False:
        return (
            "perhaps",
            seen.stage,
            f"{seen.process}, last beat {span(seen.idle)} ago{_how_far(run)}",
        )
    error = notes.peek(run / exits.ERROR) or {}
    code, stage = error.get("code"), error.get("stage")
    refused = error.get("attempt") is None and any(MADE_BY[name] == stage for name in made)
    if code and not refused:  # a mistyped option does not undo what is there
        state = "stopped" if code in STOPS else "failed"
        return state, str(stage), f"{error.get('exit')} {code}: {error.get('message')}"
    if attempt and attempt["end"]:
        again = attempt["end"] in (130, 143, attempts.KILLED, exits.TryAgain.exit_code)
        return "stopped" if again else "failed", attempt["stage"], attempt["said"]
    stage = attempt["stage"] if attempt else MADE_BY[made[-1]] if made else None
    return "done" if made else "empty", stage, ""


def _numbers(run: Path, made: dict[str, Any]) -> tuple[int | None, dict[str, float | None]]:
    """The step, and what was measured: of the adapter, else as the heartbeat or the newest checkpoint says."""
    found = made.get("adapter")
    beat = {} if found else notes.peek(run / HEARTBEAT) or {}
    metrics = (found or _newest_checkpoint(run)).get("metrics", {})
    if beat.get("unit") == "steps":
        metrics = metrics | {"step": beat.get("done")} | _of(NUMBERS, beat)
    step = _number(metrics.get("steps", metrics.get("step")))
    numbers = dict.fromkeys(NUMBERS) | _of(NUMBERS, metrics)
    return None if step is None else int(step), numbers


def _of(names: tuple[str, ...], said: dict[str, Any]) -> dict[str, float | None]:
    """Those that are numbers."""
    numbers = {name: _number(said.get(name)) for name in names}
    return {name: number for name, number in numbers.items() if number is not None}


def _how_far(run: Path) -> str:
    """How far the command at work is, for the end of a sentence; nothing where it does not say."""
    beat = notes.peek(run / HEARTBEAT) or {}
    done, total, left = (_number(beat.get(name)) for name in ("done", "total", "eta_seconds"))
    far = f"; {done:,.0f} of {total:,.0f} {beat.get('unit')}" if done is not None and total else ""
    return f"{far}, {span(left)} left" if far and left is not None else far


def _newest_checkpoint(run: Path) -> dict[str, Any]:
    for path in reversed(checkpoints.folders(run)):
        if manifest := _manifest(path):
            return manifest
    return {}


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Of an artifact, whose files are not looked at; None where it is not sane."""
    with contextlib.suppress(BadData):
        return manifests.read(folder / MANIFEST)
    return None


def _number(value: Any) -> float | None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if real and math.isfinite(value) else None


def _ended(attempt: dict[str, Any] | None) -> float:
    """When an attempt was last alive, in seconds of the epoch; 0 where that is not said."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        began = time.strptime(attempt["started"], "%Y-%m-%dT%H:%M:%SZ") if attempt else None
        return calendar.timegm(began) + float(attempt["seconds"]) if began and attempt else 0.0
    return 0.0


def plain(words: object) -> str:
    """On one line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in str(words))


def span(seconds: float) -> str:
    """A time for people to read."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
