"""Exit codes and the one place that turns an error into one.

A user's mistake is a `StageError`: one sentence that names the value, the rule and the remedy. Everything
that nobody foresaw keeps its traceback and exits 70. Both leave `error.json` in the run directory. What the
codes mean is in `endings`.
"""

import contextlib
import errno
import os
import re
import stat
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import click

from stages.lib.run import endings, gpu_errors, notes

TERMINATION_LOG = Path("/dev/termination-log")  # what Kubernetes shows of a container that ended
ERROR = "error.json"
TERMINATION_BYTES = 4000  # of the 4096 that it keeps


class StageError(click.ClickException):
    """An end that has a code of its own. `slug` names it for programs; `facts` go into `error.json`."""

    exit_code = 70
    slug = "fault"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class BadSetting(StageError):
    """A flag, setting or preset is wrong."""

    exit_code, slug = 2, "usage"


class BadData(StageError):
    """Rows, files, or an artifact that is corrupt or belongs to something else."""

    exit_code, slug = 65, "bad-data"


class Missing(StageError):
    """An input is not there."""

    exit_code, slug = 66, "missing-input"


class CannotWrite(StageError):
    """The disk is full, or the run directory cannot be written."""

    exit_code, slug = 73, "cannot-write"


class TryAgain(StageError):
    """Stopped with the state safe, or a hiccup outside: the same command goes on."""

    exit_code, slug = 75, "try-again"


class Stopped(TryAgain):
    """A signal or MAX_RUNTIME ended it with its state safe."""

    slug = "stopped"


class InUse(TryAgain):
    """Another process writes here; that run's own record is left as it is."""

    slug = "in-use"


class NoProgress(StageError):
    """The same command was tried again and again, and got nowhere."""

    slug = "no-progress"


class NoPermission(StageError):
    """A gated model, or a missing or wrong token."""

    exit_code, slug = 77, "no-permission"


class CannotRun(StageError):
    """This machine cannot run it, or the run directory belongs to other settings."""

    exit_code, slug = 78, "cannot-run"


class Diverged(StageError):
    """The loss or a gradient is not finite, or the loss stays far above its level."""

    exit_code, slug = 80, "diverged"


class OutOfMemory(StageError):
    """The GPU's memory is too small even for the smallest setting."""

    exit_code, slug = 81, "out-of-memory"


class GateFailed(StageError):
    """A result is not what it must be; a merge is not published then, an evaluation is, with its verdict."""

    exit_code, slug = 82, "gate-failed"


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
IN_THE_WAY = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
TOO_MANY = {errno.EMFILE, errno.ENFILE}
HICCUP = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
}  # the last when a FUSE mount dies


