"""The chain: each stage in turn, the first code that is not 0, and signals passed on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment

# A package `stages` in whose place only this is found: it notes its arguments, and ends as it is told to.
STAND_IN = """\
import json, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
plan = json.loads((folder / "plan.json").read_text())
words = sys.argv[1:]
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\\n")
stage = next(word for word in words if word in plan)
if plan[stage] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "waiting").touch()
    time.sleep(60)
sys.exit(plan[stage])
"""
DRIVER = """\
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from stages.lib.jobs.chain import Chain
from stages.lib.jobs.order import CHAIN
limit = float(sys.argv[1]) if len(sys.argv) > 1 else None
sys.exit(Chain(Path("env/p.env"), limit).run(CHAIN))
"""
DONE = {"prepare-data": 0, "train": 0, "evaluate": 0, "merge": 0}


def start(folder: Path, plan: dict[str, int | str], *args: str) -> "subprocess.Popen[bytes]":
    """The chain in a folder where the stages are stand-ins."""
    (folder / "stages").mkdir()
    (folder / "stages" / "__main__.py").write_text(STAND_IN.format(folder=str(folder)))
    (folder / "plan.json").write_text(json.dumps(plan))
    surroundings = clean_environment(folder) | {"PYTHONPATH": str(folder)}
    driver = DRIVER.format(root=str(ROOT))
    return subprocess.Popen([sys.executable, "-c", driver, *args], cwd=folder, env=surroundings)


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("plan", "code", "ran"),
    [({}, 0, 4), ({"train": 65}, 65, 2), ({"merge": 82}, 82, 4), ({"train": 75}, 75, 2)],
)
def test_it_ends_with_the_first_code_that_is_not_0(
    plan: dict[str, int | str], code: int, ran: int, tmp_path: Path
) -> None:
    assert start(tmp_path, DONE | plan).wait(30) == code
    expected = [["--env-file", "env/p.env", stage] for stage in DONE]
    assert calls(tmp_path) == expected[:ran]


def test_a_signal_reaches_the_stage_and_ends_the_chain(tmp_path: Path) -> None:
    chain = start(tmp_path, DONE | {"train": "wait"})
    until = time.monotonic() + 20
    while not (tmp_path / "waiting").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    chain.send_signal(signal.SIGTERM)
    assert chain.wait(20) == 75
    assert [call[-1] for call in calls(tmp_path)] == ["prepare-data", "train"]


def test_the_limit_is_of_all_together(tmp_path: Path) -> None:
    assert start(tmp_path, DONE, "1000").wait(30) == 0
    left = [float(call[call.index("--max-runtime") + 1]) for call in calls(tmp_path)]
    assert 980 < left[-1] <= left[0] < 1000
