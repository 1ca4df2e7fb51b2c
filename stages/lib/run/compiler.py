"""The C compiler that Triton calls for the launcher of each kernel, on a GPU."""

import shutil
import sysconfig
from pathlib import Path

from stages.lib.run import environment
from stages.lib.run.checks import Check, failed
from stages.lib.run.exits import CannotRun

NEEDED = "which Triton needs for its kernels on a GPU"


def check() -> Check:
    """Whether Triton will find a compiler and Python's headers, looked for as it does."""
    named = (environment.given("CC"), "gcc", "clang")
    found = next(filter(None, map(shutil.which, named)), None)
    if not found:
        remedy = "install gcc and libc6-dev, or name one in CC"
        return failed("compiler", CannotRun, f"there is no C compiler, {NEEDED}", remedy)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        remedy = "install python3-dev"
        return failed("compiler", CannotRun, f"there is no {header}, {NEEDED}", remedy)
    return Check("compiler", found)
