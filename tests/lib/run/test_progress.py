"""What a stage shows: on terminals of any width, as JSON lines elsewhere, and how long it says it will take."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyte
import pytest

from stages.lib.run import progress
from stages.lib.run.progress import Progress, phase

FIGURES = {
    "loss": 1.23456, "held_out_loss": 1.30121, "learning_rate": 2e-4, "grad_norm": 0.4,
    "tokens_per_second": 29123.4, "ceiling_share": 0.523,
}  # fmt: skip
WORK = f"""
import sys
from stages.lib.run import progress
progress.start("train")
progress.say("preset env/llama2-7b.env")
def until(word):
    assert sys.stdin.readline().strip() == word
with progress.phase("loading"):
    until("loaded")
    with progress.phase("compiling"):
        until("compiled")
with progress.Progress(1200, "steps", 100, "training", lambda: 3723.0) as steps:
    until("step")
    progress.measure(lambda: 41017769984)
    steps.update(112, **{FIGURES})
    until("say")
    progress.say("going on " + 30 * "and on ")
    until("evaluate")
    steps.become("evaluating")
    until("end")
    steps.update(1200)
print("results")
"""


class Terminal:
    """A program on a terminal, and what stands on the screen."""

    def __init__(self, columns: int) -> None:
        self.ours, theirs = pty.openpty()
        self.screen = pyte.Screen(columns, 12)
        self.stream = pyte.ByteStream(self.screen)
        self.resize(columns)
        command = [sys.executable, "-c", WORK]
        env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, text=True,
            env=env | {"TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(theirs)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", 12, columns, 0, 0))
        self.screen.resize(12, columns)

    def tell(self, word: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def shows(self, pattern: str) -> list[str]:
        """The lines of the screen, as soon as they match."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            lines = [line.rstrip() for line in self.screen.display]
            if re.search(pattern, "\n".join(lines), re.M):
                return [line for line in lines if line]
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    self.stream.feed(os.read(self.ours, 4096))
                except OSError:
                    break
        raise AssertionError("\n".join([pattern, *self.screen.display]))


@contextmanager
def terminal(columns: int) -> Iterator[Terminal]:
    found = Terminal(columns)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()
        os.close(found.ours)


def test_a_terminal_of_80_columns_that_is_resized() -> None:
    with terminal(80) as one:
        first = "train: preset env/llama2-7b.env"
        assert one.shows("loading 0:0")[0] == first
        one.tell("loaded")
        assert len(one.shows("train: compiling 0:0")) == 2
        one.tell("compiled")
        lines = one.shows("100/1,200")
        assert re.fullmatch(r"train: training  100/1,200 steps [━╸╺ ]+ 1:02:03 left", lines[1])
        one.tell("step")
        lines = one.shows("loss")
        assert lines[0] == first
        assert lines[1].startswith("train: training  112/1,200 steps ")
        assert lines[2] == (
            "  loss 1.235  held-out 1.301  29.1k tok/s  52% of peak  38.2 GiB  lr 0.0002"
        )
        one.resize(44)
        lines = one.shows(r"held-out 1.301$|29.1k tok/s$")
        assert max(map(len, lines)) <= 44
        assert one.shows(r"^training  112/1,200 steps  1:02:03 left\n  loss 1.235  held-out 1.301")
        one.resize(120)
        lines = one.shows("lr 0.0002")
        assert lines[-1].startswith("  loss 1.235")
        assert sum("112/1,200" in line for line in lines) == 1, lines
        one.tell("say")
        lines = one.shows(r"and on (?s:.*)lr 0.0002")
        assert sum("112/1,200" in line for line in lines) == 1, lines
        one.tell("evaluate")
        one.shows("train: evaluating")
        one.tell("end")
        lines = one.shows("results")
        assert lines[-1] == "results"
        assert "1,200/1,200" in lines[-3]
        assert sum("loss" in line for line in lines) == 1, lines
        assert not one.screen.cursor.hidden


def test_a_very_narrow_terminal_loses_figures_and_not_lines() -> None:
    with terminal(26) as one:
        one.tell("loaded")
        one.tell("compiled")
        one.tell("step")
        lines = one.shows("loss")
        assert lines[-1] == "  loss 1.235"
        assert lines[-2] == "training  112/1,200 steps"


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_elsewhere_lines_have_the_same_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.start("train")
    monkeypatch.setattr(progress, "_spoke", time.monotonic())
    with Progress(8, "steps", name="training") as steps:
        steps.update(1, **FIGURES)
        steps.update(2)
        assert lines(capsys) == []  # nothing is said before a few seconds are over
        monkeypatch.setattr(progress, "_spoke", 0.0)
        steps.update(3)
        with phase("saving"):
            pass
    first, last = lines(capsys)[0], lines(capsys)
    assert last == []  # all was said
    assert first.items() >= {
        "stage": "train", "event": "progress", "phase": "training", "unit": "steps", "done": 3, "total": 8,
        "loss": 1.2346, "held_out_loss": 1.3012, "learning_rate": 2e-4, "ceiling_share": 0.523,
        "tokens_per_second": 29123.0,
    }.items()  # fmt: skip
    assert first["rss_bytes"] > 1e6
    assert first["eta_seconds"] >= 0


def test_a_loop_s_first_round_is_not_taken_for_its_pace() -> None:
    """It compiles; and what an attempt before this one did took no time."""
    with Progress(100, "prompts") as prompts:
        time.sleep(0.3)
        assert prompts.counted()["eta_seconds"] is None
        prompts.update(10, tokens=0)
        assert prompts.counted()["eta_seconds"] is None
        time.sleep(0.1)
        prompts.update(20, tokens=1000)
        prompts.skip(30)
        found = prompts.counted()
        assert found["done"] == 50
        assert found["eta_seconds"] == pytest.approx(50 * 0.01, rel=0.5)
        assert found["tokens_per_second"] == pytest.approx(10_000, rel=0.5)
        prompts.update(100)
        assert prompts.counted()["eta_seconds"] == 0


def test_what_takes_long_is_told_of_and_what_does_not_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.start("train")
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.1)
    monkeypatch.setattr(progress, "_ticking", None)
    with phase("loading"):
        pass
    with phase("compiling"):
        time.sleep(0.5)
    found = lines(capsys)
    assert [line["phase"] for line in found] == ["compiling"]
    assert found[0]["phase_seconds"] >= 0.1
