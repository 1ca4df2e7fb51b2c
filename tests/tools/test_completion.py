"""Completion, in the shells themselves: a person types, and presses the tabulator."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Stages, clean_environment, run_stages

SHELLS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}


def needs(shell: str) -> str:
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell} here; apt-get install {shell}")
    return shell


class Terminal:
    """A shell on a terminal, which has sourced the script of `completion`."""

    def __init__(self, shell: str, folder: Path) -> None:
        script = folder / f"completion.{shell}"
        script.write_text(run_stages(folder, "completion", shell).stdout)
        (folder / "env").mkdir()
        for name in ("mine.env", "secrets.env", "tiny.env"):
            (folder / "env" / name).touch()
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "unlike.txt").touch()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = clean_environment(folder) | {"PATH": path, "TERM": "dumb", "ZDOTDIR": str(folder)}
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [shell, *SHELLS[shell]], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
            env=env, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        # zsh asks about folders of others otherwise.
        ready = "autoload -Uz compinit && compinit -u; " if shell == "zsh" else ""
        os.write(self.ours, f"{ready}source {script}; echo re''ady\n".encode())
        self.until("ready")

    def until(self, word: str) -> str:
        said, deadline = "", time.monotonic() + 30
        while word not in said.replace("\r", ""):
            assert select.select([self.ours], [], [], max(deadline - time.monotonic(), 0))[0], said
            said += os.read(self.ours, 65536).decode(errors="replace")
        return said

    def completed(self, line: str) -> str:
        """What becomes of a line behind which the tabulator is pressed."""
        os.write(self.ours, f"{line}\t".encode())
        time.sleep(0.6)
        os.write(self.ours, b"\x01echo '[''\x05'']'\n")  # the beginning of the line, and its end
        said = self.until("]\n").replace("\r", "").replace("\x08", "")
        return said.rpartition("\n[")[2].partition("]\n")[0].strip()


@pytest.fixture(params=["bash", "zsh"])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    found = Terminal(needs(request.param), tmp_path)
    yield found
    found.process.kill()
    found.process.wait()
    os.close(found.ours)


def test_a_line_is_completed_on_a_terminal(terminal: Terminal) -> None:
    for typed, wanted in {
        "python -m stages prep": "python -m stages prepare-data",
        ".venv/bin/python -m stages train --base-pre": ".venv/bin/python -m stages train --base-precision",
        "python -m stages train --base-precision in": "python -m stages train --base-precision int8",
        "python -m stages --env-file env/m": "python -m stages --env-file env/mine.env",
        "python -m stages --env-file env/mine.env train --optimizer pa": (
            "python -m stages --env-file env/mine.env train --optimizer paged_adamw_8bit"
        ),
        "python -m stages runs unl": "python -m stages runs unlike.txt",
        "python unl": "python unlike.txt",  # all else as before
        "ls unl": "ls unlike.txt",
    }.items():
        assert terminal.completed(typed) == wanted


def test_fish_completes_a_line(stages: Stages, tmp_path: Path) -> None:
    script = tmp_path / "completion.fish"
    script.write_text(stages("completion", needs("fish")).stdout)
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine.env").touch()
    (tmp_path / "unlike.txt").touch()
    env = clean_environment(tmp_path) | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path),
    }  # fmt: skip
    for typed, wanted in {
        "python -m stages prep": ["prepare-data"],
        f"{sys.executable} -m stages train --base-pre": ["--base-precision"],
        "python -m stages train --base-precision in": ["int8"],
        "python -m stages --env-file env/m": ["env/mine.env"],
        "python -m stages runs unl": ["unlike.txt"],
        "ls unl": ["unlike.txt"],
    }.items():
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {script}; complete -C '{typed}'"],
            cwd=tmp_path, env=env, text=True, capture_output=True, check=True,
        )  # fmt: skip
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == wanted, typed


def test_every_command_and_no_secret_is_offered_at_once(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    for name in ("mine.env", "secrets.env"):
        (tmp_path / "env" / name).touch()

    def offered(words: str, number: int) -> list[str]:
        asked = {
            "COMP_WORDS": words,
            "COMP_CWORD": str(number),
            "_LORA_STAGES_COMPLETE": "bash_complete",
            "PYTHONPROFILEIMPORTTIME": "1",
        }
        done = stages(env=asked)
        assert done.returncode == 0, done.stderr
        assert not {" torch\n", " numpy\n"} & set(done.stderr.splitlines(keepends=True))
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    said = stages("--help").stdout.split("Commands:")[1].splitlines()
    assert offered("stages ", 1) == [line.split()[0] for line in said if line.strip()]
    assert offered("stages --env-file ", 2) == ["env/mine.env"]


def test_the_image_and_the_environment_have_the_scripts() -> None:
    for shell in ("bash", "zsh", "fish"):
        assert (ROOT / "stages" / "lib" / "run" / "shells" / f"completion.{shell}").is_file()
