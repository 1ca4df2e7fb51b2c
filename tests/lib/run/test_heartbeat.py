"""The heartbeat is there while a stage works, tells what it is about, and is what a probe looks at."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from stages.lib.run import heartbeat, progress
from stages.lib.run.attempts import Attempt
from stages.lib.run.heartbeat import FILE, Heartbeat
from stages.lib.run.progress import Progress

DOCS = Path(__file__).parents[3] / "docs" / "progress.md"


def alive(run_dir: Path) -> bool:
    """What the probe of the documents says."""
    (command,) = set(re.findall(r"^    (find .*)$", DOCS.read_text(), re.M))
    assert command == heartbeat.probe(2)
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"RUN_DIR": str(run_dir)}, check=False
    )
    return done.returncode == 0


def attempt(run_dir: Path) -> Attempt:
    return Attempt(run_dir, "train", {})


def test_a_stage_at_work_has_a_heartbeat_and_none_afterwards(tmp_path: Path) -> None:
    assert not alive(tmp_path)
    with attempt(tmp_path) as made, Heartbeat(made) as heart:
        with Progress(8, "steps", name="training") as steps:
            steps.update(3, loss=1.5)
            heart.beat()
            found = json.loads((tmp_path / FILE).read_text())
        assert alive(tmp_path)
        assert (found["stage"], found["attempt"], found["phase"]) == ("train", 1, "training")
        assert (found["done"], found["total"], found["unit"], found["loss"]) == (3, 8, "steps", 1.5)
        assert found["idle_seconds"] < 5
        before = time.time() - 180
        os.utime(tmp_path / FILE, (before, before))
        assert not alive(tmp_path)
        heart.beat()
        assert alive(tmp_path)
    heart.beat()  # of a thread that is late
    assert [path.name for path in tmp_path.iterdir()] == ["attempts"]


def test_the_heartbeat_of_whoever_took_over_stays(tmp_path: Path) -> None:
    with attempt(tmp_path) as one, Heartbeat(one), attempt(tmp_path) as other:
        later = Heartbeat(other).__enter__()
    assert json.loads((tmp_path / FILE).read_text())["attempt"] == other.number == 2
    later.__exit__()
    assert not (tmp_path / FILE).exists()


def test_work_goes_on_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).mkdir()
    with attempt(tmp_path) as made, Heartbeat(made) as heart:
        heart.beat()
    assert (tmp_path / FILE).is_dir()


def test_a_phase_is_told_of_too(tmp_path: Path) -> None:
    with attempt(tmp_path) as made, Heartbeat(made) as heart, progress.phase("loading"):
        heart.beat()
        found = json.loads((tmp_path / FILE).read_text())
    assert (found["phase"], found["done"], found["eta_seconds"]) == ("loading", None, None)
    assert found["rss_bytes"] > 1e6
