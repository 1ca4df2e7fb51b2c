"""What makes no progress ends, and says where it stood."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.run.watchdog import FILE

WORK = """
import json, sys, threading, time
from pathlib import Path
from stages.lib.run import watchdog

folder, limit, patience = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
watchdog.RECORD_SECONDS = 1.0

def report(error):
    (folder / "told").write_text(error.message)
    return error.exit_code

def another_thread():
    time.sleep(60)

def where_it_hangs():
    time.sleep(60)

threading.Thread(target=another_thread, daemon=True).start()
with watchdog.watching(limit / 60, folder, report):
    if patience:
        watchdog.alive(patience)
    print("begun", flush=True)
    for _ in range(20):  # longer than the limit, but not in one piece
        time.sleep(limit / 10)
        watchdog.alive()
    print("worked", flush=True)
    if sys.argv[4] == "hang":
        where_it_hangs()
time.sleep(2 * limit)  # nobody watches any more
"""
LIMIT = 0.5


def begin(
    folder: Path, end: str, limit: float = LIMIT, patience: int = 1
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORK, str(folder), str(limit), str(patience), end]
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path.cwd()
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.case("E10")
def test_what_hangs_ends_with_75_and_the_stacks_of_all_threads(tmp_path: Path) -> None:
    process = begin(tmp_path, "hang")
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("worked\n", 75)
    for shown in (err, (tmp_path / FILE).read_text()):
        assert "where_it_hangs" in shown
        assert "another_thread" in shown
    message = (tmp_path / "told").read_text()
    assert message.startswith("nothing was finished for 0.008")
    assert f"{tmp_path / FILE}; the same command goes on" in message


@pytest.mark.case("E10")
def test_a_volume_that_hangs_too_does_not_keep_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)  # opened, it waits for a reader
    process = begin(tmp_path, "hang")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "where_it_hangs" in err


def test_what_works_is_left_alone_and_so_is_what_was_halted(tmp_path: Path) -> None:
    process = begin(tmp_path, "end")
    process.send_signal(signal.SIGSTOP)
    time.sleep(3 * LIMIT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=30) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "patience"), [(LIMIT, 0), (0, 1)])
def test_more_time_is_given_before_the_first_sign_and_all_of_it_with_0(
    tmp_path: Path, limit: float, patience: int
) -> None:
    process = begin(tmp_path, "hang", limit, patience)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4 * LIMIT)
    process.kill()
    process.communicate()
    assert not list(tmp_path.iterdir())
