"""One writer at a time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.run import lease, preemption
from stages.lib.run.exits import InUse, TryAgain

HOLD = """
import sys, time
from pathlib import Path
from stages.lib.run import lease
with lease.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that holds the run directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_writer_is_told_who_holds_it(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    with pytest.raises(TryAgain, match=f"process {other.pid} on {socket.gethostname()}") as caught:
        lease.held(tmp_path).__enter__()
    assert caught.value.exit_code == 75
    assert (tmp_path / lease.HOLDER).is_file()


def test_a_dead_holder_on_this_host_is_replaced_at_once(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    began = time.monotonic()
    with lease.held(tmp_path):
        assert json.loads((tmp_path / lease.HOLDER).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 1
    assert not (tmp_path / lease.HOLDER).exists()


@pytest.mark.parametrize("moves", [True, False])
def test_a_holder_elsewhere_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 2.0)
    holder = {"host": "elsewhere", "boot": "b", "pid": 1, "started": "then", "beat": 0}
    path = tmp_path / lease.HOLDER
    path.write_text(json.dumps(holder))
    if moves:
        import threading

        timer = threading.Timer(1.2, lambda: path.write_text(json.dumps(holder | {"beat": 1})))
        timer.start()
        with pytest.raises(TryAgain, match="elsewhere"):
            lease.held(tmp_path).__enter__()
    else:
        with lease.held(tmp_path):
            assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_of_two_that_find_the_same_holder_dead_one_goes_on(tmp_path: Path) -> None:
    dead = {"host": socket.gethostname(), "boot": "another", "pid": 1, "started": "then", "beat": 0}
    (tmp_path / lease.HOLDER).write_text(json.dumps(dead))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD.replace("sleep(60)", "sleep(2)"), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in processes]
    assert said.count("held\n") == 1
    assert not (tmp_path / lease.HOLDER).exists()


def test_who_was_taken_for_dead_publishes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    preemption.listen()
    with lease.held(tmp_path) as check:
        check()
        other = json.loads((tmp_path / lease.HOLDER).read_text()) | {"host": "elsewhere"}
        (tmp_path / lease.HOLDER).write_text(json.dumps(other))
        with pytest.raises(InUse, match="elsewhere"):
            check()
        time.sleep(0.5)
        with pytest.raises(TryAgain, match="elsewhere"):
            preemption.check()
    preemption.listen()
    assert json.loads((tmp_path / lease.HOLDER).read_text())["host"] == "elsewhere"
