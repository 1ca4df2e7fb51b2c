"""A run that saves checkpoints and does nothing else, so that it can be killed at every point of that."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from stages.lib.run import artifact, checkpoints, failpoints, lease, volume
from stages.lib.run.exits import StageError, from_os_error
from stages.lib.run.rundir import Run

STEPS = 6
LOSSES = (3.0, 1.0, 2.0, 2.5, 2.6, 2.7)  # the second is the best
END = [2, 5, 6]


def run_in(folder: Path) -> Run:
    ctx = click.Context(click.Command("train"), info_name="train")
    ctx.params = {"run_dir": folder, "force": False, "allow_stale": False, "verify": False}
    return Run(ctx)


def save(run: Run, scratch: Path, number: int) -> None:
    source = scratch / "checkpoint"
    source.mkdir()
    (source / "adapter_model.safetensors").write_bytes(bytes([number]) * 2000)
    (source / "optimizer.pt").write_bytes(bytes([number]) * 3000)
    checkpoints.save(run, source, number, LOSSES[number - 1], {}, {})


def go_on(folder: Path, to: int = STEPS) -> None:
    """From the newest checkpoint, if there is one."""
    run = run_in(folder)
    with run.work() as scratch:
        resumed = checkpoints.newest(run, {})
        if resumed:
            checkpoints.bring(resumed, scratch)
        for number in range(checkpoints.step(resumed) + 1 if resumed else 1, to + 1):
            save(run, scratch, number)


def attempt(folder: Path, points: str = "") -> int:
    """`go_on` in a process of its own; its exit code, as the command line has them."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            with _quick(folder, points):
                go_on(folder)
            code = 0
        except StageError as error:
            code = error.exit_code
        except OSError as error:
            known = from_os_error(error)
            code = known.exit_code if known else 70
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def _quick(folder: Path, points: str) -> Iterator[None]:
    os.environ |= {"FAILPOINTS": points, "SCRATCH_DIR": str(folder.parent / "scratch")}
    failpoints.arm()
    volume.RETRY_SECONDS, lease.SETTLE_SECONDS, checkpoints.SETTLE_SECONDS = (0.0, 0.0), 0.0, 0.0
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    yield


def verified(folder: Path) -> dict[int, str]:
    """The steps whose checkpoints are whole, every byte read, and what is in them."""
    found = {}
    for path in folder.glob("checkpoints/step-*"):
        made = artifact.load(path, deep=True)
        if made:
            found[checkpoints.step(made)] = made.digest
    return dict(sorted(found.items()))
