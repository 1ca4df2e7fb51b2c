"""Files here or in a store, as fsspec sees both: listed, hashed, copied."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.run.exits import BadSetting, CannotRun, Missing, NoPermission, TryAgain

BLOCK = 8 << 20
SCHEMES = ("s3", "gs", "memory")
NO_ENTRY = re.compile(
    r"Credential|TokenRetrieval|ProfileNotFound|RefreshError|SSOToken|GoogleAuthError"
)


@dataclass(frozen=True)
class Place:
    """A file or folder: its file system, and its path there."""

    files: Any
    path: str
    shown: str

    def of(self, name: str) -> str:
        """The path of a file in it."""
        return f"{self.path}/{name}" if name else self.path

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in it, by its name there; of a single file, by its own name.

        Raises:
            Missing: there is nothing.
        """
        found = self.files.find(self.path, detail=True)
        if not found:
            raise Missing(f"there is nothing at {self.shown}; check the address")
        start = self.files._strip_protocol(self.path)
        return {_below(name, start): about["size"] for name, about in sorted(found.items())}

    def size(self, name: str) -> int | None:
        """Bytes of a file in it; None where it is not."""
        try:
            about = self.files.info(self.of(name))
        except FileNotFoundError:
            return None
        return int(about["size"]) if about["type"] == "file" else None

    def blocks(self, name: str) -> Iterator[bytes]:
        """The content of a file in it."""
        with self.files.open(self.of(name), "rb") as file:
            while block := file.read(BLOCK):
                yield block

    def sha256(self, name: str) -> str:
        """Of a file in it."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()

    def write(self, name: str, blocks: Iterator[bytes]) -> str:
        """Write a file in it, without a rename, which some volumes lack; the sha256 of what was written."""
        path = self.of(name)
        digest = hashlib.sha256()
        if "file" in self.files.protocol:  # a bucket has no folders, and may not be ours to make
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self.files.open(path, "wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
        return digest.hexdigest()

    def is_folder(self) -> bool:
        """Whether it is one, or is written as one."""
        return self.shown.endswith("/") or self.files.isdir(self.path)

    def inside(self, name: str) -> "Place":
        """A place in it."""
        return Place(self.files, self.of(name), f"{self.shown.rstrip('/')}/{name}")

    def drop(self, name: str) -> None:
        """Remove a file in it, where it is there."""
        if self.files.exists(self.of(name)):
            self.files.rm_file(self.of(name))


def _below(name: str, start: str) -> str:
    return name.removeprefix(start.rstrip("/")).lstrip("/")


def place(address: str) -> Place:
    """What an address means.

    Raises:
        BadSetting: it is of no scheme that is known. CannotRun: its package is not installed.
    """
    import fsspec

    kind, found, rest = address.partition("://")
    if not found:
        return Place(fsspec.filesystem("file"), str(Path(address).absolute()), address)
    if kind not in SCHEMES or not rest.strip("/"):
        raise BadSetting(f"{address} is no folder, s3://BUCKET/... or gs://BUCKET/...; name one")
    # A list of files from before they were written would be believed.
    options = {} if kind == "memory" else {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        files = fsspec.filesystem(kind, **options)
    except ImportError as error:
        raise CannotRun(
            f"{kind}:// needs the package {error.name}: pip install -r requirements.txt"
        ) from error
    path = rest.rstrip("/") if kind != "memory" else f"/{rest.rstrip('/')}"
    return Place(files, path, address)


def errors() -> tuple[type[Exception], ...]:
    """What stores raise, beside OSError; of those packages that have been imported."""
    import sys

    found: list[type[Exception]] = [OSError]
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("aiohttp", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("gcsfs.retry", "HttpError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def told_apart(error: Exception, shown: str) -> Exception:
    """The stage error that a store's error amounts to; its text, with a query string perhaps, stays here."""
    kind = type(error).__name__
    if isinstance(error, OSError) and isinstance(error.filename, str) and "://" not in shown:
        return error
    if isinstance(error, FileNotFoundError):
        return Missing(f"there is nothing at {shown}; check the address")
    if isinstance(error, PermissionError) or NO_ENTRY.search(kind):
        return NoPermission(
            f"{shown} is closed to this account ({kind}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE or GOOGLE_APPLICATION_CREDENTIALS of one that may read and write it"
        )
    return TryAgain(f"{shown} failed ({kind}); check the network, then run the same command")
