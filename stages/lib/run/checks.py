"""What was looked at before the work, and what came of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stages.lib.run.exits import StageError
from stages.lib.run.progress import say


@dataclass(frozen=True)
class Check:
    """One thing that a run needs.

    Attributes:
        found: what is there, in words. remedy: what to do about it, where something is to be done.
        state: `ok`, `warn`, `fail`, or `skip` where it could not be looked at.
        failure: the error that a stage ends with for it.
    """

    name: str
    found: str
    remedy: str = ""
    state: str = "ok"
    failure: type[StageError] | None = None

    @property
    def code(self) -> int:
        """The exit code of a stage that needs it."""
        return self.failure.exit_code if self.failure else 0

    @property
    def sentence(self) -> str:
        """What was found, and the remedy."""
        return f"{self.found}; {self.remedy}" if self.remedy else self.found

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name, "state": self.state, "found": self.found, "remedy": self.remedy,
            "exit": self.code,
        }  # fmt: skip


def warned(name: str, found: str, remedy: str) -> Check:
    """A check of what may be meant so, or costs something."""
    return Check(name, found, remedy, "warn")


def failed(name: str, failure: type[StageError], found: str, remedy: str) -> Check:
    """A check of what keeps a stage from its end."""
    return Check(name, found, remedy, "fail", failure)


def refused(name: str, error: StageError) -> Check:
    """A check that found what a stage would end with."""
    found, _, remedy = error.message.partition("; ")
    return failed(name, type(error), found, remedy)


def enforce(checks: Iterable[Check]) -> None:
    """Say what is a warning, and raise the error of the first that failed."""
    for check in checks:
        if check.failure:
            raise check.failure(check.sentence)
        if check.state == "warn":
            say(check.sentence)
