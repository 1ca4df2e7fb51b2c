"""A repository as this run sees it: fetched and pinned, in the cache, or on the hub and open to us or not."""

from pathlib import Path

from stages.lib.run import environment, fetched, hub
from stages.lib.run.checks import Check, refused
from stages.lib.run.exits import StageError
from stages.lib.run.listing import Listing, listing


def snapshot(
    repository: str, revision: str | None, what: str, verify: bool = False
) -> tuple[Path, str]:
    """As `hub.snapshot`, from what `fetch` brought where it did, at the commit that it pinned the run to."""
    there = fetched.find(repository, revision, what)
    pinned = fetched.commit_of(repository, revision, what)
    return there or hub.snapshot(repository, pinned or revision, what, verify)


def check(
    name: str, repository: str, revision: str | None, what: str
) -> tuple[Check, Listing | None]:
    """What a stage would find, and the hub's list of files where it was asked.

    Args:
        name: of the check. repository, revision, what: as of `hub.snapshot`.
    """
    try:
        there = fetched.find(repository, revision, what)
        if there or environment.offline():
            _, commit = there or hub.snapshot(repository, revision, what)
            where = "as fetched" if there else "in the cache"
            return Check(name, f"{repository} at {commit[:12]}, {where}"), None
        listed = listing(
            repository, fetched.commit_of(repository, revision, what) or revision, what
        )
        listed.check_access()
    except StageError as error:
        return refused(name, error), None
    size = sum(listed.sizes.values()) / 1e6
    return Check(name, f"{repository} at {listed.commit[:12]}, {size:,.1f} MB, may be read"), listed
