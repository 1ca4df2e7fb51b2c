"""What DATASET asks for: one name, or several with commas between them, some with a weight."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stages.lib.data import remote
from stages.lib.run.exits import BadSetting
from stages.lib.run.settings import Decorator, setting

WEIGHED = re.compile(r"(?P<name>.+)=(?P<weight>[^=/,]*)", re.S)
PINNED = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>.+)")


@dataclass(frozen=True)
class Wanted:
    """One item of DATASET, before it is looked for."""

    name: str
    revision: str | None = None
    weight: float = 1.0

    @property
    def is_url(self) -> bool:
        """Whether it is behind a URL."""
        return not os.path.exists(self.name) and remote.scheme(self.name) is not None


def parse(dataset: str, revision: str | None = None) -> list[Wanted]:
    """The items of DATASET: `NAME[@REVISION][=WEIGHT]`, with commas between them.

    What exists under its whole name is taken so, whatever signs it holds; an `https://` URL with a query
    has no weight.

    Raises:
        BadSetting: an item or its weight is none, or `revision` has no single item to belong to.
    """
    found = [_item(text) for text in _items(dataset)]
    if revision and len(found) > 1:
        raise BadSetting(
            f"DATASET_REVISION={revision} belongs to one data set, and DATASET names {len(found)}; "
            "write owner/name@REVISION there"
        )
    if revision and found[0].revision:
        raise BadSetting(
            f"both DATASET_REVISION={revision} and DATASET name a revision; leave one out"
        )
    return [replace(item, revision=revision or item.revision) for item in found]


def _items(dataset: str) -> Iterator[str]:
    parts = dataset.split(",")
    while parts:
        joined = ((n, ",".join(parts[:n])) for n in range(len(parts), 1, -1))
        there = (
            n for n, text in joined if os.path.exists(_weighed(text)[0]) or os.path.exists(text)
        )
        many = next(there, 1)
        yield ",".join(parts[:many]).strip()
        del parts[:many]


def _item(text: str) -> Wanted:
    if not text:
        raise BadSetting("DATASET has an empty name; write names with one comma between them")
    if os.path.exists(text):
        return Wanted(text)
    name, said = _weighed(text)
    weight = _number(said, text)
    pinned = None if os.path.exists(name) else PINNED.fullmatch(name)
    if pinned:
        return Wanted(pinned["name"], pinned["revision"], weight)
    return Wanted(name, None, weight)


def _weighed(text: str) -> tuple[str, str]:
    found = WEIGHED.fullmatch(text)
    if found is None or ("://" in text and "?" in text):
        return text, "1"
    return found["name"], found["weight"]


def _number(said: str, text: str) -> float:
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise BadSetting(
            f"{said!r} in DATASET item {remote.plain(text)} is no weight: write NAME=NUMBER above 0"
        )
    return weight


def plain(dataset: str) -> str:
    """DATASET as it may be shown and recorded: its URLs without user, password and query."""
    return ",".join(map(remote.plain, _items(dataset)))


def _dataset(required: bool) -> Decorator:
    return setting(
        "--dataset", "DATASET", required=required, shown=plain,
        help="Hub id, file, folder, glob, URL or `sample`; several with commas between, "
        "NAME@REVISION=WEIGHT each.",
    )  # fmt: skip


dataset, dataset_or_none = _dataset(True), _dataset(False)
dataset_revision = setting(
    "--dataset-revision", "DATASET_REVISION", help="Commit, tag or branch of a hub data set."
)