def from_os_error(error: OSError, writing: bool = False) -> StageError | None:
    """The stage error that a file-system error amounts to, or None where it is our own fault."""
    where = error.filename or "a file"
    if error.errno in TOO_MANY:
        return CannotWrite(
            f"cannot open {where}: {error.strerror}; raise the limit, as with `ulimit -n 1024`"
        )
    if error.errno in FULL or (writing and error.errno in IN_THE_WAY):
        return CannotWrite(
            f"cannot write {where}: {error.strerror}{_owner(error)}; make room, or choose another RUN_DIR or "
            "SCRATCH_DIR"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return Missing(
            f"cannot read {where}: {error.strerror}{_owner(error)}; let this user read it, or run as its owner"
        )
    if error.errno in HICCUP:
        return TryAgain(f"the volume failed at {where}: {error.strerror}; the same command goes on")
    return None


def from_library(error: BaseException) -> StageError | None:
    """The stage error behind a library's own words on a failed file; libraries write to scratch alone."""
    where, said = "a file in SCRATCH_DIR", str(error)
    for number in sorted(FULL | HICCUP | TOO_MANY):
        if os.strerror(number) in said:  # in Rust's words, C++'s and Python's
            return from_os_error(OSError(number, os.strerror(number), where), writing=True)
    if isinstance(error, RuntimeError) and re.search(r"inline_container|PytorchStreamWriter", said):
        return from_os_error(OSError(errno.ENOSPC, "it was cut off; the disk is full", where))
    return None


def _owner(error: OSError) -> str:
    """Whose the file is that may not be used, if it is another user's."""
    if error.errno not in (errno.EACCES, errno.EPERM) or not isinstance(
        error.filename, (str, Path)
    ):
        return ""
    place = Path(error.filename).absolute()
    for path in (place, *place.parents):
        with contextlib.suppress(OSError):
            found = path.stat()
            if found.st_uid == os.geteuid():
                return ""
            mode = stat.S_IMODE(found.st_mode)
            return f" ({path} belongs to UID {found.st_uid}, mode {mode:04o}; this is UID {os.geteuid()})"
    return ""


def classify(error: BaseException) -> click.ClickException | None:
    """The error with an exit code that `error` stands for, or None where it is our own fault."""
    if not isinstance(error, (NoProgress, InUse)) and (stopped := _stopped(error)):
        return stopped
    if isinstance(error, click.ClickException):
        return error
    if isinstance(error, (KeyboardInterrupt, click.exceptions.Abort)):
        return Stopped("stopped from the keyboard; the same command goes on")
    if isinstance(error, OSError):
        return from_os_error(error)
    if full := from_library(error):
        return full
    # By name, so that a run that never needed torch does not import it here.
    if type(error).__name__ == "OutOfMemoryError":
        return OutOfMemory(
            f"the GPU is out of memory ({str(error).splitlines()[0]}); have nothing else on it, lower "
            "MAX_NEW_TOKENS, BATCH_PROMPTS or MAX_LENGTH, or take a larger one"
        )
    if gone := gpu_errors.lost(error):
        return TryAgain(f"the GPU is lost ({gone}); the same command goes on, on a sound one")
    return None


def _stopped(error: BaseException | None) -> Stopped | None:
    """The stop that a library took for a failure of its own, as some catch all that is raised in them."""
    while error is not None and not isinstance(error, Stopped):
        # What we raise while a stop is dealt with has a reason of its own, unless it names the stop as that.
        error = error.__cause__ or (None if isinstance(error, StageError) else error.__context__)
    return error


class Attempt(Protocol):
    """What keeps the record of this process, see `attempts`."""

    number: int

    def ended(self, error: BaseException | None) -> click.ClickException | None: ...


class Reported:
    """Context manager round the whole program: what leaves it becomes an exit code and `error.json`.

    The running command fills in the rest, so that a failure is recorded beside its run, if `left` says so.
    """

    stage: str | None = None
    run_dir: Path | None = None
    attempt: Attempt | None = None
    rank: Any = None  # see `several`

    def __init__(self, said: Callable[[str], str] = str, left: Any = lambda *_: True) -> None:
        self.said, self.left = said, left

    def __enter__(self) -> "Reported":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._forget()
            return
        if isinstance(error, click.exceptions.Exit):
            sys.exit(error.exit_code)
        if isinstance(error, SystemExit):
            return
        if isinstance(error, click.UsageError) and error.ctx and "run_dir" in error.ctx.params:
            self.stage, self.run_dir = error.ctx.info_name, error.ctx.params["run_dir"]
        known = classify(error)
        if known is None:
            traceback.print_exception(error)
        elif isinstance(known, StageError):
            self._say(known)
        else:
            known.show()
        sys.exit(self._record(known, error))

    def last_words(self, error: StageError) -> int:
        """Say and record an end that cannot wait for the work to stop; its exit code."""
        known = self.attempt.ended(error) if self.attempt else error
        assert isinstance(known, StageError)
        self._say(known)
        return self._record(known, error)

    def _say(self, error: StageError) -> None:
        prefix = f"{self.stage}: " if self.stage else ""
        message = self.said(error.format_message())
        click.echo(f"{prefix}{message} [exit {error.exit_code}]", err=True)

    def _record(self, known: click.ClickException | None, error: BaseException) -> int:
        row = endings.ending(getattr(known, "slug", "usage" if known else "fault"))
        record: dict[str, Any] = {
            "stage": self.stage,
            "exit": row.code,
            "code": row.slug,
            "retryable": row.retry,
            "message": self.said(
                known.format_message() if known else f"{type(error).__name__}: {error}"
            ),
            "hint": row.hint,
            "attempt": self.attempt.number if self.attempt else None,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        } | getattr(known, "facts", {})
        notes.tell(TERMINATION_LOG, record, TERMINATION_BYTES)
        beside = self.left(self.rank, record)
        if beside and self.run_dir and self.run_dir.is_dir() and not isinstance(known, InUse):
            try:
                notes.write(self.run_dir / ERROR, record)
            except OSError as cause:  # the volume may be the very thing that failed
                click.echo(f"{ERROR} could not be written: {cause}", err=True)
        return row.code

    def _forget(self) -> None:
        """Remove what was recorded of an earlier end of the same stage, which has now been mended."""
        path = self.run_dir / ERROR if self.run_dir else None
        with contextlib.suppress(OSError):
            if path and (notes.read(path) or {}).get("stage") == self.stage:
                path.unlink(missing_ok=True)
