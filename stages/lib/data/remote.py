"""Files behind URLs: listed, copied to local disk, and the errors of the stores told apart."""

import functools
import glob
import logging
import re
import time
from collections.abc import Callable, Iterator
from errno import EDQUOT, EINVAL, ENOSPC
from pathlib import Path
from typing import Any, TypeVar

from stages.lib.run.exits import (
    BadSetting,
    CannotRun,
    CannotWrite,
    Missing,
    NoPermission,
    StageError,
    TryAgain,
)

URL = re.compile(r"(?P<scheme>[A-Za-z][\w.+-]+)://(?:[^/?#]*@)?(?P<path>.*)", re.S)
WEB = ("http", "https")
SCHEMES = ("s3", "gs", *WEB)
PAUSES = (1.0, 4.0)  # seconds between the tries, of which there is one more
REMEDY = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, of an account that may read it",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the key file of an account that may read it",
    "http": "put USER:PASSWORD@ before the host, or use an address that is signed",
}
# By name: the libraries that define them are imported only where a URL is read.
NO_ENTRY = re.compile(
    r"Credential|TokenRetrieval|ProfileNotFound|RefreshError|SSOToken|GoogleAuthError"
)
Result = TypeVar("Result")


def scheme(name: str) -> str | None:
    """The scheme of a URL in lower case, or None for what is no URL.

    Raises:
        BadSetting: it is none of those that are read.
    """
    found = URL.fullmatch(name)
    if found is None:
        return None
    if found["scheme"].lower() not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise BadSetting(
            f"{found['scheme']}:// is none of {known}; copy the files to a folder first"
        )
    return found["scheme"].lower()


def plain(name: str) -> str:
    """A name that may be shown and recorded: of a URL, without user, password, query and fragment."""
    found = URL.fullmatch(name)
    if found is None:
        return name
    kind, path = found["scheme"].lower(), found["path"]
    if kind not in ("s3", "gs"):  # there `?` is a wildcard
        path = re.split(r"[?#]", path)[0]
    return f"{kind}://{path}"


def fetch(url: str, folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """Copy the files behind a URL whose names are `wanted` into a folder: the plain URL of each, and its copy.

    Args:
        url: of one file; in `s3://` and `gs://` also of a folder, or with the wildcards of a glob.

    Raises:
        Missing, NoPermission, TryAgain, CannotWrite, CannotRun: what kept it from being read.
    """
    kind = scheme(url) or ""
    files = _filesystem(kind)
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in _listed(files, kind, url) if wanted(plain(name))]
    for number, name in enumerate(names):
        shown = plain(name if kind in WEB else f"{kind}://{name}")
        copy = folder / f"{number:05d}-{shown.rpartition('/')[2][-100:]}"
        source = _requoted(name) if kind in WEB else name
        _try(kind, shown, functools.partial(files.get_file, source, str(copy)))
        yield shown, copy


def _requoted(url: str) -> str:
    """A URL with what no URL may hold escaped, and what is escaped already, such as a signature, kept."""
    from urllib.parse import quote

    return quote(url, safe="!#$%&'()*+,/:;=?@[]~")


def _listed(files: Any, kind: str, url: str) -> list[str]:
    if kind in WEB:
        return [url]
    path = plain(url).partition("://")[2]

    def names() -> list[str]:
        if glob.has_magic(path):
            return list(files.glob(path))
        if not path.endswith("/") and files.info(path)["type"] == "file":
            return [path]
        return list(files.find(path))

    return sorted(_try(kind, plain(url), names))


def _try(kind: str, shown: str, action: Callable[[], Result]) -> Result:
    """What an action gives, tried again where the network fails."""
    for pause in (*([] if kind == "gs" else PAUSES), None):  # gcsfs itself tries six times
        try:
            return action()
        except _errors(kind) as error:
            known = told_apart(error, kind, shown)
            if known is None:
                raise
            if pause is None or not isinstance(known, TryAgain):
                raise known from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _filesystem(kind: str) -> Any:
    """The store as fsspec sees it. None keeps a list of files from an earlier call."""
    patience = {"sock_connect": 30, "sock_read": 60}
    try:
        if kind == "s3":
            from s3fs import S3FileSystem

            files = S3FileSystem(
                skip_instance_cache=True, use_listings_cache=False,
                config_kwargs={"connect_timeout": 30, "read_timeout": 60},
            )  # fmt: skip
            files.retries = 1  # ours and botocore's are enough
            return files
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, **patience)
        if kind == "gs":
            from gcsfs.core import GCSFileSystem

            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
            return GCSFileSystem(
                access="read_only", requests_timeout=timeout, session_kwargs={"trust_env": True},
                skip_instance_cache=True, use_listings_cache=False,
            )  # fmt: skip
        from fsspec.implementations.http import HTTPFileSystem

        client = {"timeout": timeout, "trust_env": True}
        headers = {"Accept-Encoding": "identity"}  # the file as it is
        return HTTPFileSystem(
            encoded=True, client_kwargs=client, headers=headers, skip_instance_cache=True
        )
    except ImportError as error:
        raise CannotRun(
            f"{kind}:// needs the package {error.name}, which is not installed: "
            "pip install -r requirements.txt"
        ) from error


def _errors(kind: str) -> tuple[type[Exception], ...]:
    if kind == "s3":
        from botocore.exceptions import BotoCoreError

        return (OSError, BotoCoreError, ValueError)
    from aiohttp import ClientError

    if kind != "gs":
        return (OSError, ClientError, ValueError)
    from gcsfs.retry import ChecksumError, HttpError, NonRetryableError
    from google.auth.exceptions import GoogleAuthError

    return (
        OSError, ClientError, ValueError, ChecksumError, HttpError, NonRetryableError, GoogleAuthError
    )  # fmt: skip


def told_apart(error: Exception, kind: str, shown: str) -> StageError | None:
    """The stage error that a store's error amounts to, or None where it is not the store's.

    The text of an error is not passed on: it may hold a query string.
    """
    name = type(error).__name__
    status = str(getattr(error, "status", None) or getattr(error, "code", None) or "")
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, OSError) and error.filename:
        return None  # of the copy
    if number in (ENOSPC, EDQUOT):
        return CannotWrite(
            f"there is no room for a copy of {shown}; make some, or move SCRATCH_DIR"
        )
    if isinstance(error, FileNotFoundError) or status in ("404", "410"):
        return Missing(f"there is nothing at {shown}; check the address")
    refused = isinstance(error, PermissionError) or status in ("401", "403")
    # gcsfs says 403 so, and S3 answers a bad token with no more than Bad Request
    if refused or str(error).startswith("Forbidden") or number == EINVAL or NO_ENTRY.search(name):
        said = status or (
            "no credentials" if "Credential" in name else name.replace("OSError", "403")
        )
        remedy = REMEDY["http" if kind in WEB else kind]
        return NoPermission(f"{shown} may not be read ({said}); {remedy}")
    if (
        isinstance(error, ValueError)
        or name == "ParamValidationError"
        or status in ("400", "405", "414")
    ):
        return BadSetting(f"{shown} is no address that can be read ({status or name}); check it")
    return TryAgain(
        f"{shown} could not be read ({status or name}); check the network, then run the same command"
    )
