"""A folder's files in a repository of the Hugging Face hub: private unless told, and looked at again there."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.run import hub
from stages.lib.run.exits import (
    BadData,
    BadSetting,
    GateFailed,
    NoPermission,
    StageError,
    TryAgain,
)
from stages.lib.run.progress import say

# A wrong token, no payment, no right, no such owner, a name that is taken where this token cannot look.
REFUSED = (401, 402, 403, 404, 409)
MALFORMED = (400, 413, 422)
SMALL = 1 << 20  # bytes of a text that may name a path


@dataclass(frozen=True)
class Pushed:
    """What lies in a repository now: its address, the commit, and whether others can see it."""

    address: str
    commit: str
    public: bool


def push(repository: str, files: Mapping[str, Path], entries: Mapping[str, Any], public: bool,
         message: str) -> Pushed:  # fmt: skip
    """Upload files in one commit, and compare what the hub then lists.

    Args:
        repository: `owner/name`; made if it is not there. files: by their names there.
        entries: `bytes` and `sha256` of each. public: whether a repository may be seen by others.

    Raises:
        NoPermission: no token, or none that may write there. BadSetting: the name, or a public repository
            without `public`. TryAgain: the hub or the network failed. GateFailed: other bytes have arrived.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise BadSetting("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    token = huggingface_hub.get_token()
    if not token:
        raise NoPermission(
            f"nothing is pushed to {repository} without a token; set HF_TOKEN in the environment or in "
            "env/secrets.env, one with write access"
        )
    http_error = errors.HfHubHTTPError.__mro__[1]  # of the HTTP library that this version uses
    api = huggingface_hub.HfApi(token=token)
    try:
        seen = _open(api, repository, public)
        operations = [
            huggingface_hub.CommitOperationAdd(name, str(path)) for name, path in files.items()
        ]
        made = api.create_commit(repository, operations, commit_message=message)
        listed = api.list_repo_tree(repository, recursive=True, revision=made.oid)
        found = {entry.path: entry for entry in listed}
    except (OSError, ValueError, RuntimeError, http_error) as error:
        known = _told_apart(error, repository)
        if known is None:
            raise
        raise known from error
    for name, path in files.items():
        _compare(repository, name, path, entries[name], found.get(name))
    return Pushed(f"{api.endpoint}/{repository}", str(made.oid), seen)


def paths_within(files: Mapping[str, Path], manifest: Mapping[str, Any]) -> dict[str, str]:
    """The texts that name a path of this host, with that path.

    Args:
        manifest: of their artifact, whose settings and inputs know the paths that were given.
    """
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if path.suffix in (".json", ".md") and path.stat().st_size < SMALL
    }
    configs = [json.loads(text) for name, text in texts.items() if name.endswith("config.json")]
    known = {*_absolute([dict(manifest), *configs])}
    named = {name: [path for path in sorted(known) if path in text] for name, text in texts.items()}
    return {name: paths[0] for name, paths in named.items() if paths}


def _absolute(value: Any) -> Iterator[str]:
    """The strings in JSON that are absolute paths."""
    if isinstance(value, str):
        if value.startswith("/") and len(value) > 1:
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _absolute(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _absolute(entry)


def _open(api: Any, repository: str, public: bool) -> bool:
    """Make a repository, or look at the one that is there, before anything is sent; whether it is public."""
    from huggingface_hub import errors

    try:
        seen = not api.repo_info(repository).private
    except errors.RepositoryNotFoundError:
        api.create_repo(repository, private=not public)
        seen = not api.repo_info(repository).private
    if seen and not public:
        raise BadSetting(
            f"{repository} is public, so nothing was sent; make it private on its page, choose another "
            "REPOSITORY, or say --public"
        )
    if public and not seen:
        say(f"{repository} is private and stays so: --public makes new repositories public alone")
    return bool(seen)


def _told_apart(error: BaseException, repository: str) -> StageError | None:
    """The stage error that a failed upload amounts to, or None where it is our own fault."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return BadSetting(f"REPOSITORY {repository!r} is no hub id: write owner/name")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in REFUSED:
            return _not_allowed(repository, status)
        if status in MALFORMED:
            said = error.server_message or f"status {status}"
            return BadData(f"the hub refused what was pushed to {repository}: {said}; mend it")
    if type(error).__name__ == "XetAuthenticationError":
        return _not_allowed(repository, 403)
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return BadData(f"the hub refused README.md for {repository}: {error}; mend its first lines")
    known = hub.told_apart(error, repository, None)
    if isinstance(known, TryAgain) and not isinstance(error, errors.HfHubHTTPError):
        return _no_answer(repository, type(error).__name__)
    if known is None and isinstance(error, RuntimeError):  # from a thread that sent a large file
        return _told_apart(error.__cause__, repository) if error.__cause__ else None
    return known


def _not_allowed(repository: str, status: int) -> StageError:
    return NoPermission(
        f"the hub does not let this HF_TOKEN write to {repository} ({status}); use one with write access, or "
        "another REPOSITORY"
    )


def _no_answer(repository: str, why: str) -> StageError:
    return TryAgain(
        f"the hub did not answer for {repository} ({why}); check the network, then run the same command: what "
        "has arrived is not sent again"
    )


def _compare(repository: str, name: str, path: Path, entry: Mapping[str, Any], listed: Any) -> None:
    """Hold what the hub says of a file against ours: its sha256, or git's for a small one."""
    same = listed is not None and listed.size == entry["bytes"]
    if same and listed.lfs is not None:
        same = listed.lfs.sha256 == entry["sha256"]
    elif same:
        content = path.read_bytes()
        same = listed.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if not same:
        raise GateFailed(
            f"{name} is not in {repository} as it is here, though the hub took it; look at .gitignore there, "
            "and push again"
        )
