"""x"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trouble:
    says: str = ""
    why: str = ""
    do: str = ""
    test: str = ""
    title: str = ""


TROUBLES = ()
