"""Whether a repository of the hub can be had: fetched, in the cache, or there and open to this token."""

from stages.lib.run import environment, fetched, hub
from stages.lib.run.checks import Check, refused
from stages.lib.run.exits import StageError
from stages.lib.run.listing import Listing, listing


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
