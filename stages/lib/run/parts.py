"""What a command has finished of its work, kept so that a killed one need not do it again."""

from collections.abc import Callable
from typing import Any

from stages.lib.run import preemption
from stages.lib.run.growing import Growing
from stages.lib.run.progress import say

Done = Callable[[str, Callable[[], Any]], Any]


def afresh(name: str, make: Callable[[], Any]) -> Any:
    """As `Parts.of` where nothing is kept."""
    return make()


class Parts:
    """Results by name, a line each; JSON holds them.

    Args:
        grown: the file, with what an attempt before this one left there.
    """

    def __init__(self, grown: Growing) -> None:
        self._grown = grown
        self.known: dict[str, Any] = {line["part"]: line["result"] for line in grown.entries}
        if self.known:
            say(f"going on behind {len(self.known)} finished parts")

    def keep(self, name: str, result: Any) -> Any:
        """Remember a part's result; a moment to stop in.

        Raises:
            TryAgain: a stop was asked for.
        """
        self._grown.add({"part": name, "result": result})
        self.known[name] = result
        preemption.check()
        return result

    def of(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of a part, made now unless it was before."""
        return self.known[name] if name in self.known else self.keep(name, make())
