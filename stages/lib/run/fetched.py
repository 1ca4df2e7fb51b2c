"""What `fetch` brought onto the volume: repositories at one commit each, and files behind URLs.

`fetched/` in the run directory says which commits the run is pinned to, and where the files lie: by default in
`hub/` beside it, each repository an artifact of plain files, which any mount can hold. Later stages of the run
take them from there, and ask nobody.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from stages.lib.run import artifact
from stages.lib.run.artifact import Artifact

PINS, STORE = "fetched", "hub"
FILES = "files"  # of an artifact, so that a repository may hold a manifest of its own
COMMIT = re.compile(r"[0-9a-f]{40}")
_run_dir: Path | None = None


def use(run_dir: Path | None) -> None:
    """Look into this run directory from now on."""
    global _run_dir
    _run_dir = run_dir


def pins() -> dict[str, Any]:
    """What the run is pinned to: `store`, `repositories` and `urls`; empty where nothing was fetched."""
    made = artifact.load(_run_dir / PINS) if _run_dir else None
    return dict(made.manifest["inputs"]) if made else {}


def store_of(pinned: dict[str, Any]) -> Path:
    """The folder of what was fetched, which is recorded from the run directory on."""
    assert _run_dir is not None
    return _run_dir / pinned["store"]


def recorded(store: Path, run_dir: Path) -> str:
    """How a store is written down: one in the run directory moves with it."""
    inside = store.absolute().is_relative_to(run_dir.absolute())
    return os.path.relpath(store, run_dir) if inside else str(store.absolute())


def key(repository: str, what: str) -> str:
    """How a repository is called among the pins."""
    return f"{'dataset' if what == 'dataset' else 'model'}:{repository}"


def folder_name(repository: str, what: str, commit: str) -> str:
    """The folder of a repository in the store."""
    return f"{key(repository, what).replace(':', '--').replace('/', '--')}@{commit}"


def url_name(url: str) -> str:
    """The folder of what is behind a URL, given without its secrets."""
    return f"url--{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def commit_of(repository: str, revision: str | None, what: str) -> str | None:
    """The commit that the run is pinned to, if `revision` is what was asked for then, or that commit."""
    known = pins().get("repositories", {}).get(key(repository, what))
    return known["commit"] if known and revision in (known["asked"], known["commit"]) else None


def find(repository: str, revision: str | None, what: str) -> tuple[Path, str] | None:
    """The folder and commit of a fetched repository at a revision, or None where it was not fetched.

    Raises:
        BadData: a file of it is missing or has another size.
    """
    pinned = pins()
    commit = commit_of(repository, revision, what)
    if commit is None and revision and COMMIT.fullmatch(revision):
        commit = revision  # fetched before the run was pinned to another
    if not pinned or commit is None:
        return None
    made = artifact.load(store_of(pinned) / folder_name(repository, what, commit))
    return (made.path / FILES, commit) if made else None


def copies(url: str) -> dict[Path, str] | None:
    """The fetched copies of what is behind a URL, given without its secrets, and the URL of each; or None."""
    pinned = pins()
    if url not in pinned.get("urls", []):
        return None
    made = artifact.load(store_of(pinned) / url_name(url))
    urls = made.manifest["inputs"]["urls"] if made else {}
    return {made.path / FILES / name: shown for name, shown in urls.items()} if made else None


def whole(pinned: dict[str, Any], deep: bool) -> bool:
    """Whether all that the run is pinned to lies there.

    Raises:
        BadData: a file of it is missing, has another size or, where `deep`, another hash.
    """
    store = store_of(pinned)
    names = [
        folder_name(name.partition(":")[2], name.partition(":")[0], known["commit"])
        for name, known in pinned["repositories"].items()
    ]
    found: list[Artifact | None] = [
        artifact.load(store / name, deep=deep) for name in [*names, *map(url_name, pinned["urls"])]
    ]
    return all(found)
