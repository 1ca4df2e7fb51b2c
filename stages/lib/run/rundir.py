"""A run directory as one stage sees it: what it reads, whether it is done, what it publishes."""

import contextlib
import json
import resource
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click

from stages.lib.run import (
    artifact,
    attempts,
    environment,
    exits,
    growing,
    lease,
    preemption,
    preflight,
    scratch,
    settings,
    watchdog,
)
from stages.lib.run.artifact import Artifact
from stages.lib.run.exits import CannotRun, CannotWrite, Missing, StageError, TryAgain
from stages.lib.run.heartbeat import Heartbeat
from stages.lib.run.parts import Parts
from stages.lib.run.progress import phase, say
from stages.lib.run.versions import versions

MADE_BY = {
    "data": "prepare-data",
    "adapter": "train",
    "evaluation": "evaluate",
    "generations": "generate",
    "merged": "merge",
    "gguf": "export",
}


class Run:
    """The run directory of one command."""

    def __init__(self, ctx: click.Context) -> None:
        self.ctx = ctx
        self.stage = str(ctx.info_name)
        self.folder: Path = ctx.params["run_dir"]
        self.force: bool = ctx.params.get("force", False)
        self.allow_stale: bool = ctx.params["allow_stale"]
        self.deep: bool = ctx.params["verify"]
        self.stall_minutes: float = ctx.params.get("stall_minutes", 0)
        self.settings = settings.recorded(ctx)
        self.attempt = attempts.Attempt(self.folder, self.stage, self.settings, self.force)
        self.started = time.monotonic()
        with artifact.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, deep: bool = False, own: Collection[str] = ()) -> Artifact:
        """A verified input of this run; its settings must be those that the preset and environment say now.

        Args:
            own: settings that mean something else to this command, and so are not compared.

        Raises:
            Missing: its stage has not finished. BadData: it is corrupt. CannotRun: it is stale.
        """
        folder = self.folder / name
        found = artifact.load(folder, deep=deep or self.deep)
        if found is None:
            remedy = lease.at_work(self.folder, MADE_BY[name]) or f"run `{MADE_BY[name]}` first"
            raise Missing(f"there is no finished {name} in {self.folder}; {remedy}")
        changed = []
        for variable, entry in found.manifest["settings"].items():
            if variable in own:
                continue
            now = settings.expected(self.ctx, variable, entry["from"])
            if now is not None and now != entry["value"]:
                changed.append(f"{variable} was {entry['value']}, is now {now}")
        self._refuse_stale(folder, name, changed)
        return found

    def check_made_from(self, made: Artifact, name: str, now: Any) -> None:
        """Refuse an artifact whose input `name` was another than it is now.

        Raises:
            CannotRun: it is stale.
        """
        was = made.manifest["inputs"].get(name)
        if was != now:
            words = [json.dumps(value)[:80] for value in (was, now)]
            self._refuse_stale(
                made.path, made.path.name, [f"its input {name} was {words[0]}, is now {words[1]}"]
            )

    def _refuse_stale(self, folder: Path, name: str, changed: list[str]) -> None:
        if changed and self.allow_stale:
            say(f"using {folder} although it is stale: {'; '.join(changed)}")
        elif changed:
            raise CannotRun(
                f"{folder} is stale: {'; '.join(changed)}; run `{MADE_BY.get(name, 'its stage')}` again, "
                "or accept it with --allow-stale"
            )

    def finished(self, name: str, inputs: dict[str, Any], replace: bool = True) -> Artifact | None:
        """The artifact that this command would make again, if nothing changed; says so either way.

        Args:
            inputs: may leave out what is dear to learn, such as the commit that a branch stands at.
            replace: whether one that was made otherwise may be made anew without --force.

        Raises:
            CannotRun: it was made otherwise, and is too dear to replace unasked. CannotWrite: no stage made it.
        """
        artifact.check_ours(self.folder / name)
        if self.force:
            return None
        found = artifact.load(self.folder / name, deep=self.deep)
        if found is None:
            return None
        changed = self.differences(found, inputs)
        if changed and not replace:
            raise self.belongs_to_others(self.folder / name, changed)
        if changed:
            say(f"{self.folder / name} was made otherwise ({'; '.join(changed)}): making it anew")
            return None
        say(f"{self.folder / name} is finished and nothing changed; --force makes it again")
        return found

    def previous_inputs(self, name: str) -> dict[str, Any]:
        """The inputs of an artifact that is there already, so that a hash need not be taken twice."""
        found = None if self.force else artifact.load(self.folder / name)
        return dict(found.manifest["inputs"]) if found else {}

    def differences(self, made: Artifact, inputs: dict[str, Any]) -> list[str]:
        """What has changed since an artifact was made by this command, setting by setting."""
        changed = []
        for variable in sorted(self.settings.keys() | made.manifest["settings"].keys()):
            old = made.manifest["settings"].get(variable, {}).get("value")
            new = self.settings.get(variable, {}).get("value")
            if old != new:
                changed.append(f"{variable} was {old}, is now {new}")
        for name, new in inputs.items():
            old = made.manifest["inputs"].get(name)
            if isinstance(new, dict) and isinstance(old, dict):
                old = {key: old.get(key) for key in new}
            if old != new:
                changed.append(f"input {name} is another")
        return changed

    def belongs_to_others(self, path: Path, changed: list[str]) -> CannotRun:
        """The refusal to write over another run's work."""
        return CannotRun(
            f"{path} belongs to other settings: {'; '.join(changed)}; choose another RUN_DIR, "
            "or --force to replace it"
        )

    @phase("saving")
    def publish(
        self,
        name: str,
        source: Path,
        inputs: dict[str, Any],
        metrics: dict[str, Any],
        **facts: Any,
    ) -> Artifact:
        """Publish what lies finished in `source` as `name`, with all that a manifest holds."""
        manifest = self.manifest(inputs, metrics, **facts)
        return artifact.publish(source, self.folder / name, manifest, self)

    def made_of(self, inputs: dict[str, Any], before: dict[str, Artifact]) -> dict[str, Any]:
        """For a report: the inputs, the settings of this stage and those `before` it, and the versions."""
        told = {stage: made.manifest["settings"] for stage, made in before.items()}
        told[self.stage] = self.settings
        values = {
            stage: {name: entry["value"] for name, entry in found.items()}
            for stage, found in told.items()
        }
        return {"inputs": inputs, "settings": values, "versions": versions()}

    def revise(self, made: Artifact, source: Path, **metrics: Any) -> Artifact:
        """Publish other words on the same figures: all that the manifest says of their making stays."""
        changed = {"metrics": made.metrics | metrics}
        return artifact.publish(source, made.path, made.manifest | changed, self)

    @contextlib.contextmanager
    def draft(self, name: str, size: int, parts: Parts | None = None) -> Iterator[artifact.Draft]:
        """Publish `name` file by file, where it is too large to lie finished elsewhere.

        Args:
            size: bytes that it will have.
            parts: where its finished files are noted; those of a stopped attempt stay then.

        Raises:
            CannotWrite: there is no room for it.
        """
        self.check_held()
        draft = artifact.Draft(self.folder / name, self, parts)
        artifact.check_room(self.folder, size - draft.size)
        with draft:
            yield draft

    @contextlib.contextmanager
    def parts(self, name: str, inputs: dict[str, Any], device: dict[str, Any]) -> Iterator[Parts]:
        """What was finished of `name` before this attempt, if it is made alike; it goes once that is there.

        An end that the same command would meet again leaves nothing of it.

        Args:
            device: that computes; what another one made, or other versions did, is not gone on with.
        """
        folder = self.folder / f"{name}.parts"
        made_on = {"device": device, "versions": versions()}
        with self.growing(folder.name, "parts.jsonl", inputs | made_on) as grown:
            try:
                yield Parts(grown)
            except (TryAgain, CannotWrite):
                raise
            except StageError:
                artifact.retire(folder)
                raise
        # The artifact is there, and the exit code has to say so.
        with preemption.deferred(), contextlib.suppress(OSError):
            artifact.retire(folder)

    @contextlib.contextmanager
    def growing(self, name: str, file: str, inputs: dict[str, Any]) -> Iterator[growing.Growing]:
        """Publish `name` as one file that grows by lines; what was stopped goes on, if it is made alike.

        Args:
            file: its name.
        """
        self.check_held()
        folder = self.folder / name
        there = growing.begun(folder)
        changed = self.differences(there, inputs) if there else []
        if changed:
            say(f"{folder} was begun otherwise ({'; '.join(changed)}): starting afresh")
        made_from, goes_on = {"inputs": inputs, "settings": self.settings}, bool(there)
        with growing.Growing(folder, file, made_from, goes_on and not changed, self) as grown:
            yield grown

    def manifest(
        self, inputs: dict[str, Any], metrics: dict[str, Any], **facts: Any
    ) -> dict[str, Any]:
        """What is said of an artifact beside its files."""
        return {
            "stage": self.stage,
            "inputs": inputs,
            "settings": self.settings,
            "metrics": metrics,
            "versions": versions(),
            "wall_seconds": round(time.monotonic() - self.started, 3),
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        } | facts

    @contextlib.contextmanager
    def work(self) -> Iterator[Path]:
        """Hold the run directory, with a scratch folder that goes away at the end.

        Raises:
            InUse: another process holds it. NoProgress: three attempts got nowhere.
        """
        preflight.start(self.folder, environment.scratch_parent())
        if isinstance(self.ctx.obj, exits.Reported):
            self.ctx.obj.attempt = self.attempt
        heart = Heartbeat(self.attempt)
        with lease.held(self.folder, self.stage, heart.beat) as self.check_held:
            self.attempt.check_held = self.check_held
            with self.attempt, heart, self._watched(), self._scratch() as folder:
                try:
                    yield folder
                finally:
                    preemption.conclude()

    def progressed(self) -> None:
        """Count what is verified, so that this attempt was not in vain."""
        self.attempt.progressed()

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        outcome = self.ctx.obj if isinstance(self.ctx.obj, exits.Reported) else exits.Reported()
        return watchdog.watching(self.stall_minutes, self.folder, outcome.last_words)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        for name in (exits.ERROR, watchdog.FILE):
            (self.folder / name).unlink(missing_ok=True)
        with scratch.folder() as folder:
            yield folder
