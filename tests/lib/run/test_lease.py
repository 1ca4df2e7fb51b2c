"""One writer at a time."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.lib.run import lease, preemption
from stages.lib.run.artifact import Draft
from stages.lib.run.exits import InUse, TryAgain
from stages.lib.run.growing import CHECK_SECONDS, Growing

HOLD = """
import sys, time
from pathlib import Path
from stages.lib.run import lease
with lease.held(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""
# It publishes until it is told to stop; its volume takes a tenth of a second for a file.
PUBLISH = """
import sys, time
from pathlib import Path
from stages.lib.run import artifact, lease, preemption
from stages.lib.run.exits import Reported
lease.BEAT_SECONDS = 0.2
class Own:
    def __init__(self, check): self.check_held = check
    def progressed(self): pass
source, number = Path(sys.argv[2]), 0
with Reported():
    preemption.listen()
    with lease.held(Path(sys.argv[1]), "train") as check:
        print("held", flush=True)
        while True:
            number += 1
            with preemption.deferred():
                artifact.publish(source, Path(sys.argv[1]) / f"step-{number}", {}, Own(check))
                time.sleep(0.1)
"""


def began(folder: Path, code: str = HOLD, *args: object) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the run directory."""
    process = began(tmp_path)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def listening() -> Iterator[None]:
    preemption.listen()
    yield
    preemption.listen()


def left_by(folder: Path, **changed: Any) -> Path:
    """The holder file of a process of this machine, or of one that differs in something."""
    path = folder / lease.HOLDER
    path.write_text(json.dumps(lease._own("train") | {"id": "left"} | changed))
    return path


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.case("A21")
def test_the_second_writer_is_told_who_holds_it(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    words = f"by train, process {other.pid} on {socket.gethostname()}"
    with pytest.raises(TryAgain, match=words) as caught:
        lease.held(tmp_path).__enter__()
    assert caught.value.exit_code == 75
    assert (tmp_path / lease.HOLDER).is_file()


@pytest.mark.case("A22")
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


@pytest.mark.case("A22")
@pytest.mark.parametrize("pid", [os.getppid(), os.getpid()], ids=["another", "own"])
def test_a_process_that_has_a_dead_ones_number_is_not_it(tmp_path: Path, pid: int) -> None:
    """As after a restart of a container, or once the numbers have gone round."""
    left_by(tmp_path, pid=pid, ticks=7)
    began = time.monotonic()
    with lease.held(tmp_path):
        pass
    assert time.monotonic() - began < 1
    left_by(tmp_path, pid=pid, ticks=lease._ticks(pid))
    with pytest.raises(InUse, match=f"process {pid} "):
        lease.held(tmp_path).__enter__()


@pytest.mark.case("A22")
@pytest.mark.parametrize(
    ("place", "moves"), [("host", True), ("host", False), ("boot", False), ("space", False)]
)
def test_a_holder_elsewhere_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, moves: bool
) -> None:
    """Even of the same host's name: its process numbers say nothing here."""
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.5)
    path = left_by(tmp_path, **{place: "elsewhere"}, pid=dead_pid())
    if moves:
        moved = json.loads(path.read_text()) | {"beat": 1}
        threading.Timer(0.5, lambda: path.write_text(json.dumps(moved))).start()
        with pytest.raises(TryAgain, match="train, process"):
            lease.held(tmp_path).__enter__()
    else:
        began = time.monotonic()
        with lease.held(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert time.monotonic() - began > 1.5


def test_of_two_that_find_the_same_holder_dead_one_goes_on(tmp_path: Path) -> None:
    left_by(tmp_path, pid=dead_pid())
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


class Own:
    """Who writes as long as `check` lets it."""

    def __init__(self, check: Any) -> None:
        self.check_held = check

    def progressed(self) -> None:
        pass


def taken_over(folder: Path) -> None:
    path = folder / lease.HOLDER
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere", "id": "new"}))


def taken_over_while(folder: Path, work: Any, *args: Any) -> None:
    taken_over(folder)
    work(*args)


@pytest.mark.case("A23")
def test_who_was_taken_for_dead_publishes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: None
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    with preemption.deferred(), lease.held(tmp_path, "train") as check:
        check()
        taken_over(tmp_path)
        with pytest.raises(InUse, match="elsewhere"):
            check()
        time.sleep(0.5)
        with pytest.raises(InUse, match="elsewhere"):
            preemption.check()
    assert json.loads((tmp_path / lease.HOLDER).read_text())["host"] == "elsewhere"


@pytest.mark.case("A23")
def test_it_is_stopped_where_nothing_polls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: None
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    began = time.monotonic()
    with lease.held(tmp_path), pytest.raises(InUse, match="elsewhere"):
        taken_over_while(tmp_path, time.sleep, 20)
    assert time.monotonic() - began < 5


@pytest.mark.case("A23")
def test_neither_a_file_nor_a_line_nor_a_manifest_is_written_into_anothers_run(
    tmp_path: Path,
) -> None:
    """And what the other one has there by now is left alone."""
    (tmp_path / "one").write_text("1")
    made_from: dict[str, Any] = {"inputs": {}, "settings": {}}
    with (
        lease.held(tmp_path) as check,
        Draft(tmp_path / "drafted", Own(check)) as draft,
        Growing(tmp_path / "grown", "lines", made_from, False, Own(check)) as grown,
    ):
        draft.take(tmp_path / "one")
        grown.add({"n": 1})
        time.sleep(CHECK_SECONDS + 0.1)
        with pytest.raises(InUse):
            taken_over_while(tmp_path, draft.take, tmp_path / "one", "two")
        for write in (lambda: draft.finish({}), lambda: grown.add({"n": 2}), draft.__enter__):
            with pytest.raises(InUse):
                write()
        (tmp_path / "drafted" / "theirs").touch()
    assert sorted(path.name for path in (tmp_path / "drafted").iterdir()) == [
        "draft.json",
        "one",
        "theirs",
    ]
    assert (tmp_path / "grown" / "lines").read_text() == '{"n": 1}\n'


@pytest.mark.case("A23")
def test_a_process_that_wakes_up_after_a_takeover_stops_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x" * 1000)
    run = tmp_path / "run"
    run.mkdir()
    process = began(run, PUBLISH, tmp_path / "source")
    while not (run / "step-2" / "manifest.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with lease.held(run, "train"):
        there = sorted(path.name for path in run.iterdir())
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 75, said
        assert "on elsewhere" in said
        assert sorted(path.name for path in run.iterdir()) == there
        assert json.loads((run / lease.HOLDER).read_text())["host"] == "elsewhere"
