"""Who writes to a run directory, as what is written knows it."""

from typing import Protocol


class Holder(Protocol):
    """Who writes: asked before every file whether the run directory is still its own, told of what is whole."""

    def check_held(self) -> None: ...

    def progressed(self) -> None: ...


class Anyone:
    """Who writes where nobody else does."""

    def check_held(self) -> None:
        """It is."""

    def progressed(self) -> None:
        """It is not counted."""


ANYONE = Anyone()
