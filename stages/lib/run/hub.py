"""The Hugging Face hub: a repository pinned to a commit and brought to local disk, its errors told apart."""

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path
from typing import Any

from stages.lib.run import downloads, environment, patience
from stages.lib.run.exits import (
    BadData,
    BadSetting,
    CannotRun,
    CannotWrite,
    Missing,
    NoPermission,
    StageError,
    TryAgain,
)
from stages.lib.run.progress import say

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
    "config": ["config.json"],
    "dataset": [
        *("*.jsonl", "*.ndjson", "*.json", "*.csv", "*.parquet", "*.arrow", "*.feather"),
        *(
            f"*.{kind}.{packing}"
            for kind in ("jsonl", "ndjson", "json", "csv")
            for packing in ("gz", "zst")
        ),
    ],
}
# By the codes of OpenSSL.
OUT_OF_DATE = {9: "is not valid yet", 10: "has expired"}


def snapshot(
    repository: str, revision: str | None, what: str, verify: bool = False
) -> tuple[Path, str]:
    """Local folder and commit (40 hex digits) of a hub repository.

    Files that are not what the hub says they are, are fetched again once.

    Args:
        repository: the hub id, `owner/name`.
        revision: branch, tag or commit; None is the default branch.
        what: `model`, `tokenizer` (a model without its weights), `config` (that alone) or `dataset`.
        verify: hash also the large files that were in the cache; those that arrive now always are.

    Raises:
        NoPermission: gated, private, or a wrong token. Missing: no such repository, revision or cached file.
        TryAgain: the hub or the network failed. BadData: what is there is damaged, and cannot be mended.
    """
    from huggingface_hub import constants

    patience.Patience().use()
    with explained(repository, revision):
        folder = _fetched(repository, revision, what)
        damaged = downloads.damaged(folder, verify)
        if damaged and not constants.HF_HUB_OFFLINE:
            say(f"{', '.join(map(str, damaged))} is damaged: fetching it again")
            for path in damaged:
                downloads.discard(path)
            folder = _fetched(repository, folder.name, what)
            damaged = downloads.damaged(folder, verify)
    if damaged:
        raise BadData(
            f"{damaged[0]} is damaged; fetch {repository} anew, with the hub within reach and another HF_HOME"
        )
    return folder, folder.name


def kind(what: str) -> str:
    """The hub's word for a `model`, `tokenizer`, `config` or `dataset`."""
    return "dataset" if what == "dataset" else "model"


@contextlib.contextmanager
def explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises into the sentence and exit code that it deserves."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    http_error = HfHubHTTPError.__mro__[1]  # of the HTTP library that this version uses
    try:
        yield
    except (OSError, ValueError, EntryNotFoundError, http_error) as error:
        known = told_apart(error, repository, revision)
        if known is None:
            raise
        raise known from error


def _fetched(repository: str, revision: str | None, what: str) -> Path:
    """The folder of a snapshot in the cache: its large files brought by us, the others by the hub's library."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    of, wanted = kind(what), FILES[what]

    def cached(**how: bool) -> Path:
        found = snapshot_download(
            repository, repo_type=of, revision=revision, allow_patterns=wanted, **how
        )
        return Path(found)

    # With the list of a commit's files there, its library can tell without the hub whether they are all there.
    if revision and (downloads.storage(repository, of) / "trees" / f"{revision}.json").is_file():
        with contextlib.suppress(LocalEntryNotFoundError):
            return cached(local_files_only=True)
    for seconds in (*patience.PAUSES, None):
        try:
            downloads.bring(repository, of, revision, wanted)
            return cached()
        except (HfHubHTTPError, ConnectionError, *patience.network_errors()) as error:
            failure = error
        with contextlib.suppress(LocalEntryNotFoundError):
            return cached(local_files_only=True)
        if seconds is None or not isinstance(told_apart(failure, repository, revision), TryAgain):
            break
        patience.pause(seconds)
    raise failure


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
        return _failed(repository, error, status)
    if isinstance(error, UnicodeEncodeError):  # a header
        return NoPermission("HF_TOKEN holds a character that no token has; copy it anew")
    if type(error).__name__ in ("UnsupportedProtocol", "InvalidURL"):
        return BadSetting(f"HF_ENDPOINT is no address of a hub: {error}; write https://...")
    module = type(error).__module__.partition(".")[0]
    web = module in ("httpx", "httpx2", "requests") or isinstance(error, json.JSONDecodeError)
    if web or isinstance(error, (ConnectionError, TimeoutError)):
        return _unsafe(error) or _no_answer(repository, error)
    return None


def _failed(repository: str, error: Any, status: int) -> StageError:
    """An answer that another time may be a better one."""
    seconds = patience.asked_for(status, error.response.headers) if error.response else None
    if seconds is not None:
        return TryAgain(
            f"the hub asks to wait {seconds:.0f} s for {repository} ({status}); run the same command then"
        )
    hint = (
        "" if status != 429 or environment.has_token() else " later; with HF_TOKEN it allows more"
    )
    return TryAgain(
        f"the hub failed for {repository} (status {status}); run the same command again{hint}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unsafe(error: BaseException | None) -> StageError | None:
    """The refusal of a certificate, or None where none was refused."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            if cause.verify_code in OUT_OF_DATE:
                now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
                return CannotRun(
                    f"the hub's certificate {OUT_OF_DATE[cause.verify_code]}: is the clock of this machine "
                    f"right? It says {now} UTC"
                )
            return CannotRun(
                f"the hub's certificate is not trusted ({cause.verify_message}); where a proxy or a mirror has "
                "one of its own, name the file of its authority in SSL_CERT_FILE"
            )
    return None


def _no_answer(repository: str, error: BaseException | None) -> StageError:
    names = {type(cause) for cause in _causes(error)}
    why, remedy = type(error).__name__, "check the network"
    if socket.gaierror in names:
        why, remedy = "its name is not known", "check the network, its DNS, and HF_ENDPOINT"
    elif "ProxyError" in why:
        why, remedy = "the proxy does not let it through", "check HTTPS_PROXY"
    return TryAgain(
        f"the hub did not answer for {repository} ({why}), and it is not in the cache; {remedy}, then run the "
        "same command"
    )


def _token_remedy() -> str:
    if environment.has_token():
        return "check that HF_TOKEN belongs to an account with access"
    return "set HF_TOKEN in the environment or in env/secrets.env"
