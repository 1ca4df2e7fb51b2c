"""The command line in processes that begin with the libraries imported: what costs seconds is paid once."""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tests.conftest import clean_environment

SERVER = """
import json, os, resource, sys
from stages.lib.run import environment
environment.quiet_libraries()
environment.settle()
environment.keep_compiled()
BEFORE
from stages.__main__ import main, stages
dict(stages.commands)

def child(order):
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    for number, path in enumerate(order["files"]):
        how = os.O_RDWR if path.startswith("/dev/") else os.O_RDONLY if number == 0 else os.O_WRONLY
        os.dup2(os.open(path, how), number)
    # What is open there now, not what was when the server began.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    sys.argv = ["stages", *order["args"]]
    if order["handles"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["handles"], order["handles"]))
    try:
        main()
    except SystemExit as end:
        code = end.code
    else:
        code = 0
    sys.stdout.flush()
    os._exit(code or 0)

import gc
gc.freeze()  # else each command spends a quarter of a second on collecting what it inherited
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        child(json.loads(line))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
LIBRARIES = """
import peft, torch, transformers
from stages.lib.model import adapter, answer, load, training
"""
Result = subprocess.CompletedProcess[str]


class Forking:
    """Runs commands one after the other in `folder`."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self.server, self.folder = server, folder
        self.args: list[str] = []
        self.pid = 0

    def start(
        self, *args: object, terminal: str = "", stdin: str = "", handles: int = 0,
        cwd: Path | None = None, **env: str,
    ) -> int:  # fmt: skip
        """Start a command; its process id. `terminal`: a device to talk through, instead of files;
        `handles`: how many files it may have open; `cwd`: where, if not in `folder`."""
        self.end()
        files = [str(self.folder / name) for name in ("stdin", "stdout", "stderr")]
        for path in files:
            Path(path).write_text(stdin if path.endswith("stdin") else "")
        self.args = [str(arg) for arg in args]
        order = {"args": self.args, "env": env, "handles": handles} | {
            "cwd": str(cwd or self.folder)
        }
        self._write(order | {"files": [terminal] * 3 if terminal else files})
        self.pid = int(self._read())
        return self.pid

    def end(self) -> None:
        """Kill what a test that failed has left."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> Result:
        """The end of what was started."""
        code, self.pid = int(self._read()), 0
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return Result(self.args, code, out, err)

    def __call__(
        self,
        *args: object,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Result:
        """Run a command."""
        self.start(*args, stdin=stdin, cwd=cwd, **dict(env or {}))
        return self.wait()

    def _write(self, order: object) -> None:
        assert self.server.stdin
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()

    def _read(self) -> str:
        assert self.server.stdout
        return self.server.stdout.readline()


@contextmanager
def forking(
    folder: Path, *prefix: str, before: str = LIBRARIES, **others: str
) -> Iterator[Forking]:
    """A server for the commands that are run in `folder`; `before` is what it does once, for all of them;
    `others`: what libraries read when imported; `prefix` runs it."""
    env = clean_environment(folder) | {"OMP_NUM_THREADS": "1", "TERM": "xterm"} | others
    program = SERVER.replace("BEFORE", before)
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", program], env=env, cwd=folder, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:  # fmt: skip
        forked = Forking(server, folder)
        try:
            yield forked
        finally:
            forked.end()
            assert server.stdin
            server.stdin.close()


@cache
def _server() -> Forking:
    """One for all tests of this process; it ends with it."""
    made = forking(Path(tempfile.mkdtemp(prefix="forking-")))
    atexit.register(made.__exit__, None, None, None)
    return made.__enter__()


def run_forked(
    folder: Path,
    *args: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = "",
) -> Result:
    """As `conftest.run_stages`, without the seconds that the libraries take to be imported."""
    given = clean_environment(folder) | dict(env or {})
    return _server()(*args, stdin=stdin or "", env=given, cwd=cwd or folder)


def lines(path: Path) -> list[dict[str, object]]:
    """The whole lines of a JSONL file that may be growing."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_until(terminal: int, *words: str) -> str:
    """What a terminal shows, up to where it shows the last of some words, one after the other."""
    shown, found = "", 0
    for word in words:
        while (place := shown.find(word, found)) < 0:
            assert select.select([terminal], [], [], 30)[0], shown
            shown += os.read(terminal, 4096).decode(errors="replace")
        found = place + len(word)
    return shown
