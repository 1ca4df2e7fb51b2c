"""Bringing repositories and files onto the volume, where `fetched` finds them: whole, and as the hub's."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.run import artifact, downloads, fetched, hub, lease, preemption, preflight
from stages.lib.run.artifact import Artifact
from stages.lib.run.checks import enforce
from stages.lib.run.exits import BadData
from stages.lib.run.listing import Listing, cache, listing
from stages.lib.run.progress import say
from stages.lib.run.rundir import Run


class Store:
    """A folder of artifacts, each a repository at a commit or the files behind a URL.

    Args:
        folder: FETCH_DIR; by default in the run directory.

    Attributes:
        pins: what is recorded of the run: `store`, `repositories` and `urls`. size: bytes of all of it.
    """

    def __init__(self, run: Run, folder: Path | None) -> None:
        self._run, self._before = run, fetched.pins()
        store = fetched.store_of(self._before) if self._before else run.folder / fetched.STORE
        self.folder = folder or store
        recorded = fetched.recorded(self.folder, run.folder)
        self.pins: dict[str, Any] = {"store": recorded, "repositories": {}, "urls": []}
        self.size = 0

    def is_whole(self) -> bool:
        """Whether all that the run was pinned to before is there."""
        if not self._before:
            return False
        try:
            return fetched.whole(self._before, self._run.deep)
        except BadData as error:
            say(error.message)
            return False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """One writer at a time: the run directory is held already, a folder that runs share is not."""
        with contextlib.ExitStack() as stack:
            with artifact.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            if not self.folder.absolute().is_relative_to(self._run.folder.absolute()):
                stack.enter_context(lease.held(self.folder))
            yield

    def repository(self, name: str, revision: str | None, what: str) -> Path:
        """The folder of a repository, brought here unless it is; a commit that the run was pinned to is kept.

        Args:
            name, revision, what: as of `hub.snapshot`.

        Raises:
            BadData: what comes is not what the hub says. CannotWrite: there is no room for it.
        """
        pinned = None if self._run.force else fetched.commit_of(name, revision, what)
        made = self._kept(fetched.folder_name(name, what, pinned)) if pinned else None
        if made is None:
            listed = listing(name, pinned or revision, what)
            pinned = listed.commit
            made = self._kept(fetched.folder_name(name, what, pinned)) or self._bring(listed)
        self.pins["repositories"][fetched.key(name, what)] = {"asked": revision, "commit": pinned}
        self.size += _size(made)
        return made.path / fetched.FILES

    def _kept(self, name: str) -> Artifact | None:
        try:
            return artifact.load(self.folder / name, deep=self._run.deep)
        except BadData as error:
            say(f"{error.message.partition(';')[0]}; fetching it again")
            return None

    def _bring(self, listed: Listing) -> Artifact:
        name, size = listed.repository, sum(listed.sizes.values())
        target = self.folder / fetched.folder_name(name, listed.what, listed.commit)
        needs = [("download", cache(), listed.missing()), ("copy", self.folder, size)]
        enforce(check for check in preflight.room(needs) if check.failure)
        for _ in range(2):
            say(f"fetching {name} at {listed.commit}, {size / 1e6:,.1f} MB")
            folder, _commit = hub.snapshot(name, listed.commit, listed.what)
            made = self._publish(
                target, {n: folder / n for n in listed.sizes}, {"repository": name}
            )
            wrong = listed.differing(made)
            if not wrong:
                return made
            artifact.retire(target)
            for file in wrong:  # the cache does not look at what it holds
                downloads.discard(folder / file)
            say(f"{wrong[0]} of {name} is not what the hub says it is; fetching it again")
        raise BadData(
            f"{wrong[0]} of {name} is not what the hub says it is, twice; try again later"
        )

    def files(self, url: str, copies: dict[Path, str]) -> Path:
        """The folder of what is behind a URL, from copies of the files, each with its own URL.

        Args:
            url: without its secrets.
        """
        target = self.folder / fetched.url_name(url)
        sources = {path.name: path for path in copies}
        urls = {path.name: shown for path, shown in copies.items()}
        made = self._publish(target, sources, {"url": url, "urls": urls})
        self.pins["urls"].append(url)
        self.size += _size(made)
        return made.path / fetched.FILES

    def _publish(self, target: Path, sources: dict[str, Path], about: dict[str, Any]) -> Artifact:
        with artifact.Draft(target, self._run) as draft:
            for name, path in sources.items():
                preemption.check()
                draft.take(path, f"{fetched.FILES}/{name}")
            return draft.finish(self._run.manifest(about, {}) | {"settings": {}})


def _size(made: Artifact) -> int:
    return sum(entry["bytes"] for entry in made.manifest["files"].values())
