"""The Hugging Face hub: a repository pinned to a commit and brought to local disk, its errors told apart."""

import json
from errno import ENOSPC
from pathlib import Path

from stages.lib.run import environment
from stages.lib.run.exits import (
    BadSetting,
    CannotWrite,
    Missing,
    NoPermission,
    StageError,
    TryAgain,
)

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
FILES = {
    "model": ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md", *LICENCES],
    "tokenizer": [
        "config.json",
        "generation_config.json",
        "*token*.json",
        "*.model",
        "*.jinja",
        "vocab.json",
        "merges.txt",
    ],
    "dataset": [
        *("*.jsonl", "*.ndjson", "*.json", "*.csv", "*.parquet", "*.arrow", "*.feather"),
        *(
            f"*.{kind}.{packing}"
            for kind in ("jsonl", "ndjson", "json", "csv")
            for packing in ("gz", "zst")
        ),
    ],
}


def snapshot(repository: str, revision: str | None, what: str) -> tuple[Path, str]:
    """Local folder and commit (40 hex digits) of a hub repository.

    Args:
        repository: the hub id, `owner/name`.
        revision: branch, tag or commit; None is the default branch.
        what: `model`, `tokenizer` (a model without its weights) or `dataset`.

    Raises:
        NoPermission: gated, private, or a wrong token. Missing: no such repository, revision or cached file.
        TryAgain: the hub or the network failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    http_error = HfHubHTTPError.__mro__[1]  # of the HTTP library that this version uses

    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset" if what == "dataset" else "model",
            revision=revision,
            allow_patterns=FILES[what],
        )
    except (OSError, ValueError, EntryNotFoundError, http_error) as error:
        known = told_apart(error, repository, revision)
        if known is None:
            raise
        raise known from error
    return Path(folder), Path(folder).name


def told_apart(
    error: BaseException | None, repository: str, revision: str | None
) -> StageError | None:
    """The stage error that a hub error amounts to, or None where it is not the hub's."""
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno == ENOSPC:
        cache = constants.HF_HUB_CACHE
        return CannotWrite(
            f"there is no room for {repository} in {cache}; make some, or move HF_HOME"
        )
    if isinstance(error, errors.HFValidationError):
        return BadSetting(f"{repository!r} is no hub id: write owner/name, or a path that exists")
    if isinstance(error, errors.GatedRepoError):  # a subclass of RepositoryNotFoundError
        page = f"https://huggingface.co/{repository}"
        return NoPermission(
            f"{repository} is gated: accept its terms at {page} and {_token_remedy()}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "" if environment.has_token() else ", or it is private: then set HF_TOKEN"
        return Missing(f"the hub has no repository {repository}{hint}")
    if isinstance(error, errors.RevisionNotFoundError):
        return Missing(f"{repository} has no revision {revision!r}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Missing(
            f"{repository} is not in the cache, and HF_HUB_OFFLINE is set; run `fetch` where there is a network"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # wraps what kept it from asking the hub
        return told_apart(error.__cause__, repository, revision) or _no_answer(repository, error)
    if isinstance(error, errors.EntryNotFoundError):
        return Missing(f"{repository} lacks a file: {error}")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            return NoPermission(f"the hub refused {repository} ({status}); {_token_remedy()}")
        return TryAgain(
            f"the hub failed for {repository} (status {status}); run the same command again"
        )
    if isinstance(error, UnicodeEncodeError):  # a header
        return NoPermission("HF_TOKEN holds a character that no token has; copy it anew")
    if type(error).__name__ in ("UnsupportedProtocol", "InvalidURL"):
        return BadSetting(f"HF_ENDPOINT is no address of a hub: {error}; write https://...")
    module = type(error).__module__.partition(".")[0]
    web = module in ("httpx", "httpx2", "requests") or isinstance(error, json.JSONDecodeError)
    if web or isinstance(error, (ConnectionError, TimeoutError)):
        return _no_answer(repository, error)
    return None


def _no_answer(repository: str, error: BaseException | None) -> StageError:
    return TryAgain(
        f"the hub did not answer for {repository} ({error.__class__.__name__}), and it is not in the cache; "
        "check the network, then run the same command"
    )


def _token_remedy() -> str:
    if environment.has_token():
        return "check that HF_TOKEN belongs to an account with access"
    return "set HF_TOKEN in the environment or in env/secrets.env"
